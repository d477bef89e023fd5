"""Cityscapes' AP against the published script on random scenes, and rule by rule."""

import json

import numpy as np
import pytest
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as script  # noqa: N813
from PIL import Image
from test_convert import cityscapes_image
from test_train import NETWORK, train

from boxteacher.coco_eval import (
    EvaluationError,
    NoMasksError,
    evaluate_coco,
    format_table,
)
from boxteacher.masks import encode_mask
from boxteacher.tools import convert
from boxteacher.tools.formats import CITYSCAPES

SIZE = (80, 120)
ROAD, VOID = 7, 4


def rectangle(x, y, w, h):
    mask = np.zeros(SIZE, dtype=bool)
    mask[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = True
    return mask


def random_rectangle(rng, least=2, most=40):
    x, y = rng.integers(0, SIZE[1] - 8), rng.integers(0, SIZE[0] - 8)
    return rectangle(x, y, *rng.integers(least, most, 2))


def random_scene(rng):
    """Pixels as in instanceIds.png, and [(class, score, mask)] of a careless detector."""
    numbers = np.full(SIZE, ROAD)
    for _ in range(rng.integers(1, 4)):
        numbers[random_rectangle(rng)] = rng.choice([VOID, 0, 29, 29001])
    classes = rng.choice(list(CITYSCAPES), 4).tolist()
    for k in range(rng.integers(4, 12)):
        category = int(rng.choice(classes))
        is_group = rng.random() < 0.25
        numbers[random_rectangle(rng)] = category if is_group else 1000 * category + k
    found = []
    for number in np.unique(numbers).tolist():
        mask, category = numbers == number, number // 1000 or number
        for _ in range(rng.integers(0, 4)):  # duplicates among them
            rough = np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1))
            rough &= ~random_rectangle(rng, 1, 12)
            right = category in CITYSCAPES and rng.random() < 0.8
            found.append((category if right else int(rng.choice(classes)), rough))
    found += [(k, random_rectangle(rng)) for k in classes for _ in range(rng.integers(0, 3))]
    found.append((classes[0], np.zeros(SIZE, dtype=bool)))
    scores = rng.integers(1, 12, len(found)) / 13  # many equal ones
    return numbers, [(k, float(s), mask) for (k, mask), s in zip(found, scores, strict=True)]


