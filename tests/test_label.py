"""label.py: every box gets a mask, from its detection or from its best location."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO

import train
from boxteacher.checkpoint import load_checkpoint, save_checkpoint
from boxteacher.command_line import parse
from boxteacher.config import ConfigError
from boxteacher.data import collate, make_val_set
from boxteacher.fcos import Detections, make_locations
from boxteacher.files import WriteError
from boxteacher.losses import box_masks
from boxteacher.mask_head import aligned_upsample
from boxteacher.masks import decode_mask
from boxteacher.model import Encoded, build_model
from boxteacher.tools import given_boxes, label, study
from boxteacher.tools.given_boxes import Looks, label_image, window
from boxteacher.transforms import View
from boxteacher.visualize import instance_color

torch.set_num_threads(1)
# pycocotools under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# The network sees 64 x 64 pixels as 96 x 96.
WORDS = """shapes --fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1
    --device cpu --norm gn --mask-norm gn --shapes-size 64 --shapes-train 4 --shapes-val 3
    --train-sizes 64 --train-max-size 64 --test-size 96 --test-max-size 96 --size-unit 16
    --teacher-size 0 --batch-size 2 --steps 2 --mode boxinst""".split()


def make_model(cfg, num_classes=6):
    """Random weights, with biases that let the network detect something everywhere."""
    torch.manual_seed(1)
    model = build_model(cfg, num_classes)
    with torch.no_grad():
        model.head.class_logits.bias.fill_(0.5)
        model.head.distances.bias.fill_(1.5)
        model.head.controller.weight.normal_(std=0.03)
        model.head.controller.bias.normal_(std=0.4)[-1] = 4.0
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model(parse(WORDS))


@pytest.fixture(scope="module")
def data(model):
    return make_val_set(model.cfg)


@pytest.fixture(scope="module")
def batch(data):
    return collate([data[0]])


@pytest.fixture(scope="module")
def pixels(data):
    return data.load_image(data.entry(0))


def whole_masks(model, encoded, batch, index):
    with torch.no_grad():
        maps = model.mask_logits_s4(encoded, torch.tensor(index)[None]).sigmoid()
    maps = aligned_upsample(maps, 4)[..., : batch.sizes[0][0], : batch.sizes[0][1]]
    return F.interpolate(maps, size=(64, 64), mode="bilinear")[0]


def encode(model, batch):
    with torch.no_grad():
        return model.encode(model.normalize(batch.images, batch.sizes))


def in_image(found, box, size=(64, 64)):
    """A mask in the window of its box as a mask of the image."""
    whole = torch.zeros(size, dtype=torch.bool)
    whole[window(box, size)] = torch.from_numpy(found.mask)
    return whole


# --- one image ------------------------------------------------------------------------------------


def test_windows_hold_the_values_of_whole_masks(model, batch):
    encoded, index = encode(model, batch), torch.arange(0, 160, 8)
    view = View((64, 64), (96, 96), (0, 0, 96, 96), flip=False)
    with torch.no_grad():
        maps = torch.cat([m for _, m in model.mask_maps(encoded, 0, index)])
    whole = whole_masks(model, encoded, batch, index.tolist())
    for mask_map, wanted in zip(maps, whole, strict=True):
        corners = torch.rand(2, 2) * 64
        span = window(torch.cat([corners.amin(0), corners.amax(0)]), (64, 64))
        found = given_boxes.read_window(mask_map, view, span)
        torch.testing.assert_close(found, wanted[span], atol=1e-5, rtol=0)


def test_a_mirrored_or_cropped_view_is_read_at_the_same_pixels():
    """A map that is linear in x and y is read exactly, wherever it comes from."""
    original, span = (40, 60), (slice(10, 20), slice(12, 40))
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    for flip in (False, True):
        view = View(original, (80, 120), (12, 16, 40, 72), flip)  # twice as large, cropped
        rows, columns = (4 * torch.arange(n) + 2.0 for n in (10, 18))
        columns = 71 - columns if flip else columns
        of_y = (rows + 12 + 0.5) / 2 - 0.5  # where the cells are in the original
        of_x = (columns + 16 + 0.5) / 2 - 0.5
        found = given_boxes.read_window(of_y[:, None] + 100 * of_x, view, span)
        torch.testing.assert_close(found, (y + 100 * x)[span], atol=1e-3, rtol=0)


def test_scores_of_detections_are_those_of_whole_masks(model, batch):
    encoded, index = encode(model, batch), torch.arange(0, 160, 8)
    corners = (torch.rand(len(index), 2, 2) * 63).floor()
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    scores = torch.rand(len(index))
    with torch.no_grad():
        detections = Detections(boxes, scores, torch.zeros_like(index), index)
        sizes = batch.sizes[0], (64, 64)
        found = given_boxes.detection_scores(model, encoded, 0, detections, *sizes)
    for k, probs in enumerate(whole_masks(model, encoded, batch, index.tolist())):
        inside = probs[box_masks(boxes[k], 64, 64, stride=1)]
        foreground = inside[inside > 0.5]
        mean = foreground.mean() if len(foreground) else torch.tensor(0.0)
        torch.testing.assert_close(found[k], (scores[k] * mean).sqrt(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ([3, 5, 9, 6], (5, 6), (3, 9)),
        ([2.5, 0, 3.5, 64], (0, 64), (2, 4)),
        ([12.3 + 1e-5, 1, 17.99999, 2.00001], (1, 2), (12, 18)),  # rounding adds no pixel
        ([7.2, 7.3, 7.4, 7.5], (7, 8), (7, 8)),
        ([63.9999, 0, 64, 1], (0, 1), (63, 64)),
    ],
)
def test_a_window_holds_the_pixels_that_its_box_touches(box, rows, columns):
    assert window(torch.tensor(box), (64, 64)) == (slice(*rows), slice(*columns))


def test_a_box_has_the_mask_of_its_detection_or_of_its_best_location(
    model, batch, pixels, monkeypatch
):
    """Two detections on the first box: the one with the higher mask-aware score gets it, though the
    other comes first. None overlaps the second box enough."""
    encoded = encode(model, batch)
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 30, 60, 62]])
    index = torch.tensor([51, 24, 120])
    found = torch.tensor([[8.0, 10, 40, 40], [6, 8, 40, 42], [40, 40, 60, 62]])
    whole = whole_masks(model, encoded, batch, index.tolist())
    inside = box_masks(found - torch.tensor([0, 0, 1, 1]), 64, 64, stride=1)
    means = [float(w[i & (w > 0.5)].mean()) for w, i in zip(whole, inside, strict=True)]
    scores = torch.tensor([0.8, 0.8 * means[0] / means[1] * 1.1, 0.9])
    detections = Detections(found * 1.5, scores, torch.zeros(3, dtype=torch.int64), index)
    monkeypatch.setattr(model, "detect", lambda encoded: [detections])
    best = {tuple((boxes[1] * 1.5).tolist()): torch.tensor(133)}
    monkeypatch.setattr(given_boxes, "best_location", lambda _, __, box: best[tuple(box.tolist())])

    first, second = label_image(model, pixels, boxes, Looks())
    assert (first.source, second.source) == ("detection", "location")
    assert first.score == pytest.approx(math.sqrt(scores[1] * means[1]), abs=1e-4)
    wanted = (whole[1] > 0.5) & box_masks(boxes[0] - torch.tensor([0, 0, 1, 1]), 64, 64, stride=1)
    assert torch.equal(in_image(first, boxes[0]), wanted)

    quality = encoded.predictions.class_logits[0, 133].sigmoid().max()
    quality = quality * encoded.predictions.centerness_logits[0, 133].sigmoid()
    wanted = whole_masks(model, encoded, batch, [133])[0]
    wanted = wanted * box_masks(boxes[1] - torch.tensor([0, 0, 1, 1]), 64, 64, stride=1)
    assert torch.equal(in_image(second, boxes[1]), wanted > 0.5)
    score = math.sqrt(math.sqrt(quality) * wanted[wanted > 0.5].mean())
    assert second.score == pytest.approx(score, abs=1e-4)


def test_the_best_location_is_that_of_a_search_over_all():
    torch.manual_seed(0)
    maps = [torch.zeros(1, 1, side, side) for side in (32, 16, 8, 4, 2)]  # 256 x 256 pixels
    locations = make_locations(maps, size_unit=32)
    quality = torch.rand(len(locations.xy))
    encoded = Encoded(None, locations, torch.zeros(0))
    for _ in range(100):
        x1, y1, w, h = (torch.rand(4) * torch.tensor([156, 156, 100, 100])).tolist()
        box = torch.tensor([x1, y1, x1 + w, y1 + h])
        x, y = x1 + w / 2, y1 + h / 2
        best, best_quality = None, -1.0
        nearest, nearest_distance = None, math.inf
        for p, (px, py) in enumerate(locations.xy.tolist()):
            reach = 1.5 * float(locations.strides[p])
            longest = max(px - x1, x1 + w - px, py - y1, y1 + h - py)
            low, high = locations.size_ranges[p].tolist()
            is_inside = x1 < px < x1 + w and y1 < py < y1 + h
            is_central = abs(px - x) < reach and abs(py - y) < reach
            is_candidate = is_inside and is_central and low <= longest <= high
            if is_candidate and quality[p] > best_quality:
                best, best_quality = p, float(quality[p])
            if math.hypot(px - x, py - y) < nearest_distance:
                nearest, nearest_distance = p, math.hypot(px - x, py - y)
        assert int(given_boxes.best_location(encoded, quality, box)) == (
            nearest if best is None else best
        )


@pytest.mark.parametrize("bias", [0.5, -30.0, -300.0])  # the latter: no pixel over the threshold
def test_every_box_gets_a_mask_inside_itself(pixels, bias):
    model = make_model(parse(WORDS))
    with torch.no_grad():
        model.head.controller.bias[-1] = bias
    corners = torch.rand(40, 2, 2) * 64
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    boxes[0], boxes[1] = torch.tensor([10.2, 10.2, 10.4, 10.4]), torch.tensor([0.0, 0, 64, 64])
    masks = label_image(model, pixels, boxes, Looks())
    assert len(masks) == 40
    assert {mask.source for mask in masks} == {"detection", "location"}
    for mask, box in zip(masks, boxes, strict=True):
        x1, y1, x2, y2 = box.tolist()
        rows, columns = in_image(mask, box).nonzero().unbind(1)
        assert len(rows) > 0
        assert columns.min() >= math.floor(x1)
        assert columns.max() < math.ceil(x2)
        assert rows.min() >= math.floor(y1)
        assert rows.max() < math.ceil(y2)
        assert 0 <= mask.score <= 1
        assert bias > 0 or mask.score == 0


def test_masks_are_cut_at_one_half_as_in_predict(pixels):
    """Also after a training that had another threshold for its pseudo masks."""
    model, masks = make_model(parse(WORDS)), []
    with torch.no_grad():
        model.head.controller.bias[-1] = -1.0  # probabilities from 0.1 to 0.95 in this box
    for threshold in (0.5, 0.9):
        model.cfg = dataclasses.replace(model.cfg, mask_threshold=threshold, iou_threshold=1.0)
        masks += label_image(model, pixels, torch.tensor([[20.0, 30, 60, 62]]), Looks())
    assert 0.5 < masks[0].mask.mean() < 1
    assert (masks[0].mask == masks[1].mask).all()


# --- several looks --------------------------------------------------------------------------------


def test_with_flip_a_mirrored_image_has_the_mirrored_masks(model, pixels):
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 30, 60, 62], [1, 2, 9, 60]])
    mirrored = boxes.clone()
    mirrored[:, [0, 2]] = 64 - boxes[:, [2, 0]]
    masks = label_image(model, pixels, boxes, Looks(flip=True))
    others = label_image(model, pixels[:, ::-1].copy(), mirrored, Looks(flip=True))
    for mask, other in zip(masks, others, strict=True):
        assert (mask.mask == other.mask[:, ::-1]).mean() > 0.99
        assert mask.score == pytest.approx(other.score, abs=1e-3)
        assert mask.source == other.source


def test_scales_are_looked_at_one_by_one_and_averaged(model, pixels):
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 30, 60, 62]])
    sides = [(96, 96), (144, 144)]
    looks = [(View((64, 64), side, (0, 0, *side), False), [0, 1]) for side in sides]
    found = [[*zip(*given_boxes.look(model, pixels, [seen], boxes), strict=True)] for seen in looks]
    both = label_image(model, pixels, boxes, Looks(scales=(1.0, 1.5)))
    for g, mean in enumerate(both):
        first, second = (maps[g] for _, maps, _, _ in found)
        assert not torch.equal(first, second)
        probs = (first + second) / 2
        wanted = probs > 0.5 if (probs > 0.5).any() else probs >= probs.max() / 2
        assert np.array_equal(mean.mask, wanted.numpy())
        assert mean.score == pytest.approx(
            sum(scores[g] for _, _, scores, _ in found) / 2, abs=1e-6
        )


@pytest.mark.parametrize("flip", [False, True])
def test_zoom_shows_each_smaller_box_enlarged_and_whole(model, flip):
    """The network sees 64 pixels as 96, so a box of 50 has 75 already, more than --zoom 60."""
    boxes = torch.tensor([[10.0, 20, 18, 26], [5, 5, 55, 15], [60, 60, 64, 62.5]])
    base, *zoomed = given_boxes.views((64, 64), boxes, model.cfg, Looks(flip=flip, zoom=60.0))
    assert base[0].window == (0, 0, 96, 96)
    zoomed = zoomed[1:] if flip else zoomed
    assert [chosen for _, (chosen) in zoomed] == [[0]] * (1 + flip) + [[2]] * (1 + flip)
    for view, (g,) in zoomed:
        seen, _ = view.boxes(boxes[g : g + 1].double().numpy())
        width, height = seen[0, 2:] - seen[0, :2]
        assert max(width, height) == pytest.approx(60, abs=1.5)  # sizes are whole pixels
        wanted = (boxes[g, 2] - boxes[g, 0]) / (boxes[g, 3] - boxes[g, 1])
        assert width / height == pytest.approx(float(wanted), rel=0.06)
        assert view.window[2:] == (128, 128)  # 2 * 60, in steps of 32
        assert min(view.window[:2]) >= 0
        assert all(view.window[k] + 128 <= view.resized[k] for k in (0, 1))


def test_crops_that_are_looked_at_together_have_the_masks_of_one_by_one(model, pixels, monkeypatch):
    corners = torch.rand(30, 2, 2, generator=torch.Generator().manual_seed(0)) * 56
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 4], dim=1)
    looks, lengths, look = Looks(flip=True, zoom=70.0), [], given_boxes.look
    monkeypatch.setattr(given_boxes, "BATCH_PIXELS", 0)
    alone = label_image(model, pixels, boxes, looks)
    monkeypatch.setattr(given_boxes, "look", lambda *a: lengths.append(len(a[2])) or look(*a))
    monkeypatch.setattr(given_boxes, "BATCH_PIXELS", 5 * 160**2)
    together = label_image(model, pixels, boxes, looks)
    assert 2 < max(lengths) <= 5 * 160**2 / 96**2
    assert sum(lengths) == len([*given_boxes.views((64, 64), boxes, model.cfg, looks)])
    for a, b in zip(alone, together, strict=True):
        assert (a.mask == b.mask).mean() > 0.99
        assert a.score == pytest.approx(b.score, abs=1e-3)
        assert a.source == b.source


def test_tiny_boxes_and_image_corners_can_be_zoomed(model, pixels):
    tiny = [[0.0, 0, 0.4, 0.3], [63.2, 63.5, 64, 64], [30, 0, 30.01, 64], [60, 60, 60, 60]]
    boxes = torch.tensor(tiny)  # the last one is smaller than float32 can tell
    masks = label_image(model, pixels, boxes, Looks(flip=True, zoom=64.0))
    assert [mask.mask.shape for mask in masks] == [(1, 1), (1, 1), (64, 1), (1, 1)]
    assert all(mask.mask.any() for mask in masks)


# --- against true masks ---------------------------------------------------------------------------


def test_a_box_alone_gives_itself_and_its_ellipse():
    """A box of 8 x 4 pixels. The ellipse holds the centers of 6 or 8 pixels of a row."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    guesses = label.box_guesses(pixels, torch.tensor([2.0, 2, 10, 6]), False)
    assert guesses.keys() == {"box", "ellipse"}
    assert guesses["box"].sum() == guesses["box"].size == 32
    assert guesses["ellipse"].sum(1).tolist() == [6, 8, 8, 6]
    # a pixel whose center lies outside is touched, but does not belong
    box = torch.tensor([1.6, 2, 9.4, 6])
    assert label.box_guesses(pixels, box, False)["box"].sum() == 4 * 7


