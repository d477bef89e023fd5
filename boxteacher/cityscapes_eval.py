"""Cityscapes' average precision of masks, as its own script counts it (github.com/mcordts/
cityscapesScripts, evalInstanceLevelSemanticLabeling). It differs from COCO's:

- A match has an IoU *above* the threshold, and all detections of an image count.
- True objects under 100 pixels do not count.
- A detection without a match is no mistake if more of it than the threshold lies in regions to
  ignore: groups (crowds), objects under 100 pixels, and void, which has no class.
- AP is the area under the precision-recall curve itself: no interpolation, no sizes of objects.

D detections · G true regions of one class in one image, which do not overlap
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO

THRESHOLDS = np.arange(0.5, 1.0, 0.05)
MIN_PIXELS = 100


class Overlaps(NamedTuple):
    """What one class has in one image, and how its regions overlap, in pixels."""

    scores: np.ndarray  # float [D]
    pixels: np.ndarray  # int [D], of each detection, none is 0
    void: np.ndarray  # int [D], those of them that are void
    true_pixels: np.ndarray  # int [G]
    is_group: np.ndarray  # bool [G]
    shared: np.ndarray  # int [D, G]


def cityscapes_table(truth: COCO, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"AP", "AP50", "per_class": {name: AP}, "per_class_AP50": {name: AP50}}, 0 to 100, None for a
    class without objects that count. AP is the mean over IoU 0.50, 0.55 .. 0.95, then over classes.

    `truth` has a mask for every annotation, "iscrowd" for groups, and in each image's entry the
    region "void" as a run-length code. `results` are COCO results with masks.
    """
    of_class: dict[int, dict[int, list]] = {k: {} for k in truth.cats}
    for result in results:
        of_class[result["category_id"]].setdefault(result["image_id"], []).append(result)
    curves = {}
    for category_id, category in truth.cats.items():
        found = of_class[category_id]
        images = sorted(found.keys() | set(truth.getImgIds(catIds=[category_id])))
        overlaps = [measure_overlaps(truth, i, category_id, found.get(i, [])) for i in images]
        curves[category["name"]] = [average_precision(overlaps, t) for t in THRESHOLDS]

    per_class = {name: mean([curve]) for name, curve in curves.items()}
    per_class_50 = {name: mean([curve[:1]]) for name, curve in curves.items()}
    return {
        "AP": mean(curves.values()),
        "AP50": mean(curve[:1] for curve in curves.values()),
        "per_class": per_class,
        "per_class_AP50": per_class_50,
    }


def measure_overlaps(
    truth: COCO, image_id: int, category_id: int, found: Sequence[dict[str, Any]]
) -> Overlaps:
    """One class in one image. Detections without any pixel are dropped, as the script does."""
    annotations = truth.loadAnns(truth.getAnnIds([image_id], [category_id]))
    true_codes = [truth.annToRLE(annotation) for annotation in annotations]
    codes = [truth.annToRLE(result) for result in found]
    pixels = np.array([int(rle_codec.area(code)) for code in codes], dtype=np.int64)
    codes = [code for code, count in zip(codes, pixels, strict=True) if count]
    scores = np.array([result["score"] for result in found], dtype=float)[pixels > 0]
    pixels = pixels[pixels > 0]

    # pycocotools divides what a detection shares with a crowd by the detection's pixels
    regions = [truth.annToRLE({"image_id": image_id, "segmentation": truth.imgs[image_id]["void"]})]
    regions += true_codes
    shares = np.reshape(rle_codec.iou(codes, regions, [1] * len(regions)), (-1, len(regions)))
    shared = np.rint(shares * pixels[:, None]).astype(np.int64)
    return Overlaps(
        scores=scores,
        pixels=pixels,
        void=shared[:, 0],
        true_pixels=np.array([int(rle_codec.area(code)) for code in true_codes], dtype=np.int64),
        is_group=np.array([bool(a["iscrowd"]) for a in annotations], dtype=bool),
        shared=shared[:, 1:],
    )


def average_precision(images: Sequence[Overlaps], threshold: float) -> float | None:
    """The AP, 0 to 100, of one class at one IoU threshold. None if no object counts."""
    scores, is_right, num_true = [np.zeros(0)], [np.zeros(0, dtype=bool)], 0
    for image in images:
        union = image.pixels[:, None] + image.true_pixels - image.shared
        hits = image.shared / union > threshold
        is_small = image.true_pixels < MIN_PIXELS
        counts = ~image.is_group & ~is_small
        num_true += int(counts.sum())
        # The detection of highest score gets the object, the other hits are mistakes.
        best = np.zeros(len(hits), dtype=bool)
        for g in np.flatnonzero(counts & hits.any(axis=0)):
            best[np.where(hits[:, g], image.scores, -np.inf).argmax()] = True
        # A small group is ignored twice, as in the script.
        ignored = image.void + image.shared @ (image.is_group.astype(int) + is_small)
        is_mistake = ~hits.any(axis=1) & (ignored / image.pixels <= threshold)
        kept = hits[:, counts].any(axis=1) | is_mistake
        scores.append(image.scores[kept])
        is_right.append(best[kept])
    if not num_true:
        return None

    # The curve, with a point after the last of each group of equal scores.
    order = np.argsort(-np.concatenate(scores), kind="stable")
    score, right = np.concatenate(scores)[order], np.concatenate(is_right)[order].cumsum()
    is_last = np.diff(score, append=-np.inf) != 0
    recall = np.append(0, right[is_last] / num_true)
    precision = np.append(1, right[is_last] / (1 + np.flatnonzero(is_last)))
    return 100 * float((np.diff(recall) * (precision[1:] + precision[:-1]) / 2).sum())


def mean(curves: Any) -> float | None:
    """The mean of all values that are known."""
    known = [value for curve in curves for value in curve if value is not None]
    return float(np.mean(known)) if known else None
