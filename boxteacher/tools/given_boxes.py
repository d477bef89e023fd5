"""Masks for given boxes of one image, in one look at it or in several.

G boxes · K masks · P locations · D detections · h, w pixels of an image
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from boxteacher import mask_head
from boxteacher.config import Config
from boxteacher.fcos import assign_targets
from boxteacher.model import MASK_CHUNK, CondInst, Encoded, Size
from boxteacher.pseudo_labels import assign_to_boxes, mask_aware_scores
from boxteacher.tools.common import network_input, test_view
from boxteacher.transforms import View

CONTEXT = 2.0  # side of the crop that --zoom looks at, in sides of the box


class Looks(NamedTuple):
    """How often the network looks at an image."""

    scales: Sequence[float] = (1.0,)  # of the test size
    flip: bool = False  # look at everything mirrored, too
    zoom: float = 0.0  # smaller boxes are enlarged to so many pixels, one by one; 0: no


class BoxMask(NamedTuple):
    mask: np.ndarray  # bool, in the window of its box
    score: float
    source: str  # "detection" or "location"


# --- one image ------------------------------------------------------------------------------------


def label_image(model: CondInst, pixels: np.ndarray, boxes: Tensor, looks: Looks) -> list[BoxMask]:
    """Masks for the boxes [G, 4] of an image, uint8 RGB [h, w, 3], both in its own pixels.

    Probabilities and scores are means over the looks. A mask without pixels over the threshold
    keeps those from half of its maximum. None is empty.
    """
    maps: list[list[Tensor]] = [[] for _ in boxes]
    scores, is_detected = boxes.new_zeros(len(boxes)), [False] * len(boxes)
    for view, chosen in views(pixels.shape[:2], boxes, model.cfg, looks):
        found, found_scores, detected = look(model, pixels, view, boxes[chosen])
        for k, g in enumerate(chosen):
            maps[g].append(found[k])
            scores[g] += found_scores[k]
            is_detected[g] |= detected[k]
    masks = []
    for of_box, score, detected in zip(maps, scores.tolist(), is_detected, strict=True):
        probs = sum(of_box) / len(of_box)
        mask = probs > model.cfg.mask_threshold
        mask = mask if mask.any() else probs >= probs.max() / 2
        source = "detection" if detected else "location"
        masks.append(BoxMask(mask.cpu().numpy(), score / len(of_box), source))
    return masks


def views(
    size: Size, boxes: Tensor, cfg: Config, looks: Looks
) -> Iterator[tuple[View, Sequence[int]]]:
    """What the network looks at, and the boxes (their numbers) that it reads there."""
    base, everything = test_view(size, cfg), []
    for scale in looks.scales:
        resized = tuple(max(round(scale * side), 1) for side in base.resized)
        everything.append((View(size, resized, (0, 0, *resized), False), range(len(boxes))))
    for g, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        factor = looks.zoom / max(x2 - x1, y2 - y1)
        if factor > base.resized[0] / size[0]:
            resized, crop = [], []
            for low, high, side in ((y1, y2, size[0]), (x1, x2, size[1])):
                resized.append(max(round(factor * side), 1))
                reach = CONTEXT * looks.zoom / 2
                center = (low + high) / 2 * factor
                start = max(int(center - reach), 0)
                crop.append((start, max(min(math.ceil(center + reach), resized[-1]) - start, 1)))
            (top, height), (left, width) = crop
            everything.append((View(size, tuple(resized), (top, left, height, width), False), [g]))
    for view, chosen in everything:
        yield view, chosen
        if looks.flip:
            yield view._replace(flip=True), chosen


@torch.no_grad()
def look(
    model: CondInst, pixels: np.ndarray, view: View, boxes: Tensor
) -> tuple[list[Tensor], Tensor, list[bool]]:
    """The mask probabilities of boxes [G, 4] in one view, each in the window of its box, their
    scores [G], and which boxes have a detection.

    Detections are assigned to boxes as in the teacher's step (BoxTeacher, section 3.2). A box
    without one is read at its `best_location`, and its score takes the mean inside the true box.
    """
    cfg, seen_size = model.cfg, view.window[2:]
    images = network_input(view, pixels).to(boxes.device)
    encoded = model.encode(model.normalize(images, [seen_size]))
    seen_boxes = torch.from_numpy(view.boxes(boxes.cpu().double().numpy())[0]).to(boxes)

    # 1. Detections near a box choose among the boxes.
    found = model.detect(encoded)[0]
    found_boxes = clip_boxes_to_image(found.boxes, seen_size)
    ious = box_iou(found_boxes, seen_boxes)  # [D, G]
    near = (ious >= cfg.iou_threshold).any(1).nonzero().flatten()
    places = found.location_index[near]
    near_boxes = found_boxes[near], found.scores[near]
    trust = detection_scores(model, encoded, places, *near_boxes, seen_size, seen_size)
    assigned = assign_to_boxes(ious[near], trust, cfg.iou_threshold, cfg.score_threshold)

    # 2. Every box has a location to read its mask at.
    class_probs = encoded.predictions.class_logits[0].sigmoid().amax(-1)
    quality = class_probs * encoded.predictions.centerness_logits[0].sigmoid()  # [P]
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for g, box in enumerate(seen_boxes):
        has_detection = assigned[g] >= 0
        index[g] = places[assigned[g]] if has_detection else best_location(encoded, quality, box)

    # 3. Read the masks inside the boxes.
    masks, scores, threshold = [], quality[index].sqrt(), cfg.mask_threshold
    for some in index.split(MASK_CHUNK) if len(index) else ():
        for mask_map in model.mask_maps(encoded, 0, some):
            g = len(masks)
            masks.append(read_window(mask_map, view, window(boxes[g], view.original)))
            inside = torch.ones_like(masks[g], dtype=torch.bool)
            scores[g] = mask_aware_scores(masks[g][None], scores[g], inside, threshold)
            scores[g] = trust[assigned[g]] if assigned[g] >= 0 else scores[g]
    return masks, scores, (assigned >= 0).tolist()


def detection_scores(
    model: CondInst,
    encoded: Encoded,
    index: Tensor,
    boxes: Tensor,
    scores: Tensor,
    seen_size: Size,
    size: Size,
) -> Tensor:
    """Mask-aware scores of detections at locations index [D], with boxes [D, 4] and scores [D], in
    an image of `size` that the network sees at `seen_size`."""
    aware = [scores[:0]]
    chunks = (x.split(MASK_CHUNK) for x in (index, boxes, scores))
    for some, some_boxes, some_scores in zip(*chunks, strict=True) if len(index) else ():
        maps = model.mask_maps(encoded, 0, some)
        positions = mask_head.pixel_positions(maps, seen_size, size)
        aware.append(model.scores_in_boxes(maps, some_boxes, some_scores, *positions))
    return torch.cat(aware)


def best_location(encoded: Encoded, quality: Tensor, box: Tensor) -> Tensor:
    """Where to read the mask of a box [4] that no detection claims: an index into the P locations.

    It has the highest quality [P], largest class probability * centerness, of those that training
    gives to such a box: near its center, on the level for its size (FCOS, section 3). If the box is
    too small to have any, it is the location nearest to the center.
    """
    center, label = (box[:2] + box[2:]) / 2, torch.zeros_like(box[:1, None], dtype=torch.int64)
    alone = (box[None, None], label, label == 0, center[None, None])
    targets = assign_targets(encoded.locations, *alone)
    distance = (encoded.locations.xy - center).norm(dim=1)
    return torch.where(targets.is_positive[0], quality, -1 - distance).argmax()


def window(box: Tensor, size: Size) -> tuple[slice, slice]:
    """The rows and columns of pixels that a box [4] touches, at least one each."""
    spans = []
    for low, high, side in zip(box.tolist()[1::-1], box.tolist()[:1:-1], size, strict=True):
        first = min(int(low + 1e-3), side - 1)  # sums such as x + width are not exact
        spans.append(slice(first, max(math.ceil(high - 1e-3), first + 1)))
    return tuple(spans)


def read_window(mask_map: Tensor, view: View, pixels: tuple[slice, slice]) -> Tensor:
    """A map [H4, W4] of a view at rows and columns of the original image (as
    `mask_head.pixel_positions` and `read_maps` do for whole images)."""
    positions = []
    for axis, span in enumerate(pixels):
        start, side = view.window[axis], view.window[2 + axis]
        place = torch.arange(span.start, span.stop).to(mask_map) + 0.5
        place = place * (view.resized[axis] / view.original[axis]) - 0.5 - start
        place = side - 1 - place if axis == 1 and view.flip else place
        cells = (place.clamp(0, side - 1) - 2) / 4
        positions.append(cells.clamp(0, mask_map.shape[axis] - 1))
    return mask_head.read_maps(mask_map[None], *positions)[0]
