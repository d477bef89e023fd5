"""How Pascal VOC, Cityscapes and the 2018 Data Science Bowl lay out images, boxes and masks.

Each reader takes the folder as it is distributed, and files that list images. It returns the sets
of images in it. A box is COCO's [x, y, width, height] in pixels, x and y from the corner.

h, w pixels of an image
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from boxteacher.coco import DataError, explain, open_file
from boxteacher.masks import encode_mask

Objects = list[dict[str, Any]]  # COCO annotations without ids: category_id, bbox, segmentation ...
Reader = Callable[[Path, tuple[int, int], Counter], tuple[Objects, dict[str, Any]]]


class ImageSet(NamedTuple):
    """`read` takes a file of `files`, its (h, w), and a counter of what it leaves out. It returns
    the objects in the image, and fields for the image's entry."""

    name: str
    folder: Path  # file names are relative to it
    classes: dict[int, str]  # category id -> name
    files: list[Path]
    read: Reader


# --- what formats have in common ------------------------------------------------------------------


def require(source: Path, what: str, parts: Sequence[str]) -> None:
    """Raise DataError unless the folder `source` holds all of `parts`."""
    if any(not (source / part).exists() for part in parts):
        found = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
        shown = ", ".join(found[:8]) + ", ..." * (len(found) > 8) or "no such folder, or nothing"
        raise DataError(f"{source}: not {what}: expected {', '.join(parts)}, found {shown}")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    with explain(str(path), "give a text file"):
        return [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]


def read_names(path: Path) -> list[str]:
    """The first word of each line, without folders and ending: lists of images come in many kinds
    (2007_000032, or /JPEGImages/2007_000032.jpg and the path of a mask after it)."""
    return [Path(line.split()[0]).stem for line in read_lines(path)]


def read_map(path: Path, size: tuple[int, int], mode: str = "") -> np.ndarray:
    """A picture of numbers, one for each pixel [h, w]. In memory column follows column, as RLE.
    With a `mode`, it is converted to that mode of Pillow before."""
    with explain(str(path), "replace it"), open_file(path) as file, Image.open(file) as image:
        numbers = np.asfortranarray(image.convert(mode) if mode else image)
    if numbers.shape != size:
        raise DataError(f"{path}: its image has {size} pixels (h, w), it has {numbers.shape}")
    return numbers


def mask_object(category_id: int, mask: np.ndarray) -> dict[str, Any]:
    """A mask bool [h, w] with its tight box."""
    code = encode_mask(mask)
    box = [int(side) for side in rle_codec.toBbox(code)]
    return {"category_id": category_id, "bbox": box, "segmentation": code}


# --- Pascal VOC 2012 ------------------------------------------------------------------------------

