"""Files in COCO's format, read and checked: the JSON and its images."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short_repr

import numpy as np
from PIL import Image, ImageOps

from .errors import UserError

# COCO train2017 has two boxes of height 0 (github.com/cocodataset/cocoapi/issues/355), left out
# here; all other empty boxes are refused.
KNOWN_EMPTY_BOXES = {(200365, 296.65, 388.33), (550395, 9.98, 188.56)}  # image id, x, y
EXIF_ORIENTATION = 0x0112


class DataError(UserError):
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


# --- reading and checking -------------------------------------------------------------------------


def read_coco(json_path: str | Path, images_dir: str | Path, check_images: bool = True) -> dict:
    """Read a COCO instances JSON and check it. Masks ("segmentation") are optional.

    check_images: all files must exist, and the sizes in their headers must be the JSON's. Sizes
    are read of all images if there are at most 2000, else of the first 200; the others are
    checked when they are loaded. Returns the dict, with "json_path" added for later messages.
    """
    name, images_dir = str(json_path), Path(images_dir)
    with explain(name, "give a JSON file in COCO's format"):
        coco = json.loads(Path(json_path).read_bytes())
    check_coco(coco, name)
    if check_images:
        _check_files(coco, name, images_dir)
    return {**coco, "json_path": name}


def check_coco(coco: dict, name: str) -> None:
    """Raise DataError unless `coco` is a usable COCO dict; `name`, its file, opens the message."""
    for problem in _problems(coco):
        raise DataError(f"{name}: {problem}")


def _problems(coco: object) -> Iterator[str]:
    """What is wrong, one line each. Only the first counts: each check relies on those above it."""
    if not isinstance(coco, dict):
        yield f"the top level is a {type(coco).__name__}; expected an object in COCO's format"
    ids: dict[str, dict[int, dict]] = {}
    for key in ("images", "categories", "annotations"):
        entries, ids[key] = coco.get(key), {}
        if not isinstance(entries, list) or not (entries or key == "annotations"):
            yield f"field '{key}' is missing, not a list or empty; expected COCO's format"
        for position, entry in enumerate(entries):
            where = f"{key}[{position}]: field 'id'"
            if not isinstance(entry, dict) or not _is_int(entry.get("id")):
                yield f"{where} is missing or not a whole number; give each entry its own number"
            if entry["id"] in ids[key]:
                yield f"{where}: {entry['id']} is a duplicate; give each entry its own number"
            ids[key][entry["id"]] = entry
    for image in coco["images"]:
        where = f"image id {image['id']}: field"
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            yield f"{where} 'file_name' is missing or not text; add the name of the image's file"
        for side in ("width", "height"):
            if not _is_int(value := image.get(side)) or value <= 0:
                found = f"found {short_repr(value)}; write the file's {side} in pixels"
                yield f"{where} '{side}' must be a positive whole number, {found}"
    names = set()
    for category in coco["categories"]:
        where, value = f"category id {category['id']}: field 'name'", category.get("name")
        if not isinstance(value, str) or not value:
            yield f"{where} is missing or not text; add the class's name"
        if value in names:
            yield f"{where}: {value!r} is a duplicate; give each category its own name"
        names.add(value)
    for annotation in coco["annotations"]:
        where = f"annotation id {annotation['id']}: field"
        for field, key in (("image_id", "images"), ("category_id", "categories")):
            if not _is_int(value := annotation.get(field)) or value not in ids[key]:
                yield f"{where} '{field}': no such id in '{key}': {short_repr(value)}; correct it"
        image = ids["images"][annotation["image_id"]]
        if problem := _box_problem(annotation.get("bbox"), image):
            found = f"(image id {image['id']}) {problem}; correct it or remove the annotation"
            yield f"{where} 'bbox' {found}"
        if problem := _mask_problem(annotation.get("segmentation"), image):
            yield f"{where} 'segmentation' {problem}; correct it, or remove it to use the box alone"


def _box_problem(box: object, image: dict) -> str:
    """What is wrong with an [x, y, width, height]; empty if nothing."""
    if box is None:
        return "is missing"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        return f"must be four finite numbers [x, y, width, height], found {short_repr(box)}"
    x, y, width, height = box
    if min(width, height) <= 0 and (image["id"], x, y) not in KNOWN_EMPTY_BOXES:
        return f"{box} [x, y, width, height] has a width or height that is zero or negative"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return f"{box} lies outside its image of {image['width']}x{image['height']} pixels"
    return ""


def _mask_problem(segmentation: object, image: dict) -> str:
    """Like _box_problem, for nothing, polygons [[x, y, ...], ...] or an RLE {"size", "counts"}."""
    size = [image["height"], image["width"]]
    if isinstance(segmentation, list):
        for polygon in segmentation:
            is_list = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
            if not is_list or not all(map(_is_finite, polygon)):
                return f"has a polygon that is not 3 points or more: {short_repr(polygon)}"
    elif segmentation:
        counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
        if not isinstance(counts, (str, list)):
            return "is neither polygons nor a run-length code"
        if segmentation.get("size") != size:
            return f"has size {short_repr(segmentation.get('size'))}, its image {size} (h, w)"
        is_whole = isinstance(counts, str) or all(_is_int(n) and n >= 0 for n in counts)
        if not is_whole or (isinstance(counts, list) and sum(counts) != math.prod(size)):
            return "has counts that do not add up to its image's pixels"
    return ""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12  # false for NaN


def _check_files(coco: dict, name: str, images_dir: Path) -> None:
    images = coco["images"]
    if not images_dir.is_dir():
        raise DataError(f"{images_dir}: no such image directory; give the one that {name} is for")
    missing = [image for image in images if not (images_dir / image["file_name"]).is_file()]
    if missing:
        raise DataError(
            f"{images_dir / missing[0]['file_name']}: no such file (image id {missing[0]['id']}, "
            f"field 'file_name' in {name}); {len(missing)} of {len(images)} images are missing: "
            f"add them, or give their directory"
        )
    for entry in images if len(images) <= 2000 else images[:200]:
        path = images_dir / entry["file_name"]
        with explain(str(path), "replace it"), Image.open(path) as image:
            is_plain = image.size == (entry["width"], entry["height"])
            if is_plain and (image.format != "PNG" or "exif" in image.info):  # a PNG would load
                is_plain = image.getexif().get(EXIF_ORIENTATION, 1) == 1
        if not is_plain:  # let the loader decide, which knows how to rotate
            check_size(_load_image(images_dir, entry), entry, name)


def image_loader(images_dir: str | Path) -> Callable[[dict], np.ndarray]:
    """A function from an image entry to its file's pixels, upright, RGB uint8 [h, w, 3]."""
    return functools.partial(_load_image, Path(images_dir))


def _load_image(images_dir: Path, entry: dict) -> np.ndarray:
    """Any PIL mode as RGB: EXIF rotation applied, the first of several frames.

    Alpha is dropped, not composed, as COCO recipes do: the colors under it stay. 16 bits become
    8 by 255/65535 (so stretch 12-bit images beforehand); mode I is taken for 16 bits if a value
    is over 255, for 8 otherwise. Floating point has no agreed range and is refused.
    """
    path = images_dir / entry["file_name"]
    with explain(str(path), "replace it, or remove it from the JSON"), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range, save 8 or 16 bits")
        if not image.mode.startswith("I"):
            return np.array(image.convert("RGB"))
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("32-bit pixels beyond 0..65535, save 8 or 16 bits")
        if image.mode != "I" or gray.max() > 255:
            gray = (gray * 255 + 32767) // 65535
        return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
