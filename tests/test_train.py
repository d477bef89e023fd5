"""train.py as its users meet it: the command line, its files, its errors, and that it learns."""

import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from boxteacher.checkpoint import load_checkpoint, load_model, save_checkpoint
from boxteacher.command_line import parse
from boxteacher.data import make_val_set
from boxteacher.masks import encode_mask
from boxteacher.model import build_model
from boxteacher.reporting import make_contact_sheet
from boxteacher.shapes import make_shapes_coco, make_shapes_image

torch.set_num_threads(1)

TRAIN = str(Path(__file__).parents[1] / "train.py")
NETWORK = """--fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1
    --device cpu --workers 0""".split()
TINY = """--norm gn --mask-norm gn --shapes-size 64 --shapes-train 16 --shapes-val 3
    --train-sizes 64 --train-max-size 64 --test-size 64 --test-max-size 64 --teacher-size 0
    --batch-size 4 --steps 2 --log-every 1 --pseudo-start 0 --no-pairwise-ends""".split()
TINY = ["shapes", *NETWORK, *TINY]
EVALUATION = {"results.json", "tables.json"}
FILES = {"config.json", "contact_sheet.png", "last.pt", "metrics.jsonl", ".lock"} | EVALUATION


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str


def train(*words) -> Ended:
    """`python train.py WORDS` in this process, which spares the imports."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [TRAIN, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(TRAIN, run_name="__main__")
    except SystemExit as stop:  # what the interpreter makes of it
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        err.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
    finally:
        sys.argv = argv
    return Ended(code, out.getvalue(), err.getvalue())


def start(*words, launcher=(), **options) -> subprocess.Popen:
    """`python train.py WORDS` as a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, TRAIN, *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, **pipes, **options)


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder) -> dict[int, dict]:
    """The last line of every step, less what depends on the machine, and what is not known."""
    lines = [m for m in metrics(folder) if "evaluation" not in m]
    return {
        m["step"]: {k: v for k, v in m.items() if k != "images_per_s" and v is not None}
        for m in lines
    }


def assert_close(state, expected, **tolerance):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def assert_error(ended: Ended, *parts):
    """One line on stderr, exit code 1."""
    assert ended.code == 1, ended
    lines = ended.err.splitlines()
    assert lines[-1].startswith("error: "), ended.err
    assert [line for line in lines[:-1] if not line.startswith("warning: ")] == [], ended.err
    for part in parts:
        assert str(part) in lines[-1]


# --- one small run, looked at from all sides ------------------------------------------------------


@pytest.fixture(scope="module")
def seeing_checkpoint(tmp_path_factory):
    """{mode: a checkpoint for --init whose detector and masks say something in TINY's runs}."""
    paths = {}
    for mode in ("boxteacher", "condinst"):
        torch.manual_seed(1)
        model = build_model(parse([*TINY, "--mode", mode]), num_classes=6)
        with torch.no_grad():
            model.head.class_logits.bias.fill_(0.5)
            model.head.distances.bias.fill_(1.5)
            model.head.controller.weight.normal_(std=0.03)
            model.head.controller.bias.normal_(std=0.4)[-1] = 0.5
        paths[mode] = tmp_path_factory.mktemp("init") / f"{mode}.pt"
        save_checkpoint(paths[mode], {"student": model.state_dict(), "teacher": None})
    return paths


@pytest.fixture(scope="module")
def finished(tmp_path_factory, seeing_checkpoint):
    folder = tmp_path_factory.mktemp("run") / "out"
    init = ("--init", seeing_checkpoint["boxteacher"], "--iou-threshold", 0.2)
    ended = train(*TINY, *init, "--eval-every", 1, "--out", folder)
    assert ended.code == 0, ended.err
    return ended, folder


def test_a_run_leaves_its_files_and_says_where_they_are(finished):
    ended, folder = finished
    assert {path.name for path in folder.iterdir()} == FILES | {"best.pt"}
    last_lines = ended.out.splitlines()[-8:]
    for name in FILES - {".lock"} | {"best.pt"}:
        assert any(str(folder / name) in line for line in last_lines), name
    assert "learned from boxes alone" in ended.out
    assert "mask AP" in ended.out
    assert json.loads((folder / "config.json").read_text())["steps"] == 2


