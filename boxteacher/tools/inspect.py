"""What the method sees: a training set in numbers, and its images in pictures.

    python -m boxteacher.tools.inspect [PRESET] --statistics [--field value ...] [--images 300]
    python -m boxteacher.tools.inspect --checkpoint last.pt --output DIR [--images 8]

Images are those that the network sees in training, resized and flipped. The first command says how
many objects there are, how large they are, and how often colors mislead. The pairwise loss pulls
two pixels of similar color into one mask (BoxInst, arXiv 2012.02310, section 3.2). True masks tell
how often it is right. The second command draws, for each image, its boxes, the pairs of similar
color, the teacher's detections, which box each of them got, and the pseudo masks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from boxteacher import losses, mask_head
from boxteacher.command_line import Parser, split_preset
from boxteacher.config import ConfigError
from boxteacher.data import Batch, collate, make_train_set
from boxteacher.errors import run
from boxteacher.model import CondInst, PseudoMasks, scale_boxes
from boxteacher.presets import from_preset
from boxteacher.pseudo_labels import assign_to_boxes
from boxteacher.reporting import progress
from boxteacher.tools.common import load_network
from boxteacher.tools.given_boxes import detection_scores
from boxteacher.tools.statistics import ROWS, advice, statistics
from boxteacher.visualize import (
    MAX_CAPTIONS,
    NEUTRAL,
    contact_sheet,
    draw_instances,
    instance_color,
    tint,
)

SIDE = 500  # of a picture


@torch.no_grad()
def inspect_image(model: CondInst, batch: Batch, class_names: Sequence[str]) -> Image.Image:
    """Six pictures of the image of a batch (in eval mode: a run uses the statistics of a batch)."""
    cfg, (height, width), valid = model.cfg, batch.sizes[0], batch.valid[0]
    image, boxes, labels = batch.images[0, :, :height, :width], batch.boxes[0], batch.labels[0]
    boxes, labels, plain = boxes[valid], labels[valid], dict(class_names=class_names, side=SIDE)

    # The teacher's step, and what it detected on the way.
    seen, masks_for_boxes = [], model.masks_for_boxes
    model.masks_for_boxes = lambda *args: seen.append(args) or masks_for_boxes(*args)
    pseudo = model.make_pseudo_masks(batch)
    del model.masks_for_boxes
    ((encoded, _, found, *seen_size, _),) = seen
    sizes = seen_size[0], (height, width)
    found = found._replace(boxes=scale_boxes(found.boxes, *sizes)[0])
    scores, ious = detection_scores(model, encoded, found, *sizes), box_iou(found.boxes, boxes)
    assigned = assign_to_boxes(ious, scores, cfg.iou_threshold, cfg.score_threshold)
    best = scores.argsort(descending=True)[:MAX_CAPTIONS]  # the others would hide each other
    maps = torch.cat([m for _, m in model.mask_maps(encoded, 0, found.location_index[best])])
    probs = mask_head.read_maps(maps, *mask_head.pixel_positions(maps, *sizes))

    on_image = (..., slice(-(-height // 4)), slice(-(-width // 4)))
    filled = losses.box_masks(boxes, *pseudo.masks.shape[-2:])[on_image]
    boxed = found.boxes[best], probs, found.labels[best]
    shown = {
        f"{len(boxes)} boxes": draw_instances(image, boxes, None, labels, **plain),
        "pairs of similar color": color_pairs(image, batch, cfg.color_threshold),
        f"{len(best)} best of {len(scores)} detections, mask-aware scores": draw_instances(
            image, *boxed, scores=scores[best], **plain
        ),
        f"{int((assigned >= 0).sum())} boxes got a detection": assignment(
            image, filled, found.boxes, ious, scores, assigned.tolist()
        ),
        "pseudo masks (opacity: score)": draw_instances(
            image,
            None,
            pseudo.masks[0, valid][on_image],
            labels,
            opacity=pseudo.weights[0, valid],
            **plain,
        ),
        "affinity of the pseudo masks": affinities(image, batch, pseudo, cfg.affinity_threshold),
    }
    pictures, titles = [*shown.values()], [*shown]
    above = "Blue: pairs inside a box. Red: pairs across its edge. The stronger, the more of 8."
    below = (
        "Filled: a box. Outline: its detection. Gray: it got none. White: pairs of other labels."
    )
    above = contact_sheet([pictures[:3]], titles[:3], above, SIDE)
    below = contact_sheet([pictures[3:]], titles[3:], below, SIDE)
    whole = Image.new("RGB", (above.width, above.height + below.height))
    whole.paste(above)
    whole.paste(below, (0, above.height))
    return whole


def assignment(
    image: Tensor,
    filled: Tensor,
    found_boxes: Tensor,
    ious: Tensor,
    scores: Tensor,
    assigned: Sequence[int],
) -> Image.Image:
    """Who got which box: a box is `filled` [G, H4, W4], and its detection an outline of the same
    color. A box without one is gray."""
    colors = [instance_color(g) if d >= 0 else NEUTRAL for g, d in enumerate(assigned)]
    options = dict(colors=colors, opacity=0.6, side=SIDE)
    picture = draw_instances(image, None, filled, [0] * len(filled), ["box"], **options)
    pairs = [(d, g) for g, d in enumerate(assigned) if d >= 0]
    captions = [f"IoU {ious[pair]:.2f} s {scores[pair[0]]:.2f}" for pair in pairs]
    boxes = found_boxes[[d for d, _ in pairs]] * (SIDE / max(image.shape))
    look = dict(class_names=[*captions, ""], colors=[instance_color(g) for _, g in pairs])
    return draw_instances(np.asarray(picture), boxes, None, range(len(pairs)), **look)


def color_pairs(image: Tensor, batch: Batch, threshold: float) -> Image.Image:
    """Which pairs of pixels the colors tie together: inside a box, and across its edge."""
    rows, columns = (side // 4 for side in batch.images.shape[-2:])
    on_image = losses.inside_masks(batch.sizes, rows, columns)
    is_alike = losses.color_similarity(batch.images, on_image)[0] >= threshold
    in_box = losses.box_masks(batch.boxes[0, batch.valid[0]], rows, columns)
    inside, across = torch.zeros(2, rows, columns)
    for direction, (dy, dx) in enumerate(losses.NEIGHBORS):
        other = losses.shifted(in_box[None], dy, dx)[0]
        inside += (in_box & other & is_alike[direction]).any(0) / 8
        across += (in_box & ~other & is_alike[direction]).any(0) / 8
    return tint(image, SIDE, [(inside, (60, 140, 255)), (across, (255, 40, 40))])


def affinities(image: Tensor, batch: Batch, pseudo: PseudoMasks, threshold: float) -> Image.Image:
    """The smoothed pseudo masks, and where pairs of pixels have other labels (see
    `losses.affinity_loss`)."""
    masks = pseudo.masks[0, pseudo.weights[0] > 0][None].float()  # [1, G, H4, W4]
    in_box = losses.box_masks(batch.boxes[0, pseudo.weights[0] > 0], *masks.shape[-2:])
    smooth = (masks + F.avg_pool2d(masks, 3, 1, 1)) / 2
    parted = torch.zeros_like(smooth)
    for dy, dx in losses.NEIGHBORS:
        other = losses.shifted(smooth, dy, dx)
        parted += (smooth * other + (1 - smooth) * (1 - other) < threshold) / 8
    layers = [(0.7 * smooth[0, k], instance_color(k)) for k in range(len(in_box))]
    layers += [(edges, (255, 255, 255)) for edges in parted[0] * in_box]
    return tint(image, SIDE, layers)


# --- the program ----------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str]) -> tuple[str, argparse.Namespace, dict[str, object]]:
    """The preset, this program's own options, and the fields of Config that were given."""
    preset, words = split_preset(argv, default="shapes")
    parser = Parser("python -m boxteacher.tools.inspect [PRESET] (--statistics | ...)", __doc__)
    add = parser.add_argument
    add("--statistics", action="store_true", help="measure a data set")
    add("--checkpoint", metavar="FILE", help="written by train.py: draw pictures")
    add("--output", type=Path, metavar="DIR", help="the folder for the pictures")
    add("--images", type=int, metavar="N", help="how many (statistics: 300, pictures: 8)")
    options, given = parser.read(words)
    if options.statistics == bool(options.checkpoint and options.output):
        raise ConfigError("give either --statistics, or --checkpoint FILE and --output DIR")
    if options.images is not None and options.images < 1:
        raise ConfigError(f"--images is {options.images}: give 1 or more")
    return preset, options, given


