"""Predictions -> COCO results -> tables of average precision (AP), as pycocotools counts it.

D detections · h, w pixels of an image. COCO results are a flat list of dicts, ready for JSON: one
for each detection, with image_id, category_id, bbox (x, y, width, height), score and segmentation
(a compressed run-length code).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from . import distributed
from .coco import encode_mask, run_lengths
from .data import CocoDataset, make_test_loader
from .errors import UserError
from .model import CondInst, Instances

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class EvaluationError(UserError):
    """Results and ground truth that do not go together. The message is one line for the user."""


class NoMasksError(EvaluationError):
    """The ground truth has boxes only, so mask AP cannot be measured on it."""


# --- predictions as COCO results ------------------------------------------------------------------


def to_coco_results(
    image_id: int, found: Instances, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """One image's predictions -> COCO results. A label k becomes category_ids[k]."""
    boxes = found.boxes.cpu().double()
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1).tolist()
    labels, scores = found.labels.tolist(), found.scores.tolist()
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
            "segmentation": mask,
        }
        for box, label, score, mask in zip(boxes, labels, scores, found.masks, strict=True)
    ]


# --- average precision ----------------------------------------------------------------------------


def require_masks(coco: dict[str, Any], name: str = "the ground truth") -> None:
    """Raise NoMasksError unless every annotation has a non-empty "segmentation"."""
    annotations = coco["annotations"]
    missing = [a.get("id", i) for i, a in enumerate(annotations) if not _has_mask(a)]
    if missing:
        lack = f"lacks them for {len(missing)} of {len(annotations)} annotations (id {missing[0]})"
        if len(missing) == len(annotations):
            lack = "has none"
        raise NoMasksError(
            f"evaluation needs true masks; {name} {lack}: use a JSON whose annotations have"
            ' "segmentation", or evaluate boxes alone (iou type "bbox")'
        )


def evaluate_coco(
    coco: dict[str, Any],
    results: list[dict[str, Any]],
    max_dets: int,
    iou_types: Sequence[Literal["bbox", "segm"]] = ("bbox", "segm"),
    name: str = "the ground truth",
) -> dict[str, dict[str, Any]]:
    """COCO's average precision of boxes and masks, with a limit of `max_dets` detections per image.

        AP = mean over IoU 0.50, 0.55 .. 0.95 and classes of the 101-point interpolated precision

    Returns {iou type: {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class": {class name: AP}}},
    0..100, or None where the ground truth has no such object. Small, medium, large: areas below
    32^2, up to 96^2, above, in original pixels. The limit counts per image *and class*, as in
    pycocotools. An annotation without "area" gets its mask's area (its box's, if it has no mask).
    The arguments are not changed.

    Raises NoMasksError for "segm" without true masks. Raises EvaluationError for an unknown image
    or category, a missing predicted mask, or a mask that does not fit its image. Messages call the
    ground truth `name`.

    Differs from `COCOeval.summarize()`, whose headline AP is at 100 detections whatever the limit.
    """
    if "segm" in iou_types:
        require_masks(coco, name)
    _check_results(coco, results, name, with_masks="segm" in iou_types)
    class_names = {c["id"]: c["name"] for c in coco["categories"]}

    tables = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
        truth = _ground_truth(coco, name)
        for iou_type in iou_types:
            # Given boxes and masks, loadRes would take the boxes' areas for the masks'.
            shape = {"bbox": "bbox", "segm": "segmentation"}[iou_type]
            keys = ("image_id", "category_id", "score", shape)
            found = [{key: result[key] for key in keys} for result in results]
            detections = truth.loadRes(found) if found else COCO()  # loadRes needs one or more

            evaluation = COCOeval(truth, detections, iou_type)
            evaluation.params.maxDets = [max_dets]
            evaluation.evaluate()
            evaluation.accumulate()

            # precision [10 IoU thresholds, 101 recalls, classes, 4 area ranges]; -1: no such object
            precision = evaluation.eval["precision"][..., 0]
            tables[iou_type] = {
                "AP": _percent(precision[..., 0]),
                "AP50": _percent(precision[0, ..., 0]),
                "AP75": _percent(precision[5, ..., 0]),
                "APs": _percent(precision[..., 1]),
                "APm": _percent(precision[..., 2]),
                "APl": _percent(precision[..., 3]),
                "per_class": {
                    class_names[category_id]: _percent(precision[:, :, k, 0])
                    for k, category_id in enumerate(evaluation.params.catIds)
                },
            }
    return tables


