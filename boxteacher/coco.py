"""Files in COCO's format, read and checked: the JSON and its images."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from reprlib import repr as short_repr
from typing import BinaryIO

import numpy as np
from PIL import Image

from .errors import UserError, printable
from .masks import REACH, are_finite, mask_extents
from .plausible import doubts, likely_form

# COCO train2017 has two boxes of height 0 (github.com/cocodataset/cocoapi/issues/355). They are
# left out. All other empty boxes are refused.
KNOWN_EMPTY_BOXES = {(200365, 296.65, 388.33), (550395, 9.98, 188.56)}  # image id, x, y
EXIF_ORIENTATION = 0x0112
PNG_EXIF = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where PNGs have it
TURNS = {  # orientation -> how the stored image becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 178_956_970  # of an image: Pillow opens none that is larger


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


class Faults:
    """What is wrong with a file: all of it in one line."""

    def __init__(self, name: str, error: type[UserError] = DataError) -> None:
        self.name, self.error, self.texts = name, error, []

    def add(self, wheres: Sequence[str], text: str, count: int = 1) -> None:
        """A fault of `count` entries, the first of which are `wheres`. The text is about the first
        one."""
        more = ", ".join(wheres[1:5]) + ", ..." * (count > 5)
        more = f" (and {count - 1} more: {more})" if count > 1 else ""
        self.texts.append(f"{wheres[0]}: {text}{more}")

    def sift(
        self,
        where: Callable[[dict], str],
        entries: list[dict],
        field: str,
        problem: Callable[[dict], str],
        are_fine: Callable[[list], bool] = lambda values: False,
    ) -> list[dict]:
        """The entries whose field has no `problem`: a text, empty if there is none. `are_fine` sees
        all values at once, which is fast. It may be wrong about good ones, but not about bad ones.
        """
        if are_fine([entry.get(field) for entry in entries]):
            return entries
        texts = [problem(entry) for entry in entries]
        bad = [(entry, text) for entry, text in zip(entries, texts, strict=True) if text]
        if bad:
            wheres = [where(entry) for entry, _ in bad[:5]]
            self.add(wheres, f"field '{field}' {bad[0][1]}", len(bad))
        return [entry for entry, text in zip(entries, texts, strict=True) if not text]

    def masks(
        self,
        where: Callable[[dict], str],
        entries: list[dict],
        field: str,
        sizes: np.ndarray,
        remedy: str,
    ) -> np.ndarray:
        """The extents of the entries' masks (`mask_extents`), after a check."""
        extents, bad = mask_extents([entry.get(field) for entry in entries], sizes)
        if bad:
            first = sorted(bad)[:5]
            wheres = [where(entries[i]) for i in first]
            self.add(wheres, f"field '{field}' {bad[first[0]]}; {remedy}", len(bad))
        return extents

    def raise_any(self, remark: str = "") -> None:
        if self.texts:
            raise self.error(f"{self.name}: {'. Also: '.join(self.texts)}{remark}")


IMAGE, CATEGORY, ANNOTATION = (
    f"{kind} id {{id}}".format_map for kind in ("image", "category", "annotation")
)


def check_coco(coco: dict, name: str) -> list[str]:
    """Raise DataError unless `coco` is a usable COCO dict. `name`, its file, opens the message.

    The message has each kind of fault once, with the first entries that have it and their number.
    Returns notes about what is usable, but can hardly be meant (plausible.py).
    """
    faults = Faults(name)
    check_lists(coco, faults)
    text = partial(_text_problem, "file_name")
    faults.sift(IMAGE, coco["images"], "file_name", text, _are_texts)
    boxes, sizes, extents = check_entries(coco, faults)
    annotations, images = coco["annotations"], {image["id"]: image for image in coco["images"]}

    # Each box lies in its image.
    def are_in_place(_: list) -> bool:
        corners, far = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), REACH * sizes.max(1)
        is_in_place = (boxes[:, 2:] > 0) & (corners[:, :2] < sizes) & (corners[:, 2:] > 0)
        return bool((is_in_place & (abs(corners).max(1) <= far)[:, None]).all())

    place = partial(_place_problem, images)
    in_place = faults.sift(ANNOTATION, annotations, "bbox", place, are_in_place)
    cause = likely_form(boxes, None, sizes) if len(in_place) < len(annotations) else ""
    if len(boxes) and boxes.max() <= 1 and sizes.min() > 4:
        faults.add(["field 'bbox'"], "all boxes lie in the first pixel; give pixels, not fractions")
    faults.raise_any(cause)

    # What can hardly be meant.
    notes = []
    if annotations:
        areas = np.array([annotation.get("area") for annotation in annotations], float)
        notes = doubts([a["id"] for a in annotations], boxes, extents, sizes, areas)
    keys = np.array([(a["image_id"], a["category_id"]) for a in annotations]).reshape(-1, 2)
    keys = np.hstack([keys.astype(np.int64).view(float), boxes + 0.0])  # -0.0 is 0.0
    repeated = len(keys) - len(np.unique(keys.view(np.void(48).dtype)))
    shared = len(images) - len({image["file_name"] for image in coco["images"]})
    for count, what in (
        (repeated, "annotations repeat the image, class and box of another"),
        (shared, "images repeat the file of another; the objects of a file belong to one image"),
    ):
        notes += [f"{count} {what}"] if count else []
    return [f"{name}: {note}" for note in notes]


