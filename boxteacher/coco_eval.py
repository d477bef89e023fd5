"""Predictions -> COCO results -> tables of average precision (AP) by the rules of COCO (counted by
pycocotools), Pascal VOC or Cityscapes.

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
from reprlib import repr as short_repr
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from . import distributed
from .cityscapes_eval import cityscapes_table
from .coco import IMAGE, Faults, are_boxes, check_entries, check_ids_of, check_lists, image_sizes
from .config import Config
from .data import CocoDataset, make_test_loader
from .errors import UserError, printable
from .files import WriteError, check_writable, write_text
from .masks import are_finite, encode_mask
from .model import CondInst, Instances

# The columns of a table: lowest and highest IoU threshold, and COCO's range of areas (0: all)
COLUMNS = {
    "coco": {
        "AP": (0.5, 0.95, 0),
        "AP50": (0.5, 0.5, 0),
        "AP75": (0.75, 0.75, 0),
        "APs": (0.5, 0.95, 1),
        "APm": (0.5, 0.95, 2),
        "APl": (0.5, 0.95, 3),
    },
    "voc": {
        "AP": (0.5, 0.95, 0),
        "AP25": (0.25, 0.25, 0),
        "AP50": (0.5, 0.5, 0),
        "AP70": (0.7, 0.7, 0),
        "AP75": (0.75, 0.75, 0),
    },
}


SHAPES = {"bbox": "bbox", "segm": "segmentation"}  # the field that each kind of IoU compares


class EvaluationError(UserError):
    """Results and ground truth that do not go together. The message is one line for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


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
    """Raise NoMasksError unless every annotation has a "segmentation"."""
    annotations = coco["annotations"]
    missing = [annotation["id"] for annotation in annotations if not annotation.get("segmentation")]
    if missing:
        lack = f"lacks them for {len(missing)} of {len(annotations)} annotations (id {missing[0]})"
        if len(missing) == len(annotations):
            lack = "has none"
        raise NoMasksError(
            f'evaluation needs true masks; {name} {lack}: add "segmentation" to every annotation'
        )


def require_void(coco: dict[str, Any], name: str = "the ground truth") -> None:
    """Raise EvaluationError unless every image has the region that Cityscapes ignores."""
    faults = Faults(name, EvaluationError)
    remedy = (
        "make the file with python -m boxteacher.tools.convert cityscapes, or use --metric coco"
    )

    def problem(image: dict) -> str:
        lack = "is missing, the region that Cityscapes ignores"
        return "" if image.get("void") else f"{lack}; {remedy}"

    images = faults.sift(IMAGE, coco["images"], "void", problem)
    sizes = np.array([(image["width"], image["height"]) for image in images]).reshape(-1, 2)
    faults.masks(IMAGE, images, "void", sizes, remedy)
    faults.raise_any()


def lacks_masks(dataset: CocoDataset) -> list[str]:
    """Why mask AP cannot be measured on the data set, in one line. Empty if it can."""
    try:
        require_masks(dataset.coco, dataset.name)
    except NoMasksError as error:
        return [str(error)]
    return []


def evaluate_coco(
    coco: dict[str, Any],
    results: list[dict[str, Any]],
    max_dets: int,
    iou_types: Sequence[Literal["bbox", "segm"]] = ("bbox", "segm"),
    name: str = "the ground truth",
    metric: Literal["coco", "voc", "cityscapes"] = "coco",
) -> dict[str, dict[str, Any]]:
    """Average precision of boxes and masks, with a limit of `max_dets` detections per image.

        AP = mean over IoU 0.50, 0.55 .. 0.95 and classes of the 101-point interpolated precision

    Returns {iou type: {column: AP, "per_class": {class name: AP}}}, 0..100, or None where the
    ground truth has no such object. COLUMNS has the columns of COCO and VOC, which differ in
    nothing else. `cityscapes_table` has Cityscapes' rules, for "segm" alone and without the limit.
    Small, medium, large: areas below 32^2, up to 96^2, above, in original pixels. The limit counts
    per image *and class*, as in pycocotools. An annotation without "area" gets its mask's area (its
    box's, if it has no mask). The arguments are not changed.

    Raises NoMasksError for "segm" without true masks. Raises EvaluationError for faults of the
    ground truth. Its boxes may lie anywhere, and file names may be missing. Raises EvaluationError
    for results with an unknown image or category, a field of a wrong type, or a mask of another
    size than its image. Messages call the ground truth `name`.

    Differs from `COCOeval.summarize()`, whose headline AP is at 100 detections whatever the limit.
    """
    faults = Faults(name, EvaluationError)
    check_lists(coco, faults)
    check_entries(coco, faults)
    iou_types = ("segm",) if metric == "cityscapes" else iou_types
    if "segm" in iou_types:
        require_masks(coco, name)
    if metric == "cityscapes":
        require_void(coco, name)
    _check_results(coco, results, name, iou_types)
    class_names = {c["id"]: c["name"] for c in coco["categories"]}

    tables = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
        truth = _ground_truth(coco)
        if metric == "cityscapes":
            return {"segm": cityscapes_table(truth, results)}
        for iou_type in iou_types:
            # Given boxes and masks, loadRes would take the boxes' areas for the masks'.
            keys = ("image_id", "category_id", "score", SHAPES[iou_type])
            found = [{key: result[key] for key in keys} for result in results]
            if iou_type == "segm":
                found = [result | {"segmentation": truth.annToRLE(result)} for result in found]
            detections = truth.loadRes(found) if found else COCO()  # loadRes needs one or more

            evaluation = FastCOCOeval(truth, detections, iou_type)
            evaluation.params.maxDets = [max_dets]
            if metric == "voc":
                evaluation.params.iouThrs = np.append(0.25, evaluation.params.iouThrs)
            evaluation.evaluate()
            evaluation.accumulate()

            # precision [IoU thresholds, 101 recalls, classes, 4 area ranges]; -1: no such object
            precision, thresholds = evaluation.eval["precision"][..., 0], evaluation.params.iouThrs
            tables[iou_type] = table = {}
            for column, (low, high, area) in COLUMNS[metric].items():
                chosen = (thresholds > low - 1e-9) & (thresholds < high + 1e-9)
                table[column] = _percent(precision[chosen, ..., area])
            table["per_class"] = {
                class_names[category_id]: _percent(precision[thresholds > 0.5 - 1e-9, :, k, 0])
                for k, category_id in enumerate(evaluation.params.catIds)
            }
    return tables


