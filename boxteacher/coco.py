"""Files in COCO's format, read and checked: the JSON, its run-length codes and its images."""

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
from pycocotools import mask as rle_codec

from .errors import UserError

# COCO train2017 has two boxes of height 0 (github.com/cocodataset/cocoapi/issues/355). They are
# left out. All other empty boxes are refused.
KNOWN_EMPTY_BOXES = {(200365, 296.65, 388.33), (550395, 9.98, 188.56)}  # image id, x, y
EXIF_ORIENTATION = 0x0112


class DataError(UserError):
    """Data that cannot be used. The message is one line: file, entry and field, what to do."""

    def __init__(self, message: str) -> None:
        # A DataLoader makes a worker's error anew from its whole traceback. The last line counts.
        super().__init__(message.splitlines()[-1].removeprefix(f"{__name__}.DataError: "))


@contextmanager
def explain(what: str, remedy: str) -> Iterator[None]:
    """Turn what decoders raise (OSError, SyntaxError, struct.error, ...) into one DataError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{what} cannot be read ({reason}); {remedy}") from None


# --- reading and checking -------------------------------------------------------------------------


def read_coco(json_path: str | Path, images_dir: str | Path) -> dict:
    """Read a COCO instances JSON and check it and its images. Masks ("segmentation") are optional.

    All image files must exist, and their headers must have the JSON's sizes. Headers are read of
    all images if there are at most 2000, else of the first 200. The other images are checked when
    they are loaded. Returns the dict, with "json_path" added for later messages.
    """
    name = str(json_path)
    with explain(name, "give a JSON file in COCO's format"):
        coco = json.loads(Path(json_path).read_bytes())
    check_coco(coco, name)
    _check_files(coco, name, Path(images_dir))
    return {**coco, "json_path": name}


def check_coco(coco: dict, name: str) -> None:
    """Raise DataError unless `coco` is a usable COCO dict. `name`, its file, opens the message."""
    for problem in _problems(coco):
        raise DataError(f"{name}: {problem}")


def _problems(coco: object) -> Iterator[str]:
    """What is wrong, one line each. Only the first counts: each check relies on those above it."""
    # The three lists, each with ids of its own.
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

    # Each image has a file and a size, each category a name of its own.
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

    # Each annotation belongs to an image and a category. Its box and mask fit the image.
    for annotation in coco["annotations"]:
        where = f"annotation id {annotation['id']}: field"
        for field, key in (("image_id", "images"), ("category_id", "categories")):
            if not _is_int(value := annotation.get(field)) or value not in ids[key]:
                yield f"{where} '{field}': no such id in '{key}': {short_repr(value)}; correct it"
        image = ids["images"][annotation["image_id"]]
        if problem := _box_problem(annotation.get("bbox"), image):
            what = f"'bbox' (image id {image['id']}) {problem}"
            yield f"{where} {what}; correct it or remove the annotation"
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
    """Like _box_problem, for nothing, polygons [[x, y, ...], ...] or a run-length code."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            is_list = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
            if not is_list or not all(map(_is_finite, polygon)):
                return f"has a polygon that is not 3 points or more: {short_repr(polygon)}"
    elif segmentation:
        counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
        if not isinstance(counts, (str, list)):
            return "is neither polygons nor a run-length code"
        size = [image["height"], image["width"]]
        if segmentation.get("size") != size:
            return f"has size {short_repr(segmentation.get('size'))}, its image {size} (h, w)"
        try:
            run_lengths(segmentation)
        except ValueError as error:
            return f"has {error}"
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
            "add them, or give their directory"
        )
    for entry in images if len(images) <= 2000 else images[:200]:
        path = images_dir / entry["file_name"]
        with explain(str(path), "replace it"), Image.open(path) as image:
            is_plain = image.size == (entry["width"], entry["height"])
            if is_plain and (image.format != "PNG" or "exif" in image.info):  # a PNG would load
                is_plain = image.getexif().get(EXIF_ORIENTATION, 1) == 1
        if not is_plain:  # let the loader decide, which knows how to rotate
            check_size(_load_image(images_dir, "stretch", entry), entry, name)


# --- run-length codes and polygons ---------------------------------------------------------------


def run_lengths(code: dict) -> np.ndarray:
    """The runs of a run-length code {"size": [h, w], "counts": ...}, int64 [R].

    Runs go down the columns of the mask, off and on in turn, off first. "counts" is their list, or
    COCO's text. Each character of the text (its code less 48) has five bits of a number, low bits
    first. Its sixth bit says that the number goes on. Numbers are signed. From the fourth on, a
    number is the difference to the run before the last one.

    Raises ValueError unless the runs fill the h*w pixels exactly. pycocotools does not check this:
    it leaves pixels uninitialized or never returns.
    """
    counts, pixels = code["counts"], math.prod(code["size"])
    if isinstance(counts, list):
        if not all(_is_int(run) and 0 <= run <= pixels for run in counts):
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
    return functools.partial(_load_image, Path(images_dir), contrast)


def _load_image(images_dir: Path, contrast: str, entry: dict) -> np.ndarray:
    """Any PIL mode as RGB: EXIF rotation applied, the first of several frames.

    Alpha is dropped, as COCO recipes do: the colors under it stay. With contrast "stretch" the
    values are stretched before they become 8 bits (`stretch_contrast`). With "none", 16 bits become
    8 by 255/65535. Mode I counts as 16 bits if a value is over 255, else as 8. Floating point has
    no agreed range and is refused.
    """
    path = images_dir / entry["file_name"]
    with explain(str(path), "replace it, or remove it from the JSON"), Image.open(path) as file:
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
