"""Predictions -> COCO results -> tables of average precision (AP), as pycocotools counts it.

A prediction of one image is a dict in original image pixels: image_id int, boxes [D, 4] xyxy,
scores [D], labels [D] in 0..C-1, masks: D compressed RLEs (run-length encodings, ready for JSON).
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from tqdm import tqdm

from . import distributed
from .data import CocoDataset, make_test_loader
from .errors import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class EvaluationError(UserError):
    """Results and ground truth that do not go together; the message is one line for the user."""


class NoMasksError(EvaluationError):
    """The ground truth has boxes only, so mask AP cannot be measured on it."""


# --- masks and predictions as JSON ----------------------------------------------------------------


def encode_masks(masks: Tensor | np.ndarray) -> list[dict[str, Any]]:
    """Masks bool [D, H, W] -> D compressed RLEs {"size": [H, W], "counts": text}."""
    masks = masks.cpu().numpy() if isinstance(masks, Tensor) else np.asarray(masks)
    rles = [rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in rles]


def decode_masks(rles: Sequence[dict[str, Any]], height: int, width: int) -> Tensor:
    """The inverse of `encode_masks`: bool [D, height, width] (the size is needed for D = 0)."""
    masks = [torch.from_numpy(rle_tools.decode(rle)).bool() for rle in rles]
    return torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)


def to_coco_results(
    predictions: Iterable[dict[str, Any]], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Predictions -> COCO's flat list: boxes xywh, category_ids[label] the data set's own id."""
    results = []
    for prediction in predictions:
        boxes_xyxy = torch.as_tensor(prediction["boxes"]).reshape(-1, 4).double()
        boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1)
        scores = torch.as_tensor(prediction["scores"]).tolist()
        labels = torch.as_tensor(prediction["labels"]).tolist()
        masks = prediction["masks"]
        for box, score, label, mask in zip(boxes_xywh.tolist(), scores, labels, masks, strict=True):
            results.append(
                {
                    "image_id": int(prediction["image_id"]),
                    "category_id": int(category_ids[label]),
                    "bbox": box,
                    "score": score,
                    "segmentation": mask,
                }
            )
    return results


def write_results(path: str | Path, results: list[dict[str, Any]]) -> None:
    """Results as a COCO results JSON (what evaluation servers and pycocotools' loadRes read)."""
    Path(path).write_text(json.dumps(results))


# --- average precision ----------------------------------------------------------------------------


def require_masks(coco: dict[str, Any], name: str = "the ground truth") -> None:
    """Raise NoMasksError unless every annotation has a non-empty "segmentation"."""
    annotations = coco["annotations"]
    missing = [a.get("id", i) for i, a in enumerate(annotations) if not _has_mask(a)]
    if missing:
        some = f"lacks them for {len(missing)} of {len(annotations)} annotations (id {missing[0]})"
        raise NoMasksError(
            f"evaluation needs true masks; {name} "
            f"{'has none' if len(missing) == len(annotations) else some}: use a JSON whose "
            'annotations have "segmentation", or evaluate boxes alone (iou type "bbox")'
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

    Errors, in which `name` stands for the ground truth: NoMasksError ("segm" without true masks),
    EvaluationError (unknown image or category, no predicted mask, mask and image of unlike sizes).

    Differs from `COCOeval.summarize()`, whose headline AP is at 100 detections whatever the limit.
    """
    if "segm" in iou_types:
        require_masks(coco, name)
    _check_results(coco, results, name, with_masks="segm" in iou_types)
    class_names = {c["id"]: c["name"] for c in coco["categories"]}
    truth = _ground_truth(coco, name)

    tables = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
        for iou_type in iou_types:
            evaluation = COCOeval(_indexed(truth), _indexed(_detections(truth, results, iou_type)))
            evaluation.params.iouType = iou_type
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
    """`evaluate_coco`'s answer as text: one line for boxes, one for masks, one per class."""
    titles = {"bbox": "box", "segm": "mask"}
    lines = [" " * 4 + "".join(f"{metric:>7}" for metric in METRICS)]
    for iou_type, table in result.items():
        cells = "".join(f"{_cell(table[metric]):>7}" for metric in METRICS)
        lines.append(f"{titles[iou_type]:<4}{cells}")

    class_names = list(next(iter(result.values()))["per_class"]) if result else []
    if len(class_names) > 1:
        width = max(len(class_name) for class_name in [*class_names, "class"])
        lines += ["", f"{'class':<{width}}" + "".join(f"{titles[t] + ' AP':>9}" for t in result)]
        for class_name in class_names:
            cells = [_cell(table["per_class"][class_name]) for table in result.values()]
            lines.append(f"{class_name:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def box_baselines(coco: dict[str, Any], kind: Literal["box", "ellipse"]) -> list[dict[str, Any]]:
    """What boxes alone give: every true box (no crowd), filled or its inscribed ellipse, score 1.

    A pixel belongs to the mask if its center lies within the box or ellipse. A method trained from
    boxes has to beat these floors to have learned anything about masks.
    """
    if kind not in ("box", "ellipse"):
        raise ValueError(f'box_baselines: kind is "box" or "ellipse", not "{kind}"')
    sizes = _image_sizes(coco)
    results = []
    for annotation in coco["annotations"]:
        if annotation.get("iscrowd", 0):
            continue
        height, width = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        from_center_x = (np.arange(width) + 0.5 - (x + w / 2)) / (w / 2)  # -1..1 inside the box
        from_center_y = (np.arange(height) + 0.5 - (y + h / 2)) / (h / 2)
        if kind == "box":
            mask = (np.abs(from_center_y) <= 1)[:, None] & (np.abs(from_center_x) <= 1)
        else:
            mask = (from_center_y**2)[:, None] + from_center_x**2 <= 1
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": [x, y, w, h],
                "score": 1.0,
                "segmentation": encode_masks(mask[None])[0],
            }
        )
    return results


