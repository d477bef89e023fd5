"""Files in COCO's format, read and checked: the JSON, its run-length codes and its images."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import stat
from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from reprlib import repr as short_repr
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as rle_codec

from .errors import UserError, printable
from .plausible import doubts, likely_form

# COCO train2017 has two boxes of height 0 (github.com/cocodataset/cocoapi/issues/355). They are
# left out. All other empty boxes are refused.
KNOWN_EMPTY_BOXES = {(200365, 296.65, 388.33), (550395, 9.98, 188.56)}  # image id, x, y
EXIF_ORIENTATION = 0x0112
NUMBERS = {int, float}  # in JSON; no booleans
MAX_PIXELS = 178_956_970  # of an image: Pillow opens none that is larger
# pycocotools trusts polygons: far points and long outlines take gigabytes, or end the process.
REACH = 4  # coordinates are at most so many times the image's longer side
MAX_OUTLINE = 200  # a mask's outline is at most so many times width + height of its image


class DataError(UserError):
    """Data that cannot be used. The message is one line: file, entry and field, what to do."""

    def __init__(self, message: str) -> None:
        # A DataLoader makes a worker's error anew from its whole traceback. The last line counts.
        if message.startswith("Caught DataError"):
            message = message.splitlines()[-1].removeprefix(f"{__name__}.DataError: ")
        super().__init__(printable(message))


@contextmanager
def explain(what: str, remedy: str) -> Iterator[None]:
    """Turn what decoders raise (OSError, SyntaxError, struct.error, ...) into one DataError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{what} cannot be read ({reason}); {remedy}") from None


@contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file to read. A pipe or a device could keep the program waiting for ever."""
    no_wait = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait, too
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | no_wait)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        yield file


@contextmanager
def for_large_data() -> Iterator[None]:
    """Around code that makes millions of objects. To look for garbage among them would take as long
    as the code itself. At the end, glibc gives back the memory that it keeps between objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        with suppress(OSError, TypeError, AttributeError):  # there is no glibc
            ctypes.CDLL(None).malloc_trim(0)


# --- reading --------------------------------------------------------------------------------------


def read_coco(
    json_path: str | Path, images_dir: str | Path, compact: bool = False
) -> tuple[dict, list[str]]:
    """Read a COCO instances JSON and check it and its images. Masks ("segmentation") are optional.

    All image files must exist, and their headers must have the JSON's sizes. Headers are read of
    all images if there are at most 2000, else of the first 200. The other images are checked when
    they are loaded. With `compact`, polygons are arrays of doubles (a fourth of the memory).

    Returns the dict, and notes about what is doubtful in it. Raises DataError.
    """
    name = str(json_path)
    hook, remedy = _compact if compact else None, "give a JSON file in COCO's format"
    with explain(name, remedy), open_file(json_path) as file:
        coco = json.loads(file.read(), object_hook=hook)
    notes = check_coco(coco, name)
    _check_files(coco, name, str(images_dir))
    return coco, notes


def _compact(entry: dict) -> dict:
    if type(entry.get("segmentation")) is list:
        with suppress(TypeError, OverflowError):  # check_coco says what is wrong
            entry["segmentation"] = [array("d", polygon) for polygon in entry["segmentation"]]
    return entry


# --- checking -------------------------------------------------------------------------------------


class _Faults:
    """What is wrong with a file: all of it in one line."""

    def __init__(self, name: str) -> None:
        self.name, self.texts = name, []

    def add(self, wheres: Sequence[str], text: str) -> None:
        """A fault of the entries `wheres`. The text is about the first of them."""
        more = ", ".join(wheres[1:5]) + ", ..." * (len(wheres) > 5)
        more = f" (and {len(wheres) - 1} more: {more})" if len(wheres) > 1 else ""
        self.texts.append(f"{wheres[0]}: {text}{more}")

    def sift(
        self, kind: str, entries: list[dict], field: str, problem: Callable[[dict], str]
    ) -> list[dict]:
        """The entries whose field has no `problem`: a text, empty if there is none."""
        texts = [problem(entry) for entry in entries]
        if not any(texts):
            return entries
        bad = [(entry, text) for entry, text in zip(entries, texts, strict=True) if text]
        self.add([f"{kind} id {entry['id']}" for entry, _ in bad], f"field '{field}' {bad[0][1]}")
        return [entry for entry, text in zip(entries, texts, strict=True) if not text]

    def raise_any(self, remark: str = "") -> None:
        if self.texts:
            raise DataError(f"{self.name}: {'. Also: '.join(self.texts)}{remark}")


