"""AP against a slow reference, the detection limit, and every kind of ground truth users have."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_codec
from pycocotools.cocoeval import COCOeval

from boxteacher import coco_eval
from boxteacher.coco_eval import (
    EvaluationError,
    NoMasksError,
    box_baselines,
    evaluate_coco,
    format_table,
    require_masks,
    to_coco_results,
)
from boxteacher.masks import decode_mask, encode_mask
from boxteacher.model import Instances

SIZE = 64
# pycocotools' decoder under numpy 2
PYCOCOTOOLS_DECODES = pytest.mark.filterwarnings("ignore:__array__ implementation")


def rectangle(x, y, w, h, size=SIZE):
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


def uncompressed_rle(mask):
    counts, value = [0], False
    for pixel in mask.T.reshape(-1).tolist():
        if pixel == value:
            counts[-1] += 1
        else:
            counts.append(1)
            value = pixel
    return {"size": list(mask.shape), "counts": counts}


def make_coco(objects, images=1, class_names=("a",), size=SIZE):
    """objects: (image_id, category_id, (x, y, w, h)); uncompressed RLEs, no area, no iscrowd."""
    return {
        "images": [{"id": i + 1, "width": size, "height": size} for i in range(images)],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(class_names)],
        "annotations": [
            {
                "id": i,  # from 0, which pycocotools alone would count as "not matched"
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(box),
                "segmentation": uncompressed_rle(rectangle(*box, size)),
            }
            for i, (image_id, category_id, box) in enumerate(objects)
        ],
    }


def make_result(image_id, category_id, box, score, size=SIZE):
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "score": score,
        "segmentation": encode_mask(rectangle(*box, size)),
    }


def perfect_results(coco):
    size = coco["images"][0]["width"]
    return [
        make_result(a["image_id"], a["category_id"], a["bbox"], 0.9, size)
        for a in coco["annotations"]
    ]


def rectangle_iou(box, other):
    mask, other_mask = rectangle(*box), rectangle(*other)
    return (mask & other_mask).sum() / (mask | other_mask).sum()


def reference_ap(coco, results, category_id, threshold, max_dets):
    """Greedy matching by score, then precision interpolated at 101 recalls, all in plain loops."""
    scored = []
    truth_count = 0
    for image in coco["images"]:
        truth = [
            a["bbox"]
            for a in coco["annotations"]
            if a["image_id"] == image["id"] and a["category_id"] == category_id
        ]
        truth_count += len(truth)
        mine = [
            r for r in results if r["image_id"] == image["id"] and r["category_id"] == category_id
        ]
        taken = set()
        for result in sorted(mine, key=lambda r: -r["score"])[:max_dets]:
            best, best_iou = None, threshold
            for j, box in enumerate(truth):
                iou = rectangle_iou(result["bbox"], box)
                if j not in taken and iou >= best_iou:
                    best, best_iou = j, iou
            taken.add(best)
            scored.append((result["score"], best is not None))
    points = []
    hits = 0
    for count, (_, is_hit) in enumerate(sorted(scored, reverse=True), start=1):
        hits += is_hit
        points.append((hits / truth_count, hits / count))
    precisions = [
        max((p for recall, p in points if recall >= r), default=0.0) for r in np.linspace(0, 1, 101)
    ]
    return 100 * sum(precisions) / 101


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_dets", [3, 100])
def test_ap_equals_the_slow_reference(seed, max_dets):
    rng = np.random.default_rng(seed)

    def random_box():
        x, y = rng.integers(0, 40, 2)
        w, h = rng.integers(4, 24, 2)
        return int(x), int(y), int(w), int(h)

    objects = [(int(rng.integers(1, 4)), int(rng.integers(1, 3)), random_box()) for _ in range(20)]
    coco = make_coco(objects, images=3, class_names=("a", "b"))
    results = [
        make_result(int(rng.integers(1, 4)), int(rng.integers(1, 3)), random_box(), rng.random())
        for _ in range(10)
    ]
    for image_id, category_id, (x, y, w, h) in objects:  # near misses of the true ones, twice
        for _ in range(2):
            dx, dy, dw, dh = rng.integers(0, 4, 4)
            box = (int(x + dx), int(y + dy), int(w + dw), int(h + dh))
            box = (box[0], box[1], min(box[2], SIZE - box[0]), min(box[3], SIZE - box[1]))
            results.append(make_result(image_id, category_id, box, rng.random()))

    measured = evaluate_coco(coco, results, max_dets)
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        expected = np.mean([reference_ap(coco, results, k, threshold, max_dets) for k in (1, 2)])
        assert expected < 100
        assert expected > 0 or name == "AP75"
        for iou_type in ("bbox", "segm"):  # masks are the boxes here
            assert measured[iou_type][name] == pytest.approx(expected, abs=1e-6)
    thresholds = np.linspace(0.5, 0.95, 10)
    for k, class_name in enumerate(("a", "b"), start=1):
        expected = np.mean([reference_ap(coco, results, k, t, max_dets) for t in thresholds])
        assert measured["segm"]["per_class"][class_name] == pytest.approx(expected, abs=1e-6)
    assert measured["segm"]["AP"] == pytest.approx(
        np.mean(list(measured["segm"]["per_class"].values()))
    )


def test_perfect_predictions_score_100_and_nothing_is_printed_or_changed(capsys):
    objects = [(1, 1, (4, 4, 20, 20)), (1, 1, (30, 30, 10, 12)), (2, 2, (0, 0, 40, 50))]
    coco = make_coco(objects, images=2, class_names=("a", "b"))
    results = perfect_results(coco)
    before = copy.deepcopy((coco, results))
    measured = evaluate_coco(coco, results, 100)
    assert (coco, results) == before
    assert capsys.readouterr().out == ""
    for table in measured.values():
        assert [table[m] for m in ("AP", "AP50", "AP75", "APs", "APm")] == [pytest.approx(100)] * 5
        assert table["APl"] is None
        assert table["per_class"] == {"a": pytest.approx(100), "b": pytest.approx(100)}


def test_the_headline_ap_honors_the_detection_limit():
    grid = [(x, y, 4, 4) for x in range(0, 120, 8) for y in range(0, 120, 8)]
    coco = make_coco([(1, 1, box) for box in grid], size=128)
    results = perfect_results(coco)
    assert len(results) == 225
    assert evaluate_coco(coco, results, 1000)["segm"]["AP"] == pytest.approx(100)
    limited = evaluate_coco(coco, results, 100)["segm"]["AP"]
    assert limited == pytest.approx(100 * math.floor(100 * 100 / 225 + 1) / 101)  # recalls reached


def test_a_class_without_objects_counts_for_nothing_and_prints_as_a_dash():
    coco = make_coco([(1, 1, (4, 4, 20, 20))], class_names=("star", "ring"))
    wrong = make_result(1, 2, (30, 30, 8, 8), 1.0)
    measured = evaluate_coco(coco, [*perfect_results(coco), wrong], 100)
    assert measured["segm"]["AP"] == pytest.approx(100)
    assert measured["segm"]["per_class"] == {"star": pytest.approx(100), "ring": None}
    lines = format_table(measured).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert lines[2].split() == ["mask", "100.0", "100.0", "100.0", "100.0", "-", "-"]
    assert lines[-1].split() == ["ring", "-", "-"]


def test_no_predictions_score_zero_and_no_objects_score_none():
    coco = make_coco([(1, 1, (4, 4, 20, 20))])
    assert evaluate_coco(coco, [], 100)["segm"]["AP"] == 0
    empty = make_coco([])
    measured = evaluate_coco(empty, [make_result(1, 1, (4, 4, 20, 20), 0.5)], 100)
    assert measured["bbox"]["AP"] is None
    assert measured["segm"]["AP"] is None
    assert "-" in format_table(measured)


@pytest.mark.parametrize("nothing", ["no key", None, [], {}])
def test_ground_truth_without_masks_serves_boxes_alone(nothing):
    coco = make_coco([(1, 1, (4, 4, 20, 20)), (1, 1, (30, 30, 20, 20))])
    results = perfect_results(coco)
    for annotation in coco["annotations"]:
        annotation.pop("segmentation")
        if nothing != "no key":
            annotation["segmentation"] = nothing
    with pytest.raises(NoMasksError, match=r"boxes\.json has none") as error:
        evaluate_coco(coco, results, 100, name="boxes.json")
    assert "\n" not in str(error.value)
    for result in results:
        del result["segmentation"]
    measured = evaluate_coco(coco, results, 100, iou_types=("bbox",))
    assert list(measured) == ["bbox"]
    assert measured["bbox"]["AP"] == pytest.approx(100)
    assert [line.split()[0] for line in format_table(measured).splitlines()] == ["AP", "box"]


def test_some_masks_missing_is_refused_with_their_number():
    coco = make_coco([(1, 1, (4, 4, 20, 20)), (1, 1, (30, 30, 20, 20))])
    require_masks(coco)
    del coco["annotations"][1]["segmentation"]
    with pytest.raises(NoMasksError, match=r"1 of 2 annotations \(id 1\)"):
        require_masks(coco)


def test_polygons_and_compressed_rle_are_masks_too():
    box = (4, 6, 20, 10)
    coco = make_coco([(1, 1, box)])
    results = perfect_results(coco)
    x, y, w, h = box
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    for segmentation in (polygon, encode_mask(rectangle(*box))):
        coco["annotations"][0]["segmentation"] = segmentation
        assert evaluate_coco(coco, results, 100)["segm"]["AP"] == pytest.approx(100)


def test_areas_come_from_the_mask_then_the_box_unless_they_are_given():
    coco = make_coco([(1, 1, (0, 0, 40, 40))])
    annotation = coco["annotations"][0]
    results = perfect_results(coco)

    def sizes_present(iou_types=("bbox", "segm")):
        table = evaluate_coco(coco, results, 100, iou_types=iou_types)["bbox"]
        return [size for size in ("APs", "APm", "APl") if table[size] is not None]

    assert sizes_present() == ["APm"]
    annotation["segmentation"] = uncompressed_rle(rectangle(0, 0, 40, 10))  # 400 < 32^2
    assert sizes_present() == ["APs"]
    annotation["area"] = 10_000
    assert sizes_present() == ["APl"]
    del annotation["area"], annotation["segmentation"]
    assert sizes_present(("bbox",)) == ["APm"]


def test_a_false_detection_counts_at_the_size_of_its_mask_for_mask_ap():
    coco = make_coco([(1, 1, (0, 0, 10, 10))])
    mistake = make_result(1, 1, (20, 20, 10, 10), 0.95) | {"bbox": [20, 20, 40, 40]}
    measured = evaluate_coco(coco, [*perfect_results(coco), mistake], 100)
    assert measured["segm"]["APs"] == pytest.approx(50)  # a small mask, wrong
    assert measured["bbox"]["APs"] == pytest.approx(100)  # a medium box, not asked for


def test_a_detection_in_a_crowd_is_no_mistake():
    coco = make_coco([(1, 1, (0, 0, 10, 10)), (1, 1, (20, 20, 40, 40))])
    coco["annotations"][1]["iscrowd"] = 1
    results = [make_result(1, 1, (30, 30, 10, 10), 0.9), make_result(1, 1, (0, 0, 10, 10), 0.5)]
    assert evaluate_coco(coco, results, 100)["segm"]["AP"] == pytest.approx(100)
    del coco["annotations"][1]
    assert evaluate_coco(coco, results, 100)["segm"]["AP"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_id": 7},
            r"for val\.json: results\[0\]: field 'image_id' has no such id in 'images': 7",
        ),
        ({"category_id": 7}, "field 'category_id' has no such id in 'categories': 7"),
        ({"segmentation": None}, "field 'segmentation' is missing or empty"),
        ({"segmentation": {"size": [32, 64], "counts": "0"}}, r"\[32, 64\].*\[64, 64\]"),
        ({"segmentation": {"size": [64, 64], "counts": "0"}}, r"results\[0\].* do not add up to"),
    ],
)
def test_results_that_do_not_fit_the_ground_truth_are_refused(change, message):
    coco = make_coco([(1, 1, (4, 4, 20, 20))])
    result = make_result(1, 1, (4, 4, 20, 20), 0.5) | change
    with pytest.raises(EvaluationError, match=message):
        evaluate_coco(coco, [result], 100, name="val.json")


def test_a_true_mask_of_another_size_than_its_image_is_refused():
    coco = make_coco([(1, 1, (4, 4, 20, 20))])
    coco["images"][0]["height"] = 65
    with pytest.raises(EvaluationError, match=r"id 0: field 'segmentation' has size \[64, 64\]"):
        evaluate_coco(coco, [], 100)


@pytest.mark.parametrize("counts", [[4, 5], [4, 5000], "0", "aaaa"])
def test_true_masks_that_do_not_fill_their_image_are_refused(counts):
    """pycocotools would never return, or read beyond its memory."""
    coco = make_coco([(1, 1, (4, 4, 20, 20))])
    coco["annotations"][0]["segmentation"]["counts"] = counts
    with pytest.raises(
        EvaluationError, match=r"val\.json: annotation id 0: field 'segmentation' has counts"
    ):
        evaluate_coco(coco, [], 100, name="val.json")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_window_has_the_code_that_pycocotools_gives_the_whole_image(share):
    """Windows within the image and at its borders, as high, as wide and as large as it, and empty
    ones. Columns of a window as high as the image go on from one to the next."""
    rng = np.random.default_rng(0)
    height, width = 13, 29
    for top, bottom in ((3, 9), (0, 5), (6, 13), (0, 13), (4, 5), (7, 7)):
        for left, right in ((2, 20), (0, 4), (11, 29), (0, 29), (28, 29), (5, 5)):
            whole = np.zeros((height, width), dtype=bool)
            window = rng.random((bottom - top, right - left)) < share
            whole[top:bottom, left:right] = window
            code = encode_mask(window, (top, left), (height, width))
            expected = rle_codec.encode(np.asfortranarray(whole, dtype=np.uint8))
            assert code == {"size": [height, width], "counts": expected["counts"].decode()}
            assert code == encode_mask(whole) == encode_mask(np.asfortranarray(whole))
            assert np.array_equal(decode_mask(json.loads(json.dumps(code))), whole)


def test_matching_only_what_overlaps_changes_nothing(monkeypatch):
    """Many false alarms, crowds, equal scores, areas of every range, and a limit that cuts."""
    rng = np.random.default_rng(0)

    def random_box(largest):
        w, h = rng.integers(2, largest, 2)
        return int(rng.integers(0, 128 - w)), int(rng.integers(0, 128 - h)), int(w), int(h)

    objects = [(1 + i % 3, 1 + i % 2, random_box(120 if i % 5 else 20)) for i in range(40)]
    coco = make_coco(objects, images=4, class_names=("a", "b", "c"), size=128)
    for annotation in coco["annotations"][::7]:
        annotation["iscrowd"] = 1
    results = []
    for image_id, category_id, (x, y, w, h) in objects:
        near = (x, y, max(w - int(rng.integers(5)), 1), max(h - int(rng.integers(5)), 1))
        boxes = [near, *(random_box(100) for _ in range(6))]
        scores = rng.integers(0, 8, len(boxes)) / 8  # some are equal
        results += [
            make_result(image_id, category_id, box, float(score), 128)
            for box, score in zip(boxes, scores, strict=True)
        ]
    results.append(make_result(4, 3, (5, 5, 20, 20), 0.5, 128))  # an image without objects
    for limit in (3, 30, 1000):
        fast = evaluate_coco(coco, results, limit)
        with monkeypatch.context() as patch:
            patch.setattr(coco_eval, "FastCOCOeval", COCOeval)
            assert evaluate_coco(coco, results, limit) == fast
    assert 0 < fast["bbox"]["AP"] < 100
    assert fast["segm"]["APs"] > 0


def test_predictions_become_results_that_survive_json():
    masks = np.stack([rectangle(4, 6, 20, 10), rectangle(30, 30, 8, 8)])
    found = Instances(
        boxes=torch.tensor([[4.0, 6.0, 24.0, 16.0], [30.0, 30.0, 38.0, 38.0]]),
        scores=torch.tensor([0.5, 0.25]),
        labels=torch.tensor([1, 0]),
        masks=[encode_mask(mask) for mask in masks],
    )
    results = to_coco_results(1, found, category_ids=[10, 20])
    assert to_coco_results(2, Instances(*(x[:0] for x in found)), [10, 20]) == []
    assert [r["image_id"] for r in results] == [1, 1]
    assert [r["segmentation"] for r in results] == found.masks
    assert [r["category_id"] for r in results] == [20, 10]
    assert results[0]["bbox"] == [4, 6, 20, 10]
    assert [r["score"] for r in results] == [0.5, 0.25]
    assert json.loads(json.dumps(results)) == results


@PYCOCOTOOLS_DECODES
def test_box_baselines_rasterize_pixel_centers_and_leave_crowds_out():
    coco = make_coco([(1, 1, (4, 6, 40, 20)), (1, 1, (0, 0, 8, 8))])
    coco["annotations"][1]["iscrowd"] = 1
    coco["annotations"][0]["bbox"] = [3.6, 6.4, 40.0, 19.8]  # centers within: 4..43 and 6..25
    (box,) = box_baselines(coco, "box")
    assert np.array_equal(rle_codec.decode(box["segmentation"]), rectangle(4, 6, 40, 20))
    assert box["score"] == 1
    assert box["bbox"] == [3.6, 6.4, 40.0, 19.8]

    coco["annotations"][0]["bbox"] = [4, 6, 40, 20]
    (ellipse,) = box_baselines(coco, "ellipse")
    mask = rle_codec.decode(ellipse["segmentation"])
    for y in range(SIZE):
        for x in range(SIZE):
            inside = ((x + 0.5 - 24) / 20) ** 2 + ((y + 0.5 - 16) / 10) ** 2 <= 1
            assert mask[y, x] == inside
    assert mask.sum() == pytest.approx(math.pi * 20 * 10, rel=0.02)
    with pytest.raises(KeyError, match="diamond"):
        box_baselines(coco, "diamond")


def test_filled_boxes_are_perfect_boxes_but_poor_masks():
    coco = make_coco([(1, 1, (4, 4, 40, 40))])
    band = np.tri(SIZE, dtype=bool) & rectangle(4, 4, 40, 40)  # a triangle: IoU 0.5125 with its box
    coco["annotations"][0]["segmentation"] = uncompressed_rle(band)
    measured = evaluate_coco(coco, box_baselines(coco, "box"), 100)
    assert measured["bbox"]["AP"] == pytest.approx(100)
    assert measured["segm"]["AP"] == pytest.approx(10)  # right at the first of ten thresholds only
