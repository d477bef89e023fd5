"""What may go wrong with a run and its files, injected: docs/reliability.md lists the promises.

Where a process is the subject it is a real one, and so are the signals.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from fuzz import checkpoint_of, same
from test_train import (
    FILES,
    TINY,
    TRAIN,
    assert_close,
    assert_error,
    metrics,
    start,
    steps_of,
    train,
)

from boxteacher import run_folder
from boxteacher.checkpoint import (
    FORMAT,
    CheckpointError,
    load_checkpoint,
    load_weights,
    read_file,
    save_checkpoint,
)
from boxteacher.command_line import parse
from boxteacher.config import CHOICES, FIELDS, MEANING, Config, changes_on_resume
from boxteacher.data import Classes, CocoDataset, check_batch_norm, make_train_set
from boxteacher.errors import Stopped, UserError
from boxteacher.files import check_writable, whole_file, write_text
from boxteacher.model import build_model
from boxteacher.published import load_initial_weights
from boxteacher.reporting import RunLog, read_lines
from boxteacher.transforms import Geometry

ROOT = Path(__file__).parents[1]
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


@contextlib.contextmanager
def full_disk(free: int):
    """No file may grow beyond `free` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def wait_until(is_true, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not is_true():
        if process.poll() is not None:
            pytest.fail("it has ended: " + "\n".join(process.communicate()))
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines_in(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


# --- checkpoints: damage --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> tuple[bytes, dict]:
    path = tmp_path_factory.mktemp("intact") / "last.pt"
    state = checkpoint_of(seed=0)
    save_checkpoint(path, state)
    return path.read_bytes(), state


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("seed", range(40))
def test_a_changed_byte_is_noticed_or_changes_nothing(intact, tmp_path, seed):
    content, state = intact
    rng, path, damaged = random.Random(seed), tmp_path / "last.pt", bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 20])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    found, message = None, ""
    try:
        found = load_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
    if found is not None:
        assert same(found, state)
    else:
        assert str(path) in message
        assert "\n" not in message


def test_a_changed_weight_is_named_as_damage(intact, tmp_path):
    content, state = intact
    place = content.index(state["student"]["a.weight"].numpy().tobytes())
    path, damaged = tmp_path / "last.pt", bytearray(content)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    assert "damaged: " in refusal(load_checkpoint, path)
    path.rename(tmp_path / "other.pth")  # and where it is not one of ours
    assert "damaged: " in refusal(read_file, tmp_path / "other.pth")


