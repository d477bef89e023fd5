"""From a teacher's detections to pseudo masks (BoxTeacher, arXiv 2210.05174).

Floats are float32 or float64. Nothing here is for gradients.
D detections · G ground-truth boxes · h, w a grid of pixels, of an image or of stride 4
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_aware_scores(
    mask_probs: Tensor, scores: Tensor, inside_box: Tensor, threshold: float = 0.5
) -> Tensor:
    """How far to trust a mask: the detection's score times the mean probability of the mask's
    foreground inside the detection's own box.

        s = sqrt( c * Σ 1(m > tau) m m^b / (Σ 1(m > tau) m^b + 1e-6) )

    mask_probs m [D, h, w]; inside_box m^b bool [D, h, w], 1 inside the detection's box. scores c
    [D] are themselves roots, sqrt(class probability * centerness), so s is a root of a root.
    Returns [D] in [0, 1], 0 for an empty mask. The formula is that of the authors' slides (CVPR
    2023). Parts of a mask outside of the box do not count: a pseudo mask is cut to its ground-truth
    box, so they do no harm.
    """
    is_foreground = (mask_probs > threshold) & inside_box
    mean = (mask_probs * is_foreground).sum((1, 2)) / (is_foreground.sum((1, 2)) + 1e-6)
    return (scores * mean).sqrt()


def assign_to_boxes(
    ious: Tensor, scores: Tensor, iou_threshold: float = 0.5, score_threshold: float = 0.0
) -> Tensor:
    """Box-based assignment. Detections choose in descending mask-aware score. Each takes the free
    box of highest IoU (the first of equals), if that IoU reaches the threshold.

    Classes are not compared. Detections with a score under `score_threshold` are skipped.
    ious [D, G] between predicted and ground-truth boxes; scores [D]. Returns int64 [G] on the CPU:
    the detection of each box, -1 for none.
    """
    num_detections, num_boxes = ious.shape
    assert scores.shape == (num_detections,), "scores must be [D]"
    assigned = [-1] * num_boxes
    free = list(range(num_boxes))
    rows = ious.where(ious >= iou_threshold, -1.0).tolist()
    order = scores.sort(descending=True, stable=True)
    for detection, score in zip(order.indices.tolist(), order.values.tolist(), strict=True):
        if score < score_threshold or not free:
            break
        row = rows[detection]
        box = max(free, key=row.__getitem__)  # the first of equals
        if row[box] >= 0:
            assigned[box] = detection
            free.remove(box)
    return torch.tensor(assigned, dtype=torch.int64)


def take_assigned(masks: Tensor, scores: Tensor, assigned: Tensor) -> tuple[Tensor, Tensor]:
    """The pseudo mask and the weight of each box: those of its detection, zeros without one.

    masks bool [D, h, w] and scores [D], D at least 1; assigned int64 [G] from `assign_to_boxes`.
    Returns bool [G, h, w] and [G].
    """
    assigned = assigned.to(masks.device)
    has_mask, detection = assigned >= 0, assigned.clamp(min=0)
    weights = torch.where(has_mask, scores[detection], 0.0)
    return masks[detection] & has_mask[:, None, None], weights