def test_grabcut_finds_the_object_in_its_box():
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    pixels = rng.normal(60, 8, (60, 80, 3)).clip(0, 255).astype(np.uint8)
    y, x = np.mgrid[:60, :80]
    disk = np.hypot(x - 40, y - 30) < 14
    pixels[disk] += 120
    found = label.box_guesses(pixels, torch.tensor([26.0, 16, 55, 45]), True)["grabcut"]
    true = disk[16:45, 26:55]
    assert (found & true).sum() / (found | true).sum() > 0.95


def test_ious_become_a_mean_and_shares():
    rows = [{"masks": 0.5, "box": 1.0}, {"masks": 1.0, "box": 0.7}]
    assert label.summary(rows) == {
        "masks": {"mean_iou": 0.75, "over_50": 0.5, "over_75": 0.5},
        "box": {"mean_iou": 0.85, "over_50": 1.0, "over_75": 0.5},
    }
    assert label.summary([]) == {}


# --- the program ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of generated images, these images as files, and boxes.json without masks."""
    folder = tmp_path_factory.mktemp("label")
    cfg = parse(WORDS)
    val_set = make_val_set(cfg)
    state = {
        "config": dataclasses.asdict(cfg),
        "class_names": val_set.class_names,
        "category_ids": val_set.category_ids,
        "step": 2,
        "student": make_model(cfg).state_dict(),
        "teacher": None,
        "optimizer": None,
    }
    save_checkpoint(folder / "last.pt", state)
    study.write_shapes(str(folder), WORDS)
    coco = json.loads((folder / "train.json").read_text())
    for annotation in coco["annotations"]:
        del annotation["segmentation"]
        annotation["note"] = f"number {annotation['id']}"
    crowd = dict(id=999, image_id=1, category_id=1, bbox=[0, 0, 9, 9], iscrowd=1, area=81)
    coco["annotations"].insert(1, crowd)
    coco["annotations"].reverse()
    (folder / "boxes.json").write_text(json.dumps(coco))
    return folder