WRONG = [
    *(("config", value) for value in ([], None, 5)),
    *(("class_names", value) for value in ("cat", [], [1], None)),
    *(("category_ids", value) for value in ([1, "2"], 3, [True], [1])),
    *(("step", value) for value in (-1, "7", 1.0, True, None)),
    *(("num_images", value) for value in ("5", None)),
    *(("student", value) for value in ([], None, {"a": 1}, {1: torch.ones(1)})),
    ("student", {"a.weight": torch.ones(2, 2).to_sparse()}),
    ("student", {"a.weight": torch.ones(2, 2, device="meta")}),
    *(("teacher", value) for value in (0, "a", {"a": None})),
    *(("optimizer", value) for value in (1, [1])),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_entry_of_the_wrong_type_is_named(tmp_path, name, value):
    path = tmp_path / "last.pt"
    torch.save({**checkpoint_of(seed=0), "format": FORMAT, name: value}, path)
    assert f"entry {name!r}" in refusal(load_checkpoint, path)


@pytest.mark.parametrize("name", ["config", "class_names", "student", "teacher"])
def test_a_missing_entry_is_named(tmp_path, name):
    state = checkpoint_of(seed=0)
    del state[name]
    save_checkpoint(tmp_path / "last.pt", state)
    message = refusal(lambda: [load_checkpoint(tmp_path / "last.pt")[n] for n in [name]])
    assert f"has no entry {name!r}" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = torch.nn.Linear(2, 2)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    poisoned = {**before, "bias": torch.tensor([0, value])}
    assert "1 of 2 weights are not finite" in (text := refusal(load_weights, model, poisoned, "x"))
    assert "bias" in text
    assert_close(model.state_dict(), before, rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.pkl"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_message_advises_to_switch_safety_off(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(pickle.dumps({"x": Evil()}, protocol))
    message = refusal(read_file, name)
    assert not Path("evil").exists()
    for advice in ("weights_only", "trust", "safe_globals", "arbitrary code"):
        assert advice not in message


@pytest.mark.parametrize("path", ["n" * 300 + ".pt", "d/" * 3000 + "a.pt", "a\0.pt", ".", "fifo"])
def test_a_path_that_is_no_file_is_said_in_one_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    assert "no such checkpoint file" in refusal(load_checkpoint, path)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 50_000_000)
    assert "compressed" in refusal(load_checkpoint, tmp_path / "bomb.pt")


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [0, 10, 1000, 5000, 20_000])
def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path, free):
    path, state = tmp_path / "last.pt", {"step": 1, "w": torch.zeros(100)}
    save_checkpoint(path, state)
    with full_disk(free):
        message = refusal(save_checkpoint, path, {"step": 2, "w": torch.zeros(100_000)})
    assert f"cannot write {path}: File too large" in message
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize(
    "name", ["n" * 300, "file/a.pt", "folder", "/proc/none/a.pt", "/dev/null/a.pt", "loop/a.pt"]
)
def test_a_path_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder/inside").mkdir(parents=True)
    os.symlink("loop", "loop")
    assert f"cannot write {name}" in refusal(write_text, name, "text")
    assert f"cannot write {name}" in refusal(save_checkpoint, name, {"step": 1})
    assert f"cannot write {name}" in refusal(check_writable, Path(name))
    assert sorted(os.listdir()) == ["file", "folder", "loop"]


def test_two_processes_that_write_one_file_do_not_mix(tmp_path):
    path = tmp_path / "results.json"
    child = f"from boxteacher.files import *; check_writable(Path({str(path)!r})); "
    child += f"write_text({str(path)!r}, 'b' * 100)"
    with whole_file(path, shared=True) as file:
        file.write(b"a" * 10)
        subprocess.run([sys.executable, "-c", child], cwd=ROOT, check=True)
        assert path.read_bytes() == b"b" * 100
        file.write(b"a" * 10)
    assert path.read_bytes() == b"a" * 20
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_interrupted_while_it_is_written_leaves_the_old(tmp_path):
    write_text(tmp_path / "a", "old")
    with contextlib.suppress(KeyboardInterrupt), whole_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_signal_inside_of_torchs_writer_stays_a_signal(tmp_path):
    """torch.save makes a RuntimeError of it."""

    class Interrupted(io.BytesIO):
        writes = 0

        def write(self, part: bytes) -> int:
            self.writes += 1
            if self.writes == 2:
                raise Stopped("saved")
            return super().write(part)

    with pytest.raises(RuntimeError):
        torch.save({"weights": torch.zeros(9)}, Interrupted())
    with pytest.raises(Stopped), whole_file(tmp_path / "a"):
        torch.save({"weights": torch.zeros(9)}, Interrupted())
    assert os.listdir(tmp_path) == []


def test_an_error_while_another_is_handled_is_told_itself(tmp_path):
    """A run that has diverged saves its weights. They may fail to be saved."""

    def save_what_diverged() -> None:
        try:
            raise UserError("diverged")
        except UserError:
            with whole_file(tmp_path / "a"):
                raise RuntimeError("CUDA error")  # noqa: B904

    with pytest.raises(RuntimeError, match="CUDA"):
        save_what_diverged()


