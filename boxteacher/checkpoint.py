"""Files of weights: written whole or not at all, read without running code, loaded only if every
weight fits."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from .config import Config, from_dict
from .errors import UserError
from .files import whole_file
from .model import CondInst, build_model

FORMAT = "boxteacher-1"  # the entry "format" of every checkpoint of this program


class CheckpointError(UserError):
    """A file of weights that cannot be read, or weights that do not fit."""


# --- checkpoints of this program ------------------------------------------------------------------


class Checkpoint(dict[str, Any]):
    """What a checkpoint holds, by name. Raises CheckpointError for an entry of the wrong type, and
    for one that is asked for and not there."""

    written = 0  # when its file was, see `when_written`

    def __init__(self, path: str | Path, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self.path = path
        for name, is_right in ENTRIES.items():
            if name in self and not is_right(self[name]):
                found = short_repr(self[name])
                raise CheckpointError(f"{path}: entry {name!r} is of the wrong type: {found}")
        names, ids = self.get("class_names"), self.get("category_ids")
        if names and ids is not None and len(names) != len(ids):
            raise CheckpointError(f"{path}: entry 'category_ids' has not one id for each class")

    def __missing__(self, name: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: has no entry {name!r}; give another checkpoint")


def when_written(path: str | Path) -> int:
    """In nanoseconds. 0 if there is no such file."""
    with contextlib.suppress(OSError, ValueError):
        return os.stat(path).st_mtime_ns
    return 0


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that `path` always holds a complete checkpoint, the old one or the new one
    (see `whole_file`).

    `state` may hold tensors, numbers, strings, None, and dicts, lists and tuples of these.
    """
    with whole_file(path) as file:
        torch.save({**state, "format": FORMAT}, file)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The state that `save_checkpoint` wrote, with its tensors on the CPU. Raises CheckpointError
    for a missing, truncated, damaged or foreign file."""
    written = when_written(path)
    with contextlib.suppress(zipfile.BadZipFile):  # read_file says more about such files
        if os.path.isfile(path) and os.access(path, os.R_OK) and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: not a checkpoint of this program, or cut short")
    state = read_file(path)
    if not is_ours(state):
        raise CheckpointError(f"{path}: a PyTorch file, but not a checkpoint of this program")
    del state["format"]
    checkpoint = Checkpoint(path, state)
    checkpoint.written = written
    return checkpoint


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether what a file holds is a checkpoint of this program."""
    form = content.get("format")
    return isinstance(form, str) and form == FORMAT


def load_model(path: str | Path, device: str = "cpu") -> tuple[CondInst, list[str]]:
    """The network of a checkpoint, the teacher where there is one, ready to predict; and the names
    of its classes."""
    state = load_checkpoint(path)
    model = network_of(state, from_dict(state["config"], str(path)))
    return model.to(device), state["class_names"]


def network_of(state: Checkpoint, cfg: Config) -> CondInst:
    """The teacher of a checkpoint, or the student where there is none, ready to predict."""
    model = build_model(cfg, len(state["class_names"]))
    load_weights(model, state["teacher"] or state["student"], str(state.path))
    return model.eval()


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is kind for v in value)


def _is_weights(value: Any) -> bool:
    def is_plain(tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta

    return isinstance(value, Mapping) and all(
        isinstance(name, str) and is_plain(tensor) for name, tensor in value.items()
    )


ENTRIES: dict[str, Callable[[Any], bool]] = {  # name -> whether a value has its type
    "config": lambda value: isinstance(value, dict),
    "class_names": lambda value: _is_list_of(str, value) and len(value) > 0,
    "category_ids": lambda value: _is_list_of(int, value),
    "step": lambda value: type(value) is int and value >= 0,
    "num_images": lambda value: type(value) is int,
    "student": _is_weights,
    "teacher": lambda value: value is None or _is_weights(value),
    "optimizer": lambda value: value is None or isinstance(value, dict),
}


# --- any file of weights --------------------------------------------------------------------------

# All that a file may call: what makes arrays, their types and scalars, ordered dicts, text to bytes
ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),
}
for core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
    ADMITTED[f"{core}.multiarray", "_reconstruct"] = np.zeros(1).__reduce__()[0]
    ADMITTED[f"{core}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
    ADMITTED[f"{core}.numeric", "_frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]
# The same for torch.load. It knows the last two itself, and needs the types of numbers.
ADMITTED_BY_TORCH = [type(np.dtype(number)) for number in "f8 f4 f2 i8 i4 i2 i1 u1 ?".split()]
ADMITTED_BY_TORCH += [(v, f"{m}.{name}") for (m, name), v in ADMITTED.items() if "numpy" in m]


class RestrictedUnpickler(pickle.Unpickler):
    """Builds numpy arrays and builtin containers, and refuses everything else by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")  # as torch.load puts it
        return ADMITTED[module, name]


def check_sums(path: Path) -> None:
    """Raise CheckpointError if a part of the archive does not have its checksum. torch.load does
    not look at them, so changed bytes would become other weights. Old files are no archives."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise CheckpointError(f"{path}: a compressed archive, which PyTorch does not write")
            if damaged := archive.testzip():
                raise CheckpointError(f"{path}: damaged: {damaged} has not its checksum")


def read_file(path: str | Path) -> dict[str, Any]:
    """The dict in a .pkl (pickled numpy arrays) or in any other file (torch.save's, which may hold
    numpy arrays too). Nothing in it is executed."""
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file() fails on overlong names
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):  # torch.save's are archives
            with open(path, "rb") as file:
                content = RestrictedUnpickler(file, encoding="latin1").load()
        else:
            check_sums(path)
            with torch.serialization.safe_globals(ADMITTED_BY_TORCH):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"holds more than tensors and numpy arrays: {refused[1]}"
        elif isinstance(error, pickle.UnpicklingError):  # torch's message would advise to trust it
            reason = "damaged, or not a file of weights"
        else:
            reason = f"damaged or foreign: {type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"{path}: not loaded: {reason}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    return dict(content)


# --- weights --------------------------------------------------------------------------------------


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError unless the weights `found` have the names and shapes of `wanted`.

    One line names every missing, unused and mis-shaped entry. `what` says where the weights come
    from.
    """
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unused": sorted(found.keys() - wanted.keys()),
        "mis-shaped": [
            f"{name} {list(found[name].shape)} for {list(wanted[name].shape)}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name].shape != wanted[name].shape
        ],
    }
    lists = [f"{len(p)} {kind}: {', '.join(p)}" for kind, p in problems.items() if p]
    if lists:
        raise CheckpointError(f"{what}: weights do not fit the model; " + "; ".join(lists))


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None, what: str
) -> None:
    """Restore the optimizer's moments. Its settings stay those of now."""
    if not saved:
        raise CheckpointError(f"{what}: holds weights, but no optimizer; --init takes the weights")
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(saved))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{what}: its optimizer does not fit this run: {reason}") from None
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Copy all of `weights` into all of `model`. If they do not fit or are not finite, raise
    CheckpointError (see `check_fit`) and leave the model as it was."""
    check_fit(weights, model.state_dict(), what)
    check_finite(weights, what)
    model.load_state_dict(weights)


def check_finite(weights: Mapping[str, Tensor], what: str) -> None:
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(
            f"{what}: {len(bad)} of {len(weights)} weights are not finite, so the network would"
            f" find nothing: {', '.join(bad[:5])}{', ...' * (len(bad) > 5)}; give another file"
        )
