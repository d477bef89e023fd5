"""COCO-format data as batches.

    checked dict -> CocoDataset (load, resize, crop, flip) -> collate -> Batch

N images · G boxes of an image · h, w pixels of an image · H, W pixels of the padded images
H4, W4 the grid of stride 4 over the padded images

Boxes are xyxy in pixels of the resized image. Labels are 0..C-1 in the order of the category ids.
A sample's random choices depend on (seed, index, key) alone, not on the worker or the rank.
"""

from __future__ import annotations

import functools
import itertools
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .coco import DataError, check_size, explain, image_loader, read_coco
from .config import Config, ConfigError
from .shapes import load_shapes_image, make_shapes_coco
from .transforms import Geometry, View, draw_view, resized_size

# --- samples and batches --------------------------------------------------------------------------


class Sample(NamedTuple):
    """One image of a Batch, without any padding. The fields are the Batch's."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    centers: Tensor
    masks: Tensor | None
    has_mask: Tensor | None
    cut_rows: int
    image_id: int
    original_size: tuple[int, int]


class Batch(NamedTuple):
    """Images and what is known about them, padded to one size and one number of boxes."""

    images: Tensor  # uint8 [N, 3, H, W] RGB, zeros right and below; H and W multiples of 32
    sizes: list[tuple[int, int]]  # (h, w) of each image
    boxes: Tensor  # float32 [N, G, 4]; G is 8, 16, 32, ...
    labels: Tensor  # int64 [N, G]
    valid: Tensor  # bool [N, G]: which of the G are boxes
    centers: Tensor  # float32 [N, G, 2] (x, y) for center sampling: box center or mask centroid
    masks: Tensor | None  # bool [N, G, H4, W4]: true masks at [2::4, 2::4]
    has_mask: Tensor | None  # bool [N, G]: which boxes have a true mask
    cut_rows: list[int]  # bottom rows of each image that color similarity and affinity ignore
    image_ids: list[int]

    def to(self, device: torch.device | str) -> Batch:
        moved = [x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self]
        return Batch(*moved)


class CocoDataset(Dataset):
    """The images of a checked COCO dict, each seen through a View drawn from the geometry.

    Crowd annotations are dropped. Training leaves out images without a box. `notes` say how many.
    mask_centers (CondInst): every annotation has a mask, and `centers` are the masks' centroids.
    bottom_rows: see Batch.cut_rows, here of the original image. Items are indexed by (index, key),
    where the key makes the draw, or by a plain index. For tests the geometry must leave no choice:
    one size or scale, no crop, no flip.
    """

    def __init__(
        self,
        coco: dict,
        load_image: Callable[[dict], np.ndarray],
        geometry: Geometry,
        train: bool,
        mask_centers: bool = False,
        bottom_rows: int = 0,
        seed: int = 0,
    ) -> None:
        self.coco, self.load_image, self.geometry = coco, load_image, geometry
        self.mask_centers, self.bottom_rows, self.seed = mask_centers, bottom_rows, seed
        self.name = coco.get("json_path", "data")
        self.categories = sorted(coco["categories"], key=lambda category: category["id"])
        self.class_names = [category["name"] for category in self.categories]
        self.category_ids = [category["id"] for category in self.categories]

        # The annotations of each image that count.
        of_image: dict[int, list[dict]] = {image["id"]: [] for image in coco["images"]}
        for annotation in coco["annotations"]:
            if annotation.get("iscrowd") or min(annotation["bbox"][2:]) <= 0:
                continue
            if mask_centers and not annotation.get("segmentation"):
                raise DataError(
                    f"{self.name}: annotation id {annotation['id']}: field 'segmentation' is "
                    f"missing or empty; condinst needs masks: add it, or use boxteacher or boxinst"
                )
            of_image[annotation["image_id"]].append(annotation)
        self.images = [image for image in coco["images"] if of_image[image["id"]] or not train]
        self.annotations = [of_image[image["id"]] for image in self.images]
        self.notes = self._left_out() if train else []

        # Their boxes, xyxy within the image, and labels.
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self.boxes, self.labels = [], []
        for image, given in zip(self.images, self.annotations, strict=True):
            boxes = np.reshape([a["bbox"] for a in given], (-1, 4)).astype(float)
            boxes[:, 2:] += boxes[:, :2]
            self.boxes.append(boxes.clip(0, [image["width"], image["height"]] * 2))
            labels = [label_of[a["category_id"]] for a in given]
            self.labels.append(np.array(labels, dtype=np.int64))

    def _left_out(self) -> list[str]:
        if not self.images:
            raise DataError(f"{self.name}: field 'annotations': no image has a box to train on")
        empty = len(self.coco["images"]) - len(self.images)
        crowds = sum(bool(annotation.get("iscrowd")) for annotation in self.coco["annotations"])
        counts = ((empty, "images without a box"), (crowds, "crowd annotations"))
        return [f"{self.name}: training leaves out {n} {what}" for n, what in counts if n]

    def take_classes(self, names: Sequence[str], ids: Sequence[int], of: str) -> list[str]:
        """Number the labels as `of` does, whose classes have these names and category ids. Classes
        are the same if their names are. Returns a note if ids differ.

        Raises DataError, with the names, if a class is missing here or there.
        """
        of_name = {category["name"]: category for category in self.categories}
        lacks = {
            self.name: [name for name in names if name not in of_name],
            of: [name for name in of_name if name not in names],
        }
        if any(lacks.values()):
            missing = [f"{where} lacks {_some(found)}" for where, found in lacks.items() if found]
            raise DataError(f"{self.name} has other classes than {of}: {'; '.join(missing)}")
        label_of = np.array([names.index(name) for name in self.class_names])
        self.labels = [label_of[labels] for labels in self.labels]
        self.class_names, self.categories = list(names), [of_name[name] for name in names]
        self.category_ids = [category["id"] for category in self.categories]
        both = zip(names, self.category_ids, ids, strict=True)
        other = [f"{name} is {here}, there {there}" for name, here, there in both if here != there]
        what = f"{self.name}: its classes have other ids than in {of} and are matched by name"
        return [f"{what}: {_some(other)}"] if other else []

    def num_masks(self) -> str:
        """How many boxes have a true mask: "3 of 10"."""
        given = [bool(a.get("segmentation")) for of_image in self.annotations for a in of_image]
        return f"{sum(given)} of {len(given)}"

    def true_masks(self, index: int, size: tuple[int, int]) -> Iterator[Tensor]:
        """The true masks of image `index`, bool [h, w] of the whole image at `size`, one by one in
        the order of its boxes. A mask that is not annotated is empty."""
        image = self.images[index]
        view = View((image["height"], image["width"]), size, (0, 0, *size), flip=False)
        for annotation in self.annotations[index]:
            has_mask = bool(annotation.get("segmentation"))
            mask = self._mask(annotation, view) if has_mask else np.zeros(size, dtype=bool)
            yield torch.from_numpy(mask)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> Sample:
        # Load the image, and draw the view on it.
        index, key = item if isinstance(item, tuple) else (item, 0)
        entry, image = self.images[index], self.load_image(self.images[index])
        check_size(image, entry, self.name)
        original = (entry["height"], entry["width"])
        rng = np.random.default_rng((self.seed, index, key))
        view = draw_view(self.geometry, original, self.boxes[index], rng)

        # Boxes that can be seen, with their centers and masks.
        boxes, kept = view.boxes(self.boxes[index])
        boxes = boxes[kept]
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        annotations = list(itertools.compress(self.annotations[index], kept))
        masks = self._masks(annotations, view, centers)

        # How many of the view's rows are among the bottom rows of the image.
        top, _, height, _ = view.window
        first_cut_row = view.resized[0] - int(self.bottom_rows * view.resized[0] / original[0])
        return Sample(
            image=torch.from_numpy(np.copy(view.image(image).transpose(2, 0, 1))),
            boxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(self.labels[index][kept]),
            centers=torch.from_numpy(centers).float(),
            masks=masks,
            has_mask=torch.tensor([bool(a.get("segmentation")) for a in annotations]).bool(),
            cut_rows=min(max(top + height - first_cut_row, 0), height),
            image_id=entry["id"],
            original_size=original,
        )

    def _masks(self, annotations: list[dict], view: View, centers: np.ndarray) -> Tensor:
        """bool [G, h/4, w/4]: [2::4, 2::4] of each mask, off where an annotation has none. With
        mask_centers, the masks' centroids replace `centers`."""
        masks = [np.zeros(view.window[2:], dtype=bool)[2::4, 2::4]] * len(annotations)
        for g, annotation in enumerate(annotations):
            if not annotation.get("segmentation"):
                continue
            mask = self._mask(annotation, view)
            masks[g] = mask[2::4, 2::4]
            if self.mask_centers and mask.any():
                centers[g] = [indices.mean() for indices in reversed(mask.nonzero())]  # x, y
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, 0, 0).bool()

    def _mask(self, annotation: dict, view: View) -> np.ndarray:
        what = f"{self.name}: annotation id {annotation['id']}: field 'segmentation'"
        with explain(what, "correct it, or remove it to use the box alone"):
            return view.mask(annotation["segmentation"])