def test_links_are_followed_and_what_is_no_file_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    write_text("folder/old", "old")
    os.symlink("folder/old", "link")
    write_text("link", "new")
    assert (os.readlink("link"), Path("folder/old").read_text()) == ("folder/old", "new")
    os.mkfifo("pipe")
    assert "cannot write pipe: it is no regular file" in refusal(write_text, "pipe", "text")
    assert sorted(os.listdir()) == ["folder", "link", "pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_below_the_output_of_a_program_is_one_line():
    code = "from boxteacher import errors; errors.run(lambda: print('text', flush=True))"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr.startswith("error: standard output: No space left on device\n")
    assert "Traceback" not in done.stderr


def test_a_disk_that_gets_full_in_training_ends_it_in_one_line(tmp_path):
    with full_disk(30_000):
        ended = train(*TINY, "--out", tmp_path / "out")
    assert_error(ended, "cannot write", tmp_path / "out/last.pt", "File too large")
    assert [m["step"] for m in metrics(tmp_path / "out")] == [1, 2]
    assert train(*TINY, "--steps", 1, "--out", tmp_path / "out").code == 0  # nothing in the way


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    ended = train(*TINY, "--eval-every", 1, "--out", folder)
    assert ended.code == 0, ended.err
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def evaluate(monkeypatch, *words) -> tuple[str, str]:
    """evaluate.py in this process: (what it prints, its error)."""
    monkeypatch.setattr("test_train.TRAIN", str(ROOT / "evaluate.py"))
    ended = train(*words)
    return ended.out, ended.err


def test_the_table_is_printed_if_the_results_cannot_be_written(finished, monkeypatch, tmp_path):
    with full_disk(1):  # the untrained network finds nothing: []
        out, err = evaluate(monkeypatch, "--checkpoint", finished / "last.pt", "--out", tmp_path)
    assert "box" in out
    assert err.splitlines()[-1].startswith("error: cannot write")
    assert os.listdir(tmp_path) == []


def test_evaluation_checks_that_it_can_write_before_it_predicts(finished, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("boxteacher.model.CondInst.predict", None)  # is never called
    where = ("--out", tmp_path / "file/results")
    out, err = evaluate(monkeypatch, "--checkpoint", finished / "last.pt", *where)
    assert out == ""
    assert err.splitlines()[-1].startswith("error: cannot write")


# --- metrics.jsonl --------------------------------------------------------------------------------

GOOD = b'{"step": 1, "loss": 2.5}\n{"step": 2, "evaluation": {"bbox": {"AP": 12.5}}}\n'


@pytest.mark.parametrize(
    "tail",
    [
        *(
            b"",
            b"\n",
            b"{",
            b'{"step": 3, "lo',
            b'{"step": 3, "loss": 1',
            b'{"step"',
            b"\xff\xfe\n",
        ),
        *(b"\0" * 100, b"[]\n", b"1\n", b"null\n", b'{"step": "a"}\n', b'{"step": true}\n'),
        *(b'{"loss": 1}\n', b"[" * 100_000, b'{"step": 3}\n{"step": 9}\n', b'{"step": NaN}\n'),
    ],
)
def test_what_is_no_line_of_metrics_is_left_out(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + tail)
    log = RunLog(path, Config(steps=10), start=2)
    log.close()
    assert path.read_bytes() == GOOD
    assert (log.evaluated, log.best_ap) == (2, -1)  # there is no best.pt
    (tmp_path / "best.pt").touch()
    log = RunLog(path, Config(steps=10), start=2)
    log.close()
    assert (log.evaluated, log.best_ap) == (2, 12.5)


def test_a_line_that_a_full_disk_cuts_is_an_error_and_the_next_run_forgives_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path, Config(steps=10), start=0)
    losses = {"loss": torch.ones(())}
    log.step(1, 0.1, losses, {})
    with full_disk(path.stat().st_size + 20):
        assert f"cannot write {path}" in refusal(log.step, 2, 0.1, losses, {})
    assert path.read_text().count("step") == 2  # a part of the second line
    log.close()
    RunLog(path, Config(steps=10), start=2).close()
    assert [line["step"] for line in read_lines(path)] == [1]


# --- going on: settings and data ------------------------------------------------------------------


def another(field: str, value):
    kind = FIELDS[field]
    if kind in (int, float):
        return value + 1
    if kind is bool:
        return not value
    return {str: "other", tuple: (1, 2)}.get(type(value), "other")


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_field_is_refused_said_or_only_a_choice(field):
    before = Config()
    now = dataclasses.replace(before, **{field: another(field, getattr(before, field))})
    if field in MEANING:
        assert f"{field} was " in refusal(changes_on_resume, before, now)
    elif field in CHOICES:
        assert changes_on_resume(before, now) == []
    else:
        (line,) = changes_on_resume(before, now)
        assert line.startswith(f"resume: {field} was ")
        assert ", now " in line


def test_all_that_makes_it_another_run_is_named_at_once(finished):
    words = ["--batch-size", 2, "--seed", 3, "--accumulate", 2, "--mode", "boxinst"]
    before = (finished / "config.json").read_bytes()
    ended = train("--resume", "--out", finished, *words)
    assert_error(ended, *("batch_size was 4, now 2", "seed was 0", "accumulate was 1", "mode was"))
    assert (finished / "config.json").read_bytes() == before


def test_another_number_of_images_is_another_run(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "out")
    state = load_checkpoint(folder / "last.pt")
    save_checkpoint(folder / "last.pt", {**state, "num_images": 99})
    assert_error(train("--resume", "--out", folder), "trained on 99 images", "--init")


def test_weights_alone_are_not_resumed(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "out")
    state = load_checkpoint(folder / "last.pt")
    save_checkpoint(folder / "last.pt", {**state, "optimizer": None})
    assert_error(train("--resume", "--out", folder), "no optimizer", "--init")


def test_resume_needs_nothing_but_the_folder_and_says_what_changes(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "out")
    ended = train("--resume", "--out", folder, "--steps", 3, "--weight-decay", 0.5, "--workers", 1)
    assert ended.code == 0, ended.err
    notes = [line for line in ended.err.splitlines() if line.startswith("note: ")]
    for line in ("steps was 2, now 3", "weight_decay was 0.0001, now 0.5"):
        assert f"note: resume: {line}" in notes
    config = json.loads((folder / "config.json").read_text())
    assert (config["steps"], config["workers"], config["resume"]) == (3, 1, False)
    assert config["mode"] == "boxteacher"
    assert [m["step"] for m in metrics(folder)] == [1, 1, 2, 2, 3, 3]
    checkpoint = load_checkpoint(folder / "last.pt")
    assert checkpoint["step"] == 3
    assert checkpoint["config"]["weight_decay"] == 0.5
    assert checkpoint["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_resuming_a_finished_run_does_what_is_left(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "out")
    lines = (folder / "metrics.jsonl").read_bytes()
    (folder / "contact_sheet.png").unlink()
    ended = train("--resume", "--out", folder)
    assert ended.code == 0, ended.err
    assert "mask AP" in ended.out
    assert {path.name for path in folder.iterdir()} == FILES | {"best.pt"}
    assert (folder / "metrics.jsonl").read_bytes() == lines  # it had been evaluated
    ended = train("--resume", "--out", folder, "--metric", "voc")
    assert ended.code == 0, ended.err
    assert "since it was resumed" in ended.out
    assert json.loads((folder / "tables.json").read_text())["metric"] == "voc"
    assert [line["metric"] for line in metrics(folder)[-2:]] == ["coco", "voc"]
    ended = train("--resume", "--out", folder, "--shapes-val", 4)
    assert ended.code == 0, ended.err
    assert [line["shapes_val"] for line in metrics(folder)[-2:]] == [3, 4]  # evaluated anew
    ended = train("--resume", "--out", folder, "--steps", 1)
    assert ended.err.splitlines()[-1].startswith("error: resume: ")
    assert "has 2 steps already" in ended.err


def test_an_evaluation_that_was_cut_off_is_made_again(finished, tmp_path):
    """The run was killed while it evaluated its last step."""
    folder = copy_of(finished, tmp_path / "out")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30])
    expected = (folder / "results.json").read_bytes()
    (folder / "results.json").unlink()
    ended = train("--resume", "--out", folder)
    assert ended.code == 0, ended.err
    found = metrics(folder)
    assert found[-1]["evaluation"] == json.loads(lines[-1])["evaluation"]
    assert (folder / "results.json").read_bytes() == expected