class FastCOCOeval(COCOeval):
    """COCOeval with the same results. It compares each detection with each true object in Python.
    Here only detections that overlap one enough for the lowest threshold are given to it: the
    others match nothing. With 1000 detections an image these are most of them.
    """

    def evaluateImg(self, image_id: int, category_id: int, area_range: list, max_det: int) -> Any:  # noqa: N802
        key = image_id, category_id
        found, ious = self._dts[key], self.ious[key]  # ious [D, G], of sorted detections
        if len(ious) == 0:  # no detections, or no objects
            return super().evaluateImg(image_id, category_id, area_range, max_det)
        order = np.argsort([-d["score"] for d in found], kind="mergesort")[:max_det]
        is_near = ious[:max_det].max(1) >= self.params.iouThrs[0]
        self._dts[key], self.ious[key] = [found[i] for i in order[is_near]], ious[:max_det][is_near]
        result = super().evaluateImg(image_id, category_id, area_range, max_det)
        self._dts[key], self.ious[key] = found, ious

        # The other detections are put back in their places.
        areas = np.array([found[i]["area"] for i in order])
        is_outside = (areas < area_range[0]) | (areas > area_range[1])
        ignored = np.tile(is_outside, (len(self.params.iouThrs), 1))
        matches = np.zeros(ignored.shape)
        ignored[:, is_near], matches[:, is_near] = result["dtIgnore"], result["dtMatches"]
        ids, scores = ([found[i][name] for i in order] for name in ("id", "score"))
        return result | dict(dtIds=ids, dtScores=scores, dtMatches=matches, dtIgnore=ignored)


def format_table(result: dict[str, dict[str, Any]]) -> str:
    """`evaluate_coco`'s tables as text: one line for boxes, one for masks, one per class."""
    # All classes together.
    titles, per_class = {"bbox": "box", "segm": "mask"}, ("per_class", "per_class_AP50")
    columns = [key for key in next(iter(result.values()), {}) if key not in per_class]
    lines = [" " * 4 + "".join(f"{column:>7}" for column in columns)]
    for iou_type, table in result.items():
        cells = "".join(f"{_cell(table[column]):>7}" for column in columns)
        lines.append(f"{titles[iou_type]:<4}{cells}")

    # The classes, if there are several.
    shown = {
        f"{titles[iou_type]} {key.removeprefix('per_class_').replace('per_class', 'AP')}": table[
            key
        ]
        for iou_type, table in result.items()
        for key in per_class
        if key in table
    }
    class_names = list(next(iter(shown.values()), {}))
    if len(class_names) > 1:
        shown_names = {name: printable(name, 40) for name in class_names}
        width = max(map(len, [*shown_names.values(), "class"]))
        lines += ["", f"{'class':<{width}}" + "".join(f"{title:>11}" for title in shown)]
        for class_name in class_names:
            cells = "".join(f"{_cell(values[class_name]):>11}" for values in shown.values())
            lines.append(f"{shown_names[class_name]:<{width}}{cells}")
    return "\n".join(lines)