def check_lists(coco: dict, faults: Faults) -> None:
    """Raise unless there are the three lists of objects, each with ids of its own."""
    if not isinstance(coco, dict):
        what = f"is a {type(coco).__name__}; expected an object in COCO's format"
        raise faults.error(f"{faults.name}: the top level {what}")
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


def check_entries(coco: dict, faults: Faults) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raise unless each field that training or evaluation takes has the right type and range.
    Lists and ids are checked already, files and the places of boxes are not.

    Returns of the annotations boxes [A, 4] (x, y, width, height), the sizes of their images [A, 2]
    (width, height), and the extents of their masks [A, 4] (`mask_extents`).
    """
    # Each image has a size, each category a name of its own.
    images = coco["images"]
    for side in ("width", "height"):
        images = faults.sift(IMAGE, images, side, partial(_side_problem, side))
    faults.sift(IMAGE, images, "width", _pixels_problem)
    categories = coco["categories"]
    categories = faults.sift(CATEGORY, categories, "name", partial(_text_problem, "name"))
    faults.sift(CATEGORY, categories, "name", partial(_name_problem, set()))
    faults.raise_any()

    # Each annotation belongs to an image and a category. Its fields have the right types.
    annotations = check_ids_of(coco, coco["annotations"], ANNOTATION, faults)
    for field, problem, are_fine in (
        ("iscrowd", _crowd_problem, _are_crowds),
        ("area", _area_problem, _are_areas),
        ("bbox", _box_problem, are_boxes),
    ):
        annotations = faults.sift(ANNOTATION, annotations, field, problem, are_fine)
    boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
    sizes = image_sizes(coco, annotations)
    remedy = "correct it, or use the box alone"
    extents = faults.masks(ANNOTATION, annotations, "segmentation", sizes, remedy)
    faults.raise_any()
    return boxes, sizes, extents


def check_ids_of(
    coco: dict, entries: list[dict], where: Callable[[dict], str], faults: Faults
) -> list[dict]:
    """The annotations or results that belong to an image and a category of `coco`."""
    for field, key in (("image_id", "images"), ("category_id", "categories")):
        ids = {entry["id"] for entry in coco[key]}
        problem, are_known = partial(_id_problem, field, ids, key), partial(_are_known, ids)
        entries = faults.sift(where, entries, field, problem, are_known)
    return entries


def image_sizes(coco: dict, entries: list[dict]) -> np.ndarray:
    """int [E, 2]: width and height of the images of annotations or results."""
    sizes = np.array([(image["width"], image["height"]) for image in coco["images"]])
    number_of = {image["id"]: number for number, image in enumerate(coco["images"])}
    return sizes[np.array([number_of[entry["image_id"]] for entry in entries], dtype=int)]


def _check_ids(key: str, entries: list, faults: Faults) -> None:
    remedy = "give each entry its own number"
    bad = [i for i, e in enumerate(entries) if type(e) is not dict or not _is_id(e.get("id"))]
    if bad:
        text = f"field 'id' is missing or not a whole number of at most 64 bits; {remedy}"
        faults.add([f"{key}[{i}]" for i in bad[:5]], text, len(bad))
        return
    ids, seen = [entry["id"] for entry in entries], set()
    if len(set(ids)) < len(ids):
        twice = [i for i, number in enumerate(ids) if number in seen or seen.add(number)]
        text = f"field 'id': {ids[twice[0]]} is a duplicate; {remedy}"
        faults.add([f"{key}[{i}]" for i in twice[:5]], text, len(twice))


# Each of these tells what is wrong with a field of an entry, and what to do; "" if nothing is.
# Its short form, `_are_...`, sees the values of all entries.


def _text_problem(field: str, entry: dict) -> str:
    if isinstance(entry.get(field), str) and entry[field]:
        return ""
    what = {"file_name": "name of the image's file", "name": "class's name"}[field]
    return f"is missing or not text; add the {what}"


def _are_texts(values: list) -> bool:
    return set(map(type, values)) == {str} and all(values)


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


def _id_problem(field: str, ids: set[int], key: str, entry: dict) -> str:
    if type(value := entry.get(field)) is int and value in ids:
        return ""
    return f"has no such id in '{key}': {short_repr(value)}; correct it"


def _are_known(ids: set[int], values: list) -> bool:
    return {int}.issuperset(map(type, values)) and ids.issuperset(values)


def _crowd_problem(annotation: dict) -> str:
    if (value := annotation.get("iscrowd")) in (None, 0, 1):
        return ""
    return f"must be 0 or 1, found {short_repr(value)}; correct it or leave it out"


def _are_crowds(values: list) -> bool:
    return {int, type(None)}.issuperset(map(type, values)) and {0, 1, None}.issuperset(values)


def _area_problem(annotation: dict) -> str:
    if (value := annotation.get("area")) is None or (are_finite([value]) and value >= 0):
        return ""
    found = f"found {short_repr(value)}; correct it or leave it out"
    return f"must be a finite number of pixels, 0 or more, {found}"


def _are_areas(values: list) -> bool:
    values = [value for value in values if value is not None]
    return are_finite(values) and min(values, default=0) >= 0


def _box_problem(entry: dict) -> str:
    if are_boxes([box := entry.get("bbox")]):
        return ""
    form = f"must be four finite numbers [x, y, width, height], found {short_repr(box)}"
    form = "is missing" if box is None else form
    return f"(image id {entry['image_id']}) {form}; correct it or remove the annotation"


def are_boxes(values: list) -> bool:
    are_lists = {list}.issuperset(map(type, values)) and {4}.issuperset(map(len, values))
    return are_lists and are_finite([*chain.from_iterable(values)])


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


def _is_id(value: object) -> bool:
    return type(value) is int and abs(value) < 2**63


# --- the files of images, before they are loaded ---


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
            # Of a PNG without any of these, getexif would decode the pixels to look behind them.
            if is_plain and (image.format != "PNG" or image.info.keys() & PNG_EXIF):
                is_plain = orientation(image) == 1
        if not is_plain:  # let the loader decide, which knows how to rotate
            check_size(_load_image(Path(images_dir), "stretch", entry), entry, name)


# --- image files ----------------------------------------------------------------------------------


def check_size(image: np.ndarray, entry: dict, name: str) -> None:
    height, width = image.shape[:2]
    if (width, height) != (entry["width"], entry["height"]):
        raise DataError(
            f"{name}: image id {entry['id']} ({entry['file_name']}): fields 'width' and 'height' "
            f"say {entry['width']}x{entry['height']}, the image (upright, if EXIF rotates it) has "
            f"{width}x{height} pixels; correct them, and boxes made for another size"
        )


def orientation(image: Image.Image) -> int:
    """EXIF's. It is 1, upright, where there is none, or none that can be read."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow fails for damaged EXIF data in many ways
        return 1


