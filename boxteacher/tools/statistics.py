"""A training set in numbers (`boxteacher.tools.inspect --statistics`)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boxteacher import losses
from boxteacher.config import Config
from boxteacher.data import Batch, CocoDataset, collate

LEAKY = 0.25  # share of leaks above which an object counts as leaky
ROWS = {  # names in the JSON line and what they are, in percent; all but the first need true masks
    "alike_in_box": "of all pairs in the box, look alike",
    "leaks": "across the mask's outline, look alike (leaks)",
    "alike_inside": "inside the object, look alike",
    "alike_background": "of the background in the box, look alike",
    "wrong_pulls": "of all pairs that pull (look alike), pull wrongly (leaks)",
    "leaky_objects": f"objects with over {LEAKY:.0%} leaks (share of their crossing pairs)",
}
ADVICE = {  # the most that photographs have (COCO: 9, 1.8, 3.4), and what to do if it is more
    "leaks": (20, "outlines are hard to see in the colors: a higher --color-threshold helps"),
    "wrong_pulls": (10, "many pairs pull masks over their outlines: masks will be too large"),
    "leaky_objects": (15, "colors do not show these objects: give some true masks (--use-masks)"),
}


def alike_pairs(batch: Batch, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch of one image, on the stride-4 grid: where colors count [1, H4, W4], which pixels
    look like their neighbors [8, H4, W4], and which lie in each box [G, H4, W4]."""
    rows, columns = (side // 4 for side in batch.images.shape[-2:])
    reliable = [(h - cut, w) for (h, w), cut in zip(batch.sizes, batch.cut_rows, strict=True)]
    on_image = losses.inside_masks(reliable, rows, columns)
    is_alike = losses.color_similarity(batch.images, on_image)[0] >= threshold
    return on_image, is_alike, losses.box_masks(batch.boxes[0, batch.valid[0]], rows, columns)


def pair_counts(batch: Batch, threshold: float) -> Tensor:
    """Pairs of pixels per box of a batch of one image, counted as the pairwise loss weighs them:
    once for each end in the box whose other end lies on the image.

    Returns int64 [G, 3, 2]: pairs that cross the true mask's outline, inside it and outside it
    (where there is no mask, all); all of them and those whose similarity reaches the threshold.
    """
    on_image, is_alike, in_box = alike_pairs(batch, threshold)
    mask = batch.masks[0, : len(in_box)]
    counts = torch.zeros(len(in_box), 3, 2, dtype=torch.int64)
    for direction, (dy, dx) in enumerate(losses.NEIGHBORS):
        other = losses.shifted(mask, dy, dx)
        pairs = in_box & losses.shifted(on_image, dy, dx)
        for kind, is_kind in enumerate((mask ^ other, mask & other, ~(mask | other))):
            counts[:, kind, 0] += (pairs & is_kind).sum((1, 2))
            counts[:, kind, 1] += (pairs & is_kind & is_alike[direction]).sum((1, 2))
    return counts


def pair_shares(counts: Tensor, has_mask: Tensor) -> dict[str, float]:
    """ROWS from pair_counts [G, 3, 2] and bool [G]; without a true mask only the first of them."""
    total, alike = counts.sum((0, 1)).tolist()
    shares = [alike / max(total, 1)]
    if has_mask.any():
        total, alike = counts[has_mask].sum(0).double().unbind(-1)
        is_leaky = counts[has_mask, 0, 1] > LEAKY * counts[has_mask, 0, 0]
        shares += [*alike / total.clamp(min=1), alike[0] / alike.sum().clamp(min=1)]
        shares.append(is_leaky.double().mean())
    return {name: round(100 * float(share), 3) for name, share in zip(ROWS, shares, strict=False)}


def statistics(data: CocoDataset, images: int, threshold: float) -> dict[str, Any]:
    """Sizes (5 %, median, 95 %) and ROWS of `images` images, spread evenly over the set."""
    chosen = np.unique(np.linspace(0, len(data) - 1, images).astype(int)).tolist()
    batches = [collate([data[index]]) for index in chosen]
    boxes = torch.cat([b.boxes[0][b.valid[0]] for b in batches])
    has_mask = torch.cat([b.has_mask[b.valid] for b in batches])
    sizes = {
        "short_sides_of_images": [min(b.sizes[0]) for b in batches],
        "objects_per_image": [int(b.valid.sum()) for b in batches],
        "longer_sides_of_boxes": (boxes[:, 2:] - boxes[:, :2]).amax(1).tolist(),
    }
    counts = torch.cat([pair_counts(b, threshold) for b in batches])
    spread = {name: np.percentile(of, (5, 50, 95)).round(1).tolist() for name, of in sizes.items()}
    return {"images": len(batches), "objects": len(boxes)} | spread | pair_shares(counts, has_mask)


def advice(found: dict[str, Any], cfg: Config) -> list[str]:
    """One line for each figure that is outside of what photographs have."""
    small, middle, _ = found["longer_sides_of_boxes"]
    most, alike = found["objects_per_image"][2], found["alike_in_box"]
    alike_is = f"alike_in_box is {alike:.1f} % (photographs: 30)"
    checks = [
        (found[name] > limit, f"{name} is {found[name]} % (photographs: under {limit}): {text}")
        for name, (limit, text) in ADVICE.items()
        if name in found  # there are true masks
    ]
    checks += [
        (alike < 10, f"{alike_is}: lower --color-threshold"),
        (alike > 60, f"{alike_is}: raise --color-threshold, or use --contrast stretch if dark"),
        (
            small < 12,
            f"5 % of the boxes have a longer side under {max(small, 1):.0f} pixels, and masks have"
            f" a grid of 4 pixels: images {16 / max(small, 1):.1f} times as large help",
        ),
        (
            not cfg.size_unit / 4 <= middle <= 4 * cfg.size_unit,
            f"half of the boxes are larger than {middle:.0f} pixels, half smaller: most would share"
            f" one level of the pyramid: --size-unit {max(middle / 1.5, 1):.0f}",
        ),
        (
            most > cfg.max_detections,
            f"5 % of the images have over {most:.0f} objects: raise --max-detections"
            f" ({cfg.max_detections})",
        ),
    ]
    return [text for is_odd, text in checks if is_odd]


def show_statistics(data: CocoDataset, cfg: Config, images: int) -> None:
    found = statistics(data, images, cfg.color_threshold)
    for name, value in found.items():  # lists: 5 %, median, 95 %
        print(f"{value:7.2f} %  {ROWS[name]}" if name in ROWS else f"{name}: {value}")
    print("\n".join(advice(found, cfg)) or "Nothing is outside of what photographs have.")
    print(json.dumps({"preset": cfg.preset} | found))
