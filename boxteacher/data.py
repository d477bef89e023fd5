"""COCO-format data as batches.

    checked dict -> CocoDataset (load, crop, resize, flip) -> collate -> Batch

N images · G boxes of an image · H, W the padded images · h, w an image without its padding
Boxes are xyxy in pixels of the resized image; labels are 0..C-1 in the order of the category ids.
All chance in a sample comes from a key that travels with its index, never from worker or rank.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .coco import DataError, check_size, explain, image_loader, read_coco
from .config import Config
from .shapes import load_shapes_image, make_shapes_coco
from .transforms import Geometry, View, draw_view

# --- samples and batches --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One image of a Batch without any padding; the fields are the Batch's."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    centers: Tensor
    masks: Tensor | None
    has_mask: Tensor | None
    cut_rows: int
    image_id: int
    original_size: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    images: Tensor  # uint8 [N, 3, H, W] RGB, zeros right and below; H and W multiples of 32
    sizes: list[tuple[int, int]]  # (h, w) of each image
    boxes: Tensor  # float32 [N, G, 4]; G is 8, 16, 32, ...
    labels: Tensor  # int64 [N, G]
    valid: Tensor  # bool [N, G]: which of the G are boxes
    centers: Tensor  # float32 [N, G, 2] (x, y) for center sampling: box center or mask centroid
    masks: Tensor | None  # bool [N, G, H/4, W/4]: true masks at [2::4, 2::4]
    has_mask: Tensor | None  # bool [N, G]: which boxes have a true mask
    cut_rows: list[int]  # bottom rows of each image that color similarity takes for outside
    image_ids: list[int]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:  # the DataLoader looks for this name
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **{name: function(t) for name, t in tensors.items()})


class CocoDataset(Dataset):
    """The images of a checked COCO dict, each seen through a View drawn from the geometry.

    Crowd annotations are dropped; training leaves out images without a box; `notes` say how many.
    with_masks: true masks, where annotations have them. mask_centers (CondInst): all have them,
    and `centers` are their centroids. bottom_rows: see Batch.cut_rows, here of the original image.
    Items are indexed by (index, key), the key making the draw, or by a plain index. Testing wants
    a geometry that leaves no choice: one size or scale, no crop, no flip.
    """

    def __init__(
        self,
        coco: dict,
        load_image: Callable[[dict], np.ndarray],
        geometry: Geometry,
        train: bool,
        with_masks: bool,
        mask_centers: bool,
        bottom_rows: int,
        seed: int,
    ) -> None:
        self.coco, self.load_image, self.geometry = coco, load_image, geometry
        self.mask_centers, self.bottom_rows, self.seed = mask_centers, bottom_rows, seed
        self.name = coco.get("json_path", "data")
        self.categories = sorted(coco["categories"], key=lambda category: category["id"])
        self.class_names = [category["name"] for category in self.categories]
        self.category_ids = [category["id"] for category in self.categories]

        of_image: dict[int, list[dict]] = {image["id"]: [] for image in coco["images"]}
        for annotation in coco["annotations"]:
            if annotation.get("iscrowd") or min(annotation["bbox"][2:]) <= 0:
                continue
            if with_masks and mask_centers and not annotation.get("segmentation"):
                raise DataError(
                    f"{self.name}: annotation id {annotation['id']}: field 'segmentation' is "
                    f"missing or empty; condinst needs masks: add it, or use boxteacher or boxinst"
                )
            of_image[annotation["image_id"]].append(annotation)
        self.images = [image for image in coco["images"] if of_image[image["id"]] or not train]
        self.notes = self._left_out() if train else []

        # Arrays, since Python objects that a worker touches are copied into it, one by one.
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self.boxes, self.labels = [], []
        for image in self.images:
            annotations = of_image[image["id"]]
            boxes = np.reshape([a["bbox"] for a in annotations], (-1, 4)).astype(float)
            boxes[:, 2:] += boxes[:, :2]
            self.boxes.append(boxes.clip(0, [image["width"], image["height"]] * 2))
            labels = [label_of[a["category_id"]] for a in annotations]
            self.labels.append(np.array(labels, dtype=np.int64))
        self.annotations = [of_image[i["id"]] for i in self.images] if with_masks else None

    def _left_out(self) -> list[str]:
        if not self.images:
            raise DataError(f"{self.name}: field 'annotations': no image has a box to train on")
        empty = len(self.coco["images"]) - len(self.images)
        crowds = sum(bool(annotation.get("iscrowd")) for annotation in self.coco["annotations"])
        counts = ((empty, "images without a box"), (crowds, "crowd annotations"))
        return [f"{self.name}: training leaves out {n} {what}" for n, what in counts if n]

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
        index, key = item if isinstance(item, tuple) else (item, 0)
        entry, image = self.images[index], self.load_image(self.images[index])
        check_size(image, entry, self.name)
        original = (entry["height"], entry["width"])
        rng = np.random.default_rng((self.seed, index, key))
        view = draw_view(self.geometry, original, self.boxes[index], rng)
        boxes, kept = view.boxes(self.boxes[index])
        boxes = boxes[kept]
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        masks = has_mask = None
        if self.annotations is not None:
            annotations = list(itertools.compress(self.annotations[index], kept))
            has_mask = torch.tensor([bool(a.get("segmentation")) for a in annotations]).bool()
            masks = self._masks(annotations, view, centers)
        top, _, height, _ = view.window
        first_cut_row = view.resized[0] - int(self.bottom_rows * view.resized[0] / original[0])
        return Sample(
            image=torch.from_numpy(np.copy(view.image(image).transpose(2, 0, 1))),
            boxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(self.labels[index][kept]),
            centers=torch.from_numpy(centers).float(),
            masks=masks,
            has_mask=has_mask,
            cut_rows=min(max(top + height - first_cut_row, 0), height),
            image_id=entry["id"],
            original_size=original,
        )

    def _masks(self, annotations: list[dict], view: View, centers: np.ndarray) -> Tensor:
        """bool [G, h/4, w/4] at [2::4, 2::4]. With mask_centers, centroids go into `centers`."""
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


def collate(samples: list[Sample]) -> Batch:
    """Pad to the largest image, rounded up to 32, and to 8, 16, 32, ... boxes."""
    height, width = (-(-max(s.image.shape[d] for s in samples) // 32) * 32 for d in (1, 2))
    most = max(len(s.boxes) for s in samples)
    slots = max(8, 1 << (most - 1).bit_length())

    def stack(name: str, *shape: int) -> Tensor:
        tensors = [getattr(sample, name) for sample in samples]
        stacked = tensors[0].new_zeros(len(samples), *shape)
        for row, tensor in zip(stacked, tensors, strict=True):
            row[tuple(slice(n) for n in tensor.shape)] = tensor
        return stacked

    with_masks = samples[0].masks is not None
    counts = torch.tensor([len(s.boxes) for s in samples])
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


@dataclass(frozen=True)
class TrainOrder:
    """Endless shuffles cut into global batches; yields a rank's slices as lists of (index, key), in
    `parts` equal parts a step.

    The key is the position in the run: at an equal global batch, images and their draws depend on
    seed and step alone. A batch is all wide or all tall, if `is_wide` tells any apart.
    """

    is_wide: list[bool]
    batch_size_per_rank: int
    steps: int
    start_step: int
    seed: int
    rank: int
    world_size: int
    parts: int = 1

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size_per_rank // self.parts
        for batch in itertools.islice(self._whole_run(), self.start_step, self.steps):
            for first in range(0, len(batch), size):
                yield batch[first : first + size]

    def _whole_run(self) -> Iterator[list[tuple[int, int]]]:
        first, positions = self.rank * self.batch_size_per_rank, itertools.count()
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for epoch in itertools.count():
            rng = np.random.default_rng((self.seed, epoch))
            for index in rng.permutation(len(self.is_wide)).tolist():
                group = waiting[self.is_wide[index]]
                group.append(index)
                if len(group) == self.batch_size_per_rank * self.world_size:
                    keyed = [(index, next(positions)) for index in group]
                    yield keyed[first : first + self.batch_size_per_rank]
                    group.clear()


class Loader:
    """A DataLoader whose workers' DataErrors arrive as their one line, without a traceback."""

    def __init__(self, dataset: Dataset, order: object, workers: int, collate_fn: Callable) -> None:
        self.loader = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # its own, or each pass would move torch's global one
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        try:
            yield from self.loader
        except DataError as error:
            last_line = str(error).strip().splitlines()[-1]  # a worker's is a whole traceback
            raise DataError(last_line.removeprefix("boxteacher.coco.DataError: ")) from None