def check_coco(coco: dict, name: str) -> list[str]:
    """Raise DataError unless `coco` is a usable COCO dict. `name`, its file, opens the message.

    The message has each kind of fault once, with the first entry that has it and the number of the
    others. Returns notes about what is usable, but can hardly be meant (plausible.py).
    """
    faults = _Faults(name)

    # The three lists, each with ids of its own.
    if not isinstance(coco, dict):
        found = type(coco).__name__
        raise DataError(f"{name}: the top level is a {found}; expected an object in COCO's format")
    for key in ("images", "categories", "annotations"):
        entries, may_be_empty = coco.get(key), key == "annotations"
        if isinstance(entries, list) and (entries or may_be_empty):
            _check_ids(key, entries, faults)
        else:
            found = "is empty" if entries == [] else f"is not a list, but {short_repr(entries)}"
            remedy = "a list here, which may be empty" if may_be_empty else "a list of them here"
            found = found if key in coco else "is missing"
            faults.add([f"field '{key}'"], f"{found}; COCO's format has {remedy}")
    faults.raise_any()

    # Each image has a file and a size, each category a name of its own.
    images = faults.sift("image", coco["images"], "file_name", partial(_text_problem, "file_name"))
    for side in ("width", "height"):
        images = faults.sift("image", images, side, partial(_side_problem, side))
    faults.sift("image", images, "width", _pixels_problem)
    categories = faults.sift("category", coco["categories"], "name", partial(_text_problem, "name"))
    faults.sift("category", categories, "name", partial(_name_problem, set()))
    faults.raise_any()

    # Each annotation belongs to an image and a category. Its fields have the right types.
    annotations, images = coco["annotations"], {image["id"]: image for image in coco["images"]}
    category_ids = {category["id"] for category in coco["categories"]}
    for field, problem in {
        "image_id": partial(_id_problem, "image_id", images, "images"),
        "category_id": partial(_id_problem, "category_id", category_ids, "categories"),
        "iscrowd": _crowd_problem,
        "area": _area_problem,
        "bbox": _box_problem,
        "segmentation": partial(_mask_problem, images),
    }.items():
        annotations = faults.sift("annotation", annotations, field, problem)

    # Its box and its mask lie in the image.
    sizes = [images[annotation["image_id"]] for annotation in annotations]
    sizes = np.array([(image["width"], image["height"]) for image in sizes]).reshape(-1, 2)
    boxes = np.array([annotation["bbox"] for annotation in annotations], float).reshape(-1, 4)
    in_place = faults.sift("annotation", annotations, "bbox", partial(_place_problem, images))
    cause = likely_form(boxes, None, sizes) if len(in_place) < len(annotations) else ""
    if len(boxes) and boxes.max() <= 1 and sizes.min() > 4:
        faults.add(["field 'bbox'"], "all boxes lie in the first pixel; give pixels, not fractions")
    extents = _mask_extents(annotations, sizes, faults)
    faults.raise_any(cause)

    # What can hardly be meant.
    notes = []
    if annotations:
        areas = np.array([annotation.get("area") for annotation in annotations], float)
        notes = doubts([a["id"] for a in annotations], boxes, extents, sizes, areas)
    keys = {(a["image_id"], a["category_id"], *a["bbox"]) for a in annotations}
    repeated = len(annotations) - len(keys)
    shared = len(images) - len({image["file_name"] for image in coco["images"]})
    for count, what in (
        (repeated, "annotations repeat the image, class and box of another"),
        (shared, "images repeat the file of another; the objects of a file belong to one image"),
    ):
        notes += [f"{count} {what}"] if count else []
    return [f"{name}: {note}" for note in notes]


def _check_ids(key: str, entries: list, faults: _Faults) -> None:
    remedy = "give each entry its own number"
    bad = [i for i, e in enumerate(entries) if type(e) is not dict or not _is_id(e.get("id"))]
    if bad:
        text = f"field 'id' is missing or not a whole number of at most 64 bits; {remedy}"
        faults.add([f"{key}[{i}]" for i in bad], text)
        return
    ids, seen = [entry["id"] for entry in entries], set()
    if len(set(ids)) < len(ids):
        twice = [i for i, number in enumerate(ids) if number in seen or seen.add(number)]
        text = f"field 'id': {ids[twice[0]]} is a duplicate; {remedy}"
        faults.add([f"{key}[{i}]" for i in twice], text)


