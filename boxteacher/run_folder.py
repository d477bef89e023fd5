"""The folder of a run: its name, its lock (one run alone writes to it), and resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from .checkpoint import Checkpoint, load_checkpoint, when_written
from .config import Config, ConfigError, changes_on_resume, from_dict
from .data import Classes, CocoDataset
from .files import WriteError
from .reporting import say_notes


def name_of(cfg: Config) -> Path:
    return Path(cfg.out or f"runs/{cfg.preset}")


def later_names(out: Path) -> Iterator[Path]:
    return (Path(f"{out}_{number}") for number in itertools.count(2))


def read_run(folder: str) -> Config:
    """The configuration of the run in `folder`, to go on with it."""
    path = Path(folder) / "last.pt"
    if not os.path.isfile(path):
        raise ConfigError(f"resume: {folder} holds no last.pt to go on from; say --out FOLDER")
    return from_dict(load_checkpoint(path)["config"], str(path))


def load_last(cfg: Config) -> tuple[Checkpoint, Classes]:
    """The checkpoint to go on from, and its classes: the order of the run's labels. Raises
    ConfigError if the settings make another run."""
    checkpoint = load_checkpoint(name_of(cfg) / "last.pt")
    changes_on_resume(from_dict(checkpoint["config"], str(checkpoint.path)), cfg)
    names, ids = checkpoint["class_names"], checkpoint["category_ids"]
    return checkpoint, Classes(names, ids, str(checkpoint.path))


def check_resume(cfg: Config, checkpoint: Checkpoint, train_set: CocoDataset) -> None:
    """Say what has changed since the checkpoint, now that the data are known. Raises ConfigError if
    they are others, or if the run is longer already."""
    path, step = checkpoint.path, checkpoint["step"]
    say_notes(changes_on_resume(from_dict(checkpoint["config"], str(path)), cfg), "note")
    if step > cfg.steps:
        raise ConfigError(f"resume: {path} has {step} steps already; give --steps {step} or more")
    num_images = checkpoint.get("num_images", len(train_set))
    if num_images != len(train_set):
        raise ConfigError(
            f"resume: {path} was trained on {num_images} images with boxes, {train_set.name} has"
            f" {len(train_set)}; for a new run that starts from its weights give --init {path}"
        )


def resume_after_restart(cfg: Config) -> Config:
    """torchrun (--max-restarts) and Slurm (requeue) start the same command once more. Then it goes
    on with its run, if that has saved anything. Without --out that is the last name taken.
    """
    counters = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    if all(os.environ.get(name, "0") in ("", "0") for name in counters):
        return cfg
    out = name_of(cfg)
    if not cfg.out:
        out = [out, *itertools.takewhile(Path.exists, later_names(out))][-1]
    return dataclasses.replace(cfg, out=str(out), resume=os.path.isfile(out / "last.pt"))


def refuse_taken(cfg: Config) -> None:
    """Raise ConfigError unless a run may write to --out, or there is one for --resume."""
    has_run = os.path.isfile(name_of(cfg) / "last.pt")
    if cfg.resume and not has_run:
        read_run(str(name_of(cfg)))
    if cfg.out and has_run and not cfg.resume:
        raise ConfigError(
            f"out: {cfg.out} already holds a run; go on with --resume or choose another --out"
        )


def claim(cfg: Config, checkpoint: Checkpoint | None) -> Path:
    """Make the folder and lock it. Without --out a new run takes the next free name.

    The lock is held until this process ends, however it ends. It is a POSIX lock of the file .lock:
    child processes do not inherit it, and NFS knows it. A file system without locks is used without
    one. Raises ConfigError if another process has the lock, or has written to the run since its
    `checkpoint` was read.
    """
    out = name_of(cfg)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if cfg.out or cfg.resume:
            out.mkdir(exist_ok=True)
        else:
            names = itertools.chain([out], later_names(out))
            for out in names:
                with contextlib.suppress(FileExistsError):  # made by another run perhaps
                    out.mkdir()
                    break
        file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # never closed
    except OSError as error:
        raise WriteError(out, error) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ConfigError(
            f"out: another run is writing to {out}; wait for its end or choose another --out"
        ) from None
    except OSError:
        os.close(file)
    if when_written(out / "last.pt") != (checkpoint.written if checkpoint else 0):
        raise ConfigError(f"out: another run has written to {out} meanwhile; start again")
    return out
