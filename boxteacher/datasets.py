"""The training and validation set of a configuration: files in COCO's format, or the built-in shapes."""

from __future__ import annotations

from .config import Config
from .data import CocoDataset, Geometry, image_loader, read_coco
from .shapes import load_shapes_image, make_shapes_coco


def make_train_set(cfg: Config) -> CocoDataset:
    """Images with boxes; true masks come along where there are any, to be learned from in mode condinst, and in the
    others only to measure the pseudo masks with."""
    geometry = Geometry(cfg.train_sizes, cfg.train_max_size, cfg.train_scales, cfg.crop, cfg.flip)
    if cfg.dataset == "shapes":
        seed = 2 * cfg.seed + 1  # odd seeds: training; 0: validation, the same for every run
        coco = make_shapes_coco(seed, cfg.shapes_train, cfg.shapes_size)
        load_image = load_shapes_image(seed, cfg.shapes_size)
    else:
        coco = read_coco(cfg.train_json, cfg.train_images)
        load_image = image_loader(cfg.train_images)
    return CocoDataset(
        coco,
        load_image,
        geometry,
        train=True,
        with_masks=True,
        mask_centers=cfg.mode == "condinst",
        bottom_rows=cfg.bottom_rows,
        seed=cfg.seed,
    )


def make_val_set(cfg: Config) -> CocoDataset:
    """All validation images at test size."""
    scales = (cfg.test_scale,) if cfg.test_scale else ()
    geometry = Geometry((cfg.test_size,), cfg.test_max_size, scales, crop=0, flip=False)
    if cfg.dataset == "shapes":
        coco = make_shapes_coco(0, cfg.shapes_val, cfg.shapes_size)
        load_image = load_shapes_image(0, cfg.shapes_size)
    else:
        coco = read_coco(cfg.val_json, cfg.val_images)
        load_image = image_loader(cfg.val_images)
    return CocoDataset(
        coco,
        load_image,
        geometry,
        train=False,
        with_masks=True,
        mask_centers=False,
        bottom_rows=0,
        seed=cfg.seed,
    )
