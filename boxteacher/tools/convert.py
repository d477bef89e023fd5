"""Other formats -> COCO's JSON. Images stay where they are, and the JSON refers to them.

    python -m boxteacher.tools.convert FORMAT SOURCE DEST [--boxes-only] [--list FILE]

DEST gets a file for each set of images in SOURCE: instances_SET.json, or boxes_SET.json if there
are no masks, or with --boxes-only. Nothing is written unless all of SOURCE can be read. Formats:

voc         Pascal VOC 2012: JPEGImages, Annotations, SegmentationObject, ImageSets/Segmentation
cityscapes  Cityscapes: leftImg8bit/SET/CITY and gtFine/SET/CITY, sets train and val
yolo        images and labels (boxes or outlines), with data.yaml, classes.txt or a .names file
dsb         2018 Data Science Bowl: stage1_train/ID/images and stage1_train/ID/masks

--list FILE adds the set of images that a file lists (voc), or takes such sets alone (dsb).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools import mask as rle_codec
from tqdm import tqdm

from boxteacher import errors
from boxteacher.coco import DataError, check_coco, explain, open_file, orientation, upright
from boxteacher.command_line import Parser
from boxteacher.config import ConfigError
from boxteacher.files import write_text
from boxteacher.tools.formats import ImageSet, read_cityscapes, read_dsb, read_voc
from boxteacher.tools.yolo import read_yolo

FORMATS = {"voc": read_voc, "cityscapes": read_cityscapes, "yolo": read_yolo, "dsb": read_dsb}
WITH_LISTS = ("voc", "dsb")  # the others have a folder for each set


def make_coco(images: ImageSet, boxes_only: bool) -> tuple[dict[str, Any], Counter]:
    """A set of images as a COCO dict, and how much of what was left out."""
    entries, annotations, left_out = [], [], Counter()
    for path in tqdm(images.files, desc=images.name, leave=False, disable=None):
        height, width = size = upright_size(path)
        objects, fields = images.read(path, size, left_out)
        file_name = path.relative_to(images.folder).as_posix()
        entry = {"id": len(entries) + 1, "file_name": file_name, "width": width, "height": height}
        entries.append(entry if boxes_only else entry | fields)
        for found in objects:
            if boxes_only:
                found.pop("segmentation", None)
            ids = {"id": len(annotations) + 1, "image_id": entry["id"]}
            annotations.append(ids | {"iscrowd": 0, "area": area_of(found, size)} | found)
    categories = [{"id": number, "name": name} for number, name in images.classes.items()]
    return {"images": entries, "categories": categories, "annotations": annotations}, left_out


def upright_size(path: Path) -> tuple[int, int]:
    """The (h, w) of an image as it is shown: EXIF may turn it by a quarter."""
    remedy = "add it, or replace it"
    with explain(str(path), remedy), open_file(path) as file, Image.open(file) as image:
        # Pillow 13 gives the upright size of a TIFF, and the stored size of other files.
        return (image if orientation(image) == 1 else upright(image)).size[::-1]


def area_of(found: dict[str, Any], size: tuple[int, int]) -> float:
    """The pixels of an object's mask, or of its box if it has none."""
    mask = found.get("segmentation")
    if isinstance(mask, list):
        mask = rle_codec.merge(rle_codec.frPyObjects(mask, *size))
    return float(rle_codec.area(mask)) if mask else found["bbox"][2] * found["bbox"][3]


def describe(path: Path, images: ImageSet, coco: dict[str, Any], left_out: Counter) -> str:
    """What a file holds, and for each class how many objects."""
    found = coco["annotations"]
    masks, crowds = (sum(bool(a.get(k)) for a in found) for k in ("segmentation", "iscrowd"))
    counts = Counter(a["category_id"] for a in found)
    lines = [f"{path}: {len(coco['images'])} images in {images.folder}"]
    lines += [f"  {len(found)} objects, {masks} with a mask, {crowds} groups (crowds)"]
    lines += [f"  {counts[number]:7} {name}" for number, name in images.classes.items()]
    lines += [f"  left out: {count} {what}" for what, count in left_out.items() if count]
    return "\n".join(lines)


def main() -> None:
    usage = "python -m boxteacher.tools.convert FORMAT SOURCE DEST [--boxes-only] [--list FILE]"
    parser = Parser(usage, __doc__, fields=False)
    add = parser.add_argument
    add("format", choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    add("source", type=Path, metavar="SOURCE", help="the folder as it is distributed")
    add("dest", type=Path, metavar="DEST", help="the folder to write to")
    add("--boxes-only", action="store_true", help="leave masks out")
    add("--list", action="append", type=Path, default=[], metavar="FILE", help="names of images")
    args, _ = parser.read(sys.argv[1:])
    lists = [args.list] if args.format in WITH_LISTS else []
    if args.list and not lists:
        raise ConfigError(f"--list is for voc and dsb: the sets of {args.format} are its folders")

    written: dict[Path, tuple[str, str]] = {}
    for images in FORMATS[args.format](args.source, *lists):
        if not images.files:
            raise DataError(f"{args.source}: no images in set {images.name} ({images.folder})")
        coco, left_out = make_coco(images, args.boxes_only)
        kind = "instances" if any("segmentation" in a for a in coco["annotations"]) else "boxes"
        path = args.dest / f"{kind}_{images.name}.json"
        if path in written:
            raise DataError(f"{args.source}: two sets have the name {images.name}: rename one")
        for note in check_coco(coco, str(path)):
            print(f"warning: {note}", file=sys.stderr)
        written[path] = json.dumps(coco), describe(path, images, coco, left_out)
    for path, (content, _) in written.items():
        write_text(path, content)
    for _, summary in written.values():
        print(summary)


if __name__ == "__main__":
    errors.run(main)
