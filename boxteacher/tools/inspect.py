"""What a training set is like: how many objects, how large, and how often their colors mislead.

    python -m boxteacher.tools.inspect [PRESET] --statistics [--field value ...] [--images 300]

Images are those that the network sees in training. The pairwise loss pulls two pixels of similar
color into one mask (BoxInst, arXiv 2012.02310, section 3.2). True masks tell how often it is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from boxteacher import losses
from boxteacher.command_line import Parser, split_preset
from boxteacher.config import Config, ConfigError
from boxteacher.data import Batch, CocoDataset, collate, make_train_set
from boxteacher.errors import run
from boxteacher.presets import from_preset

LEAKY = 0.25  # share of leaks above which an object counts as leaky
ROWS = {  # names in the JSON line and what they are, in percent; all but the first need true masks
    "alike_in_box": "of all pairs in the box, look alike",
    "leaks": "across the mask's outline, look alike (leaks)",
    "alike_inside": "inside the object, look alike",
    "alike_background": "of the background in the box, look alike",
    "wrong_pulls": "of all pairs that pull (look alike), pull wrongly (leaks)",
    "leaky_objects": f"objects with over {LEAKY:.0%} leaks (share of their crossing pairs)",
}


def read_arguments(argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The configuration, and this program's own options."""
    preset, words = split_preset(argv, default="shapes")
    parser = Parser("python -m boxteacher.tools.inspect --statistics [PRESET]", __doc__)
    add = parser.add_argument
    add("--statistics", action="store_true", required=True, help="measure a data set")
    add("--images", type=int, default=300, metavar="N", help="how many (300)")
    options, given = parser.read(words)
    if options.images < 1:
        raise ConfigError(f"--images is {options.images}: give 1 or more")
    return from_preset(**({"preset": preset} | given)), options


def pair_counts(batch: Batch, threshold: float) -> Tensor:
    """Pairs of pixels per box of a batch of one image, counted as the pairwise loss weighs them:
    once for each end in the box whose other end lies on the image.

    Returns int64 [G, 3, 2]: pairs that cross the true mask's outline, inside it and outside it
    (where there is no mask, all); all of them and those whose similarity reaches the threshold.
    """
    rows, columns = (side // 4 for side in batch.images.shape[-2:])
    reliable = [(h - cut, w) for (h, w), cut in zip(batch.sizes, batch.cut_rows, strict=True)]
    on_image = losses.inside_masks(reliable, rows, columns)
    is_alike = losses.color_similarity(batch.images, on_image)[0] >= threshold
    in_box = losses.box_masks(batch.boxes[0][batch.valid[0]], rows, columns)
    mask = torch.zeros_like(in_box) if batch.masks is None else batch.masks[0, : len(in_box)]

    counts = torch.zeros(len(in_box), 3, 2, dtype=torch.int64)
    for direction, (dy, dx) in enumerate(losses.NEIGHBORS):
        other = losses.shifted(mask, dy, dx)
        pairs = in_box & on_image & losses.shifted(on_image, dy, dx)
        for kind, is_kind in enumerate((mask ^ other, mask & other, ~(mask | other))):
            counts[:, kind, 0] += (pairs & is_kind).sum((1, 2))
            counts[:, kind, 1] += (pairs & is_kind & is_alike[direction]).sum((1, 2))
    return counts


def pair_shares(counts: Tensor, has_mask: Tensor) -> dict[str, float]:
    """ROWS from pair_counts [G, 3, 2] and bool [G]; without a true mask only the first of them."""
    total, alike = counts.sum((0, 1)).tolist()
    shares = [alike / max(total, 1)]
    if has_mask.any():
        total, alike = counts[has_mask].sum(0).clamp(min=1).double().unbind(-1)
        is_leaky = counts[has_mask, 0, 1] > LEAKY * counts[has_mask, 0, 0]
        shares += torch.stack([*alike / total, alike[0] / alike.sum(), is_leaky.double().mean()])
    return {name: round(100 * float(share), 3) for name, share in zip(ROWS, shares, strict=False)}


def statistics(data: CocoDataset, images: int, threshold: float) -> dict[str, object]:
    """Sizes (5 %, median, 95 %) and ROWS of `images` images, spread evenly over the set."""
    chosen = np.unique(np.linspace(0, len(data) - 1, images).astype(int)).tolist()
    batches = [collate([data[index]]) for index in chosen]
    boxes = torch.cat([b.boxes[0][b.valid[0]] for b in batches])
    empty = batches[0].has_mask is None
    has_mask = torch.cat([(b.valid & False if empty else b.has_mask)[b.valid] for b in batches])
    sizes = {
        "short_sides_of_images": [min(b.sizes[0]) for b in batches],
        "objects_per_image": [int(b.valid.sum()) for b in batches],
        "longer_sides_of_boxes": (boxes[:, 2:] - boxes[:, :2]).amax(1).tolist(),
    }
    counts = torch.cat([pair_counts(b, threshold) for b in batches])
    spread = {name: np.percentile(of, (5, 50, 95)).round(1).tolist() for name, of in sizes.items()}
    return {"images": len(batches), "objects": len(boxes)} | spread | pair_shares(counts, has_mask)


def main() -> None:
    cfg, options = read_arguments(sys.argv[1:])
    fewer = min(options.images, cfg.shapes_train)  # the same first images, and less to paint
    data = make_train_set(dataclasses.replace(cfg, shapes_train=fewer))
    found = statistics(data, options.images, cfg.color_threshold)
    for name, value in found.items():  # lists: 5 %, median, 95 %
        print(f"{value:7.2f} %  {ROWS[name]}" if name in ROWS else f"{name}: {value}")
    print(json.dumps({"preset": cfg.preset} | found))


if __name__ == "__main__":
    run(main)
