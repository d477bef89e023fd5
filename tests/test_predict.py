"""predict.py: images without annotations become results, pictures and instance maps; and what tools
share."""

import dataclasses
import fcntl
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO

from boxteacher import errors, reporting
from boxteacher.checkpoint import load_checkpoint, save_checkpoint
from boxteacher.coco import DataError
from boxteacher.command_line import parse
from boxteacher.config import ConfigError
from boxteacher.masks import decode_mask, encode_mask, polygons
from boxteacher.model import build_model
from boxteacher.reporting import progress
from boxteacher.shapes import CLASS_NAMES, load_shapes_image, make_shapes_coco
from boxteacher.tools import common, predict
from boxteacher.visualize import draw_instances, instance_color, paint_instance_map, with_legend

torch.set_num_threads(1)
# pycocotools under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WORDS = """shapes --fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1
    --device cpu --norm gn --mask-norm gn --test-size 96 --test-max-size 128 --size-unit 16
    --teacher-size 0 --mode boxinst --max-detections 10 --workers 0""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that detects something everywhere, and images: a wide one, two of one size, one
    in a folder below, one that is no image, and one that is no image file at all."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(1)
    cfg = parse(WORDS)
    model = build_model(cfg, len(CLASS_NAMES))
    with torch.no_grad():
        model.head.class_logits.bias.fill_(2.5)
        model.head.centerness.bias.fill_(3.0)
        model.head.distances.bias.fill_(1.5)
        model.head.controller.weight.normal_(std=0.03)
        model.head.controller.bias.normal_(std=0.4)[-1] = 4.0
    state = {"config": dataclasses.asdict(cfg), "class_names": list(CLASS_NAMES)}
    state |= {"category_ids": [3, 5, 7, 11, 13, 17], "step": 1, "student": model.state_dict()}
    save_checkpoint(folder / "last.pt", state | {"teacher": None, "optimizer": None})
    images, paint = folder / "images", load_shapes_image(0, 64)
    entries = make_shapes_coco(0, 4, 64)["images"]
    (images / "below").mkdir(parents=True)
    for number, name in enumerate(("b.png", "c.png", "below/a.png"), 1):
        Image.fromarray(paint(entries[number])).save(images / name)
    Image.fromarray(np.tile(paint(entries[0]), (1, 2, 1))).save(images / "a.jpg")
    (images / "notes.txt").write_text("not an image")
    return folder


def run(monkeypatch, folder, *argv):
    words = ["predict.py", *argv, "--checkpoint", folder / "last.pt", "--score", "0.3"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    predict.main()


def results_of(output):
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def first(folder):
    """The folder as one call sees it: results, pictures and maps."""
    with pytest.MonkeyPatch.context() as patch:
        options = ("--draw", "class", "--instance-maps")
        run(patch, folder, folder / "images", "--output", folder / "first", *options)
    return folder / "first"


def test_results_are_those_of_the_model_on_every_image(folder, first):
    results = results_of(first)
    images = sorted((folder / "images").rglob("*.[pj][np]g"))
    assert {r["file_name"] for r in results} == {str(path) for path in images}
    model, state = common.load_network(str(folder / "last.pt"), {})
    for path in images:
        found = model.predict_image(np.array(Image.open(path).convert("RGB")))
        mine = [r for r in results if r["file_name"] == str(path)]
        assert len({r["image_id"] for r in mine}) == 1
        keep = found.scores >= 0.3
        assert 0 < len(mine) == int(keep.sum())
        assert [r["score"] for r in mine] == pytest.approx(found.scores[keep].tolist(), abs=1e-5)
        labels = [state["category_ids"].index(r["category_id"]) for r in mine]
        assert labels == found.labels[keep].tolist()
        masks = [mask for mask, is_kept in zip(found.masks, keep, strict=True) if is_kept]
        assert [r["segmentation"] for r in mine] == masks


def test_pycocotools_loads_the_results(folder, first):
    results = results_of(first)
    sizes = {}
    for line in (first / "results.jsonl").read_text().splitlines()[1:]:
        line = json.loads(line)
        sizes[line["file_name"]] = (line["height"], line["width"])
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [
            {"id": r["image_id"], "height": sizes[n][0], "width": sizes[n][1], "file_name": n}
            for n in sizes
            for r in [next(r for r in results if r["file_name"] == n)]
        ],
        "categories": [{"id": i, "name": str(i)} for i in (3, 5, 7, 11, 13, 17)],
        "annotations": [],
    }
    truth.createIndex()
    loaded = truth.loadRes(results)
    assert len(loaded.anns) == len(results)
    for annotation in loaded.anns.values():
        assert loaded.annToMask(annotation).any()


