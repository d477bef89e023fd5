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
from boxteacher.fcos import Detections, assign_targets
from boxteacher.model import CondInst, Encoded, Size
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


def label_image(model: CondInst, pixels: np.ndarray, boxes: Tensor, looks: Looks) -> list[BoxMask]:
    """Masks for the boxes [G, 4] of an image, uint8 RGB [h, w, 3], both in its own pixels.

    Probabilities and scores are means over the looks. A mask without pixels over the threshold
    keeps those from half of its maximum. None is empty.
    """
    sums, counts, scores = [0.0] * len(boxes), [0] * len(boxes), [0.0] * len(boxes)
    sources = ["location"] * len(boxes)
    for view, chosen in views(pixels.shape[:2], boxes, model.cfg, looks):
        found = look(model, pixels, view, boxes[chosen])
        for g, probs, score, has_detection in zip(chosen, *found, strict=True):
            sums[g], scores[g], counts[g] = sums[g] + probs, scores[g] + score, counts[g] + 1
            sources[g] = "detection" if has_detection else sources[g]
    masks = []
    for total, count, score, source in zip(sums, counts, scores, sources, strict=True):
        mask = total / count > model.cfg.mask_threshold
        mask = mask if mask.any() else total >= total.max() / 2
        masks.append(BoxMask(mask.cpu().numpy(), score / count, source))
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
        factor, reach = looks.zoom / max(x2 - x1, y2 - y1), looks.zoom * CONTEXT / 2
        if factor > base.resized[0] / size[0]:
            resized = tuple(max(round(factor * side), 1) for side in size)
            centers = factor * (y1 + y2) / 2, factor * (x1 + x2) / 2
            first = [max(int(center - reach), 0) for center in centers]
            ends = zip((math.ceil(center + reach) for center in centers), resized, strict=True)
            sides = [max(min(end) - start, 1) for end, start in zip(ends, first, strict=True)]
            everything.append((View(size, resized, (*first, *sides), False), [g]))
    for view, chosen in everything:
        yield view, chosen
        if looks.flip:
            yield view._replace(flip=True), chosen


@torch.no_grad()
def look(
    model: CondInst, pixels: np.ndarray, view: View, boxes: Tensor
) -> tuple[list[Tensor], list[float], list[bool]]:
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
    (found,) = model.detect(encoded)
    found = found._replace(boxes=clip_boxes_to_image(found.boxes, seen_size))
    ious = box_iou(found.boxes, seen_boxes)  # [D, G]
    is_near = (ious >= cfg.iou_threshold).any(1)
    near = Detections(*(part[is_near] for part in found))
    trust = detection_scores(model, encoded, near, seen_size, seen_size)
    assigned = assign_to_boxes(ious[is_near], trust, cfg.iou_threshold, cfg.score_threshold)

    # 2. Every box has a location to read its mask at.
    class_probs = encoded.predictions.class_logits[0].sigmoid().amax(-1)
    quality = class_probs * encoded.predictions.centerness_logits[0].sigmoid()  # [P]
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for g, box in enumerate(seen_boxes):
        own = near.location_index[assigned[g]] if assigned[g] >= 0 else None
        index[g] = best_location(encoded, quality, box) if own is None else own

    # 3. Read the masks inside the boxes.
    masks, scores, threshold = [], quality[index].sqrt(), cfg.mask_threshold
    for _, maps in model.mask_maps(encoded, 0, index):
        for mask_map in maps:
            g = len(masks)
            masks.append(read_window(mask_map, view, window(boxes[g], view.original)))
            inside = torch.ones_like(masks[g], dtype=torch.bool)
            scores[g] = mask_aware_scores(masks[g][None], scores[g], inside, threshold)
            scores[g] = trust[assigned[g]] if assigned[g] >= 0 else scores[g]
    return masks, scores.tolist(), (assigned >= 0).tolist()


def detection_scores(
    model: CondInst, encoded: Encoded, found: Detections, seen_size: Size, size: Size
) -> Tensor:
    """Mask-aware scores [D]. Boxes are in pixels of `size`. The network sees `seen_size`."""
    aware = [found.scores[:0]]
    for part, maps in model.mask_maps(encoded, 0, found.location_index):
        boxes, scores = found.boxes[part], found.scores[part]
        positions = mask_head.pixel_positions(maps, seen_size, size)
        aware.append(model.scores_in_boxes(maps, boxes, scores, *positions))
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
