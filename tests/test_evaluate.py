"""evaluate.py, from files to tables: published checkpoints and our own."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from golden.compare import load
from golden.synthetic import inference_image, synthetic_model
from PIL import Image
from pycocotools import mask as rle_codec

import evaluate
import train
from boxteacher.checkpoint import CheckpointError, save_checkpoint
from boxteacher.coco import DataError
from boxteacher.coco_eval import EvaluationError
from boxteacher.command_line import parse
from boxteacher.config import ConfigError
from boxteacher.data import make_val_set
from boxteacher.model import build_model
from boxteacher.published import COCO_CLASSES, load_initial_weights, to_published


def run(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()
    return capsys.readouterr().out


# --- published checkpoints ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden values' image as a data set of COCO's classes, and published weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    image = inference_image()
    height, width = image.shape[:2]
    (folder / "images").mkdir()
    Image.fromarray(image).save(folder / "images" / "a.png")
    annotation = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [10, 10, 40, 40]}
    coco = {
        "images": [{"id": 5, "file_name": "a.png", "height": height, "width": width}],
        "categories": [{"id": i, "name": name} for i, name in COCO_CLASSES.items()],
        "annotations": [annotation | {"segmentation": [[10, 10, 50, 10, 50, 50]]}],
    }
    (folder / "val.json").write_text(json.dumps(coco))
    weights = {}
    for network in ("teacher", "student"):
        state = to_published(synthetic_model("boxteacher", "r50", network).state_dict())
        weights |= {f"{network}.{name}": value for name, value in state.items()}
    torch.save({"model": weights}, folder / "boxteacher.pth")
    return folder


def data_options(folder) -> list:
    files = ["--val-json", folder / "val.json", "--val-images", folder / "images"]
    return [*files, "--test-size=317", "--test-max-size=411", "--workers=0", "--device=cpu"]


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_a_published_checkpoint_gives_the_published_output(folder, monkeypatch, capsys, network):
    argv = ["--published", folder / "boxteacher.pth", "--preset", "coco_boxteacher_r50_1x"]
    argv += ["--student"] * (network == "student")
    out = run(monkeypatch, capsys, *argv, *data_options(folder))
    path = folder / f"boxteacher_{network}_results.json"
    assert str(path) in out
    assert "mask" in out
    assert "traffic light" in out
    golden = load("infer_r50", "compact")
    results = sorted(json.loads(path.read_text()), key=lambda result: -result["score"])
    order = np.argsort(-golden[f"{network}/scores"], kind="stable")
    scores = [result["score"] for result in results]
    np.testing.assert_allclose(scores, golden[f"{network}/scores"][order], atol=2e-5)
    ids = np.array(list(COCO_CLASSES))
    found = sorted((r["category_id"], round(r["bbox"][0])) for r in results)
    x = golden[f"{network}/boxes"][:, 0].round().astype(int).tolist()
    assert found == sorted(zip(ids[golden[f"{network}/classes"]].tolist(), x, strict=True))
    area = sorted(int(rle_codec.area(result["segmentation"])) for result in results)
    np.testing.assert_allclose(area, sorted(golden[f"{network}/mask_area"]), atol=20)


def test_training_starts_from_a_published_checkpoint(folder):
    argv = ["coco_boxteacher_r50_1x", "--stride-in-1x1", "--pixel-format=bgr"]
    cfg = parse([*argv, "--init", str(folder / "boxteacher.pth")])  # and no download
    state = train.make_state(cfg, 80, torch.device("cpu"))
    wanted = torch.load(folder / "boxteacher.pth")["model"]["teacher.controller.bias"]
    assert torch.equal(state.student.head.controller.bias, wanted)
    assert torch.equal(state.teacher.head.controller.bias, wanted)
    with pytest.raises(CheckpointError, match=r"cls_logits.bias \[80\] for \[3\]"):
        train.make_state(cfg, 3, torch.device("cpu"))


def test_other_classes_are_refused(folder, monkeypatch, capsys):
    coco = json.loads((folder / "val.json").read_text())
    coco["categories"].pop()
    (folder / "fewer.json").write_text(json.dumps(coco))
    options = [*data_options(folder), "--val-json", folder / "fewer.json"]
    with pytest.raises(
        DataError, match=r"fewer\.json: other classes than .*: it lacks 'toothbrush'"
    ):
        run(monkeypatch, capsys, "--published", folder / "boxteacher.pth", *options)


# --- our own --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    argv = ["shapes", "--shapes-val=3", "--fpn-channels=64", "--device=cpu", "--workers=0"]
    cfg = parse(argv)
    val_set = make_val_set(cfg)
    torch.manual_seed(0)
    model = build_model(cfg, len(val_set.class_names))
    torch.nn.init.zeros_(model.head.class_logits.bias)  # p = 0.5, so that it detects something
    state = {
        "config": dataclasses.asdict(cfg),
        "class_names": val_set.class_names,
        "category_ids": val_set.category_ids,
        "step": 7,
        "student": model.state_dict(),
        "teacher": {name: value * 1 for name, value in model.state_dict().items()},
        "optimizer": None,
    }
    path = tmp_path_factory.mktemp("run") / "last.pt"
    save_checkpoint(path, state)
    return path


def test_our_checkpoint(last, monkeypatch, capsys, tmp_path):
    out = run(monkeypatch, capsys, "--checkpoint", last, "--max-detections=5")
    assert f"{last}: teacher, step 7" in out
    results = json.loads((last.parent / "last_teacher_results.json").read_text())
    assert results
    assert {result["image_id"] for result in results} <= {1, 2, 3}
    run(monkeypatch, capsys, f"--checkpoint={last}", "--student", "--out", tmp_path / "new")
    assert (tmp_path / "new" / "last_student_results.json").is_file()


def test_the_metric_is_chosen_and_the_tables_are_a_file(last, monkeypatch, capsys, tmp_path):
    out = run(monkeypatch, capsys, "--checkpoint", last, "--metric=voc", "--out", tmp_path)
    assert out.splitlines()[1].split() == ["AP", "AP25", "AP50", "AP70", "AP75"]
    tables = json.loads((tmp_path / "last_teacher_tables.json").read_text())
    assert tables["metric"] == "voc"
    assert set(tables["segm"]["per_class"]) == set(tables["bbox"]["per_class"])
    with pytest.raises(EvaluationError, match="field 'void' is missing"):  # the shapes have none
        run(monkeypatch, capsys, "--checkpoint", last, "--metric=cityscapes", "--out", tmp_path)


def test_other_sizes_than_the_teacher_had(last, monkeypatch, capsys, tmp_path):
    sizes = ["--test-size", "160", "--test-max-size", "160"]  # less than teacher_size
    run(monkeypatch, capsys, "--checkpoint", last, *sizes, "--out", tmp_path)
    assert (tmp_path / "last_teacher_results.json").is_file()


def test_help_begins_with_the_options_of_the_program(monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        run(monkeypatch, capsys, "--help")
    shown = capsys.readouterr().out
    assert done.value.code == 0
    assert shown.startswith("usage: evaluate.py (--checkpoint FILE | --published FILE)")
    assert {"--checkpoint", "--published", "--student"} <= set(shown.split())
    assert len(shown.splitlines()) < 30


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        ([], ConfigError, "give either --checkpoint FILE or --published FILE"),
        (["--student"], ConfigError, "give either --checkpoint FILE or --published FILE"),
        (["--checkpoint"], ConfigError, "--checkpoint: expected one value"),
        (["--checkpoint", "a.pt", "--published", "b.pth"], ConfigError, "not allowed with"),
        (
            ["--checkpint", "a.pt"],
            ConfigError,
            "no option --checkpint; the nearest is --checkpoint",
        ),
        (["--checkpoint", "none.pt"], CheckpointError, "none.pt"),
        (["--published", "none.pth"], CheckpointError, "none.pth: no such checkpoint file"),
        (["--checkpoint", "LAST", "--preset", "shapes"], ConfigError, "has its own"),
        (["--checkpoint", "LAST", "--val-json", "a.json"], ConfigError, "add --dataset coco"),
        (["--checkpoint", "LAST", "--backbone", "resnet34"], CheckpointError, "missing"),
        (["--checkpoint", "LAST", "--sizes", "1"], ConfigError, "no option --sizes"),
        (["--checkpoint", "LAST", "--mode", "boxinstt"], ConfigError, "nearest is boxinst"),
        (["shapes", "--checkpoint", "LAST"], ConfigError, "no option shapes"),
    ],
)
def test_errors_are_one_line(last, monkeypatch, capsys, argv, error, words):
    argv = [str(last) if word == "LAST" else word for word in argv]
    with pytest.raises(error, match=words) as caught:
        run(monkeypatch, capsys, *argv)
    assert "\n" not in str(caught.value)


def test_a_backbone_file_that_is_no_such_thing(tmp_path):
    (tmp_path / "R-50.pkl").write_bytes(b"nothing")
    cfg = parse(["coco_boxteacher_r50_1x", "--backbone-weights", str(tmp_path / "R-50.pkl")])
    with pytest.raises(CheckpointError, match=r"R-50.pkl"):
        load_initial_weights(build_model(cfg, 80), cfg)