VOC_CLASSES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
    motorbike person pottedplant sheep sofa train tvmonitor""".split()
BORDER = 255  # in SegmentationObject: pixels of no object, around each object


def read_voc(source: Path, lists: Sequence[Path]) -> list[ImageSet]:
    """ImageSets/Segmentation/train.txt and val.txt, and the `lists`. A set has masks if all of its
    images have a file in SegmentationObject. Objects that are marked difficult count as others."""
    names = [f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val")]
    require(source, "Pascal VOC 2012", ["JPEGImages", "Annotations", *names])
    classes, sets = dict(enumerate(VOC_CLASSES, start=1)), []
    for path in [*(source / name for name in names), *lists]:
        ids, folder = read_names(path), source / "JPEGImages"
        masks = [source / "SegmentationObject" / f"{name}.png" for name in ids]
        with_masks = all(mask.is_file() for mask in masks)
        read = functools.partial(read_voc_image, source, with_masks)
        sets.append(ImageSet(path.stem, folder, classes, [folder / f"{i}.jpg" for i in ids], read))
    return sets


def read_voc_image(
    source: Path, with_masks: bool, path: Path, size: tuple[int, int], left_out: Counter
) -> tuple[Objects, dict[str, Any]]:
    """The boxes of the XML. Its corners are numbers of pixels, counted from 1, and both belong to
    the box. So x = xmin - 1 and width = xmax - xmin + 1. Some corners are not whole numbers.

    Masks come from the PNG, which does not say whose they are. The mask and the object whose boxes
    have the highest IoU belong together, then the next. What is left over is left out.
    """
    objects, xml = [], source / "Annotations" / f"{path.stem}.xml"
    with explain(str(xml), "replace it"):
        for element in ElementTree.parse(xml).getroot().findall("object"):
            corners = [element.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")]
            x1, y1, x2, y2 = map(float, corners)
            name = (element.findtext("name") or "").strip()
            box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            if not all(side > 0 for side in box[2:]):
                raise ValueError(f"an object without width or height: {corners}")
            if name not in VOC_CLASSES:
                raise ValueError(f"class {name!r} is none of VOC's 20")
            objects.append({"category_id": VOC_CLASSES.index(name) + 1, "bbox": box})
    if not with_masks:
        return objects, {}

    numbers = read_map(source / "SegmentationObject" / f"{path.stem}.png", size)
    masks = [mask_object(0, numbers == n) for n in np.unique(numbers) if n not in (0, BORDER)]
    boxes = [[found["bbox"] for found in group] for group in (masks, objects)]
    ious = np.reshape(rle_codec.iou(*boxes, [0] * len(objects)), (len(masks), len(objects)))
    for _ in range(min(ious.shape)):
        m, g = np.unravel_index(ious.argmax(), ious.shape)
        if ious[m, g] <= 0:
            break
        objects[g]["segmentation"] = masks[m]["segmentation"]
        ious[m], ious[:, g] = -1, -1
    kept = [found for found in objects if "segmentation" in found]
    left_out["objects without a mask"] += len(objects) - len(kept)
    left_out["masks without an object"] += len(masks) - len(kept)
    return kept, {}


# --- Cityscapes -----------------------------------------------------------------------------------

CITYSCAPES = {  # the classes with instances that are evaluated
    **{24: "person", 25: "rider", 26: "car", 27: "truck"},
    **{28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
# Ids of what evaluation ignores, from "unlabeled" to groups of trailers
CITYSCAPES_VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)


def read_cityscapes(source: Path) -> list[ImageSet]:
    """The sets train and val: the annotations of test are empty."""
    names = [f"{top}/{name}" for top in ("leftImg8bit", "gtFine") for name in ("train", "val")]
    require(source, "Cityscapes", names)
    sets, read = [], functools.partial(read_cityscapes_image, source)
    for name in ("train", "val"):
        folder = source / "leftImg8bit" / name
        files = sorted(folder.glob("*/*_leftImg8bit.png"))
        sets.append(ImageSet(name, folder, CITYSCAPES, files, read))
    return sets


def read_cityscapes_image(
    source: Path, path: Path, size: tuple[int, int], left_out: Counter
) -> tuple[Objects, dict[str, Any]]:
    """Pixels of an object have 1000 times the class plus a number. Pixels of a group of objects,
    which nobody told apart, have the class alone: they become a crowd."""
    name = path.name.replace("_leftImg8bit", "_gtFine_instanceIds")
    *_, set_name, city, _ = path.parts
    numbers = read_map(source / "gtFine" / set_name / city / name, size)
    objects = []
    for n in np.unique(numbers).tolist():
        category_id = n // 1000 or n
        if category_id in CITYSCAPES:
            objects.append(mask_object(category_id, numbers == n) | {"iscrowd": int(n < 1000)})
    void = encode_mask(np.isin(numbers, CITYSCAPES_VOID))
    return objects, {"void": void}


# --- the 2018 Data Science Bowl -------------------------------------------------------------------


def read_dsb(source: Path, lists: Sequence[Path]) -> list[ImageSet]:
    """All of stage1_train as the set train, or the ids in each of the `lists`."""
    require(source, "the 2018 Data Science Bowl", ["stage1_train"])
    folder = source / "stage1_train"
    sets = [(path.stem, read_names(path)) for path in lists]
    sets = sets or [("train", sorted(path.name for path in folder.iterdir() if path.is_dir()))]
    files = {name: [folder / i / "images" / f"{i}.png" for i in ids] for name, ids in sets}
    return [ImageSet(n, folder, {1: "nucleus"}, files[n], read_dsb_image) for n, _ in sets]


def read_dsb_image(
    path: Path, size: tuple[int, int], left_out: Counter
) -> tuple[Objects, dict[str, Any]]:
    """One file in masks for each nucleus, on where it is not black."""
    require(path.parents[1], "an image of the 2018 Data Science Bowl", ["masks"])
    objects = []
    for mask_path in sorted((path.parents[1] / "masks").glob("*.png")):
        mask = read_map(mask_path, size, mode="L") > 0
        objects += [mask_object(1, mask)] if mask.any() else []
        left_out["empty masks"] += not mask.any()
    return objects, {}