# Each of these tells what is wrong with a field of an entry, and what to do; "" if nothing is.


def _text_problem(field: str, entry: dict) -> str:
    if isinstance(entry.get(field), str) and entry[field]:
        return ""
    what = {"file_name": "name of the image's file", "name": "class's name"}[field]
    return f"is missing or not text; add the {what}"


def _side_problem(side: str, image: dict) -> str:
    if type(value := image.get(side)) is int and value > 0:
        return ""
    found = f"found {short_repr(value)}; write the file's {side} in pixels"
    return f"must be a positive whole number, {found}"


def _pixels_problem(image: dict) -> str:
    if image["width"] * image["height"] <= MAX_PIXELS:
        return ""
    return f"times 'height' is over {MAX_PIXELS} pixels; cut the image into parts"


def _name_problem(seen: set[str], category: dict) -> str:
    if (name := category["name"]) in seen:
        return f"{short_repr(name)} is a duplicate; give each category its own name"
    seen.add(name)
    return ""


def _id_problem(field: str, ids: Container[int], key: str, annotation: dict) -> str:
    if type(value := annotation.get(field)) is int and value in ids:
        return ""
    return f"has no such id in '{key}': {short_repr(value)}; correct it"


def _crowd_problem(annotation: dict) -> str:
    if (value := annotation.get("iscrowd")) in (None, 0, 1):
        return ""
    return f"must be 0 or 1, found {short_repr(value)}; correct it or leave it out"


def _area_problem(annotation: dict) -> str:
    if (value := annotation.get("area")) is None or (_are_finite([value]) and value >= 0):
        return ""
    found = f"found {short_repr(value)}; correct it or leave it out"
    return f"must be a finite number of pixels, 0 or more, {found}"


def _box_problem(annotation: dict) -> str:
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and _are_finite(box):
        return ""
    form = f"must be four finite numbers [x, y, width, height], found {short_repr(box)}"
    form = "is missing" if box is None else form
    return f"(image id {annotation['image_id']}) {form}; correct it or remove the annotation"


def _place_problem(images: dict[int, dict], annotation: dict) -> str:
    image, box = images[annotation["image_id"]], annotation["bbox"]
    (x, y, width, height), (w, h) = box, (image["width"], image["height"])
    far = REACH * max(w, h)
    if min(width, height) <= 0 and (image["id"], x, y) not in KNOWN_EMPTY_BOXES:
        what = "[x, y, width, height] has a width or height that is zero or negative"
    elif x >= w or y >= h or x + width <= 0 or y + height <= 0:
        what = f"lies outside its image of {w}x{h} pixels"
    elif min(x, y) < -far or max(x + width, y + height) > far:
        what = f"reaches far beyond its image of {w}x{h} pixels"
    else:
        return ""
    return f"(image id {image['id']}) {box} {what}; correct it or remove the annotation"


def _mask_problem(images: dict[int, dict], annotation: dict) -> str:
    """About the form of polygons [[x, y, ...], ...] or of a run-length code."""
    segmentation, remedy = annotation.get("segmentation"), "; correct it, or use the box alone"
    if isinstance(segmentation, list):
        for polygon in segmentation:
            is_list = isinstance(polygon, (list, array)) and len(polygon) >= 6
            if not is_list or len(polygon) % 2 or not _are_finite(polygon):
                form = "has a polygon that is not [x, y, ...] of 3 points or more"
                return f"{form}: {short_repr(polygon)}{remedy}"
    elif segmentation:
        image = images[annotation["image_id"]]
        counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
        if not isinstance(counts, (str, list)):
            return f"is neither polygons nor a run-length code{remedy}"
        size = [image["height"], image["width"]]
        if segmentation.get("size") != size:
            found = short_repr(segmentation.get("size"))
            return f"has size {found}, its image {size} (h, w){remedy}"
    return ""


def _is_id(value: object) -> bool:
    return type(value) is int and abs(value) < 2**63


def _are_finite(numbers: list | array) -> bool:
    if isinstance(numbers, array):  # _mask_extents looks at these
        return True
    are_numbers = NUMBERS.issuperset(map(type, numbers))
    return are_numbers and all(abs(value) < 1e12 for value in numbers)  # false for NaN