def test_maps_hold_every_visible_instance(folder, first):
    name = str(folder / "images/b.png")
    results = [r for r in results_of(first) if r["file_name"] == name]
    (picture,) = (first / "instances").glob("*_b.png.png")
    ids = np.array(Image.open(picture))
    assert ids.dtype == np.uint16
    masks = np.array([decode_mask(r["segmentation"]) for r in results])
    assert ((ids > 0) == masks.any(0)).all()
    for k, mask in enumerate(masks):
        covered = masks[masks.sum((1, 2)) < mask.sum()].any(0)
        assert (ids[mask & ~covered] != 0).all()
        assert not (ids == k + 1)[~mask].any()


def test_pictures_have_the_names_and_shapes_of_their_images(first):
    """Two images have the name a, in two folders."""
    names = sorted(path.name for path in (first / "overlays").iterdir())
    assert names == [
        f"{n:06}_{m}.png" for n, m in enumerate(("a.jpg", "b.png", "a.png", "c.png"), 1)
    ]
    picture = Image.open(first / "overlays/000001_a.jpg.png")
    assert picture.width == 800
    assert picture.height > 400  # and the legend


def test_the_batch_changes_nothing(folder, first, monkeypatch):
    options = ("--output", folder / "batched", "--batch", "3")
    run(monkeypatch, folder, folder / "images", *options)
    one, three = results_of(first), results_of(folder / "batched")
    assert len(one) > 3
    for a, b in zip(one, three, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert (a["file_name"], a["category_id"]) == (b["file_name"], b["category_id"])
        assert rle_codec.iou([a["segmentation"]], [b["segmentation"]], [0])[0, 0] > 0.99


def test_polygons_are_the_same_masks(folder, first, monkeypatch):
    run(monkeypatch, folder, folder / "images/b.png", "--output", folder / "poly", "--polygons")
    wanted = [r for r in results_of(first) if r["file_name"].endswith("b.png")]
    for result, code in zip(results_of(folder / "poly"), wanted, strict=True):
        codes = rle_codec.frPyObjects(result["segmentation"], 64, 64)
        assert (rle_codec.decode(rle_codec.merge(codes)) == decode_mask(code["segmentation"])).all()


def test_an_empty_mask_has_no_polygon_and_stays_a_code(folder, monkeypatch):
    monkeypatch.setattr(predict, "polygons", lambda mask: [])
    run(monkeypatch, folder, folder / "images/b.png", "--output", folder / "empty", "--polygons")
    codes = [result["segmentation"] for result in results_of(folder / "empty")]
    assert codes
    assert all("counts" in code for code in codes)


def test_two_calls_with_one_output_do_not_mix_their_results(folder, monkeypatch):
    output, image = folder / "shared", folder / "images/b.png"
    run(monkeypatch, folder, image, "--output", output)
    with open(output / "results.jsonl") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"results\.jsonl: another process is writing to it"):
            run(monkeypatch, folder, image, "--output", output)
    run(monkeypatch, folder, image, "--output", output)


def test_the_teachers_size_does_not_limit_the_size_of_the_test(folder, monkeypatch):
    state = load_checkpoint(folder / "last.pt")
    state["config"] |= {"teacher_size": 120}
    large = folder / "large"
    large.mkdir()
    save_checkpoint(large / "last.pt", state)
    words = ["--output", large / "found", "--test-size", "64", "--test-max-size", "64"]
    run(monkeypatch, large, folder / "images/b.png", *words)
    assert results_of(large / "found")