def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["label.py", *map(str, argv)])
    label.main()


def options(folder):
    files = ["--boxes", folder / "boxes.json", "--images", folder / "train"]
    return ["--checkpoint", folder / "last.pt", *files, "--output", folder / "masks.json"]


def test_a_file_of_boxes_becomes_a_file_of_masks_that_condinst_learns_from(
    folder, monkeypatch, capsys
):
    run(monkeypatch, *options(folder))
    assert str(folder / "masks.json") in capsys.readouterr().out
    before, after = (json.loads((folder / f"{n}.json").read_text()) for n in ("boxes", "masks"))
    assert {k: v for k, v in after.items() if k != "annotations"} == {
        k: v for k, v in before.items() if k != "annotations"
    }
    new = {"segmentation", "score", "mask_source"}
    for old, annotation in zip(before["annotations"], after["annotations"], strict=True):
        assert {k: v for k, v in annotation.items() if k not in new} == old
        assert (new <= annotation.keys()) == (annotation["id"] != 999)
    api = COCO(str(folder / "masks.json"))
    for annotation in after["annotations"]:
        if annotation["id"] != 999:
            mask = api.annToMask(annotation)
            x, y, w, h = annotation["bbox"]
            assert (
                mask.sum() == mask[int(y) : math.ceil(y + h), int(x) : math.ceil(x + w)].sum() > 0
            )

    words = [*WORDS, "--mode=condinst", "--dataset=coco", f"--out={folder / 'out'}"]
    words += [f"--train-json={folder / 'masks.json'}", f"--train-images={folder / 'train'}"]
    words += [f"--val-json={folder / 'val.json'}", f"--val-images={folder / 'val'}"]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    train.main()
    assert "condinst learned from boxes and masks" in capsys.readouterr().out