def main() -> None:
    preset, options, given = read_arguments(sys.argv[1:])
    images = options.images or (300 if options.statistics else 8)
    if options.statistics:
        cfg = from_preset(**({"preset": preset} | given))
        fewer = min(images, cfg.shapes_train)  # the same first images, and less to paint
        data = make_train_set(dataclasses.replace(cfg, shapes_train=fewer))
        found = statistics(data, images, cfg.color_threshold)
        for name, value in found.items():  # lists: 5 %, median, 95 %
            print(f"{value:7.2f} %  {ROWS[name]}" if name in ROWS else f"{name}: {value}")
        print("\n".join(advice(found, cfg)) or "Nothing is outside of what photographs have.")
        print(json.dumps({"preset": cfg.preset} | found))
        return
    model, state = load_network(options.checkpoint, given)
    fewer = min(images, model.cfg.shapes_train)
    data = make_train_set(dataclasses.replace(model.cfg, shapes_train=fewer))
    chosen = range(min(images, len(data)))
    options.output.mkdir(parents=True, exist_ok=True)
    for index in progress(chosen, "inspect", len(chosen)):
        batch = collate([data[index, index]])
        batch = batch.to(model.pixel_mean.device)
        picture = inspect_image(model, batch, state["class_names"])
        picture.save(options.output / f"{batch.image_ids[0]}.png")
    print(options.output)


if __name__ == "__main__":
    run(main)