def upright(image: Image.Image) -> Image.Image:
    """The image as EXIF turns it. `ImageOps.exif_transpose` also writes the other tags again, and
    fails if one of them is malformed."""
    image.load()  # Pillow turns TIFF files itself
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def image_loader(images_dir: str | Path, contrast: str = "none") -> Callable[[dict], np.ndarray]:
    """A function from an image entry to its file's pixels, upright, RGB uint8 [h, w, 3]."""
    return partial(_load_image, Path(images_dir), contrast)


def _load_image(images_dir: Path, contrast: str, entry: dict) -> np.ndarray:
    """Any PIL mode as RGB: EXIF rotation applied, the first of several frames.

    Alpha is dropped, as COCO recipes do: the colors under it stay. With contrast "stretch" gray
    values are stretched before they become 8 bits (`stretch_contrast`). With "none", 16 bits become
    8 by 255/65535. Mode I counts as 16 bits if a value is over 255, else as 8. Floating point has
    no agreed range and is refused. Pillow reads 16-bit files with color or alpha as 8 bits.
    """
    path = images_dir / entry["file_name"]
    remedy = "replace it, or leave it out"
    with explain(str(path), remedy), open_file(path) as raw, Image.open(raw) as file:
        image = upright(file)
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
    each other, and a second stretch changes nothing. If the two are equal, the least and greatest
    value take their places. An image of one value becomes 0.
    pixels of any shape and number type. Returns uint8. Raises ValueError for NaN and infinity.
    """
    if not np.isfinite(pixels).all():
        raise ValueError("pixels that are not finite numbers")
    low = float(np.percentile(pixels, 0.5, method="lower"))
    high = float(np.percentile(pixels, 99.5, method="higher"))
    if high <= low:
        low, high = float(pixels.min()), float(pixels.max())
    scaled = (pixels.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)