def test_metrics_are_json_lines_with_losses_and_the_flywheel(finished):
    first, *rest = metrics(finished[1])
    assert [("evaluation" in m, m["step"]) for m in rest] == [(True, 1), (False, 2), (True, 2)]
    losses = {"class", "box", "centerness", "projection", "pairwise"}
    losses |= {"pseudo_mask", "pseudo_affinity"}
    shares = {
        "similar_pair_share",
        "pseudo_masks_per_image",
        "mask_aware_score",
        "pseudo_mask_iou",
    }
    assert losses | shares | {"step", "lr", "images_per_s", "loss"} <= first.keys()
    assert first["loss"] == pytest.approx(sum(first[name] for name in losses), rel=1e-4)
    assert first["pseudo_masks_per_image"] > 0
    assert 0 < first["mask_aware_score"] <= 1
    assert 0 < first["pseudo_mask_iou"] < 1
    assert 0 < first["similar_pair_share"] < 1
    assert rest[0]["evaluation"].keys() == {"bbox", "segm"}


def test_the_checkpoint_holds_what_evaluation_and_prediction_need(finished):
    checkpoint = load_checkpoint(finished[1] / "last.pt")
    assert checkpoint["step"] == 2
    assert checkpoint["class_names"] == ["star", "ring", "crescent", "cross", "triangle", "blob"]
    assert len(checkpoint["category_ids"]) == 6
    assert checkpoint["config"]["fpn_channels"] == 64
    assert checkpoint["teacher"].keys() == checkpoint["student"].keys()
    assert any(
        not torch.equal(checkpoint["teacher"][name], value)
        for name, value in checkpoint["student"].items()
    )


def test_a_model_is_loaded_from_a_checkpoint_alone(finished):
    model, class_names = load_model(finished[1] / "last.pt")
    checkpoint = load_checkpoint(finished[1] / "last.pt")
    assert class_names == checkpoint["class_names"]
    assert_close(model.state_dict(), checkpoint["teacher"], rtol=0, atol=0)
    found = model.predict_image(make_shapes_image(0, 0, 64)[0])
    assert all(mask["size"] == [64, 64] for mask in found.masks)


def test_the_contact_sheet_is_a_picture_of_four_columns(finished):
    with Image.open(finished[1] / "contact_sheet.png") as sheet:
        sheet.load()
    assert sheet.width > 1000
    assert sheet.height > 3 * 300  # one row for each of three images
    tiles = np.array_split(np.asarray(sheet.convert("RGB")), 4, axis=1)
    assert all(tile.std() > 20 for tile in tiles)


def test_the_tables_of_the_last_evaluation_are_a_file_too(finished):
    tables = json.loads((finished[1] / "tables.json").read_text())
    assert tables.pop("metric") == "coco"
    logged = metrics(finished[1])[-1]["evaluation"]
    assert tables == logged


def test_epochs_count_the_images_and_metric_chooses_the_tables(tmp_path):
    """Two epochs of 16 images in steps of 4. A run that goes on has the same length."""
    words = [*TINY[: TINY.index("--steps")], "--mode", "boxinst", "--metric", "voc"]
    words += ["--out", tmp_path / "out", "--epochs", 2]
    ended = train(*words)
    assert ended.code == 0, ended.err
    assert "boxinst: 16 images, 8 steps, learning rate 0.001, to" in ended.out
    kept = json.loads((tmp_path / "out/config.json").read_text())
    assert (kept["steps"], kept["epochs"], kept["metric"]) == (8, 2, "voc")
    columns = ["AP", "AP25", "AP50", "AP70", "AP75", "per_class"]
    assert list(json.loads((tmp_path / "out/tables.json").read_text())["segm"]) == columns
    again = train("--resume", "--out", tmp_path / "out")  # nothing is left to do
    assert (again.code, "16 images, 8 steps" in again.out) == (0, True), again.err


