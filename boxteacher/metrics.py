"""What a run measures of its batches, beside the losses.

A metric is a fraction [2], (numerator, denominator), which can be summed over ranks.
N images · G boxes · P locations · H4, W4 the stride-4 grid
"""

from __future__ import annotations

import torch
from torch import Tensor

from .data import Batch


@torch.no_grad()
def pseudo_mask_metrics(masks: Tensor, weights: Tensor, batch: Batch) -> dict[str, Tensor]:
    """How many boxes have a pseudo mask, and the mean score of these. Where true masks exist, also
    their mean IoU on the stride-4 grid. masks bool [N, G, H4, W4]; weights [N, G]."""
    has_pseudo = (weights > 0) & batch.valid
    count = has_pseudo.sum()
    num_images = torch.full_like(count, len(batch.sizes))
    fractions = {
        "pseudo_masks_per_image": (count, num_images),
        "pseudo_masks_share": (count, batch.valid.sum()),
        "mask_aware_score": (weights.sum(), count),
    }
    if batch.masks is not None:
        both = (masks & batch.masks).sum((2, 3))
        either = (masks | batch.masks).sum((2, 3)).clamp(min=1)
        is_known = has_pseudo & batch.has_mask
        iou = torch.where(is_known, both / either, 0.0).sum()
        fractions["pseudo_mask_iou"] = (iou, is_known.sum())
    return {name: torch.stack([a.float(), b.float()]) for name, (a, b) in fractions.items()}


def lost_box_metrics(box_index: Tensor, is_positive: Tensor, batch: Batch) -> dict[str, Tensor]:
    """How many boxes no location learns, mostly because they are too small for the strides, and
    the mean short side of these boxes, in pixels. box_index, is_positive [N, P]: see Targets."""
    count = torch.zeros_like(batch.labels)
    count.scatter_add_(1, box_index, is_positive.to(count.dtype))
    is_lost = batch.valid & (count == 0)
    sides = torch.where(is_lost, (batch.boxes[..., 2:] - batch.boxes[..., :2]).amin(-1), 0).sum()
    lost, total = is_lost.sum().to(sides.dtype), batch.valid.sum()
    return {"lost_boxes": torch.stack((lost, total)), "lost_side": torch.stack((sides, lost))}
