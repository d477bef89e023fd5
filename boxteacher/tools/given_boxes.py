"""Masks for given boxes of one image, from one view of it or from several.

G boxes · K masks · P locations · D detections · h, w pixels of an image
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from boxteacher import mask_head
from boxteacher.config import Config
from boxteacher.fcos import Detections, assign_targets
from boxteacher.model import CondInst, Encoded, Size, whole_view
from boxteacher.pseudo_labels import assign_to_boxes, mask_aware_scores
from boxteacher.transforms import View

CONTEXT = 2.0  # least side of the crop that --zoom looks at, in sides of the box
BATCH_PIXELS = 2**18  # that the network sees at a time: about 16 crops of 128 by 128

Seen = tuple[View, Sequence[int]]  # what the network looks at, and the boxes that it reads there


class Looks(NamedTuple):
    """How often the network looks at an image."""

    scales: Sequence[float] = (1.0,)  # of the test size
    flip: bool = False  # look at everything mirrored, too
    zoom: float = 0.0  # each smaller box is enlarged to so many pixels; 0: none


class BoxMask(NamedTuple):
    mask: np.ndarray  # bool, in the window of its box
    score: float
    source: str  # "detection" or "location"


def label_image(model: CondInst, pixels: np.ndarray, boxes: Tensor, looks: Looks) -> list[BoxMask]:
    """Masks for the boxes [G, 4] of an image, uint8 RGB [h, w, 3], both in its own pixels.

    Probabilities and scores are means over the looks. A mask without pixels over the threshold
    keeps those from half of its maximum. So no mask is empty.
    """
    if not len(boxes):
        return []
    sums, counts, scores = [0.0] * len(boxes), [0] * len(boxes), [0.0] * len(boxes)
    sources = ["location"] * len(boxes)
    for part in batches(views(pixels.shape[:2], boxes, model.cfg, looks)):
        for g, probs, score, has_detection in look(model, pixels, part, boxes):
            sums[g], scores[g], counts[g] = sums[g] + probs, scores[g] + score, counts[g] + 1
            sources[g] = "detection" if has_detection else sources[g]
    masks = []
    for total, count, score, source in zip(sums, counts, scores, sources, strict=True):
        mask = total / count > 0.5  # as in `predict`. mask_threshold is for the pseudo masks
        mask = mask if mask.any() else total >= total.max() / 2
        masks.append(BoxMask(mask.cpu().numpy(), score / count, source))
    return masks


# --- what the network looks at --------------------------------------------------------------------


def views(size: Size, boxes: Tensor, cfg: Config, looks: Looks) -> Iterator[Seen]:
    """What the network looks at, and the boxes (their numbers) that it reads there. Crops have one
    size, a multiple of 32, unless the enlarged image is smaller."""
    base, everything, crop = whole_view(size, cfg), [], -(-int(CONTEXT * looks.zoom) // 32) * 32
    for scale in looks.scales:
        resized = tuple(max(round(scale * side), 1) for side in base.resized)
        everything.append((View(size, resized, (0, 0, *resized), False), range(len(boxes))))
    for g, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        factor = looks.zoom / max(x2 - x1, y2 - y1, 1.0)  # float32 may leave no extent
        if factor > base.resized[0] / size[0]:
            resized = tuple(max(round(factor * side), 1) for side in size)
            middle = factor * (y1 + y2) / 2, factor * (x1 + x2) / 2
            top, left = (
                max(min(round(center - crop / 2), side - crop), 0)
                for center, side in zip(middle, resized, strict=True)
            )
            window = (top, left, min(crop, resized[0]), min(crop, resized[1]))
            everything.append((View(size, resized, window, False), [g]))
    for view, chosen in everything:
        yield view, chosen
        if looks.flip:
            yield view._replace(flip=True), chosen


def batches(seen: Iterable[Seen]) -> Iterator[list[Seen]]:
    """Lists of views of one padded size, because padding counts in the head's GroupNorm: so a look
    does not depend on the others. A list has BATCH_PIXELS at most, or one view."""
    of_size = defaultdict(list)
    for view, chosen in seen:
        of_size[tuple(-(-side // 32) * 32 for side in view.window[2:])].append((view, chosen))
    for (height, width), group in of_size.items():
        count = max(BATCH_PIXELS // (height * width), 1)
        yield from (group[start : start + count] for start in range(0, len(group), count))


# --- what it reads there --------------------------------------------------------------------------


@torch.no_grad()
def look(
    model: CondInst, pixels: np.ndarray, seen: Sequence[Seen], boxes: Tensor
) -> Iterator[tuple[int, Tensor, float, bool]]:
    """For each box of each view: its number, its mask probabilities in the window of the box, its
    score, and whether it has a detection. boxes [G, 4]. The views have one padded size."""
    images = torch.cat([view.padded(pixels) for view, _ in seen]).to(boxes.device)
    encoded = model.encode(model.normalize(images, [view.window[2:] for view, _ in seen]))
    for n, found in enumerate(model.detect(encoded)):
        view, chosen = seen[n]
        read = read_boxes(model, encoded, n, found, view, boxes[chosen])
        yield from zip(chosen, *read, strict=True)


def read_boxes(
    model: CondInst, encoded: Encoded, n: int, found: Detections, view: View, boxes: Tensor
) -> tuple[list[Tensor], list[float], list[bool]]:
    """The mask probabilities of boxes [G, 4] in the nth view, each in the window of its box, their
    scores [G], and which boxes have a detection.

    Detections are assigned to boxes as in the teacher's step (BoxTeacher). A box
    without one is read at its `best_location`, and its score takes the mean inside the true box.
    """
    cfg, seen_size = model.cfg, view.window[2:]
    seen_boxes = torch.from_numpy(view.boxes(boxes.cpu().double().numpy())[0]).to(boxes)

    # 1. Detections near a box choose among the boxes.
    found = found._replace(boxes=clip_boxes_to_image(found.boxes, seen_size))
    ious = box_iou(found.boxes, seen_boxes)  # [D, G]
    is_near = (ious >= cfg.iou_threshold).any(1)
    near = Detections(*(part[is_near] for part in found))
    trust = detection_scores(model, encoded, n, near, seen_size, seen_size)
    assigned = assign_to_boxes(ious[is_near], trust, cfg.iou_threshold, cfg.score_threshold)

    # 2. Every box has a location to read its mask at.
    class_probs = encoded.predictions.class_logits[n].sigmoid().amax(-1)
    quality = class_probs * encoded.predictions.centerness_logits[n].sigmoid()  # [P]
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for g, box in enumerate(seen_boxes):
        own = near.location_index[assigned[g]] if assigned[g] >= 0 else None
        index[g] = best_location(encoded, quality, box) if own is None else own

    # 3. Read the masks inside the boxes.
    masks, scores, threshold = [], quality[index].sqrt(), cfg.mask_threshold
    for mask_map in itertools.chain.from_iterable(m for _, m in model.mask_maps(encoded, n, index)):
        g = len(masks)
        masks.append(read_window(mask_map, view, window(boxes[g], view.original)))
        inside = torch.ones_like(masks[g], dtype=torch.bool)
        scores[g] = mask_aware_scores(masks[g][None], scores[g], inside, threshold)
        scores[g] = trust[assigned[g]] if assigned[g] >= 0 else scores[g]
    return masks, scores.tolist(), (assigned >= 0).tolist()


def detection_scores(
    model: CondInst, encoded: Encoded, n: int, found: Detections, seen_size: Size, size: Size
) -> Tensor:
    """Mask-aware scores [D] in image n, as large as `seen_size`. Boxes are in pixels of `size`."""
    aware = [found.scores[:0]]
    for part, maps in model.mask_maps(encoded, n, found.location_index):
        boxes, scores = found.boxes[part], found.scores[part]
        positions = mask_head.pixel_positions(maps, seen_size, size)
        aware.append(model.scores_in_boxes(maps, boxes, scores, *positions))
    return torch.cat(aware)


def best_location(encoded: Encoded, quality: Tensor, box: Tensor) -> Tensor:
    """Where to read the mask of a box [4] without a detection: an index into the P locations.

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
