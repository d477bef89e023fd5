"""Checkpoints survive a kill at any moment, refuse what is not theirs, and load all or nothing."""

import contextlib
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from boxteacher import checkpoint
from boxteacher.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from boxteacher.files import WriteError

ROOT = Path(__file__).parents[1]


def small_model() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# --- save and load ------------------------------------------------------------


def test_round_trip(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = {
        "step": 7,
        "student": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": {"lr": 0.1, "sizes": (1, 2), "out": "", "resume": False, "none": None},
    }
    save_checkpoint(tmp_path / "new" / "last.pt", state)
    loaded = load_checkpoint(tmp_path / "new" / "last.pt")
    assert loaded.keys() == state.keys()
    assert loaded["config"] == state["config"]
    assert loaded["step"] == 7
    for name, value in model.state_dict().items():
        assert torch.equal(loaded["student"][name], value)
    optimizer.load_state_dict(loaded["optimizer"])
    assert os.listdir(tmp_path / "new") == ["last.pt"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})

    def disk_full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(WriteError, match=r"cannot write .*last.pt: No space left on device; all"):
        save_checkpoint(tmp_path / "last.pt", {"step": 2})
    assert load_checkpoint(tmp_path / "last.pt") == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_data_reach_the_disk_before_the_name_and_the_name_before_return(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace

    def watch_fsync(descriptor):
        size = os.fstat(descriptor).st_size
        kind = "directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append((f"fsync {kind}", size > 0))
        fsync(descriptor)

    def watch_rename(source, target):
        events.append(("rename", os.path.getsize(source) > 0))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_rename)
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    assert [name for name, _ in events] == ["fsync file", "rename", "fsync directory"]
    assert all(has_content for _, has_content in events[:2])


KILLS = """
import os, random, signal, sys, time
import torch
from boxteacher.checkpoint import load_checkpoint, save_checkpoint

path, mode = sys.argv[1:]
torch.set_num_threads(1)

def state(step):
    return {"step": step, "w": torch.full((100_000,), step)}

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half_written(state, file):
    file.write(b"PK" * 1000)
    file.flush()
    die()

def killed_child(work, seconds):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

def save_without_pause():
    for step in range(1, 1_000_000):
        save_checkpoint(path, state(step))

def save_once():
    setattr(*victim)
    save_checkpoint(path, state(2))

if mode == "random":
    save_checkpoint(path, state(0))
    steps, longest = [0], 0.04
    while len(steps) < 30 or max(steps) < 2:
        killed_child(save_without_pause, random.uniform(0.001, longest))
        longest *= 1.1 if max(steps) < 2 else 1  # a slow disk
        found = load_checkpoint(path)
        assert torch.all(found["w"] == found["step"])
        steps.append(found["step"])
else:
    for victim in ((torch, "save", half_written), (os, "fsync", die), (os, "replace", die)):
        save_checkpoint(path, state(1))
        killed_child(save_once, None)
        assert load_checkpoint(path)["step"] == 1
    save_checkpoint(path, state(3))
    assert load_checkpoint(path)["step"] == 3
assert len(os.listdir(os.path.dirname(path))) <= 2  # last.pt, and at most one unfinished file
"""


@pytest.mark.parametrize("mode", ["random", "chosen"])
def test_a_killed_process_never_leaves_a_broken_checkpoint(tmp_path, mode):
    """SIGKILL at random moments of saving without pause; and within each part of one save."""
    command = [sys.executable, "-c", KILLS, str(tmp_path / "last.pt"), mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- what is refused ----------------------------------------------------------


def test_missing_file(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "none.pt")
    assert "no such checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path, share):
    save_checkpoint(tmp_path / "last.pt", {"w": torch.randn(1000)})
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
    assert "cut short" in refusal(tmp_path / "cut.pt")


def test_foreign_files(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    assert "not a checkpoint of this program" in refusal(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "damaged or foreign" in refusal(tmp_path / "zip.pt")
    torch.save(small_model().state_dict(), tmp_path / "weights.pt")
    assert "not a checkpoint of this program" in refusal(tmp_path / "weights.pt")
    torch.save([1], tmp_path / "list.pt")
    assert "holds a list, not a dict of weights" in refusal(tmp_path / "list.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_refused_or_still_a_dict(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"step": 1, "w": torch.zeros(10), "c": {"s": (1, 2)}})
    whole, path = (tmp_path / "last.pt").read_bytes(), tmp_path / "damaged.pt"
    for seed in range(300):
        place = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[place.randrange(len(whole))] = place.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            assert isinstance(load_checkpoint(path), dict)


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "x": _Evil()}, tmp_path / "evil.pt")
    assert "more than tensors" in refusal(tmp_path / "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(_Evil()))
    assert "not a checkpoint of this program" in refusal(tmp_path / "pickle.pt")
    assert not (tmp_path / "evil").exists()


# --- weights ------------------------------------------------------------------


def test_weights_are_copied():
    source, target = small_model(), small_model()
    load_weights(target, source.state_dict(), "source")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
        assert value.data_ptr() != target.state_dict()[name].data_ptr()


def test_weights_that_do_not_fit_are_listed_by_name_and_change_nothing():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: value + 1 for name, value in before.items()}
    del weights["norm.running_mean"], weights["conv.bias"]
    weights["extra.a"] = weights["extra.b"] = torch.zeros(1)
    weights["conv.weight"] = torch.zeros(4, 3, 1, 1)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, "other.pt")
    message = str(caught.value)
    assert message.startswith("other.pt: ")
    assert "2 missing: conv.bias, norm.running_mean" in message
    assert "2 unused: extra.a, extra.b" in message
    assert "1 mis-shaped: conv.weight [4, 3, 1, 1] for [4, 3, 3, 3]" in message
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
