"""Masks for boxes: a trained model turns every box of a data set into a mask.

    python -m boxteacher.tools.label --checkpoint last.pt --boxes boxes.json --images DIR
                                     --output masks.json [--draw masks.jpg]
    python -m boxteacher.tools.label --checkpoint last.pt

The first command copies boxes.json. Every annotation keeps its place and its fields, and gets
`segmentation`, `score` (mask-aware) and `mask_source`: `detection`, or `location` for a box
without a detection. Crowds stay as they are. Classes do not matter. The second command labels the
checkpoint's validation set and writes given_boxes.json next to it.

An interrupted command goes on when it is given again. Until it is done, its results are in the file
OUTPUT.unfinished, a line for each image.

Where there are true masks, both commands compare the new masks, filled boxes and ellipses with
them. The second one also compares GrabCut, if OpenCV is installed. --flip adds the mirrored image.
docs/tools.md says what that, --scales and --zoom bring and cost. Every field of the configuration
is an option, too (`python train.py --help` shows them).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from boxteacher import errors
from boxteacher.coco import check_size
from boxteacher.coco_eval import box_baselines
from boxteacher.command_line import Parser
from boxteacher.config import ConfigError, from_word
from boxteacher.data import CocoDataset, make_val_set
from boxteacher.files import append_line, check_writable, write_text
from boxteacher.masks import decode_mask, encode_mask, polygons
from boxteacher.model import CondInst
from boxteacher.reporting import progress, say_notes
from boxteacher.tools.common import claimed_lines, lines_so_far, load_network, settings_of
from boxteacher.tools.given_boxes import Looks, label_image, window
from boxteacher.transforms import resized_size
from boxteacher.visualize import contact_sheet, draw_instances, save_picture, sheet_side

try:
    import cv2
except ImportError:  # GrabCut is left out
    cv2 = None

DRAWN = 3  # images in the picture of --draw

# --- against true masks ---------------------------------------------------------------------------


def box_guesses(pixels: np.ndarray, box: Tensor, with_grabcut: bool) -> dict[str, np.ndarray]:
    """What a box [4] alone says of its mask, in its window: its inscribed ellipse, filled, and what
    GrabCut (OpenCV) makes of it, which learns the background from a margin of half a box. Where
    that leaves nothing, the ellipse stands in. GrabCut takes seconds for a large box."""
    rows, columns = window(box, pixels.shape[:2])
    height, width = rows.stop - rows.start, columns.stop - columns.start
    x1, y1, x2, y2 = box.tolist()
    place = [x1 - columns.start, y1 - rows.start, x2 - x1, y2 - y1]
    alone = {"images": [{"id": 0, "height": height, "width": width}]}
    alone["annotations"] = [{"image_id": 0, "category_id": 0, "bbox": place}]
    guesses = {
        kind: decode_mask(box_baselines(alone, kind)[0]["segmentation"])
        for kind in ("ellipse", "box")
    }
    if with_grabcut and cv2 is not None:
        top, left = max(rows.start - height // 2 - 2, 0), max(columns.start - width // 2 - 2, 0)
        part = pixels[top : rows.stop + height // 2 + 2, left : columns.stop + width // 2 + 2]
        labels = np.full(part.shape[:2], cv2.GC_BGD, dtype=np.uint8)
        inner = labels[rows.start - top :, columns.start - left :][:height, :width]
        inner[:], models = cv2.GC_PR_FGD, np.zeros((2, 1, 65))
        cv2.setRNGSeed(0)
        with contextlib.suppress(cv2.error):  # raised if the box is all of the image
            cv2.grabCut(part.copy(), labels, None, *models, 5, cv2.GC_INIT_WITH_MASK)
        found = inner % 2 == 1  # sure or probable foreground, often nothing
        guesses["grabcut"] = found if found.any() else guesses["ellipse"]
    return guesses


def summary(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """From the IoUs of each box, by kind of mask, their mean and the shares over 0.5 and 0.75."""
    table = {}
    for kind in rows[0] if rows else ():
        ious = [row[kind] for row in rows]
        table[kind] = {"mean_iou": sum(ious) / len(ious)}
        table[kind] |= {f"over_{t}": sum(x > t / 100 for x in ious) / len(ious) for t in (50, 75)}
    return table


# --- a data set -----------------------------------------------------------------------------------


def label_entry(
    model: CondInst, data: CocoDataset, index: int, looks: Looks, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """For each box of an image: its annotation's `id`, the new `fields`, and the `ious` of several
    kinds of masks with the true mask, where that is known."""
    entry, rows = data.entry(index), []
    pixels, size = data.load_image(entry), (entry["height"], entry["width"])
    check_size(pixels, entry, data.name)
    boxes = torch.from_numpy(data.boxes[index]).float().to(model.pixel_mean.device)
    masks, true_masks = label_image(model, pixels, boxes, looks), data.true_masks(index, size)
    numbers = data.annotation_ids[index].tolist()
    for number, box, found, true in zip(numbers, boxes, masks, true_masks, strict=True):
        spans, true, ious = window(box, size), true.numpy(), {}
        corner = tuple(span.start for span in spans)
        code = polygons(found.mask, *corner) if args.polygons else None
        code = code or encode_mask(found.mask, corner, size)
        fields = {"segmentation": code, "score": found.score, "mask_source": found.source}
        if true.any():
            guesses = box_guesses(pixels, box, with_grabcut=not args.boxes)
            for kind, mask in {"masks": found.mask, **guesses}.items():
                common = int((mask & true[spans]).sum())
                ious[kind] = common / (int(mask.sum()) + int(true.sum()) - common)
        rows.append({"id": number, "fields": fields, "ious": ious})
    return rows


def label_dataset(
    model: CondInst,
    data: CocoDataset,
    looks: Looks,
    args: argparse.Namespace,
    lines: Path,
    settings: dict,
) -> list[dict[str, Any]]:
    """The rows of all boxes but crowds. Each image's become a line of the file `lines`, and what
    an interrupted call has left there is not made again, if the image has the same boxes."""
    annotations = defaultdict(list)
    for annotation in data.coco["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    content = {i["id"]: json.dumps([i, annotations[i["id"]]]) for i in data.coco["images"]}
    digests = {i: hashlib.sha256(text.encode()).hexdigest() for i, text in content.items()}
    done = (line for line in lines_so_far(lines, settings) if line["image_id"] in digests)
    rows = {d["image_id"]: d["rows"] for d in done if d["data"] == digests[d["image_id"]]}
    todo = [index for index in range(len(data)) if int(data.image_ids[index]) not in rows]
    if rows:
        print(f"goes on after {len(rows)} of {len(data)} images", file=sys.stderr)
    for index in progress(todo, "label", len(todo)):
        image_id = int(data.image_ids[index])
        rows[image_id] = label_entry(model, data, index, looks, args)
        known = {"image_id": image_id, "data": digests[image_id]}
        append_line(lines, known | {"rows": rows[image_id]})
    return list(itertools.chain.from_iterable(rows.values()))


def draw_sheet(data: CocoDataset, sets_of_masks: dict[str, CocoDataset]) -> Image.Image:
    """Some images, spread over the set: their boxes, and their masks in the other sets."""
    chosen = [index for index, boxes in enumerate(data.boxes) if len(boxes)]
    places = np.linspace(0, len(chosen) - 1, min(DRAWN, len(chosen))).round().astype(int)
    chosen = [chosen[place] for place in places]
    sizes, titles = data.sizes[chosen].tolist(), ["boxes", *sets_of_masks]
    side = sheet_side([height / max(height, width) for height, width in sizes], len(titles))
    rows = []
    for index, size in zip(chosen, sizes, strict=True):
        options = {"class_names": data.class_names, "side": side}
        draw = functools.partial(draw_instances, data.load_image(data.entry(index)), **options)
        fine = resized_size(*size, 0, 2 * side, factor=1)
        row, labels = [draw(data.boxes[index], None, data.labels[index])], data.labels[index]
        for masks in sets_of_masks.values():
            row.append(draw(None, torch.stack([*masks.true_masks(index, fine)]), labels))
        rows.append(row)
    return contact_sheet(rows, titles, f"{len(rows)} of {len(data)} images.", side)


# --- the program ----------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any], Looks]:
    parser = Parser("python -m boxteacher.tools.label --checkpoint FILE [...]", __doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", required=True, help="written by train.py")
    add("--boxes", metavar="FILE", help="JSON in COCO's format (default: the validation set)")
    add("--images", metavar="DIR", help="the folder of its images")
    add("--output", metavar="FILE", help="the file to write")
    add("--draw", metavar="FILE", help="a picture of some images with boxes and masks")
    add("--polygons", action="store_true", help="write polygons, not run-length codes")
    add("--min-score", type=float, default=0.0, metavar="S", help="leave out lower scores")
    scales = functools.partial(from_word, "train_scales")  # a list of numbers, too
    add("--scales", type=scales, default=(1.0,), metavar="LIST", help="sizes to average: 1,1.25")
    add("--zoom", type=float, default=0.0, metavar="PIXELS", help="enlarge each smaller box")
    args, given = parser.read(argv)
    files = [path for path in (args.boxes, args.images, args.output) if path]
    if len(files) not in (0, 3):
        raise ConfigError("give --boxes, --images and --output, or none of them")
    if not args.scales or min(args.scales) <= 0 or not 0 <= args.zoom < math.inf:
        raise ConfigError("scales: give one or more factors above 0, and zoom: 0 or more pixels")
    if not 0 <= args.min_score <= 1:
        raise ConfigError(f"min-score: give a number between 0 and 1, got {args.min_score}")
    if args.draw and Path(args.draw).suffix.lower() not in (".png", ".jpg"):
        raise ConfigError(f"draw: {args.draw}: give a name that ends in .png or .jpg")
    return args, given, Looks(args.scales, given.pop("flip", False), args.zoom)


def main() -> None:
    args, given, looks = read_arguments(sys.argv[1:])
    model, _ = load_network(args.checkpoint, {"teacher_size": 0} | given)
    cfg = model.cfg
    if args.boxes:
        files = dict(val_json=args.boxes, val_images=args.images)
        cfg = dataclasses.replace(cfg, dataset="coco", **files)
    elif cfg.dataset == "coco" and not cfg.val_json:
        raise ConfigError("no validation set in the checkpoint: give --boxes, --images, --output")
    output = Path(args.output or Path(args.checkpoint).with_name("given_boxes.json"))
    for read in filter(None, (args.checkpoint, args.boxes, args.draw)):
        if os.path.realpath(read) == os.path.realpath(output):
            raise ConfigError(f"output: {output} is also another file of this command")
    check_writable(output)
    data = make_val_set(cfg)
    say_notes(data.notes)
    lines = output.with_name(f"{output.name}.unfinished")
    settings = settings_of(args, "boxes", "images", "draw", "min_score")
    if args.draw:
        check_writable(Path(args.draw))
    with claimed_lines(lines, settings):
        rows = label_dataset(model, data, looks, args, lines, settings)

    fields = {row["id"]: row["fields"] for row in rows}
    parts = {"all": rows}
    parts["unclaimed"] = [row for row in rows if row["fields"]["mask_source"] == "location"]
    content: dict[str, Any] = {}
    for name, part in parts.items():
        table = summary([row["ious"] for row in part if row["ious"]])
        content[name] = {"boxes": len(part)} | table
        print(f"{name}: {len(part)} boxes" + "  mean IoU  over .5  over .75" * bool(table))
        for kind, values in table.items():
            print(f"  {kind:<16}" + "".join(f"  {value:.3f}" for value in values.values()))

    labeled = [a | fields.get(a["id"], {}) for a in data.coco["annotations"]]
    weak = {i for i, of_box in fields.items() if of_box["score"] < args.min_score}
    for annotation in labeled:
        if annotation["id"] in weak:
            del annotation["segmentation"]
    if args.min_score:
        print(f"{len(weak)} of {len(fields)} boxes got no mask: score below {args.min_score}")
    labeled = data.coco | {"annotations": labeled}
    if args.draw:
        shown = {"masks": CocoDataset(labeled, data.load_image, data.geometry, False)}
        shown |= {"true masks": data} if "masks" in content["all"] else {}
        save_picture(draw_sheet(data, shown), Path(args.draw))
    write_text(output, json.dumps(labeled if args.boxes else content))
    lines.unlink()
    print(output)


if __name__ == "__main__":
    errors.run(main)