def test_results_are_cocos(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    assert {r["image_id"] for r in results} <= {1, 2, 3}
    assert results[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}


def test_a_folder_with_a_run_is_not_written_to(finished):
    before = (finished[1] / "metrics.jsonl").read_bytes()
    assert_error(train(*TINY, "--out", finished[1]), "already holds a run", "--resume")
    assert (finished[1] / "metrics.jsonl").read_bytes() == before


def test_without_out_the_next_free_name_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/shapes").mkdir(parents=True)
    (tmp_path / "runs/shapes/config.json").write_text("{}")
    ended = train(*TINY, "--steps", 1, "--mode", "boxinst", "--batch-size", 1)
    assert ended.code == 0, ended.err
    assert {path.name for path in (tmp_path / "runs/shapes_2").iterdir()} == FILES
    assert [path.name for path in (tmp_path / "runs/shapes").iterdir()] == ["config.json"]


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["boxteacher", "condinst"])
def test_two_processes_do_what_one_does_with_the_same_global_batch(
    mode, seeing_checkpoint, tmp_path
):
    """Group norm throughout, since batch norm's statistics are each rank's own. BoxInst's losses
    are among BoxTeacher's.
    """
    words = [*TINY, "--mode", mode, "--init", seeing_checkpoint[mode], "--iou-threshold", "0.2"]
    words += "--steps 3 --optimizer sgd --lr 0.02 --warmup-steps 0 --weak-warmup-steps 2".split()
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    two = start(*words, "--out", tmp_path / "two", launcher=launcher)
    one = train(*words, "--out", tmp_path / "one")
    out, err = two.communicate(timeout=300)
    assert one.code == 0, one.err
    assert two.returncode == 0, err
    assert out.count("learned from") == 1  # rank 0 alone speaks and writes
    assert {path.name for path in (tmp_path / "two").iterdir()} == FILES

    expected, found = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert list(found) == list(expected) == [1, 2, 3]
    names = ["class", "box", "centerness", "loss"]
    if mode == "condinst":
        names.append("mask")
    else:
        names += ["projection", "pairwise", "pseudo_mask", "pseudo_affinity"]
        assert expected[1]["pseudo_masks_per_image"] > 0
    for step, line in expected.items():
        for name in names:
            assert found[step][name] == pytest.approx(line[name], rel=1e-3), (step, name)
            assert line[name] > 0, (step, name)
    first, second = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    for who in ("student",) if mode == "condinst" else ("student", "teacher"):
        assert_close(second[who], first[who], rtol=1e-3, atol=1e-5)


