"""Masks for boxes: a trained model turns every box of a data set into a mask.

    python -m boxteacher.tools.label --checkpoint last.pt --boxes boxes.json --images DIR
                                     --output masks.json
    python -m boxteacher.tools.label --checkpoint last.pt

The first command copies boxes.json. Every annotation keeps its place and its fields, and gets
`segmentation`, `score` (mask-aware) and `mask_source`: `detection`, or `location` for a box that no
detection claims. Crowds stay as they are. Classes do not matter. The second command labels the
checkpoint's validation set and writes given_boxes.json next to it.

Where there are true masks, both compare with them the new masks, filled boxes, ellipses and (if
OpenCV is installed) GrabCut. --flip looks at everything mirrored, too. docs/tools.md says what
that, --scales and --zoom bring and cost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from torch import Tensor

from boxteacher import errors
from boxteacher.coco import check_size, encode_mask, polygons
from boxteacher.command_line import Parser
from boxteacher.config import ConfigError, from_word
from boxteacher.data import CocoDataset, make_val_set
from boxteacher.files import write_text
from boxteacher.model import CondInst
from boxteacher.reporting import progress, say_notes
from boxteacher.tools.common import load_network
from boxteacher.tools.given_boxes import Looks, label_image, window

try:
    import cv2
except ImportError:  # GrabCut is left out
    cv2 = None

# --- against true masks ---------------------------------------------------------------------------


def box_guesses(pixels: np.ndarray, box: Tensor) -> dict[str, np.ndarray]:
    """What a box [4] alone says of its mask, in its window: filled, its inscribed ellipse, and what
    GrabCut (OpenCV) makes of it. A pixel belongs to the first two if its center does."""
    rows, columns = window(box, pixels.shape[:2])
    x1, y1, x2, y2 = box.tolist()
    down = abs(np.arange(rows.start, rows.stop) + 0.5 - (y1 + y2) / 2) / ((y2 - y1) / 2)
    across = abs(np.arange(columns.start, columns.stop) + 0.5 - (x1 + x2) / 2) / ((x2 - x1) / 2)
    guesses = {
        "ellipse": np.hypot(down[:, None], across) <= 1,
        "box": np.maximum(down[:, None], across) <= 1,
    }
    if cv2 is not None:  # it learns the background from a margin of half a box
        height, width = guesses["box"].shape
        top, left = max(rows.start - height // 2 - 2, 0), max(columns.start - width // 2 - 2, 0)
        part = pixels[top : rows.stop + height // 2 + 2, left : columns.stop + width // 2 + 2]
        labels = np.full(part.shape[:2], cv2.GC_BGD, dtype=np.uint8)
        inner = labels[rows.start - top :, columns.start - left :][:height, :width]
        inner[:], models = cv2.GC_PR_FGD, np.zeros((2, 1, 65))
        cv2.setRNGSeed(0)
        with contextlib.suppress(cv2.error):  # raised if the box is all of the image
            cv2.grabCut(part.copy(), labels, None, *models, 5, cv2.GC_INIT_WITH_MASK)
        guesses["grabcut"] = inner % 2 == 1  # sure or probable foreground
    return guesses


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """From the IoUs of each box, by kind of mask, their mean and the shares over 0.5 and 0.75."""
    table = {}
    for kind in rows[0] if rows else ():
        ious = [row[kind] for row in rows]
        table[kind] = {"mean_iou": sum(ious) / len(ious)}
        table[kind] |= {f"over_{t}": sum(x > t / 100 for x in ious) / len(ious) for t in (50, 75)}
    return table


# --- a data set -----------------------------------------------------------------------------------


def label_dataset(
    model: CondInst, data: CocoDataset, looks: Looks, as_polygons: bool
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, float]]]:
    """By annotation id the new fields, and the IoUs of several kinds of masks where the true mask
    is known. Crowds get none."""
    fields, ious, api, device = {}, {}, COCO(), model.pixel_mean.device
    api.imgs = {image["id"]: image for image in data.coco["images"]}
    given = {annotation["id"]: annotation for annotation in data.coco["annotations"]}
    for index in progress(range(len(data)), "label", len(data)):
        entry, ids = data.entry(index), data.annotation_ids[index].tolist()
        if not ids:
            continue
        pixels, size = data.load_image(entry), (entry["height"], entry["width"])
        check_size(pixels, entry, data.name)
        boxes = torch.from_numpy(data.boxes[index]).float().to(device)
        masks = label_image(model.eval(), pixels, boxes, looks)
        for number, box, found in zip(ids, boxes, masks, strict=True):
            corner = tuple(span.start for span in window(box, size))
            shape = polygons(found.mask, *corner) if as_polygons else None
            fields[number] = {
                "segmentation": shape or encode_mask(found.mask, corner, size),
                "score": found.score,
                "mask_source": found.source,
            }
            if given[number].get("segmentation"):
                guesses = {"masks": found.mask, **box_guesses(pixels, box)}
                codes = [encode_mask(guess, corner, size) for guess in guesses.values()]
                overlaps = rle_tools.iou(codes, [api.annToRLE(given[number])], [0])[:, 0]
                ious[number] = dict(zip(guesses, overlaps.tolist(), strict=True))
    return fields, ious


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any], Looks]:
    parser = Parser("python -m boxteacher.tools.label --checkpoint FILE [...]", __doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", required=True, help="written by train.py")
    add("--boxes", metavar="FILE", help="JSON in COCO's format (default: the validation set)")
    add("--images", metavar="DIR", help="the folder of its images")
    add("--output", metavar="FILE", help="the file to write")
    add("--polygons", action="store_true", help="write polygons, not run-length codes")
    add("--min-score", type=float, default=0.0, metavar="S", help="masks below get left out")
    scales = functools.partial(from_word, "train_scales")  # a list of numbers, too
    add("--scales", type=scales, default=(1.0,), metavar="LIST", help="sizes to look at: 1,1.5")
    add("--zoom", type=float, default=0.0, metavar="PIXELS", help="enlarge each smaller box")
    args, given = parser.read(argv)
    files = [path for path in (args.boxes, args.images, args.output) if path]
    if len(files) not in (0, 3):
        raise ConfigError("give --boxes, --images and --output, or none of them")
    if not args.scales or min(args.scales) <= 0 or not 0 <= args.zoom < math.inf:
        raise ConfigError("scales: give one or more factors above 0, and zoom: 0 or more pixels")
    return args, given, Looks(args.scales, given.pop("flip", False), args.zoom)


def main() -> None:
    args, given, looks = read_arguments(sys.argv[1:])
    model, _ = load_network(args.checkpoint, given)
    cfg = model.cfg
    if args.boxes:
        files = dict(val_json=args.boxes, val_images=args.images)
        cfg = dataclasses.replace(cfg, dataset="coco", **files)
    dataset = make_val_set(cfg)
    say_notes(dataset.notes)
    fields, ious = label_dataset(model, dataset, looks, args.polygons)

    located = {i for i, of_box in fields.items() if of_box["mask_source"] == "location"}
    content: dict[str, Any] = {"num_boxes": len(fields), "num_unclaimed": len(located)}
    content["all"] = summary([*ious.values()])
    content["unclaimed"] = summary([row for i, row in ious.items() if i in located])
    for kind, row in content["all"].items():
        shown = "".join(f"  {name} {value:.3f}" for name, value in row.items())
        print(f"{kind:<8}{shown}")
    print(json.dumps(content))
    if args.boxes:
        labeled = [a | fields.get(a["id"], {}) for a in dataset.coco["annotations"]]
        content = dataset.coco | {"annotations": labeled}
        weak = {i for i, of_box in fields.items() if of_box["score"] < args.min_score}
        for annotation in content["annotations"]:
            if annotation["id"] in weak:
                del annotation["segmentation"]
        if args.min_score:
            print(f"{len(weak)} of {len(fields)} boxes got no mask: score below {args.min_score}")
    output = Path(args.output or Path(args.checkpoint).with_name("given_boxes.json"))
    write_text(output, json.dumps(content))
    print(output)


if __name__ == "__main__":
    errors.run(main)
