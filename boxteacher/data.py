"""COCO-format data as batches.

    checked dict -> CocoDataset (load, resize, crop, flip) -> collate -> Batch

N images · G boxes of an image · h, w pixels of an image · H, W pixels of the padded images
H4, W4 the grid of stride 4 over the padded images

Boxes are xyxy in pixels of the resized image. Labels are 0..C-1 in the order of the category ids.
A sample's random choices depend on (seed, index, key) alone, not on the worker or the rank.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import signal
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from reprlib import repr as short_repr
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .coco import DataError, check_size, for_large_data, image_loader, read_coco
from .config import Config, ConfigError, is_due
from .masks import run_lengths
from .shapes import load_shapes_image, make_shapes_coco
from .transforms import Geometry, View, draw_view, resized_size

# --- classes --------------------------------------------------------------------------------------


class Classes(NamedTuple):
    """The classes 0..C-1 of a model or a data set."""

    names: list[str]
    ids: list[int]  # in its JSON
    source: str  # its file, for messages


def match_classes(found: Classes, known: Classes) -> Classes:
    """The classes `found` in a file, in the order of the `known` ones.

    Equal names are the same class, whatever their ids. If the known ones are a published file's,
    without names, the order of ids counts. Raises DataError if one of the two has a
    class that the other lacks, or if both give the same ids to other names: one must be wrong.
    """
    names = found.names
    if known.names == [f"class {number}" for number in known.ids] and len(names) == len(known.ids):
        names = known.names  # a published file has no names. Its classes are in the order of ids
    ids = dict(zip(names, found.ids, strict=True))
    only = [[n for n in names if n not in known.names], [n for n in known.names if n not in ids]]
    differences = [
        f"{verb} {listed(o)}" for verb, o in zip(("has", "lacks"), only, strict=True) if o
    ]
    if differences:
        what = f"other classes than {known.source}: it {' and '.join(differences)}"
        raise DataError(f"{found.source}: {what}; field 'categories' must have the same")
    order = [ids[name] for name in known.names]
    if order != known.ids and sorted(order) == sorted(known.ids):
        number, name = next(
            p for p in zip(known.ids, known.names, strict=True) if ids[p[1]] != p[0]
        )
        other = names[found.ids.index(number)]
        raise DataError(
            f"{found.source}: category id {number} is {short_repr(other)}, but in {known.source} it"
            f" is {short_repr(name)}; correct the names of one of them"
        )
    return Classes(known.names, order, found.source)


def listed(names: list[str]) -> str:
    return ", ".join(map(short_repr, names[:5])) + ", ..." * (len(names) > 5)


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


# --- a data set -----------------------------------------------------------------------------------


class Ragged(Sequence):
    """Arrays of different lengths in one buffer: item i is values[offsets[i] : offsets[i + 1]].

    If `values` is a Ragged itself, items are lists. Worker processes share such buffers. Of dicts
    and lists each makes a copy while it reads them, because Python counts references inside.
    """

    def __init__(self, values: np.ndarray | Ragged, lengths: Sequence[int]) -> None:
        self.values = values
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | slice) -> Any:
        chosen = range(len(self))[index]
        if isinstance(index, slice):
            return [self[i] for i in chosen]
        return self.values[self.offsets[chosen] : self.offsets[chosen + 1]]


def pack(numbers: np.ndarray) -> tuple[np.ndarray, int]:
    """float64 -> (packed, unit), where packed / unit == numbers: uint16 or int32 if all are whole
    hundredths, like COCO's polygons, else float64."""
    packed = np.empty(len(numbers), dtype=np.int32)
    for start in range(0, len(numbers), 1 << 20):  # few at a time save memory
        part = numbers[start : start + (1 << 20)]
        hundredths = np.rint(100 * part)
        if (hundredths / 100 != part).any() or abs(hundredths).max() >= 2**31:
            return numbers, 1
        packed[start : start + (1 << 20)] = hundredths
    is_small = packed.min(initial=0) >= 0 and packed.max(initial=0) < 2**16
    return packed.astype(np.uint16) if is_small else packed, 100


class Item(NamedTuple):
    """What a data set is asked for."""

    index: int  # of the image
    key: int = 0  # makes the random draw
    with_masks: bool = True  # False: Sample.masks is None, which saves time