def make_files(folder, scenes):
    """Cityscapes' folders with these scenes as val, converted; the COCO dict and results."""
    root, results = folder / "cityscapes", []
    cityscapes_image(root, "train", "aachen", "0", np.full(SIZE, 26000))
    for n, (numbers, _) in enumerate(scenes):
        cityscapes_image(root, "val", "bonn", f"{n:03}", numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert", "cityscapes", str(root), str(folder / "out")])
        convert.main()
    coco = json.loads((folder / "out/instances_val.json").read_text())
    for image, (_, found) in zip(coco["images"], scenes, strict=True):
        for category, score, mask in found:
            code = encode_mask(mask)
            box = {"bbox": [0, 0, 1, 1], "category_id": category}
            results.append({"image_id": image["id"], "score": score, "segmentation": code} | box)
    return coco, results


def by_the_script(folder, scenes, monkeypatch):
    """What cityscapesscripts makes of the same files."""
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # gone from numpy 2.4
    predictions, truths = [], []
    for n, (_, found) in enumerate(scenes):
        lines = []
        for k, (category, score, mask) in enumerate(found):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{n}_{k}.png")
            lines.append(f"{n}_{k}.png {category} {score!r}\n")
        predictions.append(folder / f"pred_{n}.txt")
        predictions[-1].write_text("".join(lines))
        truths.append(folder / f"cityscapes/gtFine/val/bonn/bonn_{n:03}_gtFine_instanceIds.png")
    args = script.args
    args.quiet, args.predictionPath = True, str(folder)
    args.gtInstancesFile = str(folder / "gtInstances.json")
    script.setInstanceLabels(args)
    truths = [str(path) for path in truths]
    instances = script.getGtInstances(truths, args)
    matches = script.matchGtWithPreds([str(p) for p in predictions], truths, instances, args)
    return script.computeAverages(script.evaluateMatches(matches, args), args)


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_the_published_script(seed, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(4)]
    table = evaluate_coco(*make_files(tmp_path, scenes), 100, metric="cityscapes")["segm"]
    wanted = by_the_script(tmp_path, scenes, monkeypatch)
    assert 1 < table["AP"] < 99  # says something
    assert table["AP"] == pytest.approx(100 * wanted["allAp"], abs=1e-6)
    assert table["AP50"] == pytest.approx(100 * wanted["allAp50%"], abs=1e-6)
    assert list(table["per_class"]) == list(wanted["classes"])
    for name, values in wanted["classes"].items():
        for key, ours in (("ap", "per_class"), ("ap50%", "per_class_AP50")):
            if np.isnan(values[key]):
                assert table[ours][name] is None
            else:
                assert table[ours][name] == pytest.approx(100 * values[key], abs=1e-6)


def test_from_the_download_to_the_table(tmp_path, monkeypatch):
    """Convert for training and for evaluation, then the preset, with a small network."""
    root, folder = tmp_path / "data/cityscapes", str(tmp_path / "data/cityscapes")
    for split, seed in (("train", 1), ("val", 2)):
        for n in range(4):
            numbers, _ = random_scene(np.random.default_rng((seed, n)))
            cityscapes_image(root, split, "bonn", f"{n:03}", numbers)
    for more in ([], ["--boxes-only"]):
        monkeypatch.setattr("sys.argv", ["convert", "cityscapes", folder, folder, *more])
        convert.main()
    monkeypatch.chdir(tmp_path)
    small = "--backbone resnet10_half --no-pretrained --norm bn --freeze-at 0 --steps 2".split()
    sizes = "--train-sizes 80,96 --train-max-size 192 --test-size 80 --test-max-size 192".split()
    words = [*NETWORK, *small, *sizes, "--teacher-size", "80", "--batch-size", "2"]
    ended = train("cityscapes_boxteacher_r50", *words)
    assert ended.code == 0, ended.err
    tables = json.loads((tmp_path / "runs/cityscapes_boxteacher_r50/tables.json").read_text())
    assert tables["metric"] == "cityscapes"
    assert tables["segm"]["AP"] is not None
    assert set(tables["segm"]["per_class_AP50"]) == set(CITYSCAPES.values())


# --- rule by rule ---------------------------------------------------------------------------------


def measure(objects, found, void=None):
    """The tables of one image. objects: (mask, iscrowd) and found: (score, mask), all cars."""
    void_code = encode_mask(np.zeros(SIZE, bool) if void is None else void)
    image = {"id": 1, "file_name": "a", "height": SIZE[0], "width": SIZE[1], "void": void_code}
    common = {"image_id": 1, "category_id": 26, "bbox": [0, 0, 1, 1]}
    coco = {
        "images": [image],
        "categories": [{"id": 26, "name": "car"}, {"id": 27, "name": "truck"}],
        "annotations": [
            common | {"id": k, "iscrowd": crowd, "segmentation": encode_mask(mask)}
            for k, (mask, crowd) in enumerate(objects)
        ],
    }
    results = [
        common | {"score": score, "segmentation": encode_mask(mask)} for score, mask in found
    ]
    return evaluate_coco(coco, results, 100, metric="cityscapes")


CAR, ELSEWHERE = rectangle(0, 0, 20, 10), rectangle(60, 40, 20, 10)


def test_perfect_detections():
    table = measure([(CAR, 0), (ELSEWHERE, 0)], [(0.9, CAR), (0.5, ELSEWHERE)])["segm"]
    assert table["AP"] == table["AP50"] == pytest.approx(100)
    assert table["per_class"] == {"car": pytest.approx(100), "truck": None}


def test_the_curve_is_cut_into_trapezoids():
    # Recall 0, 0, 1/2 at precision 1, 0, 1/2: (0 + 1/2) / 2 * 1/2
    table = measure([(CAR, 0), (ELSEWHERE, 0)], [(0.9, rectangle(0, 40, 20, 10)), (0.5, CAR)])
    assert table["segm"]["AP"] == pytest.approx(100 * 0.125)


def test_an_iou_at_the_threshold_is_no_match():
    half = rectangle(0, 0, 10, 10)
    assert measure([(CAR, 0)], [(0.9, half)])["segm"]["AP50"] == 0
    more = half | rectangle(10, 0, 1, 1)
    assert measure([(CAR, 0)], [(0.9, more)])["segm"]["AP50"] == pytest.approx(100)


def test_a_second_detection_of_an_object_is_a_mistake():
    assert measure([(CAR, 0)], [(0.5, CAR), (0.9, CAR)])["segm"]["AP"] == pytest.approx(100)
    both = measure([(CAR, 0), (ELSEWHERE, 0)], [(0.9, CAR), (0.8, CAR), (0.7, ELSEWHERE)])
    # precision 1 up to recall 1/2, there 1/2, at recall 1 it is 2/3
    assert both["segm"]["AP"] == pytest.approx(100 * (0.5 + 0.25 * (1 / 2 + 2 / 3)))


@pytest.mark.parametrize("where", ["group", "small", "void"])
def test_what_lies_in_a_region_to_ignore_is_no_mistake(where):
    mistake = rectangle(60, 40, 9, 11)  # 99 pixels
    region = rectangle(60, 40, 9, 10)
    truth = {"group": [(rectangle(60, 0, 9, 60), 1)], "small": [(region, 0)], "void": []}[where]
    void = region if where == "void" else None
    found = [(0.9, mistake), (0.5, CAR)]
    assert measure([(CAR, 0), *truth], found, void)["segm"]["AP50"] == pytest.approx(100)
    assert measure([(CAR, 0)], found)["segm"]["AP50"] == pytest.approx(25)


def test_small_objects_do_not_count_and_nobody_misses_them():
    tiny = rectangle(60, 40, 9, 11)
    assert measure([(CAR, 0), (tiny, 0)], [(0.9, CAR)])["segm"]["AP"] == pytest.approx(100)
    assert measure([(tiny, 0)], [(0.9, CAR)])["segm"]["AP"] is None


def test_detections_that_are_all_ignored_score_0():
    """The script stops with an IndexError here."""
    assert measure([(CAR, 0)], [(0.9, ELSEWHERE)], ELSEWHERE)["segm"]["AP"] == 0
    assert measure([(CAR, 0)], [])["segm"]["AP"] == 0


def test_more_detections_than_the_limit_count():
    cars = [rectangle(x, y, 20, 5) for x in range(0, 120, 20) for y in range(0, 80, 5)]
    twice = [(0.9, car) for car in cars] + [(0.5, cars[0])] * 20
    assert measure([(car, 0) for car in cars], twice)["segm"]["AP"] == pytest.approx(100)


def test_the_table_shows_both_numbers_of_each_class():
    lines = format_table(measure([(CAR, 0)], [(0.9, CAR)])).splitlines()
    assert lines[0].split() == ["AP", "AP50"]
    assert lines[1].split() == ["mask", "100.0", "100.0"]
    assert lines[3].split() == ["class", "mask", "AP", "mask", "AP50"]
    assert lines[4].split() == ["car", "100.0", "100.0"]
    assert lines[5].split() == ["truck", "-", "-"]


def test_a_file_without_void_or_masks_is_refused(tmp_path):
    coco, results = make_files(tmp_path, [random_scene(np.random.default_rng(0))])
    del coco["images"][0]["void"]
    with pytest.raises(
        EvaluationError, match=r"image id 1: field 'void' is missing.*convert cityscap"
    ):
        evaluate_coco(coco, results, 100, name="val.json", metric="cityscapes")
    coco["images"][0]["void"] = {"size": [2, 2], "counts": [4]}
    with pytest.raises(
        EvaluationError, match=r"val\.json: image id 1: field 'void' has size \[2, 2\]"
    ):
        evaluate_coco(coco, results, 100, name="val.json", metric="cityscapes")
    del coco["annotations"][0]["segmentation"]
    with pytest.raises(NoMasksError):
        evaluate_coco(coco, results, 100, metric="cityscapes")
