"""Checkpoints: written whole or not at all, read without running code, loaded without leniency."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

FORMAT = "boxteacher-1"  # stands in every file under "format"


class CheckpointError(UserError):
    """A file or a state that is not what it should be; the message is for the user."""


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that `path` holds, at every instant, the old file or the new one.

    Whoever kills the process or pulls the plug finds a whole checkpoint: it is written beside
    `path`, flushed to the disk and then renamed over it. `state` may hold tensors, numbers,
    strings, None, and dicts, lists and tuples of these; anything else raises CheckpointError, since
    `load_checkpoint` would refuse it.
    """
    state = {**state, "format": FORMAT}
    _check_plain(state, "state")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)  # the new name, too, must reach the disk
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, its tensors on the CPU.

    Nothing in the file is executed (weights_only). Raises CheckpointError, one line, for a missing,
    truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        if not zipfile.is_zipfile(path):  # its table of contents stands at the end of the file
            raise CheckpointError(f"{path}: not a PyTorch checkpoint, or cut short")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        reason = "damaged, or holds more than tensors and plain values"
        raise CheckpointError(f"{path}: not loaded: {reason}") from None
    except Exception as error:  # a damaged file can fail in any way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"{path}: not loaded, damaged or foreign: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a PyTorch file, but not a checkpoint of this program")
    del state["format"]
    return state


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], what: str) -> None:
    """Copy all of `state_dict` into all of `model`: same names, same shapes, nothing left over.

    Otherwise raises CheckpointError, which names every missing, unused and mis-shaped entry, and
    leaves the model as it was. `what` says in the message where the weights come from.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state_dict.items()}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unused": sorted(found.keys() - wanted.keys()),
        "mis-shaped": [
            f"{name} {list(found[name])} for {list(wanted[name])}"
            for name in sorted(wanted.keys() & found.keys())
            if wanted[name] != found[name]
        ],
    }
    if any(problems.values()):
        lists = [f"{len(p)} {kind}: {', '.join(p)}" for kind, p in problems.items() if p]
        raise CheckpointError(f"{what}: weights do not fit the model; " + "; ".join(lists))
    model.load_state_dict(state_dict)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what `torch.load(weights_only=True)` would not read back, by name."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in (int, float, str, bool, type(None)):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}: checkpoints hold tensors and plain values only"
        )