def test_two_machines_meet_and_rank_0_alone_writes(tmp_path):
    """torchrun's rendezvous, as in docs/benchmarks.md, with one process on each of two "machines".
    They share no folder, and each makes the data on its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d".split()
    launcher += [f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=7", "--local_addr=localhost"]
    machines = [tmp_path / "first", tmp_path / "second"]
    words = [*TINY, "--mode", "boxinst", "--out", "out"]
    for machine in machines:
        machine.mkdir()
    runs = [start(*words, launcher=launcher, cwd=machine) for machine in machines]
    ended = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ended
    wrote = [{path.name for path in machine.glob("out/*")} for machine in machines]
    assert sorted(wrote, key=len) == [set(), FILES]
    assert "".join(out for out, _ in ended).count("learned from") == 1
    assert [m["step"] for m in metrics(machines[wrote.index(FILES)] / "out")] == [1, 2, 2]


def test_a_run_without_a_terminal_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("boxteacher.reporting.SAY_EVERY", 0)
    ended = train(*TINY, "--steps", 3, "--out", tmp_path / "out")
    lines = [line for line in ended.out.splitlines() if line.startswith("step ")]
    assert [line.partition(",")[0] for line in lines[:3]] == [f"step {n} of 3" for n in (1, 2, 3)]
    assert re.search(r"\d+ min left, \d+\.\d images/s, loss \d+\.\d+ \(class ", lines[0])


def test_bfloat16_and_compilation_are_chosen_by_the_device_unless_said(tmp_path):
    """Here on a CPU: bfloat16 gives nearly the losses of float32, but not the same."""
    lines = {}
    for dtype in ("float32", "bfloat16"):
        ended = train(*TINY, "--steps", 1, "--dtype", dtype, "--out", tmp_path / dtype)
        assert ended.code == 0, ended.err
        lines[dtype] = metrics(tmp_path / dtype)[0]
    for name in ("class", "box", "centerness", "projection"):
        full, half = lines["float32"][name], lines["bfloat16"][name]
        assert half == pytest.approx(full, rel=0.03), name
        assert half != full, name
    resolved = json.loads((tmp_path / "bfloat16/config.json").read_text())
    assert (resolved["dtype"], resolved["compile"]) == ("bfloat16", "off")
    resumed = train("--resume", "--steps", 2, "--out", tmp_path / "bfloat16")
    assert "note: dtype is bfloat16 (--dtype auto: float32)\n" in resumed.err
    assert "note: compile" not in resumed.err


def test_until_pseudo_start_it_is_boxinst_and_then_the_pairwise_loss_may_end(tmp_path):
    words = [*TINY, "--norm", "bn", "--mask-norm", "bn", "--lr-schedule", "step", "--lr-drops", ""]
    words += ["--warmup-steps", 0, "--weak-warmup-steps", 1, "--pseudo-start", 3, "--pairwise-ends"]
    runs = {"boxinst": 2, "boxteacher": 3, "both": 4, "boxinst ends": 4}
    for name, steps in runs.items():
        mode = "boxinst" if name.startswith("boxinst") else "boxteacher"
        ended = train(*words, "--mode", mode, "--steps", steps, "--out", tmp_path / name)
        assert ended.code == 0, ended.err
        assert ("pseudo_start=3 is beyond steps=3" in ended.err) == (name == "boxteacher")
    boxinst, copied = (load_checkpoint(tmp_path / n / "last.pt") for n in ("boxinst", "boxteacher"))
    student, teacher = boxinst["student"], copied["teacher"]  # both after two steps
    assert all(torch.equal(teacher[name], value) for name, value in student.items())
    steps = steps_of(tmp_path / "both")
    assert [steps[n] for n in (1, 2)] == list(steps_of(tmp_path / "boxinst").values())
    assert ["pseudo_mask" in steps[n] for n in (1, 2, 3, 4)] == [False, False, False, True]
    for run in (steps, steps_of(tmp_path / "boxinst ends")):
        assert [run[n]["pairwise"] > 0 for n in (1, 2, 3, 4)] == [True, True, True, False]


# --- interruptions --------------------------------------------------------------------------------


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(tmp_path):
    """Batch norm too: its running statistics are the checkpoint's as well."""
    words = [*TINY, "--steps", 14, "--batch-size", 2, "--norm", "bn", "--mask-norm", "bn"]
    words += ["--checkpoint-every", 1, "--pseudo-start", 8]
    killed = start(*words, "--out", tmp_path / "killed")
    log = tmp_path / "killed/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    step = load_checkpoint(tmp_path / "killed/last.pt")["step"]
    assert 3 <= step < 14

    whole = train(*words, "--out", tmp_path / "whole")
    resumed = train(*words, "--out", tmp_path / "killed", "--resume")
    assert whole.code == 0, whole.err
    assert resumed.code == 0, resumed.err
    assert {path.name for path in (tmp_path / "killed").iterdir()} == FILES
    lines, found = steps_of(tmp_path / "whole"), steps_of(tmp_path / "killed")
    assert list(found) == list(lines) == list(range(1, 15))
    for step, line in lines.items():
        assert found[step] == pytest.approx(line, rel=1e-4, abs=1e-6), step
    expected, found = (load_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "killed"))
    assert found["step"] == 14
    for who in ("student", "teacher"):
        assert_close(found[who], expected[who], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "optimizer", "lr"),
    [("gn", "adamw", "1e30"), ("gn", "sgd", "1e6"), ("bn", "sgd", "1e6")],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_checkpoint(
    norm, optimizer, lr, tmp_path
):
    """Its weights are finite, and the statistics of batch norms, which a bad step damages."""
    words = ["--norm", norm, "--mask-norm", norm, "--optimizer", optimizer, "--lr", lr]
    ended = train(*TINY, *words, "--steps", 9, "--warmup-steps", 0, "--out", tmp_path / "out")
    assert_error(ended, "not finite: class", "image ids [", "diverged.pt", "--lr")
    checkpoint = load_checkpoint(tmp_path / "out/diverged.pt")
    assert 1 <= checkpoint["step"] < 9
    for who in ("student", "teacher"):
        for name, value in checkpoint[who].items():
            assert value.isfinite().all(), f"{who} {name}"