def _mask_extents(annotations: list[dict], sizes: np.ndarray, faults: _Faults) -> np.ndarray:
    """[A, 4]: left, top, right, bottom of each mask, NaN where there is none. Masks that break
    pycocotools become faults: runs that do not fill the image, points far out, endless outlines."""
    extents, bad = np.full((len(annotations), 4), np.nan), {}
    with_polygons = []
    for i, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list):
            if segmentation:
                with_polygons.append(i)
        elif segmentation:
            try:
                extents[i] = _code_extents(segmentation)
            except ValueError as error:
                bad[i] = f"has {error}"
    for start in range(0, len(with_polygons), 50_000):  # few at a time save memory
        chosen = with_polygons[start : start + 50_000]
        polygons = [annotations[i]["segmentation"] for i in chosen]
        extents[chosen], lengths = _polygon_extents(polygons)
        is_far = ~(abs(extents[chosen]) <= REACH * sizes[chosen].max(1, keepdims=True)).all(1)
        is_long = lengths > MAX_OUTLINE * sizes[chosen].sum(1)
        for i in np.array(chosen)[is_far].tolist():
            bad[i] = f"has points {REACH} times the image's size away, or not finite"
        for i in np.array(chosen)[is_long & ~is_far].tolist():
            bad[i] = "has an outline without end: its points go to and fro through the image"
    if bad:
        first = min(bad)
        wheres = [f"annotation id {annotations[i]['id']}" for i in sorted(bad)]
        faults.add(wheres, f"field 'segmentation' {bad[first]}; correct it, or use the box alone")
    return extents


