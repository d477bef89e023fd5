"""COCO-format data on its way to the network: draw a geometry, batch it, colour it.

    checked dict -> CocoDataset (load, crop, resize, flip) -> collate -> Batch -> augment

N images · G boxes of an image · H, W the padded images · h, w an image without its padding
Boxes are xyxy in pixels of the resized image; labels are 0..C-1 in the order of the category ids.
All chance in a sample comes from a key that travels with its index, never from worker or rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from pycocotools import mask as rle_codec
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class DataError(ValueError):
    """Data that cannot be used. The message is one line: file, entry and field, what to do."""


@contextmanager
def explain(what: str, remedy: str) -> Iterator[None]:
    """Turn what decoders raise (OSError, SyntaxError, struct.error, ...) into one DataError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{what} cannot be read ({reason}); {remedy}") from None


def check_size(image: np.ndarray, entry: dict, name: str) -> None:
    height, width = image.shape[:2]
    if (width, height) != (entry["width"], entry["height"]):
        raise DataError(
            f"{name}: image id {entry['id']} ({entry['file_name']}): fields 'width' and 'height' "
            f"say {entry['width']}x{entry['height']}, the image (upright, if EXIF rotates it) has "
            f"{width}x{height} pixels; correct them, and boxes made for another size"
        )


# --- geometry -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """What may happen to an image: resize, then crop (if not 0), then flip (half of the time)."""

    sizes: tuple[int, ...] = ()  # short sides, one drawn per image
    max_size: int = 0  # long side at most; 0: no limit
    scales: tuple[float, ...] = ()  # if given: factors, one drawn per image, in place of sizes
    crop: int = 0
    flip: bool = False


