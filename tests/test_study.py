"""study.py: its tables against numbers worked out by hand, and that it goes on where it stopped."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boxteacher.command_line import parse
from boxteacher.config import ConfigError
from boxteacher.errors import UserError
from boxteacher.presets import PRESETS
from boxteacher.tools import study, study_tables

ROOT = Path(__file__).parents[1]
TINY = """shapes --fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1
    --device cpu --norm gn --mask-norm gn --shapes-size 64 --shapes-train 4 --shapes-val 2
    --train-sizes 64 --train-max-size 64 --test-size 64 --test-max-size 64 --teacher-size 0
    --batch-size 2 --steps 2""".replace("\n", " ")

# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", range(1, 13))
def test_quantiles_are_those_of_students_t(degrees):
    """Integrates the density from 0 to the quantile."""
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    step = study_tables.T_975[degrees - 1] / 20_000
    middles = ((k + 0.5) * step for k in range(20_000))
    area = sum(step * scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2) for t in middles)
    assert 0.5 + area == pytest.approx(0.975, abs=2e-5)


def test_the_spread_of_a_few_values():
    spread = study_tables.spread([41.0, 43.0, 42.0])
    assert (spread["seeds"], spread["mean"], spread["std"]) == (3, 42, 1)
    assert spread["half_interval"] == pytest.approx(4.303 / math.sqrt(3))
    alone = study_tables.spread([5.0])
    assert alone == {"seeds": 1, "mean": 5.0, "std": None, "half_interval": None}
    assert study_tables.spread([])["mean"] is None


def result(run, **values):
    return run.identity | dict.fromkeys(study_tables.MEASURES) | values


@pytest.fixture
def pair(tmp_path):
    """Two configurations, and a function that makes their runs."""
    configurations = {c.label: c for c in [study.C("a", "shapes"), study.C("b", "shapes --lr 1")]}

    def make(label, seed):
        return study.make_run(tmp_path, configurations, label, seed)

    return configurations, make


def test_differences_are_paired_over_the_seeds_that_both_have(pair):
    """b - a is 1, 2, 0 for seeds 0, 1, 2. Only a has seed 3, only b has seed 4."""
    configurations, make = pair
    aps = {"a": {0: 40, 1: 41, 2: 42, 3: 90}, "b": {0: 41, 1: 43, 2: 42, 4: 10}}
    results = [result(make(x, seed), mask_ap=ap) for x in aps for seed, ap in aps[x].items()]
    results.append(result(make("b", 9), mask_ap=99))  # not in the table
    results.append(make("b", 3).identity | {"error": "out of memory"})
    results.append(result(make("b", 3), mask_ap=0) | {"words": "shapes --lr 2"})  # of other words
    runs = [make(label, seed) for label in "ab" for seed in range(5)]
    a, b = study_tables.tabulate(configurations, [run.identity for run in runs], results)
    assert (a["mask_ap"]["seeds"], a["mask_ap"]["mean"]) == (4, 213 / 4)
    assert b["mask_ap"]["values"] == aps["b"]
    assert (b["reference"], b["box_ap"]["seeds"], b["box_ap"]["mean"]) == ("a", 0, None)
    difference = b["mask_ap"]["difference"]
    assert (difference["seeds"], difference["mean"], difference["std"]) == (3, 1, 1)
    assert difference["half_interval"] == pytest.approx(2.484, abs=1e-3)

    lines = study_tables.markdown([a, b]).splitlines()
    assert lines[3].startswith("| b | 4 | 34.0 ± 16.0 |  | ")
    assert lines[-1].startswith("| b - a | 3 | 1.0 ± 2.5 |  | ")
    assert len({line.count("|") for line in lines if line}) == 1


# --- the studies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_study_is_made_of_command_lines_that_train_py_takes(name, tmp_path):
    configurations = {c.label: c for c in study.STUDIES[name]}
    assert len(configurations) == len(study.STUDIES[name]) > 1
    different = {(c.words, c.start_from, c.masks_from) for c in study.STUDIES[name]}
    assert len(different) == len(configurations)
    before = set()  # what a run needs comes before it
    for label, configuration in configurations.items():
        needed = {configuration.start_from, configuration.masks_from} - {""}
        assert needed <= before
        assert {configuration.reference} - {""} <= configurations.keys()
        before.add(label)
        run = study.make_run(tmp_path, configurations, label, 3)
        *_, train, given_boxes = run.commands
        cfg = parse(train[2:])
        assert Path(train[1]) == ROOT / "train.py"
        assert (cfg.seed, cfg.out) == (3, str(run.folder))
        assert given_boxes[-1] == f"--checkpoint={run.folder / 'last.pt'}"
        first = {study.make_run(tmp_path, configurations, x, 3).folder for x in needed}
        assert set(run.needs) == first
        assert Path(cfg.init).parent in first if configuration.start_from else cfg.init == ""


def test_self_training_differs_from_condinst_in_its_masks_alone(tmp_path):
    configurations = {c.label: c for c in study.STUDIES["shapes"]}
    runs = [study.make_run(tmp_path, configurations, x, 1) for x in ("self-training", "CondInst")]
    ours, theirs = (vars(parse(run.commands[-2][2:])) for run in runs)
    files = {"dataset", "train_json", "train_images", "val_json", "val_images", "out"}
    assert {field for field, value in ours.items() if value != theirs[field]} == files
    assert ours["train_json"] == str(runs[0].folder / "masks.json")


def test_a_changed_preset_makes_other_runs(tmp_path, monkeypatch):
    configurations = {c.label: c for c in study.STUDIES["nuclei"]}

    def identity() -> dict:
        run = study.make_run(tmp_path, configurations, "BoxTeacher", 0)
        return json.loads(json.dumps(run.identity))

    result = identity() | {"mask_ap": 52.0}
    assert study_tables.is_finished(identity(), [result])
    monkeypatch.setitem(PRESETS["nuclei"].changes, "train_scales", (1.5, 2.0))
    assert not study_tables.is_finished(identity(), [result])


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(study.fcntl, "flock", flock)
    study.run_all([], 1, tmp_path)


# --- runs -----------------------------------------------------------------------------------------

SCRIPT = """
import sys
from boxteacher import errors
from boxteacher.tools import study
study.STUDIES = {"tiny": [study.C(*words) for words in %r]}
FAKE = '''
import json, sys, time
folder, seed = sys.argv[1], int(sys.argv[2])
if seed == 7:
    sys.exit("error: seed 7 is unlucky")
time.sleep(0.3 if seed < 2 else 600)
evaluation = {"bbox": {"AP": 50}, "segm": {"AP": 40 + seed, "AP50": 60, "AP75": 30}}
open(folder + "/metrics.jsonl", "w").write(json.dumps({"step": 1, "evaluation": evaluation}))
given = {"all": {"masks": {"mean_iou": 0.7, "over_50": 0.9, "over_75": 0.5}}}
open(folder + "/given_boxes.json", "w").write(json.dumps(given))
'''
real = study.make_run
def make_run(*arguments):
    run = real(*arguments)
    fake = [sys.executable, "-c", FAKE, str(run.folder), str(run.identity["seed"])]
    return run._replace(commands=[fake, fake])