# --- the two sides as pycocotools wants them ------------------------------------------------------


def _has_mask(annotation: dict[str, Any]) -> bool:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return bool(segmentation.get("counts"))
    return bool(segmentation) and any(segmentation)


def _rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE -> compressed RLE."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return rle_tools.frPyObjects(segmentation, *segmentation["size"])
        return segmentation
    return rle_tools.merge(rle_tools.frPyObjects([p for p in segmentation if p], height, width))


def _ground_truth(coco: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy with compressed masks, an area and a crowd flag for every annotation.

    Ids are counted anew from 1: COCOeval writes "matched with id" and takes 0 for "not matched".
    """
    sizes = _image_sizes(coco)
    annotations = []
    for i, original in enumerate(coco["annotations"], start=1):
        annotation = original | {"id": i, "iscrowd": original.get("iscrowd", 0)}
        area = annotation["bbox"][2] * annotation["bbox"][3]
        if _has_mask(original):
            size = sizes[original["image_id"]]
            rle = _rle(original["segmentation"], *size)
            _check_size(rle, size, f"{name}: annotation {original.get('id', i)}")
            annotation["segmentation"] = rle
            area = float(rle_tools.area(rle))
        if annotation.get("area") is None:
            annotation["area"] = area
        annotations.append(annotation)
    return {
        "images": coco["images"],
        "annotations": annotations,
        "categories": coco["categories"],
    }


def _detections(
    truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str
) -> dict[str, Any]:
    """The results with ids and areas: the mask's area for mask AP, the box's for box AP."""
    annotations = []
    for i, result in enumerate(results, start=1):
        if iou_type == "segm":
            area = float(rle_tools.area(result["segmentation"]))
        else:
            area = result["bbox"][2] * result["bbox"][3]
        annotations.append(result | {"id": i, "area": area, "iscrowd": 0})
    return truth | {"annotations": annotations}


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
            _check_size(result["segmentation"], sizes[image_id], f"results[{i}]")


def _check_size(rle: dict[str, Any], size: tuple[int, int], where: str) -> None:
    """pycocotools would call the IoU of masks of unlike sizes -1, and the AP would just be low."""
    if tuple(rle["size"]) != size:
        raise EvaluationError(
            f"{where}: segmentation.size is {list(rle['size'])}, but its image's (height, width) "
            f"is {list(size)}"
        )


def _image_sizes(coco: dict[str, Any]) -> dict[int, tuple[int, int]]:
    return {image["id"]: (image["height"], image["width"]) for image in coco["images"]}


def _indexed(dataset: dict[str, Any]) -> COCO:
    """A COCO object of its own annotation dicts: COCOeval writes into them."""
    api = COCO()
    api.dataset = dataset | {"annotations": [dict(a) for a in dataset["annotations"]]}
    api.createIndex()
    return api


def _percent(precision: np.ndarray) -> float | None:
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


# --- a model on a data set ------------------------------------------------------------------------


@torch.no_grad()
def predict_dataset(
    model: Any, dataset: CocoDataset, device: torch.device, workers: int = 0
) -> list[dict[str, Any]] | None:
    """`model.predict` (see CondInst) on every image, shared among ranks. COCO results on rank 0,
    None elsewhere.
    """
    was_training = model.training
    model.eval()
    loader = make_test_loader(dataset, distributed.rank(), distributed.world_size(), workers)
    predictions = []
    for batch, original_size in tqdm(loader, desc="evaluate", leave=False, disable=not_shown()):
        batch = batch.to(device)
        found = model.predict(batch.images, batch.sizes, [original_size])[0]
        predictions.append(
            {
                "image_id": batch.image_ids[0],
                "boxes": found.boxes.float().cpu(),
                "scores": found.scores.float().cpu(),
                "labels": found.labels.cpu(),
                "masks": encode_masks(found.masks),
            }
        )
    model.train(was_training)
    results = to_coco_results(predictions, dataset.category_ids)
    gathered = distributed.gather_objects(results)
    return None if gathered is None else [result for part in gathered for result in part]


def evaluate_dataset(
    model: Any,
    dataset: CocoDataset,
    device: torch.device,
    workers: int,
    max_dets: int,
    results_path: Path,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Predict, write the results as COCO JSON, and measure: `evaluate_coco`'s tables and a text, on
    rank 0; nothing elsewhere. Where the ground truth has no masks, boxes alone count.
    """
    results = predict_dataset(model, dataset, device, workers)
    if results is None:
        return {}, ""
    write_results(results_path, results)
    remark = ""
    try:
        tables = evaluate_coco(dataset.coco, results, max_dets, name=dataset.name)
    except NoMasksError as error:
        remark = f"{error}. Boxes alone:\n"
        tables = evaluate_coco(dataset.coco, results, max_dets, ["bbox"], dataset.name)
    return tables, remark + format_table(tables)


def not_shown() -> bool | None:
    """tqdm's `disable`: only rank 0 shows a bar, and only on a terminal."""
    return None if distributed.is_main() else True