def test_the_validation_set_is_compared_with_its_true_masks(folder, monkeypatch):
    run(monkeypatch, "--checkpoint", folder / "last.pt")
    content = json.loads((folder / "given_boxes.json").read_text())
    val_set = make_val_set(parse(WORDS))
    assert content["all"]["boxes"] == len(val_set.coco["annotations"])
    assert 0 < content["unclaimed"]["boxes"] < content["all"]["boxes"]
    for part in ("all", "unclaimed"):
        assert content[part].keys() >= {"masks", "ellipse", "box"}
        assert 0 < content[part]["masks"]["mean_iou"] < 1
        assert 0.3 < content[part]["ellipse"]["mean_iou"] < 0.8


def test_grabcut_is_for_the_comparison_alone(folder, monkeypatch):
    asked, box_guesses = set(), label.box_guesses

    def guesses(*args, with_grabcut):
        asked.add(with_grabcut)
        return box_guesses(*args, False)

    monkeypatch.setattr(label, "box_guesses", guesses)
    run(monkeypatch, "--checkpoint", folder / "last.pt")
    assert asked == {True}
    asked.clear()
    files = ["--boxes", folder / "val.json", "--images", folder / "val"]
    run(monkeypatch, "--checkpoint", folder / "last.pt", *files, "--output", folder / "new.json")
    assert asked == {False}