def test_the_message_names_the_one_loss_that_is_not_finite(tmp_path, seeing_checkpoint):
    checkpoint = load_checkpoint(seeing_checkpoint["condinst"])
    checkpoint["student"]["head.centerness.bias"].fill_(3e38)
    save_checkpoint(tmp_path / "poison.pt", checkpoint)
    init = ("--init", tmp_path / "poison.pt", "--mode", "condinst")
    ended = train(*TINY, *init, "--out", tmp_path / "out")
    assert_error(ended, "step 0", "not finite: centerness for image ids [")
    assert load_checkpoint(tmp_path / "out/diverged.pt")["step"] == 0


# --- data of one's own ----------------------------------------------------------------------------


def write_coco(folder: Path, name: str, seed: int, count: int, size: int, masks: bool) -> list[str]:
    """Shapes as files in COCO's format, all of one class. Returns train.py's options for them."""
    coco = make_shapes_coco(seed, count, size)
    (folder / name).mkdir(parents=True)
    for index, entry in enumerate(coco["images"]):
        entry["file_name"] += ".png"
        pixels = make_shapes_image(seed, index, size)[0]
        Image.fromarray(pixels).save(folder / name / entry["file_name"])
    for annotation in coco["annotations"]:
        annotation["category_id"] = 7
        if not masks:
            del annotation["segmentation"]
    coco["categories"] = [{"id": 7, "name": "Ding für alles"}]
    (folder / f"{name}.json").write_text(json.dumps(coco))
    return [f"--{name}-json", str(folder / f"{name}.json"), f"--{name}-images", str(folder / name)]