@pytest.mark.parametrize("counter", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_command_that_is_started_again_goes_on_by_itself(tmp_path, monkeypatch, counter):
    monkeypatch.chdir(tmp_path)
    assert run_folder.resume_after_restart(cfg := parse([*TINY])) == cfg
    monkeypatch.setenv(counter, "1")
    fresh = run_folder.resume_after_restart(parse([*TINY, "--out", "new"]))
    assert (fresh.out, fresh.resume) == ("new", False)
    for name in ("runs/shapes", "runs/shapes_2"):
        save_checkpoint(Path(name) / "last.pt", {"step": 1})
    again = run_folder.resume_after_restart(parse([*TINY]))
    assert (again.out, again.resume) == ("runs/shapes_2", True)
    assert run_folder.resume_after_restart(parse([*TINY, "--out", "runs/shapes"])).resume
    monkeypatch.setenv(counter, "0")
    assert run_folder.resume_after_restart(cfg) == cfg


@pytest.mark.parametrize("path", ["n" * 300, "d/" * 3000, "file", "file/in"])
@pytest.mark.parametrize("words", [[], ["--resume"]])
def test_a_run_folder_that_cannot_be_is_said_in_one_line(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    ended = train(*TINY, "--out", path, *words)
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.err


def test_a_run_that_never_began_leaves_nothing(tmp_path):
    for words in (["--init", tmp_path / "none.pt"], ["--backbone-weights", tmp_path / "none.pth"]):
        assert_error(train(*TINY, *words, "--out", tmp_path / "out"), "no such checkpoint")
        assert not (tmp_path / "out").exists()


def test_two_runs_never_get_the_same_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(run_folder.claim(parse(TINY), None)) for _ in range(3)]
    assert names == ["runs/shapes", "runs/shapes_2", "runs/shapes_3"]


def test_a_run_that_another_has_written_to_meanwhile_is_not_claimed(tmp_path):
    """While this one read its data, the other one finished, and its lock is gone."""
    path = tmp_path / "last.pt"
    cfg = parse([*TINY, "--out", str(tmp_path)])
    assert run_folder.claim(cfg, None) == tmp_path
    save_checkpoint(path, {"step": 1})
    assert "start again" in refusal(run_folder.claim, cfg, None)
    checkpoint = load_checkpoint(path)
    assert run_folder.claim(cfg, checkpoint) == tmp_path
    save_checkpoint(path, {"step": 2})
    os.utime(path, ns=(0, checkpoint.written + 1))
    assert "start again" in refusal(run_folder.claim, cfg, checkpoint)


def test_a_folder_of_runs_that_is_a_dead_link_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("disk that is not mounted")
    assert "cannot write runs" in refusal(run_folder.claim, parse(TINY), None)


# --- classes --------------------------------------------------------------------------------------


def dataset_with(
    categories: list[tuple[int, str]], names: list[str], ids: list[int]
) -> CocoDataset:
    """One image, and a box of each category, for a model with the classes `names` and `ids`."""
    coco = {
        "images": [{"id": 1, "file_name": "a", "width": 9, "height": 9}],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": i, "bbox": [n, 0, 1, 1]}
            for n, (i, _) in enumerate(categories)
        ],
    }
    known = Classes(names, ids, "last.pt")
    return CocoDataset(coco, None, Geometry((9,), 9), train=False, classes=known)