@dataclass(frozen=True)
class View:
    """What does happen to one image: maps the original's pixels, boxes and masks to [h, w]."""

    original: tuple[int, int]  # height, width
    resized: tuple[int, int]
    window: tuple[int, int, int, int]  # top, left, h, w in the resized image
    flip: bool

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] -> [h, w, 3], by PIL's bilinear filter, the window only."""
        (height, width), (y_scale, x_scale) = self.original, self._scale()
        top, left, h, w = self.window
        right, bottom = min((left + w) / x_scale, width), min((top + h) / y_scale, height)
        source = (left / x_scale, top / y_scale, right, bottom)
        view = Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR, source)
        return np.asarray(view)[:, ::-1] if self.flip else np.asarray(view)

    def boxes(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[G, 4] -> [G, 4] clipped to the view, and bool [G]: which to keep.

        Those with their centre in view, or with 30 % of their area and 4 pixels (or all of a
        smaller side) both ways.
        """
        (y_scale, x_scale), (top, left, h, w) = self._scale(), self.window
        full = boxes * ([x_scale, y_scale] * 2) - ([left, top] * 2)
        seen = full.clip(0, [w, h] * 2)
        center = (full[:, :2] + full[:, 2:]) / 2
        full_sides, seen_sides = full[:, 2:] - full[:, :2], seen[:, 2:] - seen[:, :2]
        is_large = (seen_sides >= full_sides.clip(max=4)).all(1)
        is_large &= seen_sides.prod(1) >= 0.3 * full_sides.prod(1)
        kept = is_large | ((center >= 0) & (center <= [w, h])).all(1)
        if self.flip:
            seen[:, [0, 2]] = w - seen[:, [2, 0]]
        return seen, kept

    def mask(self, segmentation: list | dict) -> np.ndarray:
        """-> bool [h, w]: polygons scaled, then rasterised; run-length codes resized (nearest)."""
        y_scale, x_scale = self._scale()
        top, left, h, w = self.window
        if isinstance(segmentation, list):
            points = [np.reshape(polygon, (-1, 2)) * (x_scale, y_scale) for polygon in segmentation]
            codes = rle_codec.frPyObjects([p.ravel().tolist() for p in points], *self.resized)
            mask = rle_codec.decode(rle_codec.merge(codes))[top : top + h, left : left + w]
        else:
            if isinstance(segmentation["counts"], list):
                segmentation = rle_codec.frPyObjects(segmentation, *self.original)
            rows = ((np.arange(top, top + h) + 0.5) / y_scale).astype(int)
            columns = ((np.arange(left, left + w) + 0.5) / x_scale).astype(int)
            mask = rle_codec.decode(segmentation)
            if mask.sum() != rle_codec.area(segmentation):  # what no run reaches is uninitialised
                raise ValueError("the runs do not fill the image")
            mask = mask[rows][:, columns]
        return (mask[:, ::-1] if self.flip else mask).astype(bool)

    def _scale(self) -> tuple[float, float]:
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]


def resized_size(
    height: int, width: int, short_side: int, max_size: int = 0, factor: float = 0
) -> tuple[int, int]:
    """New (height, width): the short side becomes `short_side`, or both grow by `factor` if given;
    then both shrink until the long one is at most max_size (0: no limit)."""
    if factor:
        new_height, new_width = factor * height, factor * width
    elif height < width:
        new_height, new_width = short_side, short_side / height * width
    else:
        new_height, new_width = short_side / width * height, short_side
    shrink = max_size / max(new_height, new_width) if max_size else 1
    if shrink < 1:
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def draw_view(
    geometry: Geometry, original: tuple[int, int], boxes: np.ndarray, rng: np.random.Generator
) -> View:
    """Draw from the geometry. A crop contains the centre of one of the boxes [G, 4], at random."""
    flip = geometry.flip and rng.random() < 0.5
    short_side = 0 if geometry.scales else int(rng.choice(geometry.sizes))
    factor = float(rng.choice(geometry.scales)) if geometry.scales else 0
    resized = resized_size(*original, short_side, geometry.max_size, factor)
    if not geometry.crop:
        return View(original, resized, (0, 0, *resized), flip)
    sides = [min(geometry.crop, side) for side in resized]
    box = boxes[rng.integers(len(boxes))]
    start = []
    for axis, side in enumerate(sides):  # y, then x
        center = (box[1 - axis] + box[3 - axis]) / 2 * resized[axis] / original[axis]
        low = max(0, math.ceil(center - side))
        high = min(resized[axis] - side, math.floor(center))
        start.append(int(rng.integers(low, high + 1)))
    return View(original, resized, (*start, *sides), flip)


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
    centers: Tensor  # float32 [N, G, 2] (x, y) for centre sampling: box centre or mask centroid
    masks: Tensor | None  # bool [N, G, H/4, W/4]: true masks at [2::4, 2::4]
    has_mask: Tensor | None  # bool [N, G]: which boxes have a true mask
    cut_rows: list[int]  # bottom rows of each image that colour similarity takes for outside
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
            what = f"{self.name}: annotation id {annotation['id']}: field 'segmentation'"
            with explain(what, "correct it, or remove it to use the box alone"):
                mask = view.mask(annotation["segmentation"])
            masks[g] = mask[2::4, 2::4]
            if self.mask_centers and mask.any():
                centers[g] = [indices.mean() for indices in reversed(mask.nonzero())]  # x, y
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, 0, 0).bool()


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
            raise DataError(last_line.removeprefix(f"{__name__}.DataError: ")) from None


def make_train_loader(
    dataset: CocoDataset,
    batch_size_per_rank: int,
    steps: int,
    start_step: int,
    seed: int,
    rank: int,
    world_size: int,
    workers: int,
    aspect_grouping: bool,
    parts: int = 1,
) -> Loader:
    """Yields this rank's Batch of each step from start_step to steps - 1, or the `parts` Batches
    that share its images (see TrainOrder).
    """
    is_wide = [not aspect_grouping or i["width"] >= i["height"] for i in dataset.images]
    run = (batch_size_per_rank, steps, start_step, seed, rank, world_size)
    order = TrainOrder(is_wide, *run, parts)
    return Loader(dataset, order, workers, collate)


def make_test_loader(dataset: CocoDataset, rank: int, world_size: int, workers: int) -> Loader:
    """Yields (Batch of one image, its original (height, width)) for images rank::world_size."""
    order = [[index] for index in range(rank, len(dataset), world_size)]
    return Loader(dataset, order, workers, _collate_test)


def _collate_test(samples: list[Sample]) -> tuple[Batch, tuple[int, int]]:
    return collate(samples), samples[0].original_size


# --- colour augmentation --------------------------------------------------------------------------


class Strength(NamedTuple):
    jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    jitter_probability: float
    gray_probability: float
    blur_probability: float


STRENGTHS = {
    "none": Strength((0, 0, 0, 0), 0, 0, 0),
    "weak": Strength((0.2, 0.2, 0.2, 0.1), 0.2, 0, 0),
    "strong": Strength((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0),
    "strong_blur": Strength((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5),
}
DRAWS_PER_IMAGE = 12


def augment(
    images: Tensor,
    sizes: list[tuple[int, int]],
    strength: str,
    generator: torch.Generator,
    skip: int = 0,
) -> Tensor:
    """Other colours: jitter in random order, grayscale, blur of kernel 3 (SPEC section 6).

    uint8 [N, 3, H, W] -> the same, each image treated without its padding, which stays 0.
    Each image takes DRAWS_PER_IMAGE numbers from the generator (on the CPU: no sync), after those
    of `skip` images: ranks that share a generator's seed and skip rank * N images draw together
    what one process draws for the global batch.
    """
    if strength not in STRENGTHS:
        raise ValueError(f"strength {strength!r} is not one of {', '.join(STRENGTHS)}")
    draws = torch.rand(skip + len(images), DRAWS_PER_IMAGE, generator=generator)[skip:].tolist()
    augmented = images.clone()
    for n, (h, w) in enumerate(sizes):
        image = augmented[n, :, :h, :w]
        image.copy_(_augment_image(image, STRENGTHS[strength], draws[n]))
    return augmented


def _augment_image(image: Tensor, strength: Strength, draws: list[float]) -> Tensor:
    amounts, order, (do_jitter, do_gray, do_blur, sigma) = draws[:4], draws[4:8], draws[8:]
    if do_jitter < strength.jitter_probability:
        adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
        for k in sorted(range(4), key=order.__getitem__):
            change = (2 * amounts[k] - 1) * strength.jitter[k]
            image = adjust[k](image, change if adjust[k] is tvf.adjust_hue else 1 + change)
    if do_gray < strength.gray_probability:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    if do_blur < strength.blur_probability and min(image.shape[1:]) > 1:  # it reflects one pixel
        image = tvf.gaussian_blur(image, [3, 3], [0.1 + 1.9 * sigma] * 2)
    return image