def box_baselines(coco: dict[str, Any], kind: Literal["box", "ellipse"]) -> list[dict[str, Any]]:
    """COCO results that boxes alone give: each true box, filled or its inscribed ellipse, score 1.

    A pixel belongs to the mask if its center lies within the box or ellipse. A method that
    learns masks from boxes must be better than both. Crowds are left out.
    """
    norm = {"box": np.maximum, "ellipse": np.hypot}[kind]
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
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


def _ground_truth(coco: dict[str, Any]) -> COCO:
    """A copy with an area and a crowd flag for every annotation.

    Ids are counted anew from 1: COCOeval writes "matched with id" and takes 0 for "not matched".
    """
    truth = COCO()
    annotations = [
        annotation | {"id": i, "iscrowd": int(bool(annotation.get("iscrowd")))}
        for i, annotation in enumerate(coco["annotations"], start=1)
    ]
    truth.dataset = {"info": {}} | coco | {"annotations": annotations}  # loadRes may read "info"
    truth.createIndex()
    for annotation in annotations:
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            if annotation.get("segmentation"):
                annotation["area"] = float(rle_codec.area(truth.annToRLE(annotation)))
    return truth


def _check_results(
    coco: dict[str, Any], results: list[dict[str, Any]], name: str, iou_types: Sequence[str]
) -> None:
    """Raise EvaluationError unless all fields that count have the right type and range."""
    faults = Faults(f"results for {name}", EvaluationError)
    if not isinstance(results, list):
        what = f"are a {type(results).__name__}; give COCO's list of results"
        raise EvaluationError(f"{faults.name} {what}")
    bad = [i for i, result in enumerate(results) if not isinstance(result, dict)]
    if bad:
        text = f"is not an object, but {short_repr(results[bad[0]])}; correct it"
        faults.add([f"results[{i}]" for i in bad[:5]], text, len(bad))
    faults.raise_any()

    def where(result: dict) -> str:
        return f"results[{next(i for i, other in enumerate(results) if other is result)}]"

    found = check_ids_of(coco, results, where, faults)
    found = faults.sift(where, found, "score", _score_problem, are_finite)
    if "bbox" in iou_types:
        found = faults.sift(where, found, "bbox", _box_problem, _are_boxes)
    if "segm" in iou_types:
        found = faults.sift(where, found, "segmentation", _no_mask_problem)
        sizes = image_sizes(coco, found)
        faults.masks(where, found, "segmentation", sizes, "correct it")
    faults.raise_any()


def _score_problem(result: dict) -> str:
    if are_finite([value := result.get("score")]):
        return ""
    return f"must be a finite number, found {short_repr(value)}; correct it"


def _box_problem(result: dict) -> str:
    if _are_boxes([box := result.get("bbox")]):
        return ""
    form = "four finite numbers [x, y, width, height], the last two 0 or more"
    return f"must be {form}, found {short_repr(box)}; correct it"


def _are_boxes(boxes: list) -> bool:
    return are_boxes(boxes) and min((min(box[2:]) for box in boxes), default=0) >= 0


def _no_mask_problem(result: dict) -> str:
    is_none = (mask := result.get("segmentation")) is None
    is_empty = isinstance(mask, (list, dict)) and not mask
    return "is missing or empty; mask AP needs predicted masks" if is_none or is_empty else ""


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
    cfg: Config,
    results_path: Path,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Predict, write the COCO results as JSON, and measure. Returns `evaluate_coco`'s tables and
    their text on rank 0, nothing elsewhere. The tables also go to a file next to the results, which
    has "tables" in its name instead. If the ground truth lacks masks, boxes alone count.

    Before it predicts, it raises WriteError if the results could not be written. If the disk gets
    full after that, it prints the tables and then raises WriteError.
    """
    if distributed.is_main():
        check_writable(results_path)
    results = predict_dataset(model, dataset, device, cfg.workers)
    if results is None:
        return {}, ""
    metric, tables, text = _measure(dataset, results, cfg)
    tables_path = results_path.with_name(results_path.name.replace("results", "tables"))
    try:
        write_text(results_path, json.dumps(results))
        write_text(tables_path, json.dumps({"metric": metric} | tables, indent=2) + "\n")
    except WriteError:
        print(text, flush=True)
        raise
    return tables, text


def _measure(
    dataset: CocoDataset, results: list[dict[str, Any]], cfg: Config
) -> tuple[str, dict[str, dict[str, Any]], str]:
    """The metric, its tables and their text. Without true masks, boxes alone, by COCO's metric in
    place of Cityscapes'."""
    metric, name, limit = cfg.metric, dataset.name, cfg.max_detections
    try:
        tables, remark = evaluate_coco(dataset.coco, results, limit, name=name, metric=metric), ""
    except NoMasksError as error:
        metric = "coco" if metric == "cityscapes" else metric
        tables = evaluate_coco(dataset.coco, results, limit, ["bbox"], name, metric)
        remark = f"{error}. Boxes alone:\n"
    return metric, tables, remark + format_table(tables)