def make_train_loader(dataset, cfg, start_step=0, rank=0, world_size=1):
    is_wide = [bool(cfg.crop) or i["width"] >= i["height"] for i in dataset.images]
    order = TrainOrder(
        is_wide,
        cfg.batch_size // world_size,
        cfg.steps,
        start_step,
        cfg.seed,
        rank,
        world_size,
        cfg.accumulate,
    )
    parts = []
    for batch in Loader(dataset, order, cfg.workers, collate):
        parts.append(batch)
        if len(parts) == cfg.accumulate:
            yield parts
            parts = []


def make_test_loader(dataset: CocoDataset, rank: int, world_size: int, workers: int) -> Loader:
    """Yields (Batch of one image, its original (height, width)) for images rank::world_size."""
    order = [[index] for index in range(rank, len(dataset), world_size)]
    return Loader(dataset, order, workers, _collate_test)


def _collate_test(samples: list[Sample]) -> tuple[Batch, tuple[int, int]]:
    return collate(samples), samples[0].original_size


# --- the data sets of a configuration -------------------------------------------------------------


def make_train_set(cfg: Config) -> CocoDataset:
    """Images with boxes; true masks come along where there are any, to be learned from in mode
    condinst, and in the others only to measure the pseudo masks with.
    """
    geometry = Geometry(cfg.train_sizes, cfg.train_max_size, cfg.train_scales, cfg.crop, cfg.flip)
    if cfg.dataset == "shapes":
        seed = 2 * cfg.seed + 1  # odd seeds: training; 0: validation, the same for every run
        coco = make_shapes_coco(seed, cfg.shapes_train, cfg.shapes_size) | {"json_path": "shapes"}
        paint = load_shapes_image(seed, cfg.shapes_size)
        # painted once: a small run sees each image several times, and painting costs like training
        load_image = functools.partial(_kept, [paint(entry) for entry in coco["images"]])
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


def _kept(images: list[np.ndarray], entry: dict) -> np.ndarray:
    return images[entry["id"] - 1]


def make_val_set(cfg: Config) -> CocoDataset:
    """All validation images at test size."""
    scales = (cfg.test_scale,) if cfg.test_scale else ()
    geometry = Geometry((cfg.test_size,), cfg.test_max_size, scales, crop=0, flip=False)
    if cfg.dataset == "shapes":
        coco = make_shapes_coco(0, cfg.shapes_val, cfg.shapes_size) | {"json_path": "shapes"}
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