def test_an_unreadable_file_costs_a_line_and_the_exit_code(folder, monkeypatch, capsys):
    broken = folder / "broken.png"
    broken.write_bytes((folder / "images/b.png").read_bytes()[:300])
    images = [folder / "images/c.png", broken, folder / "images/b.png"]
    with pytest.raises(errors.UserError, match="1 of 3 files could not be read"):
        run(monkeypatch, folder, *images, "--output", folder / "some")
    assert len({result["file_name"] for result in results_of(folder / "some")}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {broken} cannot be read")


def test_what_was_interrupted_goes_on(folder, first, monkeypatch):
    """The process is killed after two images, in the middle of a line."""
    output, images = folder / "again", folder / "images"
    run(monkeypatch, folder, images, "--output", output)
    whole = results_of(output)
    lines = (output / "results.jsonl").read_bytes().splitlines(keepends=True)
    (output / "results.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    (output / "results.json").unlink()
    loaded, load = [], predict.image_loader
    monkeypatch.setattr(
        predict, "image_loader", lambda *a: lambda e: loaded.append(e) or load(*a)(e)
    )
    run(monkeypatch, folder, images, "--output", output)
    assert len(loaded) == 2
    assert results_of(output) == whole
    with pytest.raises(ConfigError, match=r"results of other settings \(polygons\)"):
        run(monkeypatch, folder, images, "--output", output, "--polygons")
    (output / "results.jsonl").write_text("no JSON")
    with pytest.raises(DataError, match=r"results\.jsonl cannot be read .*; remove it"):
        run(monkeypatch, folder, images, "--output", output)


def test_a_call_with_more_images_keeps_the_pictures_of_before(folder, monkeypatch):
    """Below an image folder, and with the same name in two folders."""
    images = folder / "growing"
    (images / "below").mkdir(parents=True)
    shutil.copy(folder / "images/b.png", images / "below/b.png")
    options = (images, "--output", images / "found", "--draw", "class", "--instance-maps")
    run(monkeypatch, folder, *options)
    before = (images / "found/overlays/000001_b.png.png").read_bytes()
    shutil.copy(folder / "images/c.png", images / "b.png")
    run(monkeypatch, folder, *options)
    for kind in ("overlays", "instances"):
        pictures = {path.name for path in (images / "found" / kind).iterdir()}
        assert pictures == {"000001_b.png.png", "000002_b.png.png"}
    assert (images / "found/overlays/000001_b.png.png").read_bytes() == before
    assert {r["image_id"] for r in results_of(images / "found")} == {1, 2}


def test_folders_and_what_pillow_cannot_open_are_no_images(folder, monkeypatch, tmp_path):
    shutil.copytree(folder / "images/below", tmp_path / "images/below")
    (tmp_path / "images/paper.pdf").write_bytes(b"%PDF-1.4")
    shutil.copy(folder / "images/b.png", tmp_path / "images/b.png")
    found = predict.find_images([str(tmp_path / "images"), str(tmp_path / "images/b*")])
    names = [str(Path(name).relative_to(tmp_path / "images")) for name in found]
    assert names == ["b.png", "below/a.png"]
    (tmp_path / "images/linked").symlink_to(folder / "images/below")
    (tmp_path / "images/endless").symlink_to(tmp_path / "images")
    found = predict.find_images([str(tmp_path / "images")])
    names = [str(Path(name).relative_to(tmp_path / "images")) for name in found]
    assert names == ["b.png", "below/a.png", "linked/a.png"]


def test_it_is_a_program_for_globs(folder):
    command = [sys.executable, "-m", "boxteacher.tools.predict", str(folder / "images/*.png")]
    command += ["--checkpoint", str(folder / "last.pt"), "--output", str(folder / "program")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "in 2 images" in done.stdout
    command[3] = str(folder / "no_such.png")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {folder / 'no_such.png'}: no image there")


# --- what tools share -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_polygons_become_the_same_mask_again(seed):
    """Random masks have holes, islands in holes, and pixels that touch at corners only."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        mask = rng.random(rng.integers(1, 14, 2)) < rng.random()
        mask = np.kron(mask, np.ones(rng.integers(1, 4, 2))) > 0
        size = (mask.shape[0] + 5, mask.shape[1] + 7)
        found = polygons(mask, top=2, left=3)
        wanted = decode_mask(encode_mask(mask, (2, 3), size))
        codes = rle_codec.frPyObjects(found, *size) if found else []
        found = rle_codec.decode(rle_codec.merge(codes)) if codes else np.zeros(size)
        assert (found == wanted).all()


def test_a_square_with_a_hole_is_one_polygon():
    mask = np.ones((4, 4), dtype=bool)
    mask[1:3, 1:3] = False
    (polygon,) = polygons(mask)
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    assert len(corners) == 4 + 1 + 4 + 1  # outer, back to its start, inner, back to its start
    assert len(polygons(np.eye(2, dtype=bool))) == 2  # diagonal pixels do not connect


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch):
    times = iter(range(0, 1000, 20))
    stream = io.StringIO()
    monkeypatch.setattr(reporting.time, "monotonic", lambda: next(times))
    monkeypatch.setattr("sys.stderr", stream)
    assert list(progress("abcdef", "read", 6)) == list("abcdef")
    assert stream.getvalue().splitlines() == [
        "read: 2 of 6, 1 min left",
        "read: 4 of 6, 1 min left",
        "read: 6 of 6, 0 min left",
    ]


# --- pictures -------------------------------------------------------------------------------------


def test_a_painted_map_has_color_on_its_instances_alone():
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    ids = np.zeros((40, 60), dtype=np.uint16)
    ids[10:30, 10:30], ids[5:35, 40:55] = 1, 2
    picture = np.array(paint_instance_map(image, ids, [instance_color(0), instance_color(1)], 60))
    assert (picture[ids == 0] == 100).all()
    for k in (0, 1):
        inner = np.zeros_like(ids, dtype=bool)
        inner[15:25, (15, 45)[k] : (25, 50)[k]] = True
        wanted = (100 + np.array(instance_color(k))) / 2
        assert np.abs(picture[inner] - wanted).max() <= 1
        assert not (picture[ids == k + 1] == 100).all(1).any()


def test_a_large_photograph_with_many_instances_is_painted_small():
    ids = np.zeros((3000, 4000), dtype=np.uint16)
    ids[::100] = 700
    colors = [instance_color(k) for k in range(700)]
    picture = paint_instance_map(np.zeros((3000, 4000, 3), dtype=np.uint8), ids, colors, 400)
    assert picture.size == (400, 300)


def test_a_legend_lies_below_the_picture_and_wraps():
    picture = Image.new("RGB", (200, 100), (1, 2, 3))
    whole = with_legend(picture, [(f"class {k}: {k}", instance_color(k)) for k in range(9)])
    pixels = np.array(whole)
    assert (pixels[:100] == (1, 2, 3)).all()
    for k in range(9):
        assert (pixels[100:] == instance_color(k)).all(-1).sum() == 15 * 15
    assert with_legend(picture, []).height < whole.height


def test_captions_do_not_cover_each_other():
    """Two boxes at one place: the second caption takes another corner."""
    image = np.zeros((100, 200, 3), dtype=np.uint8)
    boxes, colors = np.array([[50, 40, 150, 80]] * 2), [(255, 0, 0), (0, 255, 0)]
    names = ["first", "second"]
    picture = np.array(draw_instances(image, boxes, None, [0, 1], names, colors=colors))
    for color in colors:
        assert (picture == color).all(-1).sum() > 300  # the caption's ground, besides the outline


def test_the_checkpoints_fields_can_be_replaced(folder):
    model, state = common.load_network(str(folder / "last.pt"), {"max_detections": 3})
    assert model.cfg.max_detections == 3
    assert not model.training
    assert state["category_ids"] == load_checkpoint(folder / "last.pt")["category_ids"]