@pytest.mark.parametrize(
    "categories",
    [
        [(1, "cat"), (2, "dog"), (3, "emu")],  # as trained
        [(0, "cat"), (1, "dog"), (2, "emu")],  # counted from 0
        [(9, "emu"), (70, "cat"), (71, "dog")],
    ],
)
def test_classes_are_the_same_by_name_whatever_their_ids(categories):
    dataset = dataset_with(categories, ["cat", "dog", "emu"], [1, 2, 3])
    names = [dataset.class_names[label] for label in dataset.labels[0]]
    assert names == [name for _, name in categories]
    ids = [dataset.category_ids[label] for label in dataset.labels[0]]
    assert ids == [i for i, _ in categories]
    assert bool(dataset.notes) == (dataset.category_ids != [1, 2, 3])


def test_a_class_that_is_missing_here_or_there_is_named():
    message = refusal(dataset_with, [(1, "cat"), (2, "ox")], ["cat", "dog"], [1, 2])
    assert "data: other classes than last.pt: it has 'ox' and lacks 'dog'" in message


@pytest.mark.parametrize("ids", [(2, 1, 3), (2, 3, 1)])
def test_the_same_ids_with_other_names_are_refused(ids):
    """One of the two files must be wrong, and nobody knows which."""
    names = ["cat", "dog", "emu"]
    message = refusal(dataset_with, [*zip(ids, names, strict=True)], names, [1, 2, 3])
    assert f"data: category id 1 is {names[ids.index(1)]!r}, but in last.pt it is 'cat'" in message