class CocoDataset(Dataset):
    """The images of a checked COCO dict, each seen through a View drawn from the geometry.

    Crowd annotations are dropped. Training leaves out images without a box. `notes` say how many,
    and what is doubtful. mask_centers (CondInst): every annotation has a mask, and `centers` are
    the masks' centroids. bottom_rows: see Batch.cut_rows, here of the original image. classes:
    those whose order the labels have (default: by id). For tests the geometry must leave no choice:
    one size or scale, no crop, no flip. `coco` is the dict, unless it is for training.
    """

    def __init__(
        self,
        coco: dict,
        load_image: Callable[[dict], np.ndarray],
        geometry: Geometry,
        train: bool,
        name: str = "data",
        mask_centers: bool = False,
        bottom_rows: int = 0,
        seed: int = 0,
        classes: Classes | None = None,
    ) -> None:
        self.load_image, self.geometry = load_image, geometry
        self.mask_centers, self.bottom_rows, self.seed = mask_centers, bottom_rows, seed
        self.coco, self.name, self.notes = None if train else coco, name, []
        by_id = sorted((category["id"], category["name"]) for category in coco["categories"])
        own = Classes([name for _, name in by_id], [number for number, _ in by_id], self.name)
        self.classes = own if classes is None else match_classes(own, classes)
        if classes is not None and self.classes.ids != classes.ids:
            by_name = set(own.names) == set(classes.names)
            how = "by name" if by_name else "in the order of their ids"
            what = f"its classes have other ids and are matched {how}"
            self.notes.append(f"{self.name}: unlike in {classes.source}, {what}")

        # The annotations that count, image by image, and their boxes: xyxy within the image.
        number_of = {image["id"]: number for number, image in enumerate(coco["images"])}
        label_of = {category_id: label for label, category_id in enumerate(self.classes.ids)}
        annotations = [a for a in coco["annotations"] if not a.get("iscrowd")]
        of_image = np.array([number_of[a["image_id"]] for a in annotations], dtype=int)
        boxes = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
        labels = np.array([label_of[a["category_id"]] for a in annotations], dtype=np.int64)
        ids = np.array([annotation["id"] for annotation in annotations], dtype=np.int64)
        segmentations = [a.get("segmentation") or [] for a in annotations]
        order = np.argsort(of_image, kind="stable")
        order = order[(boxes[order, 2:] > 0).all(1)]
        boxes, labels, ids = boxes[order], labels[order], ids[order]
        segmentations = [segmentations[i] for i in order.tolist()]
        counts = np.bincount(of_image[order], minlength=len(number_of))
        images = [image for image, n in zip(coco["images"], counts, strict=True) if n or not train]
        counts = counts[counts > 0] if train else counts
        sizes = [(image["height"], image["width"]) for image in images]
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.repeat(self.sizes[:, [1, 0, 1, 0]], counts, axis=0))

        # What training does not see.
        bare = [k for k, mask in enumerate(segmentations) if not mask]
        if mask_centers and bare:
            raise DataError(
                f"{self.name}: annotation id {ids[bare[0]]}: field 'segmentation' is missing or"
                f" empty (like {len(bare)} of {len(ids)}); condinst needs masks: add them, or use"
                " boxteacher or boxinst"
            )
        if train:
            self._tell_what_is_left_out(coco, len(images), labels)

        # All of it in a few buffers.
        self.image_ids = np.array([image["id"] for image in images], dtype=np.int64)
        names = [image["file_name"].encode(errors="surrogatepass") for image in images]
        self.file_names = Ragged(np.frombuffer(b"".join(names), np.uint8), [*map(len, names)])
        self.boxes, self.labels = Ragged(boxes, counts), Ragged(labels, counts)
        self.annotation_ids = Ragged(ids, counts)
        self._pack_masks(segmentations, counts)

    def _tell_what_is_left_out(self, coco: dict, num_images: int, labels: np.ndarray) -> None:
        total, crowds = (
            len(coco["annotations"]),
            sum(bool(a.get("iscrowd")) for a in coco["annotations"]),
        )
        if not num_images:
            why = f"of {total}, {crowds} are crowds ('iscrowd')" if total else "the list is empty"
            raise DataError(f"{self.name}: field 'annotations' has no box to train on: {why}")
        lacking = np.setdiff1d(np.arange(len(self.classes.ids)), labels).tolist()
        for count, what in (
            (len(coco["images"]) - num_images, "images without a box"),
            (crowds, "crowd annotations"),
            (total - crowds - len(labels), "empty boxes"),
            (
                len(lacking),
                "classes without a box: " + listed([self.classes.names[k] for k in lacking]),
            ),
        ):
            if count:
                self.notes.append(f"{self.name}: training leaves out {count} {what}")

    def _pack_masks(self, segmentations: list[list | dict], counts: list[int]) -> None:
        """A mask is a list of polygons, or of the runs of its code alone."""
        is_code = np.array([isinstance(mask, dict) for mask in segmentations], dtype=bool)
        for k in np.flatnonzero(is_code).tolist():
            segmentations[k] = [run_lengths(segmentations[k]).astype(float)]
        masks = [
            [array("d", part) if isinstance(part, list) else part for part in mask]
            for mask in segmentations
        ]
        parts = list(itertools.chain.from_iterable(masks))
        numbers, self.unit = pack(np.frombuffer(b"".join(parts)))
        parts = Ragged(numbers, [*map(len, parts)])
        self.masks = Ragged(Ragged(parts, [*map(len, masks)]), counts)
        self.is_code = Ragged(is_code, counts)

    @property
    def class_names(self) -> list[str]:
        return self.classes.names

    @property
    def category_ids(self) -> list[int]:
        return self.classes.ids

    def num_masks(self) -> str:
        """How many boxes have a true mask: "3 of 10"."""
        is_given = np.diff(self.masks.values.offsets) > 0
        return f"{is_given.sum()} of {len(is_given)}"

    def entry(self, index: int) -> dict[str, Any]:
        """The image as in the JSON: id, file_name, height and width."""
        name = self.file_names[index].tobytes().decode(errors="surrogatepass")
        height, width = self.sizes[index].tolist()
        number = int(self.image_ids[index])
        return {"id": number, "file_name": name, "height": height, "width": width}

    def segmentations(self, index: int) -> list[list | dict]:
        """The masks of the image's boxes as View.mask takes them. Empty where there is none."""
        found = []
        for mask, is_code in zip(self.masks[index], self.is_code[index], strict=True):
            parts = [part / self.unit for part in mask]
            size = self.sizes[index].tolist()
            found.append({"size": size, "counts": parts[0].astype(int)} if is_code else parts)
        return found

    def true_masks(self, index: int, size: tuple[int, int]) -> Iterator[Tensor]:
        """The true masks of image `index`, bool [h, w] of the whole image at `size`, one by one in
        the order of its boxes. A mask that is not annotated is empty."""
        view = View(tuple(self.sizes[index].tolist()), size, (0, 0, *size), flip=False)
        for segmentation in self.segmentations(index):
            mask = view.mask(segmentation) if segmentation else np.zeros(size, dtype=bool)
            yield torch.from_numpy(mask)

    def whole(self, geometry: Geometry) -> CocoDataset:
        """The same images without crops and flips, as for tests."""
        shown = copy.copy(self)
        shown.geometry, shown.mask_centers, shown.bottom_rows = geometry, False, 0
        return shown

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, item: int | tuple) -> Sample:
        # Load the image, and draw the view on it.
        index, key, with_masks = Item(*item) if isinstance(item, tuple) else Item(item)
        entry = self.entry(index)
        image = self.load_image(entry)
        check_size(image, entry, self.name)
        original = (entry["height"], entry["width"])
        rng = np.random.default_rng((self.seed, index, key))
        view = draw_view(self.geometry, original, self.boxes[index], rng)

        # Boxes that can be seen, with their centers and masks.
        boxes, kept = view.boxes(self.boxes[index])
        boxes = boxes[kept]
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        masks = has_mask = None
        if with_masks:
            segmentations = [*itertools.compress(self.segmentations(index), kept)]
            masks = self._masks(segmentations, view, centers)
            has_mask = torch.tensor([bool(s) for s in segmentations], dtype=torch.bool)

        # How many of the view's rows are among the bottom rows of the image.
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

    def _masks(self, segmentations: list, view: View, centers: np.ndarray) -> Tensor:
        """bool [G, h/4, w/4]: [2::4, 2::4] of each mask, off where an annotation has none. With
        mask_centers, the masks' centroids replace `centers`."""
        masks = [np.zeros(view.window[2:], dtype=bool)[2::4, 2::4]] * len(segmentations)
        for g, segmentation in enumerate(segmentations):
            if not segmentation:
                continue
            mask = view.mask(segmentation)
            masks[g] = mask[2::4, 2::4]
            if self.mask_centers and mask.any():
                centers[g] = [indices.mean() for indices in reversed(mask.nonzero())]  # x, y
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, 0, 0).bool()