def format_table(result: dict[str, dict[str, Any]]) -> str:
    """`evaluate_coco`'s tables as text: one line for boxes, one for masks, one per class."""
    # All classes together.
    titles = {"bbox": "box", "segm": "mask"}
    lines = [" " * 4 + "".join(f"{metric:>7}" for metric in METRICS)]
    for iou_type, table in result.items():
        cells = "".join(f"{_cell(table[metric]):>7}" for metric in METRICS)
        lines.append(f"{titles[iou_type]:<4}{cells}")

    # The classes, if there are several.
    class_names = list(next(iter(result.values()))["per_class"]) if result else []
    if len(class_names) > 1:
        width = max(len(class_name) for class_name in [*class_names, "class"])
        lines += ["", f"{'class':<{width}}" + "".join(f"{titles[t] + ' AP':>9}" for t in result)]
        for class_name in class_names:
            cells = [_cell(table["per_class"][class_name]) for table in result.values()]
            lines.append(f"{class_name:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def box_baselines(coco: dict[str, Any], kind: Literal["box", "ellipse"]) -> list[dict[str, Any]]:
    """COCO results that boxes alone give: each true box, filled or its inscribed ellipse, score 1.

    A pixel belongs to the mask if its center lies within the box or ellipse. A method trained from
    boxes must beat these floors to have learned anything about masks. Crowds are left out.
    """
    norm = {"box": np.maximum, "ellipse": np.hypot}[kind]
    sizes = _image_sizes(coco)
    results = []
    for annotation in coco["annotations"]:
        if annotation.get("iscrowd", 0):
            continue
        height, width = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        # How far pixel centers are from the box's center. The box's sides are at 1.
        across = abs(np.arange(width) + 0.5 - (x + w / 2)) / (w / 2)
        down = abs(np.arange(height) + 0.5 - (y + h / 2)) / (h / 2)
        mask = encode_mask(norm(down[:, None], across) <= 1)
        result = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        results.append(result | {"score": 1.0, "segmentation": mask})
    return results


# --- the ground truth for pycocotools, and what it does not check ---------------------------------


def _has_mask(annotation: dict[str, Any]) -> bool:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return bool(segmentation.get("counts"))
    return bool(segmentation) and any(segmentation)


def _ground_truth(coco: dict[str, Any], name: str) -> COCO:
    """A copy with an area and a crowd flag for every annotation.

    Ids are counted anew from 1: COCOeval writes "matched with id" and takes 0 for "not matched".
    """
    annotations = [
        annotation | {"id": i, "iscrowd": annotation.get("iscrowd", 0)}
        for i, annotation in enumerate(coco["annotations"], start=1)
    ]
    truth, sizes = COCO(), _image_sizes(coco)
    truth.dataset = {"info": {}} | coco | {"annotations": annotations}  # loadRes may read "info"
    truth.createIndex()
    for original, annotation in zip(coco["annotations"], annotations, strict=True):
        area = annotation["bbox"][2] * annotation["bbox"][3]
        if _has_mask(annotation):
            if isinstance(annotation["segmentation"], dict):
                where = f"{name}: annotation {original.get('id')}"
                _check_code(annotation["segmentation"], sizes[annotation["image_id"]], where)
            area = float(rle_codec.area(truth.annToRLE(annotation)))
        if annotation.get("area") is None:
            annotation["area"] = area
    return truth


def _check_results(
    coco: dict[str, Any], results: list[dict[str, Any]], name: str, with_masks: bool
) -> None:
    sizes = _image_sizes(coco)
    category_ids = {category["id"] for category in coco["categories"]}
    for i, result in enumerate(results):
        image_id, category_id = result["image_id"], result["category_id"]
        if image_id not in sizes:
            raise EvaluationError(f"results[{i}]: image_id {image_id} is not in {name}")
        if category_id not in category_ids:
            raise EvaluationError(f"results[{i}]: category_id {category_id} is not in {name}")
        if with_masks and not result.get("segmentation"):
            raise EvaluationError(f'results[{i}]: no "segmentation"; mask AP needs predicted masks')
        if with_masks:
            _check_code(result["segmentation"], sizes[image_id], f"results[{i}]")


def _check_code(code: dict[str, Any], size: tuple[int, int], where: str) -> None:
    """pycocotools gives masks of another size an IoU of -1, so that AP would just be low. It never
    returns from runs that do not fill their image."""
    if tuple(code["size"]) != size:
        raise EvaluationError(
            f"{where}: segmentation.size is {list(code['size'])}, but its image's (height, width) "
            f"is {list(size)}"
        )
    try:
        run_lengths(code)
    except ValueError as error:
        raise EvaluationError(f"{where}: segmentation has {error}") from None


def _image_sizes(coco: dict[str, Any]) -> dict[int, tuple[int, int]]:
    return {image["id"]: (image["height"], image["width"]) for image in coco["images"]}


def _percent(precision: np.ndarray) -> float | None:
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


# --- a model on a data set ------------------------------------------------------------------------


@torch.no_grad()
def predict_dataset(
    model: CondInst, dataset: CocoDataset, device: torch.device, workers: int = 0
) -> list[dict[str, Any]] | None:
    """The model's predictions on every image, shared among ranks. COCO results on rank 0, None
    elsewhere."""
    was_training = model.training
    model.eval()
    loader = make_test_loader(dataset, distributed.rank(), distributed.world_size(), workers)
    is_hidden = None if distributed.is_main() else True  # None: hidden unless on a terminal
    results = []
    for batch, original_size in tqdm(loader, desc="evaluate", leave=False, disable=is_hidden):
        batch = batch.to(device)
        (found,) = model.predict(batch.images, batch.sizes, [original_size])
        results += to_coco_results(batch.image_ids[0], found, dataset.category_ids)
    model.train(was_training)
    of_ranks = distributed.gather_objects(results)
    return None if of_ranks is None else list(itertools.chain.from_iterable(of_ranks))


def evaluate_dataset(
    model: CondInst,
    dataset: CocoDataset,
    device: torch.device,
    workers: int,
    max_dets: int,
    results_path: Path,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Predict, write the COCO results as JSON, and measure. Returns `evaluate_coco`'s tables and
    their text on rank 0, nothing elsewhere. If the ground truth lacks masks, boxes alone count.
    """
    results = predict_dataset(model, dataset, device, workers)
    if results is None:
        return {}, ""
    results_path.write_text(json.dumps(results))

    # Masks and boxes if the ground truth has both, else boxes.
    remark = ""
    try:
        tables = evaluate_coco(dataset.coco, results, max_dets, name=dataset.name)
    except NoMasksError as error:
        remark = f"{error}. Boxes alone:\n"
        tables = evaluate_coco(dataset.coco, results, max_dets, ["bbox"], dataset.name)
    return tables, remark + format_table(tables)