def _some(words: list[str]) -> str:
    return ", ".join(words[:5]) + ", ..." * (len(words) > 5)


def collate(samples: list[Sample]) -> Batch:
    """Pad to the largest image, rounded up to 32, and to 8, 16, 32, ... boxes."""
    # The padded sizes.
    height, width = (-(-max(s.image.shape[d] for s in samples) // 32) * 32 for d in (1, 2))
    counts = torch.tensor([len(s.boxes) for s in samples])
    slots = max(8, 1 << (int(counts.max()) - 1).bit_length())

    def stack(name: str, *shape: int) -> Tensor:  # a field of all samples, zeros behind each
        tensors = [getattr(sample, name) for sample in samples]
        stacked = tensors[0].new_zeros(len(samples), *shape)
        for row, tensor in zip(stacked, tensors, strict=True):
            row[tuple(slice(n) for n in tensor.shape)] = tensor
        return stacked

    with_masks = samples[0].masks is not None
    return Batch(
        images=stack("image", 3, height, width),
        sizes=[(s.image.shape[1], s.image.shape[2]) for s in samples],
        boxes=stack("boxes", slots, 4),
        labels=stack("labels", slots),
        valid=torch.arange(slots) < counts[:, None],
        centers=stack("centers", slots, 2),
        masks=stack("masks", slots, height // 4, width // 4) if with_masks else None,
        has_mask=stack("has_mask", slots) if with_masks else None,
        cut_rows=[s.cut_rows for s in samples],
        image_ids=[s.image_id for s in samples],
    )


# --- loaders --------------------------------------------------------------------------------------


def make_train_loader(
    dataset: CocoDataset, cfg: Config, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> StepLoader:
    """Yields, for each step from start_step to cfg.steps - 1, the list of the rank's
    `cfg.accumulate` Batches, its parts. Images are grouped by aspect, unless a crop makes them all
    one size."""
    is_wide = [cfg.crop > 0 or image["width"] >= image["height"] for image in dataset.images]
    order = train_order(is_wide, cfg, start_step, rank, world_size)
    batches = make_loader(dataset, order, cfg.workers, collate)
    return StepLoader(batches, max(cfg.steps - start_step, 0), cfg.accumulate)


class StepLoader:
    """The batches of a loader in lists, one for each step. It can be read once."""

    def __init__(self, batches: DataLoader, steps: int, parts: int) -> None:
        self.batches, self.steps, self.parts = batches, steps, parts

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self.batches)
        for _ in range(self.steps):
            yield [next(batches) for _ in range(self.parts)]


def train_order(
    is_wide: list[bool], cfg: Config, start_step: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """The (index, key) of the rank's images, one list for each part of each step.

    Endless shuffles are cut into global batches, which are all wide or all tall. The key is the
    image's position in the run. So images and their draws depend on the seed and the step alone,
    if the global batch is of equal size.
    """
    size = cfg.batch_size // (world_size * cfg.accumulate)  # images of a part
    run = _global_batches(is_wide, cfg.batch_size, cfg.seed)
    for batch in itertools.islice(run, start_step, cfg.steps):
        for part in range(rank * cfg.accumulate, (rank + 1) * cfg.accumulate):
            yield batch[part * size : (part + 1) * size]


def _global_batches(is_wide: list[bool], size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    positions, waiting = itertools.count(), {True: [], False: []}
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch))
        for index in rng.permutation(len(is_wide)).tolist():
            group = waiting[is_wide[index]]
            group.append(index)
            if len(group) == size:
                yield [(index, next(positions)) for index in group]
                group.clear()


def make_test_loader(dataset: CocoDataset, rank: int, world_size: int, workers: int) -> DataLoader:
    """Yields (Batch of one image, its original (height, width)) for images rank::world_size."""
    order = [[index] for index in range(rank, len(dataset), world_size)]
    return make_loader(dataset, order, workers, _collate_test)


def _collate_test(samples: list[Sample]) -> tuple[Batch, tuple[int, int]]:
    return collate(samples), samples[0].original_size


def make_loader(
    dataset: CocoDataset, order: Iterable, workers: int, collate_fn: Callable
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, or each pass would move torch's global one
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(_: int) -> None:
    """Ctrl-C, Slurm and torchrun signal all processes of a run. The main one goes on until it is
    saved, so its workers must, too: for a minute at most."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def check_batch_norm(dataset: CocoDataset, cfg: Config, world_size: int) -> None:
    """Raise ConfigError if a batch norm of stride 32 may see one value of each channel: one image
    of up to 32 pixels. It cannot be trained with that."""
    norms = {"--norm gn": cfg.norm, "--mask-norm gn": cfg.mask_norm}
    norms = [remedy for remedy, norm in norms.items() if norm == "bn"]
    if not norms or cfg.batch_size > world_size * cfg.accumulate:
        return
    geometry = dataset.geometry
    for height, width in {(image["height"], image["width"]) for image in dataset.images}:
        for short, factor in itertools.product(geometry.sizes, geometry.scales or (0.0,)):
            size = resized_size(height, width, short, geometry.max_size, factor)
            if min(max(size), geometry.crop or math.inf) <= 32:
                raise ConfigError(
                    f"batch norm cannot learn from one image of {size[1]}x{size[0]} pixels at a"
                    f" time: use {' '.join(norms)}, or more than one image per process and part"
                )


# --- the data sets of a configuration -------------------------------------------------------------


def make_train_set(cfg: Config) -> CocoDataset:
    """Images with boxes. Mode condinst learns from their true masks. The other modes compare pseudo
    masks with them, where there are any."""
    if cfg.dataset == "shapes":
        seed = 2 * cfg.seed + 1  # odd, since 0 is the validation set of every run
        coco = make_shapes_coco(seed, cfg.shapes_train, cfg.shapes_size) | {"json_path": "shapes"}
        paint = load_shapes_image(seed, cfg.shapes_size)
        # Painted once: a small run sees each image often, and painting costs as much as training.
        load_image = functools.partial(_kept, [paint(entry) for entry in coco["images"]])
    else:
        coco = read_coco(cfg.train_json, cfg.train_images)
        load_image = image_loader(cfg.train_images, cfg.contrast)
    return CocoDataset(
        coco,
        load_image,
        Geometry(cfg.train_sizes, cfg.train_max_size, cfg.train_scales, cfg.crop, cfg.flip),
        train=True,
        mask_centers=cfg.mode == "condinst",
        bottom_rows=cfg.bottom_rows,
        seed=cfg.seed,
    )


def _kept(images: list[np.ndarray], entry: dict) -> np.ndarray:
    return images[entry["id"] - 1]


def make_val_set(cfg: Config) -> CocoDataset:
    """All validation images at test size."""
    if cfg.dataset == "shapes":
        coco = make_shapes_coco(0, cfg.shapes_val, cfg.shapes_size) | {"json_path": "shapes"}
        load_image = load_shapes_image(0, cfg.shapes_size)
    else:
        coco = read_coco(cfg.val_json, cfg.val_images)
        load_image = image_loader(cfg.val_images, cfg.contrast)
    scales = (cfg.test_scale,) if cfg.test_scale else ()
    geometry = Geometry((cfg.test_size,), cfg.test_max_size, scales)
    return CocoDataset(coco, load_image, geometry, train=False)