# --- loaders --------------------------------------------------------------------------------------


def make_train_loader(
    dataset: CocoDataset, cfg: Config, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> StepLoader:
    """Yields, for each step from start_step to cfg.steps - 1, the list of the rank's
    `cfg.accumulate` Batches, its parts. Images are grouped by aspect, unless a crop makes them all
    one size. A crop is placed around one box. With crops an image comes as often as it has boxes,
    so all boxes of the set are chosen equally often, those of large images too."""
    is_wide = (dataset.sizes[:, 1] >= dataset.sizes[:, 0]) | (cfg.crop > 0)
    times = np.diff(dataset.boxes.offsets) if cfg.crop else np.ones(len(dataset), int)
    order = train_order(is_wide.tolist(), times.tolist(), cfg, start_step, rank, world_size)
    batches = make_loader(dataset, order, cfg.workers, collate, cfg.device != "cpu")
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
    is_wide: list[bool],
    times: list[int],
    cfg: Config,
    start_step: int,
    rank: int,
    world_size: int,
) -> Iterator[list[Item]]:
    """The items of the rank, one list for each part of each step.

    Endless shuffles are cut into global batches, which are all wide or all tall. A shuffle has
    image i times[i] times. The key is the image's position in the run. So images and their draws
    depend on the seed and the step alone, if the global batch is of equal size. True masks come
    where training learns from them. In mode boxteacher they are otherwise for the log (the IoU of
    pseudo masks), so they come with the steps that are logged.
    """
    size = cfg.batch_size // (world_size * cfg.accumulate)  # images of a part
    batches = _global_batches(is_wide, times, cfg.batch_size, cfg.seed)
    run = itertools.islice(batches, cfg.steps)
    for step, batch in itertools.islice(enumerate(run, 1), start_step, None):
        is_learned = cfg.mode == "condinst" or cfg.use_masks
        is_shown = cfg.mode == "boxteacher" and is_due(cfg, step, cfg.log_every)
        items = [Item(index, key, is_learned or is_shown) for index, key in batch]
        for part in range(rank * cfg.accumulate, (rank + 1) * cfg.accumulate):
            yield items[part * size : (part + 1) * size]