if sys.argv.pop(1) == "fake":
    study.make_run = make_run
errors.run(study.main)
"""
TWO = [("a", "shapes --lr 0.001"), ("b", "shapes --lr 0.002")]


def start(folder, *words, kind="fake", configurations=TWO, **options) -> subprocess.Popen:
    """The program with a study `tiny` of its own. kind "fake": its runs are no trainings."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT % configurations, kind, "tiny", *words]
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, **options)


def results_of(folder) -> list[dict]:
    path = folder / "runs/study/tiny/results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_one_run_raises_ends_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configurations = {c.label: c for c in (study.C(*words) for words in TWO)}
    folder = tmp_path / "tiny"
    folder.mkdir()

    def do(run, lock, children):
        if run.identity["label"] == "a":
            raise OSError(28, "No space left on device")
        return run.identity | {"mask_ap": 40.0}

    monkeypatch.setattr(study, "do", do)
    runs = [study.make_run(folder, configurations, label, 0) for label in "ab"]
    with pytest.raises(UserError, match="1 runs failed"):
        study.run_all(runs, 1, folder)
    first, second = study.read_results(folder)
    assert "No space left" in first["error"]
    assert second["mask_ap"] == 40.0


def test_a_killed_study_goes_on_where_it_stopped(tmp_path):
    """The runs of seed 2 would take ten minutes. The study is killed while they run."""
    killed = start(tmp_path, "--seeds", "0-2", "--jobs", "2")
    marks = [tmp_path / f"runs/study/tiny/{label}/seed_2/log.txt" for label in "ab"]
    deadline = time.monotonic() + 120
    while not all(mark.exists() for mark in marks) and time.monotonic() < deadline:
        time.sleep(0.05)
    refused = start(tmp_path, "--seeds", "5").communicate(timeout=120)
    killed.send_signal(signal.SIGTERM)
    out, err = killed.communicate(timeout=60)
    assert killed.returncode == 130
    assert err == "interrupted\n"
    assert "4 of 6, " in out
    assert " min left: " in out
    assert "going on already" in refused[1]
    first = results_of(tmp_path)
    pairs = [(r["label"], r["seed"]) for r in first]
    assert sorted(pairs) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    # The children have ended, or the lock would be held.
    again = start(tmp_path, "--seeds", "0,1,7", "--only", "b")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 1
    assert "error: 1 runs failed" in err
    assert out.startswith("1 of 1, 0 min left: ")
    *same, failed = results_of(tmp_path)
    assert same == first
    assert (failed["label"], failed["seed"]) == ("b", 7)
    assert failed["error"] == "error: seed 7 is unlucky"
    table = json.loads((tmp_path / "runs/study/tiny/table_seeds_0,1,7.json").read_text())
    assert table[0]["mask_ap"]["values"] == {"0": 40, "1": 41}
    assert table[1]["mask_ap"]["difference"]["mean"] == 0
    assert (tmp_path / "runs/study/tiny/table_seeds_0,1,7.md").read_text().count("\n") == 9

    start(tmp_path, "--seeds", "7,7", "--only", "b").communicate(timeout=120)  # tried again, once
    assert [r["seed"] for r in results_of(tmp_path)[-2:]] == [7, 7]
    changed = [TWO[0], ("b", "shapes --lr 0.003")]
    start(tmp_path, "--seeds", "0-1", configurations=changed).communicate(timeout=120)
    assert [r["words"] for r in results_of(tmp_path)[-2:]] == ["shapes --lr 0.003"] * 2
    assert len(results_of(tmp_path)) == 8


