"""Tables of COCO and VOC against pycocotools run by hand on files, and a slow reference."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_coco_eval import make_coco, make_result, reference_ap, uncompressed_rle

from boxteacher.coco import read_coco
from boxteacher.coco_eval import evaluate_coco, format_table
from boxteacher.masks import decode_mask, encode_mask

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


# --- COCO's oddities ------------------------------------------------------------------------------


def odd_coco(rng):
    """Crowds, objects of a few pixels, boxes at the border and beyond, images without objects,
    gaps in the ids of categories, polygons and both kinds of run-length codes."""
    sizes = {7: (90, 120), 8: (64, 64), 30: (150, 110), 31: (40, 40), 502: (120, 120)}
    images = [
        {"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in sizes.items()
    ]
    categories = [{"id": k, "name": f"class {k}"} for k in (3, 17, 18, 90)]  # 18 has no object
    annotations = []
    for image_id, (height, width) in sizes.items():
        for _ in range(0 if image_id == 31 else 12):
            most = int(rng.choice([3, 20, 100]))
            x, y = rng.integers(-2, width - 3), rng.integers(-2, height - 3)
            w, h = rng.integers(2, most + 1, 2)
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if x2 <= x1 or y2 <= y1:
                continue
            mask = np.zeros((height, width), dtype=bool)
            mask[y1:y2, x1:x2] = True
            iscrowd, kind = int(rng.random() < 0.15), rng.integers(3)
            corners = [float(v) for v in (x1, y1, x2, y1, x2 - 0.3 * (x2 - x1), y2, x1, y2)]
            if kind == 0 and not iscrowd:
                segmentation = [corners]
            elif kind == 1:
                segmentation = uncompressed_rle(mask)
            else:
                segmentation = encode_mask(mask)
            annotations.append(
                {
                    "id": 1000 + 7 * len(annotations),
                    "image_id": image_id,
                    "category_id": int(rng.choice([3, 17, 90])),
                    "bbox": [float(v) for v in (x, y, w, h)],
                    "segmentation": segmentation,
                    "area": float(mask.sum()),
                    "iscrowd": iscrowd,
                }
            )
    return {"images": images, "categories": categories, "annotations": annotations}


def rough_results(rng, coco):
    """A few detections near each object, some of another class, and some anywhere."""
    api, results = COCO(), []
    api.dataset = coco
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    for annotation in coco["annotations"]:
        mask = decode_mask(api.annToRLE(annotation))
        for _ in range(rng.integers(0, 4)):
            moved = np.roll(mask, rng.integers(-2, 3, 2), axis=(0, 1))
            box = [
                v + float(d) for v, d in zip(annotation["bbox"], rng.normal(0, 1, 4), strict=True)
            ]
            box[2:] = [max(side, 1.0) for side in box[2:]]
            category_id = annotation["category_id"] if rng.random() < 0.8 else 18
            results.append((annotation["image_id"], category_id, box, moved))
    for image in coco["images"]:
        mask = rng.random((image["height"], image["width"])) < 0.3
        results.append((image["id"], 90, [0.0, 0.0, 20.0, 20.0], mask))
    return [
        {
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "score": float(rng.random()),
            "segmentation": encode_mask(mask),
        }
        for image_id, category_id, box, mask in results
    ]


def by_hand(truth_file, results_file, iou_type, thresholds=None):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(truth_file)
        evaluation = COCOeval(truth, truth.loadRes(results_file), iou_type)
        if thresholds is not None:
            evaluation.params.iouThrs = thresholds
        evaluation.evaluate()
        evaluation.accumulate()
        if thresholds is None:
            evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(4))
def test_odd_files_measure_as_with_pycocotools_by_hand(seed, tmp_path):
    rng = np.random.default_rng(seed)
    coco = odd_coco(rng)
    results = rough_results(rng, coco)
    truth_file, files = str(tmp_path / "truth.json"), {}
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    for iou_type in ("bbox", "segm"):
        # With boxes in the file, pycocotools would take their areas for the sizes of masks.
        left = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
        files[iou_type] = str(tmp_path / f"{iou_type}.json")
        with open(files[iou_type], "w") as file:
            json.dump(results if iou_type == "bbox" else left, file)

    tables = evaluate_coco(coco, results, 100)
    for iou_type, table in tables.items():
        stats = by_hand(truth_file, files[iou_type], iou_type).stats[:6]
        for column, value in zip(COLUMNS, stats, strict=True):
            assert table[column] == (pytest.approx(100 * value, abs=1e-9) if value >= 0 else None)
        assert 1 < table["AP"] < 99
        assert table["per_class"]["class 18"] is None


def test_odd_files_pass_the_reader(tmp_path):
    coco = odd_coco(np.random.default_rng(0))
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    for image in coco["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    read, _ = read_coco(tmp_path / "truth.json", tmp_path)
    assert len(read["annotations"]) > 20


# --- Pascal VOC -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_voc_equals_pycocotools_at_its_thresholds(seed, tmp_path):
    rng = np.random.default_rng(10 + seed)
    coco = odd_coco(rng)
    results = rough_results(rng, coco)
    for result in results:
        del result["bbox"]
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    (tmp_path / "results.json").write_text(json.dumps(results))
    table = evaluate_coco(coco, results, 100, ["segm"], metric="voc")["segm"]
    assert list(table) == ["AP", "AP25", "AP50", "AP70", "AP75", "per_class"]
    wanted = {f"AP{t:.0f}": [t / 100] for t in (25, 50, 70, 75)}
    wanted["AP"] = np.linspace(0.5, 0.95, 10)
    for column, thresholds in wanted.items():
        files = (str(tmp_path / name) for name in ("truth.json", "results.json"))
        evaluation = by_hand(*files, "segm", np.array(thresholds))
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        expected = 100 * precision[precision > -1].mean()
        assert table[column] == pytest.approx(expected, abs=1e-9)
    assert table["AP25"] > table["AP50"] > table["AP70"] > table["AP75"]


@pytest.mark.parametrize("seed", range(3))
def test_voc_equals_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    boxes = [
        (*rng.integers(0, 36, 2).tolist(), *rng.integers(6, 24, 2).tolist()) for _ in range(16)
    ]
    coco = make_coco(
        [(k % 3 + 1, k % 2 + 1, box) for k, box in enumerate(boxes)], 3, class_names=("a", "b")
    )
    results = []
    for k, (x, y, w, h) in enumerate(boxes):
        for shift in rng.integers(0, 6, 2).tolist():
            box = (x + shift, y, min(w, 64 - x - shift), h)
            results.append(make_result(k % 3 + 1, k % 2 + 1, box, rng.random()))
    tables = evaluate_coco(coco, results, 100, metric="voc")
    for threshold in (25, 50, 70, 75):
        each = [reference_ap(coco, results, k, threshold / 100, 100) for k in (1, 2)]
        for iou_type in ("bbox", "segm"):
            assert tables[iou_type][f"AP{threshold}"] == pytest.approx(np.mean(each), abs=1e-6)
    assert 0 < tables["segm"]["AP75"] < tables["segm"]["AP25"] < 100
    head = format_table(tables).splitlines()[0]
    assert head.split() == ["AP", "AP25", "AP50", "AP70", "AP75"]


def test_voc_without_masks_measures_boxes():
    coco = make_coco([(1, 1, (4, 4, 20, 20))])
    results = [make_result(1, 1, (4, 4, 20, 10), 0.5)]
    table = evaluate_coco(coco, results, 100, ["bbox"], metric="voc")["bbox"]
    assert (table["AP25"], table["AP70"]) == (pytest.approx(100), 0)
