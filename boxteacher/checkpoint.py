"""Checkpoints: written whole or not at all, read without running code, loaded without leniency.

`python -m boxteacher.checkpoint IN OUT [--preset NAME] [--field value ...]` makes a checkpoint out
of a published one, or, if IN is one of ours, a published one out of it.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import official
from .config import Config, ConfigError, from_preset, read_options
from .official import OfficialError

FORMAT = "boxteacher-1"  # stands in every file under "format"


class CheckpointError(ValueError):
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


# --- published checkpoints ------------------------------------------------------------------------


def import_official(
    path: str | Path,
    build_model: Callable[[Config, int, bool], nn.Module],
    preset: str = "",
    **given: Any,
) -> dict[str, Any]:
    """A published checkpoint as `save_checkpoint` would have it, and "notes" for the user.

    The configuration is the preset's (without one: what the weights imply, on COCO), but with the
    backbone's variant and the pixels of published weights; `given` fields overrule both. Raises
    CheckpointError, with all names, if a weight is missing, left over or of another shape.
    """
    try:
        found = official.split_networks(official.read_file(path), str(path))
        fields, num_classes = official.describe(found, str(path))
        if preset:
            _check_preset(fields, from_preset(preset), str(path))
            fields = {k: v for k, v in fields.items() if k in ("stride_in_1x1", "pixel_format")}
            config = from_preset(preset, **(fields | given))
        else:
            config = dataclasses.replace(Config(), **(fields | given))
        model_state = build_model(config, num_classes, False).state_dict()
        notes = [f"{path}: not used: {name}" for name in found.set_aside]
        state: dict[str, Any] = {"teacher": None, "iterations": {}}
        for part, weights in found.networks.items():
            absent = official.check_fit(weights, model_state, f"{path} ({part})")
            notes += [f"{path}: {part} has no {name}: set anew" for name in absent]
            part = "student" if part == "model" else part
            fresh = {name: value.clone() for name, value in model_state.items()}
            state[part] = fresh | official.from_official(weights)
            state["iterations"][part] = float(weights.get(official.ITERATION, torch.zeros(1)))
    except OfficialError as error:
        raise CheckpointError(str(error)) from None
    classes = official.COCO_CLASSES
    if num_classes != len(classes):
        classes = {n: f"class {n}" for n in range(1, num_classes + 1)}
    return state | {
        "config": dataclasses.asdict(config),
        "class_names": list(classes.values()),
        "category_ids": list(classes),
        "step": int(state["iterations"]["student"]),
        "optimizer": None,
        "notes": notes,
    }


def _check_preset(fields: Mapping[str, Any], config: Config, what: str) -> None:
    for field in ("mode", "backbone", "deformable"):
        found, wanted = fields.get(field, False), getattr(config, field)
        if found != wanted:
            raise CheckpointError(
                f"{what}: its weights say {field}={found}, preset {config.preset} {field}={wanted};"
                " choose another preset"
            )


def export_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `import_official`: a checkpoint's weights and counters, by published names."""
    if state["config"]["size_unit"] != 64:
        raise CheckpointError("only models with size_unit=64 have published names")
    networks = {part: state[part] for part in ("teacher", "student") if state[part] is not None}
    iterations = state.get("iterations", {"student": state["step"]})
    weights: dict[str, Tensor] = {}
    for part, values in networks.items():
        if "mask_branch.tower.3.0.weight" not in values or "mask_branch.tower.4.0.weight" in values:
            raise CheckpointError("only models with mask_branch_convs=4 have published names")
        renamed = official.to_official(values, iterations.get(part, 0))
        prefix = f"{part}." if len(networks) == 2 else ""
        weights |= {prefix + name: value for name, value in renamed.items()}
    return weights


def load_initial_weights(model: nn.Module, config: Config) -> None:
    """What training starts from, `config.init`: a checkpoint's teacher if it has one, else its
    student; ours, or a published one. All of it has to fit, the number of classes included, and the
    variant of the backbone, which does not show in the shapes."""
    path = config.init
    try:
        content = official.read_file(path)
        if content.get("format") == FORMAT:
            fields, weights = content.get("config", {}), content["teacher"] or content["student"]
        else:
            found = official.split_networks(content, path)
            fields, _ = official.describe(found, path)
            theirs = found.networks.get("teacher") or found.networks["model"]
            official.check_fit(theirs, model.state_dict(), path)
            weights = {**model.state_dict(), **official.from_official(theirs)}
    except OfficialError as error:
        raise CheckpointError(str(error)) from None
    for field in ("stride_in_1x1", "pixel_format"):
        given = getattr(config, field)
        wanted = fields.get(field, given)
        if wanted != given:
            option = f"--{field.replace('_', '-')} {str(wanted).lower()}"
            raise CheckpointError(f"{path}: made for {field}={wanted}, not {given}: add {option}")
    load_weights(model, weights, path)


def main(argv: Sequence[str]) -> None:
    from .model import build_model  # only the program needs it

    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        raise ConfigError("usage: python -m boxteacher.checkpoint IN OUT [--preset NAME]")
    source, target, given = argv[0], argv[1], read_options(argv[2:])
    try:
        is_ours = official.read_file(source).get("format") == FORMAT
    except OfficialError as error:
        raise CheckpointError(str(error)) from None
    if is_ours:
        torch.save({"model": export_official(load_checkpoint(source))}, target)
        print(f"{target}: {source} under published names")
        return
    state = import_official(source, build_model, given.pop("preset", ""), **given)
    for note in state.pop("notes"):
        print(note, file=sys.stderr)
    save_checkpoint(target, state)
    config = state["config"]
    print(f"{target}: {config['mode']}, {config['backbone']}, {len(state['class_names'])} classes")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")