def _polygon_extents(masks: list[list]) -> tuple[np.ndarray, np.ndarray]:
    """Masks of polygons: their extents [M, 4] and the lengths of their outlines [M]."""
    polygons = [array("d", polygon) for polygon in chain.from_iterable(masks)]
    points = np.frombuffer(b"".join(polygons)).reshape(-1, 2)
    ends = np.cumsum([len(polygon) // 2 for polygon in polygons])
    first = np.cumsum([0] + [sum(map(len, mask)) // 2 for mask in masks[:-1]])
    with np.errstate(invalid="ignore"):  # infinity
        steps = np.abs(np.diff(points, axis=0, append=points[-1:])).max(1)
    steps[ends - 1] = 0  # from one polygon to the next
    extents = [np.minimum.reduceat(points, first), np.maximum.reduceat(points, first)]
    return np.concatenate(extents, axis=1), np.add.reduceat(steps, first)


def _check_files(coco: dict, name: str, images_dir: str) -> None:
    images = coco["images"]
    if not os.path.isdir(images_dir):
        raise DataError(f"{images_dir}: no such image directory; give the one that {name} is for")
    path_of = partial(os.path.join, images_dir)
    missing = [image for image in images if not os.path.isfile(path_of(image["file_name"]))]
    if missing:
        raise DataError(
            f"{path_of(printable(missing[0]['file_name'], 200))}: no such file (image id "
            f"{missing[0]['id']}, field 'file_name' in {name}); {len(missing)} of {len(images)} "
            "images are missing: add them, or give their directory"
        )
    for entry in images if len(images) <= 2000 else images[:200]:
        path = path_of(entry["file_name"])
        with explain(path, "replace it"), open_file(path) as file, Image.open(file) as image:
            is_plain = image.size == (entry["width"], entry["height"])
            if is_plain and (image.format != "PNG" or "exif" in image.info):  # a PNG would load
                is_plain = image.getexif().get(EXIF_ORIENTATION, 1) == 1
        if not is_plain:  # let the loader decide, which knows how to rotate
            check_size(_load_image(Path(images_dir), "stretch", entry), entry, name)


# --- run-length codes and polygons ---------------------------------------------------------------


def run_lengths(code: dict) -> np.ndarray:
    """The runs of a run-length code {"size": [h, w], "counts": ...}, int64 [R].

    Runs go down the columns of the mask, off and on in turn, off first. "counts" is their list, or
    COCO's text. Each character of the text (its code less 48) has five bits of a number, low bits
    first. Its sixth bit says that the number goes on. Numbers are signed. From the fourth on, a
    number is the difference to the run before the last one. An array holds the runs themselves.

    Raises ValueError unless the runs fill the h*w pixels exactly. pycocotools does not check this:
    it leaves pixels uninitialized or never returns.
    """
    counts, pixels = code["counts"], math.prod(code["size"])
    if isinstance(counts, np.ndarray):
        runs = counts
    elif isinstance(counts, list):
        are_numbers = all(type(run) is int for run in counts)
        if not are_numbers or min(counts, default=0) < 0 or max(counts, default=0) > pixels:
            raise ValueError("counts that are not the lengths of runs")
        runs = np.array(counts, dtype=np.int64)
    else:
        text = counts.encode() if isinstance(counts, str) else counts
        bits = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
        # Where each number ends and starts, and how many characters it has (at most 6).
        last = np.flatnonzero(bits < 32)
        first = np.concatenate([[0], last + 1])
        length = np.diff(first)
        is_whole = first[-1] == len(bits) and length.max(initial=0) <= 6
        if not is_whole or (bits < 0).any() or (bits > 63).any():
            raise ValueError("counts that are not a run-length code")
        # The sum of a number's bits, each in its place. The highest bit is the sign.
        place = 5 * (np.arange(len(bits)) - np.repeat(first[:-1], length))
        runs = np.add.reduceat((bits & 31) << place, first[:-1])
        runs -= (bits[last] & 16) << (5 * length - 4)
        # From differences to runs.
        runs[1::2] = runs[1::2].cumsum()
        runs[2::2] = runs[2::2].cumsum()
    if (runs < 0).any() or runs.sum() != pixels:
        raise ValueError(f"counts that do not add up to its {pixels} pixels")
    return runs


def decode_mask(code: dict) -> np.ndarray:
    """The mask of a run-length code: bool [h, w]. ValueError if the code is broken."""
    height, width = code["size"]
    runs = run_lengths(code)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _code_extents(code: dict) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the mask of a run-length code; zeros if it has no pixel."""
    runs, height = run_lengths(code), code["size"][0]
    ends, runs = runs.cumsum()[1::2], runs[1::2]
    first, last = (ends - runs)[runs > 0], ends[runs > 0] - 1  # pixels of each run that is on
    if not len(first):
        return 0, 0, 0, 0
    top, bottom = (first % height).min(), (last % height).max()
    if (first // height < last // height).any():  # from one column into the next
        top, bottom = 0, height - 1
    return first[0] // height, top, last[-1] // height + 1, bottom + 1


def encode_mask(
    mask: np.ndarray, corner: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None
) -> dict:
    """The run-length code, with COCO's text, of a mask that is known in a window: `mask`, bool
    [r, c], starts at `corner` (row, column) of an image of `size` (h, w), which is off elsewhere.
    Without corner and size it is the whole image.
    """
    (top, left), (height, width) = corner, size or mask.shape
    columns = mask.T
    if len(mask) == height:  # runs go on from the end of a column to the start of the next one
        columns = columns.reshape(1, -1)
    # Where each column turns on or off, as numbers of the image's pixels, counted down its columns.
    padded = np.zeros((columns.shape[0], columns.shape[1] + 2), dtype=bool)
    padded[:, 1:-1] = columns
    column, row = np.nonzero(padded[:, 1:] != padded[:, :-1])
    runs = np.diff((left + column) * height + top + row, prepend=0, append=height * width)
    runs = runs if runs[-1] else runs[:-1]
    code = rle_codec.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode()}


# The edges of a pixel, clockwise: the neighbor behind it, where it starts, and where it leads, each
# as (y, x) from the pixel or from the start.
EDGES = (
    ((-1, 0), (0, 0), (0, 1)),  # the upper one, to the right
    ((0, 1), (0, 1), (1, 0)),  # the right one, down
    ((1, 0), (1, 1), (0, -1)),  # the lower one, to the left
    ((0, -1), (1, 0), (-1, 0)),  # the left one, up
)


def polygons(mask: np.ndarray, top: int = 0, left: int = 0) -> list[list[float]]:
    """The outlines of a mask, bool [h, w], along the edges of its pixels, as COCO's polygons
    [[x, y, x, y, ...], ...]. pycocotools makes the same mask of them again.

    There is one polygon for each connected part (diagonal pixels do not connect). COCO has no
    holes. So a line leads from the part's outline to the hole's and back, with nothing between.
    `top`, `left`: the place of the mask in its image.
    """
    padded, loop_of_edge, part_of_loop = np.pad(mask, 1), {}, []
    parts: list[list[tuple[int, int]]] = []
    for edges, corners in sorted(outlines(padded)):  # from left to right
        points = [(x - 1 + left, y - 1 + top) for x, y in corners]
        x, y = edges[0]
        if padded[y, x]:  # the mask is on the right of its leftmost edge: a new part
            part_of_loop.append(len(parts))
            parts.append(points)
        else:  # a hole. On its left its part ends at an outline that is known already
            start = int(np.flatnonzero(~padded[y, :x])[-1]) + 1
            part_of_loop.append(part_of_loop[loop_of_edge[start, y]])
            outer = parts[part_of_loop[-1]]
            outer += [outer[0], *points, points[0]]
        loop_of_edge |= dict.fromkeys(edges, len(part_of_loop) - 1)
    return [[float(value) for point in points for value in point] for points in parts]


def outlines(padded: np.ndarray) -> Iterator[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """The loops of edges between pixels on and off, the former on the right hand. Yields for each
    loop its vertical edges, from left to right, as (x, y of the pixel on their right), and its
    corners (x, y). The outermost pixels are off."""
    edges = set()  # (y, x) of the start, and which of EDGES
    for side, (neighbor, (y_start, x_start), _) in enumerate(EDGES):
        is_edge = padded & ~np.roll(padded, [-step for step in neighbor], (0, 1))
        edges |= {(y + y_start, x + x_start, side) for y, x in np.argwhere(is_edge).tolist()}
    free = edges.copy()
    while free:
        edge = first = min(free)
        vertical, corners = [], []
        while not corners or edge != first:
            free.discard(edge)
            y, x, side = edge
            if side in (1, 3):
                vertical.append((x, y - (side == 3)))
            y, x = y + EDGES[side][2][0], x + EDGES[side][2][1]
            turns = ((y, x, (side + turn) % 4) for turn in (1, 0, 3))  # to the right, if possible
            edge = next(turn for turn in turns if turn in edges)
            if edge[2] != side:
                corners.append((x, y))
        yield sorted(vertical), corners


# --- image files ----------------------------------------------------------------------------------


def check_size(image: np.ndarray, entry: dict, name: str) -> None:
    height, width = image.shape[:2]
    if (width, height) != (entry["width"], entry["height"]):
        raise DataError(
            f"{name}: image id {entry['id']} ({entry['file_name']}): fields 'width' and 'height' "
            f"say {entry['width']}x{entry['height']}, the image (upright, if EXIF rotates it) has "
            f"{width}x{height} pixels; correct them, and boxes made for another size"
        )


def image_loader(images_dir: str | Path, contrast: str = "none") -> Callable[[dict], np.ndarray]:
    """A function from an image entry to its file's pixels, upright, RGB uint8 [h, w, 3]."""
    return partial(_load_image, Path(images_dir), contrast)


def _load_image(images_dir: Path, contrast: str, entry: dict) -> np.ndarray:
    """Any PIL mode as RGB: EXIF rotation applied, the first of several frames.

    Alpha is dropped, as COCO recipes do: the colors under it stay. With contrast "stretch" the
    values are stretched before they become 8 bits (`stretch_contrast`). With "none", 16 bits become
    8 by 255/65535. Mode I counts as 16 bits if a value is over 255, else as 8. Floating point has
    no agreed range and is refused.
    """
    path = images_dir / entry["file_name"]
    remedy = "replace it, or remove it from the JSON"
    with explain(str(path), remedy), open_file(path) as raw, Image.open(raw) as file:
        image = ImageOps.exif_transpose(file)
        if not image.mode.startswith(("I", "F")):
            pixels = np.array(image.convert("RGB"))
            return stretch_contrast(pixels) if contrast == "stretch" else pixels
        gray = np.asarray(image)
        if contrast == "stretch":
            gray = stretch_contrast(gray)
        elif image.mode == "F":
            raise ValueError(
                "floating-point pixels have no agreed range: save 8 or 16 bits, or use --contrast"
                " stretch"
            )
        elif gray.min() < 0 or gray.max() > 65535:
            raise ValueError(
                "32-bit pixels beyond 0..65535: save 8 or 16 bits, or use --contrast stretch"
            )
        elif image.mode != "I" or gray.max() > 255:
            gray = (gray.astype(np.int64) * 255 + 32767) // 65535
        return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)


def stretch_contrast(pixels: np.ndarray) -> np.ndarray:
    """Map the image's 0.5th percentile to 0 and its 99.5th to 255, linearly, and cut the rest off.

    The percentiles are those of all values, so the channels of a color image keep their ratios to
    each other, and a second stretch changes nothing. An image of (nearly) one value becomes 0.
    pixels of any shape and number type. Returns uint8. Raises ValueError for NaN and infinity.
    """
    if not np.isfinite(pixels).all():
        raise ValueError("pixels that are not finite numbers")
    low = float(np.percentile(pixels, 0.5, method="lower"))
    high = float(np.percentile(pixels, 99.5, method="higher"))
    scaled = (pixels.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)
