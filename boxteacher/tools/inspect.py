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

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from boxteacher import losses, mask_head
from boxteacher.command_line import Parser, split_preset
from boxteacher.config import ConfigError
from boxteacher.data import Batch, Classes, collate, make_train_set
from boxteacher.errors import run
from boxteacher.fcos import Detections
from boxteacher.model import CondInst, PseudoMasks, scale_boxes
from boxteacher.presets import from_preset
from boxteacher.pseudo_labels import assign_to_boxes
from boxteacher.reporting import progress, say_notes
from boxteacher.tools.common import load_network
from boxteacher.tools.given_boxes import detection_scores
from boxteacher.tools.statistics import alike_pairs, show_statistics
from boxteacher.visualize import (
    MAX_CAPTIONS,
    NEUTRAL,
    contact_sheet,
    draw_instances,
    instance_color,
    save_picture,
    tint,
)

SIDE = 500  # of a picture


class TeacherStep(NamedTuple):
    """The teacher's step on one image with G boxes. Boxes are in the image's pixels."""

    pseudo: PseudoMasks
    found: Detections  # with mask-aware scores, in descending order
    assigned: list[int]  # G: the detection of each box, -1 for none
    shown: list[int]  # K detections: all that are assigned, and the best of the others
    probs: Tensor  # [K, h, w] their masks


@torch.no_grad()
def teacher_step(model: CondInst, batch: Batch) -> TeacherStep:
    """`make_pseudo_masks` on a batch of one image, and what happens on the way. (In eval mode. A
    run uses the statistics of a batch.)"""
    seen, masks_for_boxes = [], model.masks_for_boxes
    model.masks_for_boxes = lambda *args: seen.append(args) or masks_for_boxes(*args)
    pseudo = model.make_pseudo_masks(batch)
    del model.masks_for_boxes
    ((encoded, _, found, *seen_size, _),) = seen
    sizes = seen_size[0], batch.sizes[0]
    found = found._replace(boxes=scale_boxes(found.boxes, *sizes)[0])
    found = found._replace(scores=detection_scores(model, encoded, 0, found, *sizes))
    order = found.scores.argsort(descending=True)
    found = Detections(*(part[order] for part in found))
    ious = box_iou(found.boxes, batch.boxes[0, batch.valid[0]])
    limits = model.cfg.iou_threshold, model.cfg.score_threshold
    assigned = assign_to_boxes(ious, found.scores, *limits).tolist()
    best = range(min(len(found.scores), MAX_CAPTIONS))  # the others would hide each other
    shown = sorted({*best, *assigned} - {-1})
    probs = [found.boxes.new_zeros(0, *sizes[1])]
    for _, maps in model.mask_maps(encoded, 0, found.location_index[shown]):
        probs.append(mask_head.read_maps(maps, *mask_head.pixel_positions(maps, *sizes)))
    return TeacherStep(pseudo, found, assigned, shown, torch.cat(probs))


def inspect_image(model: CondInst, batch: Batch, class_names: Sequence[str]) -> Image.Image:
    """Four pictures of the image of a batch."""
    (height, width), valid = batch.sizes[0], batch.valid[0]
    image, boxes, labels = batch.images[0, :, :height, :width], batch.boxes[0], batch.labels[0]
    boxes, labels, step = boxes[valid], labels[valid], teacher_step(model, batch)
    draw = functools.partial(draw_instances, image, class_names=class_names, side=SIDE)

    masks = step.pseudo.masks[0, valid, : -(-height // 4), : -(-width // 4)]
    of_box = {detection: g for g, detection in enumerate(step.assigned) if detection >= 0}
    colors = [instance_color(of_box[d]) if d in of_box else NEUTRAL for d in step.shown]
    look = dict(colors=colors, opacity=[1.0 if d in of_box else 0.2 for d in step.shown])
    found = Detections(*(part[step.shown] for part in step.found))
    pictures = [
        draw(boxes, None, labels),
        color_pairs(image.cpu(), batch.to("cpu"), model.cfg.color_threshold),
        draw(found.boxes, step.probs, found.labels, scores=found.scores, **look),
        draw(None, masks, labels, opacity=step.pseudo.weights[0, valid]),
    ]
    titles = [f"{len(boxes)} boxes", "pairs of similar color"]
    titles += [f"{len(of_box)} boxes got a detection", "pseudo masks (opacity: score)"]
    footer = (
        "Pairs: blue inside a box, red across its edge. The stronger, the more of 8."
        " Detections: in the color of the box that they got. Gray: the best of the others."
    )
    return contact_sheet([pictures], titles, footer, SIDE)


def color_pairs(image: Tensor, batch: Batch, threshold: float) -> Image.Image:
    """Which pairs of pixels the colors tie together: inside a box, and across its edge."""
    _, is_alike, in_box = alike_pairs(batch, threshold)
    inside, across = torch.zeros(2, *is_alike.shape[1:])
    for direction, (dy, dx) in enumerate(losses.NEIGHBORS):
        other = losses.shifted(in_box[None], dy, dx)[0]
        inside += (in_box & other & is_alike[direction]).any(0) / 8
        across += (in_box & ~other & is_alike[direction]).any(0) / 8
    return tint(image, SIDE, [(inside, (60, 140, 255)), (across, (255, 40, 40))])


# --- the program ----------------------------------------------------------------------------------


def main() -> None:
    preset, words = split_preset(sys.argv[1:], default="shapes")
    parser = Parser("python -m boxteacher.tools.inspect [PRESET] (--statistics | ...)", __doc__)
    add = parser.add_argument
    add("--statistics", action="store_true", help="measure a data set")
    add("--checkpoint", metavar="FILE", help="written by train.py: draw pictures")
    add("--output", type=Path, metavar="DIR", help="the folder for the pictures")
    add("--images", type=int, metavar="N", help="how many (statistics: 300, pictures: 8)")
    options, given = parser.read(words)
    if options.statistics == bool(options.checkpoint and options.output):
        raise ConfigError("give either --statistics, or --checkpoint FILE and --output DIR")
    if options.checkpoint and words != sys.argv[1:]:
        raise ConfigError(f"{preset}: --checkpoint has its own configuration; give no preset")
    images = options.images if options.images is not None else 300 if options.statistics else 8
    if images < 1:
        raise ConfigError(f"--images is {images}: give 1 or more")
    if options.statistics:
        cfg, classes = from_preset(**({"preset": preset} | given)), None
    else:
        model, state = load_network(options.checkpoint, given)
        cfg = model.cfg
        classes = Classes(state["class_names"], state["category_ids"], options.checkpoint)
    fewer = min(images, cfg.shapes_train)  # the same first images, and less to paint
    data = make_train_set(dataclasses.replace(cfg, shapes_train=fewer), classes)
    say_notes(data.notes)
    if options.statistics:
        return show_statistics(data, cfg, images)
    chosen = range(min(images, len(data)))
    for index in progress(chosen, "inspect", len(chosen)):
        batch = collate([data[index, index]]).to(model.pixel_mean.device)
        picture = inspect_image(model, batch, state["class_names"])
        save_picture(picture, options.output / f"{batch.image_ids[0]}.png")
    print(options.output)


if __name__ == "__main__":
    run(main)
