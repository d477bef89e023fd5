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
    is_near = (ious >= cfg.iou_threshold).any(1)
    places = found.location_index[is_near]
    plain = View(seen_size, seen_size, (0, 0, *seen_size), False)
    near = places, found_boxes[is_near], found.scores[is_near]
    _, trust = read_masks(model, encoded, plain, *near)
    assigned = assign_to_boxes(ious[is_near], trust, cfg.iou_threshold, cfg.score_threshold)

    # 2. Every box has a location to read its mask at.
    class_probs = encoded.predictions.class_logits[0].sigmoid().amax(-1)
    quality = class_probs * encoded.predictions.centerness_logits[0].sigmoid()  # [P]
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for g, box in enumerate(seen_boxes):
        has_detection = assigned[g] >= 0
        index[g] = places[assigned[g]] if has_detection else best_location(encoded, quality, box)

    # 3. Read the masks inside the boxes.
    maps, scores = read_masks(model, encoded, view, index, boxes, quality[index].sqrt())
    for g, detection in enumerate(assigned.tolist()):
        scores[g] = trust[detection] if detection >= 0 else scores[g]
    return maps, scores, (assigned >= 0).tolist()


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


def read_masks(
    model: CondInst, encoded: Encoded, view: View, index: Tensor, boxes: Tensor, scores: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Mask probabilities at locations index [K], each in the window of its box (boxes [K, 4] in the
    view's original), and their mask-aware scores [K], from the scores [K] of the locations. The
    probabilities are those of `CondInst.mask_probs`, which computes whole images."""
    maps, trust, threshold = [], torch.zeros_like(scores), model.cfg.mask_threshold
    for places in index.split(MASK_CHUNK):
        for probs in model.mask_logits_s4(encoded, places[None])[0].sigmoid():
            k = len(maps)
            spans = enumerate(window(boxes[k], view.original))
            rows, columns = (interpolation(view, a, s, probs.shape[a]).to(probs) for a, s in spans)
            maps.append(rows @ probs @ columns.T)
            inside = torch.ones_like(maps[k], dtype=torch.bool)
            trust[k] = mask_aware_scores(maps[k][None], scores[k], inside, threshold)
    return maps, trust


def window(box: Tensor, size: Size) -> tuple[slice, slice]:
    """The rows and columns of pixels that a box [4] touches, at least one each."""
    spans = []
    for low, high, side in zip(box.tolist()[1::-1], box.tolist()[:1:-1], size, strict=True):
        first = min(int(low + 1e-3), side - 1)  # sums such as x + width are not exact
        spans.append(slice(first, max(math.ceil(high - 1e-3), first + 1)))
    return tuple(spans)


def interpolation(view: View, axis: int, pixels: slice, cells: int) -> Tensor:
    """[pixels, cells]: bilinear weights of the rows (axis 0) or columns (1) of the stride-4 map in
    pixels of the original. Cell i is at pixel 4 i + 2 of the network's input, which is the view."""
    start, side = view.window[axis], view.window[2 + axis]
    position = (torch.arange(pixels.start, pixels.stop) + 0.5) / view.original[axis]
    position = position * view.resized[axis] - 0.5 - start
    position = side - 1 - position if axis == 1 and view.flip else position
    cell = ((position.clamp(0, side - 1) - 2) / 4).clamp(0, cells - 1)
    return (1 - (cell[:, None] - torch.arange(cells)).abs()).clamp(min=0)