def options_for(size: int) -> list[str]:
    """A preset for files, with nothing of nuclei left in it."""
    words = f"""nuclei --train-scales= --test-scale 0 --crop 0 --max-detections 30 --teacher-size 0
        --train-sizes {size} --train-max-size {size} --test-size {size} --test-max-size {size}
        --pseudo-start 0"""
    return [*words.split(), *NETWORK]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve images with boxes alone, three of them gray, palette and 16 bit; the options."""
    folder = tmp_path_factory.mktemp("files")
    words = write_coco(folder, "train", 1, 12, 64, masks=False)
    words += write_coco(folder, "val", 0, 2, 64, masks=False)
    gray, palette, deep = sorted((folder / "train").iterdir())[:3]
    with Image.open(gray) as image:
        image.convert("L").save(gray)
    with Image.open(palette) as image:
        image.quantize(64).save(palette)
    with Image.open(deep) as image:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(deep)
    return folder, words


def test_boxes_alone_are_trained_on_and_evaluated_as_boxes(files, tmp_path):
    words = [*options_for(64), *files[1], "--steps", 2, "--log-every", 1, "--batch-size", 6]
    ended = train(*words, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    lines = metrics(tmp_path / "out")
    assert [m["step"] for m in lines] == [1, 2, 2]
    assert lines[0]["pseudo_mask_iou"] is None
    assert lines[-1]["evaluation"].keys() == {"bbox"}
    assert "evaluation needs true masks" in ended.out
    assert "box AP" in ended.out
    assert "mask AP" not in ended.out
    checkpoint = load_checkpoint(tmp_path / "out/last.pt")
    assert (checkpoint["class_names"], checkpoint["category_ids"]) == (["Ding für alles"], [7])
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        sheet.load()


def test_a_run_without_a_validation_set_says_so_and_evaluates_nothing(files, tmp_path):
    words = [*options_for(64), *files[1], "--val-json=", "--steps", 2, "--log-every", 1]
    ended = train(*words, "--batch-size", 6, "--eval-every", 1, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "warning: val_json is empty: without a validation set" in ended.err
    assert "AP" not in ended.out
    assert [m["step"] for m in metrics(tmp_path / "out")] == [1, 2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - EVALUATION
    # The sheet shows the training images at test size, never flipped or cropped.
    model, _ = load_model(tmp_path / "out/last.pt")
    cfg = dataclasses.replace(model.cfg, val_json=files[1][1], val_images=files[1][3])
    expected = make_contact_sheet(model, make_val_set(cfg), torch.device("cpu"))
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.size == expected.size
        difference = np.asarray(sheet.convert("RGB"), int) - np.asarray(expected, int)
    assert (np.abs(difference).max(-1) > 8).mean() < 1e-3


def test_an_image_that_cannot_be_read_costs_no_step(files, tmp_path):
    shutil.copytree(files[0], tmp_path / "data")
    words = [str(word).replace(str(files[0]), str(tmp_path / "data")) for word in files[1]]
    words = [*options_for(64), *words, "--val-json=", "--steps", 12, "--log-every", 1]
    words += ["--batch-size", 2, "--norm", "gn", "--mask-norm", "gn"]
    image = tmp_path / "data/train/shapes-1-8.png"  # not one of those that are looked at first
    with Image.open(image) as png:
        png.save(image, "JPEG")  # of which only the header is read at the start
    assert train(*words, "--out", tmp_path / "whole").code == 0
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    assert_error(train(*words, "--out", tmp_path / "out"), image, "replace it")
    step = load_checkpoint(tmp_path / "out/last.pt")["step"]
    assert 0 < step == len(metrics(tmp_path / "out")) < 6
    image.write_bytes(content)
    resumed = train("--resume", "--out", tmp_path / "out")
    assert resumed.code == 0, resumed.err
    whole, other = (load_checkpoint(tmp_path / f"{name}/last.pt") for name in ("whole", "out"))
    for name, weight in whole["student"].items():
        assert torch.equal(weight, other["student"][name]), name

    # The step before it was bad: that is said, and diverged.pt is there.
    poison = load_checkpoint(tmp_path / "whole/last.pt")
    poison["teacher"]["head.centerness.bias"].fill_(3e38)  # the one that --init takes
    save_checkpoint(tmp_path / "poison.pt", poison)
    image.write_bytes(content[: len(content) // 2])
    words += ["--batch-size", 6, "--seed", 2, "--init", tmp_path / "poison.pt"]
    assert_error(train(*words, "--out", tmp_path / "bad"), "not finite: centerness", "diverged.pt")
    assert load_checkpoint(tmp_path / "bad/diverged.pt")["step"] == 0


def test_condinst_says_that_it_needs_masks(files, tmp_path):
    words = [*options_for(64), *files[1], "--mode", "condinst", "--out", tmp_path / "out"]
    assert_error(train(*words), files[0] / "train.json", "'segmentation'", "boxteacher")


# --- errors, help ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["shape"], ["'shape'", "nearest is shapes", "--list"]),
        (["shapes", "--batchsize", "4"], ["--batchsize", "nearest is --batch-size"]),
        (["shapes", "--mode", "boxteachr"], ["mode", "'boxteachr'", "nearest is boxteacher"]),
        (["shapes", "--lr", "fast"], ["lr", "number", "'fast'"]),
        (["shapes", "--out", "nowhere", "--resume"], ["nowhere", "last.pt"]),
        ([*TINY, "--metric", "cityscapes"], ["shapes: image id 1: field 'void' is missing"]),
        (["--out", "nowhere", "--resume"], ["nowhere", "last.pt"]),
        ([*TINY, "--out", "new", "--init", "missing.pt"], ["missing.pt", "no such checkpoint"]),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(words, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_error(train(*words), *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_in_one_line(tmp_path):
    assert_error(train(*TINY, "--device", "cuda", "--out", tmp_path / "out"), "no GPU")


def test_data_that_cannot_be_used_is_refused_in_one_line_and_leaves_no_run(files, tmp_path):
    folder, good = files
    coco = json.loads((folder / "train.json").read_text())
    coco["annotations"][2]["bbox"][1] = float("nan")
    (tmp_path / "nan.json").write_text(json.dumps(coco))
    cases = [
        (["--train-json", tmp_path / "none.json"], [tmp_path / "none.json"]),
        (["--val-json", tmp_path / "none.json"], [tmp_path / "none.json"]),
        (["--train-images", tmp_path / "none"], [tmp_path / "none", "image directory"]),
        (
            ["--train-json", tmp_path / "nan.json"],
            [tmp_path / "nan.json", f"annotation id {coco['annotations'][2]['id']}", "'bbox'"],
        ),
    ]
    for words, parts in cases:
        out = tmp_path / "out"
        ended = train(*options_for(64), *good, *words, "--out", out)
        assert_error(ended, *parts)  # and with --out again: no run stands in the way


def test_a_run_on_other_classes_is_not_resumed(finished, files, tmp_path):
    words = [*options_for(64), *files[1], "--out", finished[1], "--resume"]
    before = (finished[1] / "config.json").read_bytes()
    assert_error(train(*words), "another run", "dataset was shapes, now coco")
    assert (finished[1] / "config.json").read_bytes() == before


def test_an_error_is_one_line_of_a_process_too():
    process = start("shape")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines() == [err.rstrip("\n")]
    assert err.startswith("error: no preset 'shape'")


def test_help_and_list_print_and_end():
    listed, helped = train("--list"), train("--help")
    assert (listed.code, listed.err, helped.code, helped.err) == (0, "", 0, "")
    for name in ("shapes", "nuclei", "coco_boxteacher_r50_1x"):
        assert f"\n{name}: " in f"\n{listed.out}"
    assert "--weak-warmup-steps" in helped.out


# --- it learns ------------------------------------------------------------------------------------


def write_diamonds(folder: Path, name: str, seed: int, count: int, masks: bool) -> list[str]:
    """One or two bright diamonds per dark image of 96 x 96: half of its box, so that only colors
    tell. Returns train.py's options for them.
    """
    rng, size = np.random.default_rng(seed), 96
    images, annotations = [], []
    (folder / name).mkdir()
    for image_id in range(1, count + 1):
        background = rng.uniform(0, 80, 3)
        pixels, taken = np.tile(background, (size, size, 1)), np.zeros((size, size), dtype=bool)
        for _ in range(2):
            height, width = rng.integers(40, 80, 2).tolist()
            top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
            window = (slice(top, top + height), slice(left, left + width))
            if taken[window].any():
                continue
            taken[window] = True
            y, x = np.mgrid[:height, :width] + 0.5
            mask = np.zeros((size, size), dtype=bool)
            mask[window] = abs(y / height - 0.5) + abs(x / width - 0.5) <= 0.5
            pixels[mask] = rng.uniform(150, 255, 3)
            annotation = dict(id=len(annotations) + 1, image_id=image_id, category_id=1)
            annotation["bbox"] = [int(left), int(top), width, height]
            if masks:
                annotation["segmentation"] = encode_mask(mask)
            annotations.append(annotation)
        pixels = (pixels + rng.normal(0, 1, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{image_id}.png")
        images.append(dict(id=image_id, file_name=f"{image_id}.png", width=size, height=size))
    coco = dict(images=images, annotations=annotations, categories=[{"id": 1, "name": "diamond"}])
    (folder / f"{name}.json").write_text(json.dumps(coco))
    return [f"--{name}-json", str(folder / f"{name}.json"), f"--{name}-images", str(folder / name)]


def test_boxes_and_masks_are_learned_from_boxes_alone(tmp_path):
    """Runs with seeds 0 and 1 reached 84.0 and 83.9 mask AP. A filled box has an IoU of one half
    with its diamond, so filled boxes, the masks before any are learned, have an AP of 10 at most.
    """
    files = write_diamonds(tmp_path, "train", 1, 400, masks=False)
    files += write_diamonds(tmp_path, "val", 2, 60, masks=True)
    words = """--mode boxteacher --steps 350 --batch-size 4 --warmup-steps 20
        --weak-warmup-steps 150 --ema-momentum 0.95 --tower-convs 2 --mask-branch-convs 2
        --mask-branch-channels 64 --max-mask-locations 8""".split()
    ended = train(*options_for(96), *files, *words, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    tables = metrics(tmp_path / "out")[-1]["evaluation"]
    assert tables["bbox"]["AP"] > 60
    assert tables["segm"]["AP"] > 25
    assert tables["segm"]["AP50"] > 70