def test_images_as_files_are_the_generated_ones(folder):
    words = ["--dataset=coco", f"--val-json={folder / 'val.json'}"]
    files = make_val_set(parse([*WORDS, *words, f"--val-images={folder / 'val'}"]))
    generated = make_val_set(parse(WORDS))
    assert len(files) == len(generated) == 3
    for a, b in zip(files, generated, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.masks, b.masks)


def test_classes_do_not_matter(folder, monkeypatch):
    coco = json.loads((folder / "boxes.json").read_text())
    coco["categories"] = [{"id": 9, "name": "thing"}]
    coco["annotations"] = [a | {"category_id": 9} for a in coco["annotations"]]
    (folder / "things.json").write_text(json.dumps(coco))
    outputs = ["--output", folder / "things_masks.json"]
    run(monkeypatch, *options(folder))
    run(monkeypatch, *options(folder), "--boxes", folder / "things.json", *outputs)
    masks, things = (
        json.loads((folder / f"{n}.json").read_text()) for n in ("masks", "things_masks")
    )
    for a, b in zip(masks["annotations"], things["annotations"], strict=True):
        assert a | {"category_id": 9} == b


def test_polygons_are_the_same_masks_and_weak_ones_are_left_out(folder, monkeypatch, capsys):
    run(monkeypatch, *options(folder))
    codes = json.loads((folder / "masks.json").read_text())["annotations"]
    scores = sorted(a["score"] for a in codes if "score" in a)
    least = scores[len(scores) // 2]
    outputs = ["--output", folder / "weak.json", "--boxes", folder / "masks.json"]
    capsys.readouterr()  # masks.json: what is weak loses the mask that it had
    run(monkeypatch, *options(folder), *outputs, "--polygons", "--min-score", least)
    told = f"{len(scores) // 2} of {len(scores)} boxes got no mask: score below {least}"
    assert told in capsys.readouterr().out
    api = COCO(str(folder / "weak.json"))
    for code, annotation in zip(codes, api.dataset["annotations"], strict=True):
        if annotation.get("iscrowd"):
            continue
        assert ("segmentation" in annotation) == (code["score"] >= least)
        if "segmentation" in annotation:
            assert isinstance(annotation["segmentation"], list)
            assert (api.annToMask(annotation) == decode_mask(code["segmentation"])).all()


STOP_AFTER_TWO_IMAGES = """
import os, signal, sys
from boxteacher import errors
from boxteacher.tools import label
append_line, name = label.append_line, sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def append_and_stop(path, line):
    append_line(path, line)
    if len(path.read_bytes().splitlines()) == 3:
        os.kill(os.getpid(), getattr(signal, name))
label.append_line = append_and_stop
errors.run(label.main)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGINT", 130)])
def test_what_was_interrupted_goes_on(folder, monkeypatch, capsys, name, code):
    run(monkeypatch, *options(folder))
    output = folder / f"{name}.json"
    words = [*options(folder), "--output", output]
    command = [sys.executable, "-c", STOP_AFTER_TWO_IMAGES, name, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr == ("interrupted\n" if name == "SIGINT" else "")
    lines = folder / f"{name}.json.unfinished"
    assert not output.exists()
    end = b'{"image_id": 3, "rows": [{"id"' if name == "SIGINT" else b"\0\0\n{}\n"  # a crash
    lines.write_bytes(lines.read_bytes() + end)
    made, label_entry = [], label.label_entry
    monkeypatch.setattr(label, "label_entry", lambda *a: made.append(a[2]) or label_entry(*a))
    capsys.readouterr()
    other = folder / "other.pt"
    save_checkpoint(other, load_checkpoint(folder / "last.pt") | {"step": 3})
    with pytest.raises(ConfigError, match=r"holds results of other settings \(flip, weights\)"):
        run(monkeypatch, *words, "--flip", "--checkpoint", other)
    run(monkeypatch, *words)
    assert "goes on after 2 of 4 images" in capsys.readouterr().err
    assert len(made) == 2
    assert output.read_bytes() == (folder / "masks.json").read_bytes()
    assert not lines.exists()


def test_an_interrupted_call_makes_only_images_anew_whose_boxes_have_changed(
    folder, monkeypatch, tmp_path
):
    shutil.copy(folder / "boxes.json", tmp_path / "boxes.json")
    words = [*options(folder), "--boxes", tmp_path / "boxes.json", "--output", tmp_path / "m.json"]

    def interrupted():
        raise KeyboardInterrupt

    made, label_entry = [], label.label_entry
    monkeypatch.setattr(
        label,
        "label_entry",
        lambda *a: interrupted() if len(made) == 3 else made.append(a[2]) or label_entry(*a),
    )
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *words)
    coco = json.loads((tmp_path / "boxes.json").read_text())
    removed, changed = (coco["images"][n]["id"] for n in (0, 1))
    del coco["images"][0]  # its file was broken
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != removed]
    next(a for a in coco["annotations"] if a["image_id"] == changed)["bbox"][2] -= 1
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    made.clear()
    monkeypatch.setattr(label, "label_entry", lambda *a: made.append(a[2]) or label_entry(*a))
    run(monkeypatch, *words)
    assert made == [0, 2]  # the changed one, and the last
    labeled = json.loads((tmp_path / "m.json").read_text())["annotations"]
    assert all("segmentation" in a for a in labeled if not a.get("iscrowd"))


def test_a_picture_shows_boxes_masks_and_true_masks(folder, monkeypatch):
    run(monkeypatch, *options(folder), "--draw", folder / "masks.png")
    run(monkeypatch, "--checkpoint", folder / "last.pt", "--draw", folder / "val.jpg")
    without, with_truth = (Image.open(folder / name) for name in ("masks.png", "val.jpg"))
    assert with_truth.width > 1.4 * without.width  # three columns, and two
    pixels = np.array(without).astype(int)
    left, right = pixels[:, : without.width // 2], pixels[:, without.width // 2 :]
    assert (left == instance_color(0)).all(-1).any()  # a box
    assert not (right == instance_color(0)).all(-1).any()  # colors of masks are mixed with gray
    with pytest.raises(ConfigError, match=r"ends in \.png or \.jpg"):
        run(monkeypatch, *options(folder), "--draw", folder / "masks")


def test_options_that_do_not_go_together_are_refused(folder, monkeypatch):
    with pytest.raises(ConfigError, match="give --boxes, --images and --output, or none"):
        run(monkeypatch, *options(folder)[:-2])
    with pytest.raises(WriteError, match="it is no regular file"):
        run(monkeypatch, *options(folder), "--output", folder)
    for name in ("last.pt", "boxes.json"):
        with pytest.raises(ConfigError, match=f"{name} is also another file of this command"):
            run(monkeypatch, *options(folder), "--output", folder / name)
    with pytest.raises(ConfigError, match="min-score: give a number between 0 and 1, got nan"):
        run(monkeypatch, *options(folder), "--min-score", "nan")
    with pytest.raises(ConfigError, match="is about generated images; to read files, add"):
        run(monkeypatch, "--checkpoint", folder / "last.pt", "--val-json", folder / "val.json")
    with pytest.raises(ConfigError, match="no validation set in the checkpoint"):
        run(monkeypatch, "--checkpoint", folder / "last.pt", "--dataset", "coco", "--val-json=")