def _global_batches(
    is_wide: list[bool], times: list[int], size: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    images = np.repeat(np.arange(len(is_wide)), times)
    positions, waiting = itertools.count(), {True: [], False: []}
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch))
        for index in rng.permutation(images).tolist():
            group = waiting[is_wide[index]]
            group.append(index)
            if len(group) == size:
                yield [(index, next(positions)) for index in group]
                group.clear()


def make_test_loader(dataset: CocoDataset, rank: int, world_size: int, workers: int) -> DataLoader:
    """Yields (Batch of one image, its original (height, width)) for images rank::world_size."""
    items = [Item(index, with_masks=False) for index in range(rank, len(dataset), world_size)]
    return make_loader(dataset, [[item] for item in items], workers, _collate_test)


def _collate_test(samples: list[Sample]) -> tuple[Batch, tuple[int, int]]:
    return collate(samples), samples[0].original_size


def make_loader(
    dataset: CocoDataset, order: Iterable, workers: int, collate_fn: Callable, pin: bool = False
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=pin and torch.cuda.is_available(),
        # A forked worker shares the data set's memory. From Python 3.14 on it is not the default.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # its own, or each pass would move torch's global one
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(_: int) -> None:
    """Ctrl-C, a closed terminal, Slurm and torchrun signal all processes of a run. The main one
    goes on until it is saved, so its workers must, too: after SIGTERM for five minutes, which is
    longer than a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300))


def check_batch_norm(dataset: CocoDataset, cfg: Config, world_size: int) -> None:
    """Raise ConfigError if a batch norm of stride 32 may see one value of each channel: one image
    of up to 32 pixels. It cannot be trained with that."""
    norms = {"--norm gn": cfg.norm, "--mask-norm gn": cfg.mask_norm}
    norms = [remedy for remedy, norm in norms.items() if norm == "bn"]
    if not norms or cfg.batch_size > world_size * cfg.accumulate:
        return
    geometry = dataset.geometry
    for height, width in np.unique(dataset.sizes, axis=0).tolist():
        for short, factor in itertools.product(geometry.sizes, geometry.scales or (0.0,)):
            size = resized_size(height, width, short, geometry.max_size, factor)
            if min(max(size), geometry.crop or math.inf) <= 32:
                raise ConfigError(
                    f"batch norm cannot learn from one image of {size[1]}x{size[0]} pixels at a"
                    f" time: use {' '.join(norms)}, or more than one image per process and part"
                )


# --- the data sets of a configuration -------------------------------------------------------------


@for_large_data()
def make_train_set(cfg: Config, classes: Classes | None = None) -> CocoDataset:
    """Images with boxes. Mode condinst learns from their true masks. Mode boxteacher compares
    pseudo masks with them, where there are any. `classes`: those of a run that goes on."""
    if cfg.dataset == "shapes":
        seed = train_shapes_seed(cfg)
        coco, name = make_shapes_coco(seed, cfg.shapes_train, cfg.shapes_size), "shapes"
        paint = load_shapes_image(seed, cfg.shapes_size)
        # Painted once: a small run sees each image often, and painting costs as much as training.
        load_image = functools.partial(_kept, [paint(entry) for entry in coco["images"]])
    else:
        (coco, notes), name = read_coco(cfg.train_json, cfg.train_images, True), cfg.train_json
        load_image = image_loader(cfg.train_images, cfg.contrast)
    dataset = CocoDataset(
        coco,
        load_image,
        Geometry(cfg.train_sizes, cfg.train_max_size, cfg.train_scales, cfg.crop, cfg.flip),
        train=True,
        name=name,
        mask_centers=cfg.mode == "condinst",
        bottom_rows=cfg.bottom_rows,
        seed=cfg.seed,
        classes=classes,
    )
    if cfg.dataset == "coco":
        dataset.notes += notes + dark_images(dataset)
    return dataset


def train_shapes_seed(cfg: Config) -> int:
    return 2 * cfg.seed + 1  # odd, since 0 is the validation set of every run


def _kept(images: list[np.ndarray], entry: dict) -> np.ndarray:
    return images[entry["id"] - 1]


@for_large_data()
def make_val_set(cfg: Config, classes: Classes | None = None) -> CocoDataset:
    """All validation images at test size. `classes` are those of the model: its labels' order."""
    if cfg.dataset == "shapes":
        coco, name = make_shapes_coco(0, cfg.shapes_val, cfg.shapes_size), "shapes"
        load_image = load_shapes_image(0, cfg.shapes_size)
    else:
        (coco, notes), name = read_coco(cfg.val_json, cfg.val_images), cfg.val_json
        load_image = image_loader(cfg.val_images, cfg.contrast)
    dataset = CocoDataset(coco, load_image, whole_geometry(cfg), False, name, classes=classes)
    if cfg.dataset == "coco":
        dataset.notes += notes + dark_images(dataset)
    return dataset


def whole_geometry(cfg: Config) -> Geometry:
    """That of the test images."""
    scales = (cfg.test_scale,) if cfg.test_scale else ()
    return Geometry((cfg.test_size,), cfg.test_max_size, scales)


def dark_images(dataset: CocoDataset) -> list[str]:
    """A note if some images that are spread over the set use the lowest quarter of 0..255 alone."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, 8).astype(int)).tolist()
    brightest = max(int(dataset.load_image(dataset.entry(index)).max()) for index in chosen)
    if brightest >= 64:
        return []
    return [
        f"{dataset.name}: {len(chosen)} images have no value over {brightest} of 255: do they use 8"
        " or 12 of 16 bits? --contrast stretch makes them visible"
    ]