def test_classes_that_have_no_names_are_known_by_the_order_of_their_ids():
    """As in published files."""
    assert dataset_with([(1, "cat"), (2, "ox")], ["class 1", "class 2"], [1, 2]).notes == []
    others = dataset_with([(7, "cat"), (9, "ox")], ["class 1", "class 2"], [1, 2])
    assert others.category_ids == [7, 9]
    assert others.notes[0].endswith("matched in the order of their ids")
    message = refusal(dataset_with, [(1, "cat")], ["class 1", "class 2"], [1, 2])
    assert "lacks 'class 1', 'class 2'" in message


CLASSES = ["star", "ring", "crescent"]


@pytest.mark.parametrize(
    ("wanted", "of", "parts"),
    [
        (["star", "ring", "crescent"], [0, 1, 2], []),
        (["crescent", "star", "ring"], [2, 0, 1], ["3 carried over"]),
        (["ring", "ox"], [1, None], ["1 carried over by name ('ring')", "1 new ('ox')", "2 not"]),
        (["ox"], [None], ["1 new ('ox')", "3 not used ('star', 'ring', 'crescent')"]),
        (["a", "b", "c"], [None] * 3, ["3 new"]),
        ([*CLASSES, *map(str, range(20))], [0, 1, 2] + [None] * 20, ["20 new ('0', '1', '2'"]),
    ],
)
def test_fine_tuning_carries_classes_over_by_name(tmp_path, wanted, of, parts):
    cfg = parse([*TINY, "--mode", "boxinst", "--init", str(tmp_path / "a.pt")])
    old, model = build_model(cfg, len(CLASSES)), build_model(cfg, len(wanted))
    state = {"config": dataclasses.asdict(cfg), "class_names": CLASSES, "teacher": None}
    save_checkpoint(tmp_path / "a.pt", {**state, "student": old.state_dict()})
    fresh = [part.clone() for part in model.head.class_logits.parameters()]
    notes = load_initial_weights(model, cfg, wanted)
    assert all(part in notes[0] for part in parts)
    assert bool(notes) == bool(parts)
    for layer, mine in zip(("weight", "bias"), fresh, strict=True):
        source, target = (getattr(m.head.class_logits, layer) for m in (old, model))
        for row, known in enumerate(of):
            assert torch.equal(target[row], mine[row] if known is None else source[known])
    others = {n: w for n, w in old.state_dict().items() if "class_logits" not in n}
    found = {n: w for n, w in model.state_dict().items() if n in others}
    assert_close(found, others, rtol=0, atol=0)


def test_without_names_the_number_of_classes_must_fit(tmp_path):
    cfg = parse([*TINY, "--mode", "boxinst", "--init", str(tmp_path / "a.pt")])
    state = {"student": build_model(cfg, 3).state_dict(), "teacher": None}
    save_checkpoint(tmp_path / "a.pt", state)
    message = refusal(load_initial_weights, build_model(cfg, 2), cfg, ["a", "b"])
    assert "class_logits.bias [3] for [2]" in message


