"""How YOLO data sets lay out images, boxes and outlines of objects."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from boxteacher.coco import DataError, explain
from boxteacher.files import files_below
from boxteacher.tools.formats import ImageSet, Objects, read_lines, require

IMAGE_ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_yolo(source: Path) -> list[ImageSet]:
    """A set for each folder of images: images/SET or SET/images, with labels next to it."""
    classes, folders = read_class_names(source), {}
    for path in files_below(source):
        parts = path.relative_to(source).parts[:-1]
        is_hidden = any(part.startswith(".") for part in parts)
        if "images" in parts and not is_hidden and path.suffix.lower() in IMAGE_ENDINGS:
            folders.setdefault(parts, []).append(path)
    if not folders:
        require(source, "a YOLO data set", ["images/SET or SET/images with images in it"])
    sets = []
    for parts, files in folders.items():
        labels = Path(source, *("labels" if part == "images" else part for part in parts))
        name = str(labels.relative_to(source))
        require(source, "a YOLO data set (labels may be an empty folder)", [name])
        name = "_".join(part for part in parts if part != "images") or "all"
        read = functools.partial(read_yolo_image, labels, classes)
        sets.append(ImageSet(name, Path(source, *parts), classes, files, read))
    return sets


def read_class_names(source: Path) -> dict[int, str]:
    """{number: name} from "names" in a YAML file ([a, b], lines of - a, or of 0: a), else from a
    file with one name in each line."""
    for path in sorted([*source.glob("*.yaml"), *source.glob("*.yml")]):
        text = re.sub(r"(?m)(^|\s)#.*$", "", "\n".join(read_lines(path)))
        if found := re.search(r"(?ms)^names:(.*?)(?=^[^\s\-\]}]|\Z)", text):
            names = found[1].strip()
            if names.startswith(("[", "{")):
                return number_names(names.strip("[]{}"), ",\n")
            return number_names(names, "\n")  # a comma is a part of the name
    for path in sorted([*source.glob("classes.txt"), *source.glob("*.names")]):
        return number_names("\n".join(read_lines(path)), "\n")
    require(source, "a YOLO data set", ["a YAML file with names, classes.txt or a .names file"])
    return {}


def number_names(text: str, ends: str) -> dict[int, str]:
    """Names in quotes, or up to one of the characters `ends`, after a number or a dash or none."""
    names: dict[int, str] = {}
    entry = rf"""\s*(?:-\s+|(\d+)\s*:\s*)?("[^"\n]*"|'[^'\n]*'|[^{ends}]+)"""
    for number, name in re.findall(entry, text):
        if name := name.strip("\"' \t"):
            names[int(number or len(names))] = name
    return names


def read_yolo_image(
    labels: Path, classes: dict[int, str], path: Path, size: tuple[int, int], left_out: Counter
) -> tuple[Objects, dict[str, Any]]:
    """One object in each line: class, then center x, center y, width and height of its box, or the
    x and y of the three or more points of its outline. All are shares of the image's sides. An
    image without a file has no objects."""
    file, objects, (height, width) = labels / f"{path.stem}.txt", [], size
    left_out["missing files of labels (these images have no objects)"] += not file.is_file()
    for n, line in enumerate(read_lines(file) if file.is_file() else [], start=1):
        where = f"{file}, object {n}"
        with explain(where, "write class and numbers with spaces between them"):
            number, *shares = map(float, line.split())
        if number not in classes:
            raise DataError(f"{where}: class {number:g} has no name; there are {len(classes)}")
        if len(shares) < 4 or len(shares) % 2 or not all(-0.01 <= s <= 1.01 for s in shares):
            raise DataError(
                f"{where}: expected a box (4 numbers from 0 to 1) or points (6 or more, an even"
                f" number of them), found {line[:60]!r}"
            )
        if len(shares) == 4:
            (x, y), half = shares[:2], np.array(shares[2:]) / 2
            shares = [x - half[0], y - half[1], x + half[0], y + half[1]]
        points = np.clip(np.reshape(shares, (-1, 2)), 0, 1) * (width, height)
        x1, y1, x2, y2 = [*points.min(0).tolist(), *points.max(0).tolist()]
        if x2 <= x1 or y2 <= y1:
            raise DataError(f"{where}: an object without width or height; remove it")
        found = {"category_id": int(number), "bbox": [x1, y1, x2 - x1, y2 - y1]}
        is_box = len(points) == 2
        objects.append(found | ({} if is_box else {"segmentation": [points.ravel().tolist()]}))
    return objects, {}