def test_self_training_starts_from_the_studys_own_boxinst_and_its_masks(tmp_path):
    """Real runs of two steps. --only brings along the run that is needed."""
    configurations = [
        ("CondInst", f"{TINY} --mode condinst"),
        ("BoxInst", f"{TINY} --mode boxinst"),
        ("self", f"{TINY} --mode condinst --mask-channels 16", "BoxInst", "BoxInst"),
    ]
    process = start(
        tmp_path, "--seeds", "0", "--only", "self", kind="real", configurations=configurations
    )
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, (out, err)
    boxinst, self_training = results_of(tmp_path)
    assert (boxinst["label"], self_training["label"]) == ("BoxInst", "self")
    first = boxinst["words"]
    words = f"{TINY} --mode condinst --mask-channels 16 | start from: {first} | masks from: {first}"
    assert self_training["words"] == words
    for line in (boxinst, self_training):
        assert study_tables.MEASURES.keys() <= line.keys()
        assert 0 <= line["mask_ap"] <= line["mask_ap50"] <= 100
        assert 0 < line["mean_iou"] < 1
        assert 0 < line["minutes"] < 5
    folder = tmp_path / "runs/study/tiny/self/seed_0"
    assert {path.name for path in folder.iterdir()} >= {"masks.json", "last.pt", "log.txt"}
    assert not (folder / "files").exists()  # they are as large as the data set
    cfg = json.loads((folder / "config.json").read_text())
    assert (cfg["mode"], Path(cfg["train_json"]).name) == ("condinst", "masks.json")
    assert Path(cfg["init"]) == Path("runs/study/tiny/BoxInst/seed_0/last.pt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["shapes", "--only", "none"],
            "only: 'none' is not one of 'BoxInst, first part', 'BoxInst'",
        ),
        (["shapes", "--seeds", "one"], "seeds: give 0-4 or 0,1,2 and the like, not one"),
        (["shapes", "--seeds", "5-3"], "seeds: give 0-4 or 0,1,2 and the like, not 5-3"),
    ],
)
def test_errors_are_one_line(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["study.py", *words])
    with pytest.raises(ConfigError, match=message):
        study.main()
