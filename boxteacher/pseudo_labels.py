"""From a teacher's detections to pseudo masks for boxes (BoxTeacher, arXiv 2210.05174).

D detections · G ground-truth boxes · H, W image pixels
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_aware_scores(
    mask_probs: Tensor, scores: Tensor, inside_box: Tensor, threshold: float = 0.5
) -> Tensor:
    """How far to trust a mask: the detection's score times the mean probability of its foreground
    in its own box.

        s = sqrt( c * Σ 1(m > tau) m m^b / (Σ 1(m > tau) m^b + 1e-6) )

    mask_probs m [D, H, W]; scores c [D]; inside_box m^b bool [D, H, W]. Returns [D] in [0, 1]; 0
    for an empty mask.

    Differs from the published code (see `published_scores`): this is the formula of the paper's
    presentation, used for the order of detections and for the weight of their masks.
    """
    is_foreground = (mask_probs > threshold) & inside_box
    mean = (mask_probs * is_foreground).sum((1, 2)) / (is_foreground.sum((1, 2)) + 1e-6)
    return (scores * mean).sqrt()


def published_scores(
    mask_probs: Tensor, scores: Tensor, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """What the published code has in place of `mask_aware_scores`, to compare numbers with: the
    mean is over the whole mask, order and weight are two.

        mean = Σ 1(m > tau) m / Σ 1(m > tau)
        order = sqrt(c * mean);   weight = sqrt(sqrt(c) * mean)

    Returns order and weight, each [D].
    """
    is_foreground = mask_probs > threshold
    mean = (mask_probs * is_foreground).sum((1, 2)) / is_foreground.sum((1, 2)).clamp(min=1)
    return (scores * mean).sqrt(), (scores.sqrt() * mean).sqrt()


def assign_to_boxes(
    ious: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.0,
    published: bool = False,
) -> Tensor:
    """Box-based assignment (BoxTeacher): detections in descending mask-aware score;
    each takes, among the boxes not yet taken, the one of highest IoU (the first of equals), if that
    IoU reaches the threshold. Classes are not compared; detections scored under `score_threshold`
    are skipped.

    ious [D, G] between predicted and ground-truth boxes; scores [D]. Returns int64 [G] on the CPU:
    the detection of each box, -1 for none.

    `published`: as in the published code, where a box taken by detection number 0 can be taken
    again, and the last of equal IoUs wins.
    """
    num_detections, num_boxes = ious.shape
    assert scores.shape == (num_detections,)
    assigned = [-1] * num_boxes
    free = set(range(num_boxes))
    rows = ious.tolist()
    order = scores.sort(descending=True, stable=True)
    for detection, score in zip(order.indices.tolist(), order.values.tolist(), strict=True):
        if score < score_threshold or not free:
            break
        row = rows[detection]
        box = max(sorted(free, reverse=published), key=row.__getitem__)
        if row[box] >= iou_threshold:
            assigned[box] = detection
            if not (published and detection == 0):
                free.remove(box)
    return torch.tensor(assigned, dtype=torch.int64)