# --- batch norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        ("--batch-size 1 --train-sizes 32", True),
        ("--batch-size 4 --accumulate 4 --train-sizes 32", True),
        ("--batch-size 1 --train-sizes 28,64", True),
        ("--batch-size 1 --train-sizes 64 --crop 32", True),
        ("--batch-size 1 --train-scales 0.5", True),
        ("--batch-size 1 --train-sizes 33", False),
        ("--batch-size 2 --train-sizes 32", False),
        ("--batch-size 1 --train-sizes 32 --norm gn --mask-norm gn", False),
        ("--batch-size 1 --train-sizes 32 --norm gn --mask-norm bn", True),
    ],
)
def test_batch_norm_of_one_value_is_refused_at_the_start(words, is_refused):
    cfg = parse([*TINY, "--norm", "bn", "--mask-norm", "bn", *words.split()])
    train_set = make_train_set(cfg)
    if is_refused:
        message = refusal(check_batch_norm, train_set, cfg, 1)
        assert "--mask-norm gn" in message
        assert ("--norm gn" in message.replace("--mask-norm gn", "")) == (cfg.norm == "bn")
    else:
        check_batch_norm(train_set, cfg, 1)


# --- signals, kills, locks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    ended = train(*LONG, "--steps", 12, "--out", folder)
    assert ended.code == 0, ended.err
    return folder


# SGD: AdamW divides by the size of gradients, and makes much of the last digits of small ones. So
# runs with one and with two processes would differ.
LONG = [*TINY, *"--batch-size 2 --checkpoint-every 2 --optimizer sgd --lr 0.16".split()]


def assert_same_run(found: Path, expected: Path, rel: float = 1e-4) -> None:
    lines = steps_of(expected)
    assert list(steps_of(found)) == list(lines)
    for step, line in steps_of(found).items():
        assert line == pytest.approx(lines[step], rel=rel, abs=1e-6), step
    one, two = (load_checkpoint(folder / "last.pt") for folder in (found, expected))
    for who in ("student", "teacher"):
        assert_close(one[who], two[who], rtol=rel, atol=rel / 100)


def test_a_worker_that_is_killed_ends_the_run_in_one_line(tmp_path):
    """As the kernel does if memory is short."""
    folder = tmp_path / "out"
    process = start(*LONG, "--steps", 4000, "--workers", 1, "--out", folder)
    wait_until(lambda: lines_in(folder) >= 4, process)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert re.search(r"error: DataLoader worker .*; too little memory", err.splitlines()[-1])
    assert load_checkpoint(folder / "last.pt")["step"] >= 2


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_stops_a_run_which_goes_on_exactly(whole, tmp_path, number, workers):
    """To all processes of the run, twice within a moment, as Slurm and torchrun do. And while it
    runs, a second run in its folder is refused."""
    folder = tmp_path / "out"
    words = [*LONG, "--steps", 12, "--workers", workers, "--out", folder]
    process = start(*words, start_new_session=True)
    wait_until(lambda: lines_in(folder) >= 4, process)
    if number == signal.SIGTERM:
        os.kill(process.pid, signal.SIGSTOP)
        assert_error(train("--resume", "--out", folder), "another run is writing to", folder)
        os.kill(process.pid, signal.SIGCONT)
    for _ in range(2):
        os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert "Error" not in err
    assert f"{number.name}: the run saves and stops in two steps" in err
    advice = f"train.py --resume --out {folder} continues the run"
    assert err.splitlines()[-1] == f"stopped, and everything is saved: {advice}"
    step = load_checkpoint(folder / "last.pt")["step"]
    assert lines_in(folder) == step < 12
    resumed = train("--resume", "--out", folder)
    assert resumed.code == 0, resumed.err
    assert "note: " not in resumed.err
    assert_same_run(folder, whole)


