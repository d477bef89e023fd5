"""From a teacher's detections to pseudo masks for ground-truth boxes (BoxTeacher, arXiv 2210.05174, section 3.2).

D detections · G ground-truth boxes · H, W image pixels
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_aware_scores(
    mask_probs: Tensor, scores: Tensor, inside_box: Tensor, threshold: float = 0.5
) -> Tensor:
    """How far to trust a mask: the detection's score times the mean probability of its foreground in its own box.

        s = sqrt( c * Σ 1(m > tau) m m^b / (Σ 1(m > tau) m^b + 1e-6) )

    mask_probs m [D, H, W]; scores c [D]; inside_box m^b bool [D, H, W]. Returns [D] in [0, 1]; 0 for an empty mask.

    Differs from the published code, which takes sqrt(sqrt(c) * mean over the whole mask) as the weight and orders
    detections by sqrt(c * mean): this is the formula of the paper's presentation, used for both.
    """
    is_foreground = (mask_probs > threshold) & inside_box
    mean = (mask_probs * is_foreground).sum((1, 2)) / (is_foreground.sum((1, 2)) + 1e-6)
    return (scores * mean).sqrt()


def assign_to_boxes(
    ious: Tensor, scores: Tensor, iou_threshold: float = 0.5, score_threshold: float = 0.0
) -> Tensor:
    """Box-based assignment (BoxTeacher, algorithm 1): detections in descending mask-aware score; each takes, among
    the boxes not yet taken, the one of highest IoU (the first of equals), if that IoU reaches the threshold.
    Classes are not compared; detections scored under `score_threshold` are skipped.

    ious [D, G] between predicted and ground-truth boxes; scores [D]. Returns int64 [G] on the CPU: the detection
    of each box, -1 for none.

    Differs from the published code, where a box taken by detection number 0 can be taken again and the last of
    equal IoUs wins.
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
        box = max(sorted(free), key=row.__getitem__)
        if row[box] >= iou_threshold:
            assigned[box] = detection
            free.remove(box)
    return torch.tensor(assigned, dtype=torch.int64)