@pytest.mark.parametrize("closed", ["stdout and stderr", "stderr"])
def test_a_run_whose_reader_has_gone_away_is_saved_all_the_same(tmp_path, closed):
    """Ctrl-C ends both sides of `python train.py 2>&1 | tee log`. And `2>&-`."""
    folder, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, TRAIN, *map(str, [*LONG, "--steps", 2000, "--out", folder])]
    if closed == "stderr":
        line = f"exec {shlex.join(command)} >{log} 2>&-"
        process = subprocess.Popen(["bash", "-c", line], env=os.environ | {"OMP_NUM_THREADS": "1"})
    else:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    wait_until(lambda: lines_in(folder) >= 2, process)
    if process.stdout:
        process.stdout.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    assert load_checkpoint(folder / "last.pt")["step"] == lines_in(folder) < 2000


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_run_that_ends_while_it_evaluates_is_finished_by_resume(tmp_path, number, code):
    folder = tmp_path / "out"
    words = [*TINY, "--steps", 1, "--shapes-val", 150, "--out", folder]
    process = start(*words)
    wait_until(lambda: (folder / "last.pt").exists(), process)  # before it evaluates
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert lines_in(folder) == 1
    resumed = train("--resume", "--out", folder)
    assert resumed.code == 0, resumed.err
    names = {path.name for path in folder.iterdir()}
    assert names - {f".results.json.{process.pid}.unfinished"} == FILES
    assert "evaluation" in metrics(folder)[-1]


SIGNALED = """
import sys, time
from boxteacher import errors
from boxteacher.guard import StopSignals

def main():
    StopSignals.ONE_SIGNAL = 0.3
    with StopSignals() as signals:
        print("ready", flush=True)
        while not signals.received:
            time.sleep(0.01)
        print("noted", flush=True)
        if sys.argv[1] == "at once":
            with signals.at_once():
                time.sleep(600)
        time.sleep(600)

errors.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_a_run_at_once(number):
    command = [sys.executable, "-c", SIGNALED, "later"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):  # a burst is one signal
        process.send_signal(number)
    assert process.stdout.readline() == "noted\n"
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number


def test_nohup_stays_in_force():
    code = """
import signal
from boxteacher.guard import StopSignals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with StopSignals() as signals:
    signal.raise_signal(signal.SIGHUP)
    print(signals.received)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr


def test_a_signal_ends_at_once_what_is_saved():
    command = [sys.executable, "-c", SIGNALED, "at once"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err.splitlines()[-1].startswith("stopped, and everything is saved")


@pytest.mark.parametrize("main", ["print", "lambda: parse(['--list'])"])
def test_a_reader_that_goes_away_ends_the_program_quietly(main):
    """argparse, which prints --list, takes no notice of it, unless the text is short enough to wait
    in a buffer."""
    imports = "from boxteacher import errors; from boxteacher.command_line import parse"
    command = [sys.executable, "-c", f"{imports}; errors.run({main})"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) in ([141] if main == "print" else [0, 141])


# --- torchrun -------------------------------------------------------------------------------------


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("error: ", "Traceback"))]


def test_an_error_of_all_processes_is_said_once(tmp_path):
    words = [*TINY, "--init", tmp_path / "none.pt", "--out", tmp_path / "out"]
    process = start(*words, launcher=TORCHRUN)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
    assert not (tmp_path / "out").exists()


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def test_torchrun_restarts_a_run_after_a_kill_and_all_ranks_stop_together(whole, tmp_path):
    """A rank is killed: torchrun starts the same command again, and it goes on. Then one rank gets
    SIGTERM: all stop after the same step, and one process can go on with the run."""
    folder = tmp_path / "out"
    launcher = [*TORCHRUN, "--max-restarts=1"]
    process = start(*LONG, "--steps", 12, "--out", folder, launcher=launcher)
    wait_until(lambda: (folder / "last.pt").exists(), process)
    ranks = children_of(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    wait_until(lambda: set(children_of(process.pid)).isdisjoint(ranks), process)
    wait_until(lambda: len(children_of(process.pid)) == 2, process)
    before = load_checkpoint(folder / "last.pt")["step"]
    wait_until(lambda: load_checkpoint(folder / "last.pt")["step"] > before, process)
    os.kill(children_of(process.pid)[-1], signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    stopped = [line for line in err.splitlines() if line.startswith("stopped, and everything")]
    assert len(stopped) == 1, err
    step = load_checkpoint(folder / "last.pt")["step"]
    assert list(steps_of(folder)) == list(range(1, step + 1))
    assert before < step <= 12  # on a busy machine the signal may come after the last step
    resumed = train("--resume", "--out", folder)
    assert resumed.code == 0, resumed.err
    assert_same_run(folder, whole, rel=1e-3)
