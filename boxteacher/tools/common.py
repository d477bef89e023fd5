"""What several tools share: a checkpoint's network, and results that survive an interruption."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from boxteacher.checkpoint import load_checkpoint, network_of
from boxteacher.coco import explain
from boxteacher.config import ConfigError, of_checkpoint, validate
from boxteacher.distributed import init_distributed
from boxteacher.files import write_text
from boxteacher.model import CondInst


def load_network(path: str, given: dict[str, Any]) -> tuple[CondInst, dict[str, Any]]:
    """The network of a checkpoint, the teacher where there is one, ready to predict; and the
    checkpoint. `given` replaces fields of the configuration."""
    device, state = init_distributed(given.get("device", "auto")), load_checkpoint(path)
    cfg = of_checkpoint(state["config"], path, given)
    validate(dataclasses.replace(cfg, resume=False, init=path))  # the weights are there
    return network_of(state, cfg).to(device), state


# --- a file that grows by a line for each image ---------------------------------------------------


def settings_of(args: argparse.Namespace, *ignored: str) -> dict[str, str]:
    """All that the lines depend on: the options except those `ignored`, and the weights."""
    ignored = {"checkpoint", "output", "device", "workers", *ignored}
    settings = {k: str(v) for k, v in vars(args).items() if k not in ignored and v is not None}
    return settings | {"weights": hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()}


@contextlib.contextmanager
def claimed_lines(path: Path, settings: dict[str, str]) -> Iterator[None]:
    """Begin the file with a line of the settings, unless it is there. Inside, this process alone
    writes to it. Raises ConfigError if another one does."""
    if not path.exists():
        write_text(path, json.dumps(settings) + "\n")
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{path}: another process is writing to it; wait for its end or give another"
                " --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def lines_so_far(path: Path, settings: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The lines of JSON that an interrupted call with the same settings wrote. The first line of
    the file are the settings. What follows the last whole line is removed. Raises ConfigError if
    the settings are others."""
    with open(path, "rb") as file:
        with explain(str(path), "remove it"):
            before = dict(json.loads(file.readline()))
        if others := sorted(k for k in before | settings if before.get(k) != settings.get(k)):
            raise ConfigError(
                f"{path}: holds results of other settings ({', '.join(others)}): give the same"
                " settings to go on, or another --output, or remove it"
            )
        length = file.tell()
        with contextlib.suppress(ValueError):  # no JSON
            while (line := file.readline()).endswith(b"\n"):
                yield json.loads(line)
                length = file.tell()
    os.truncate(path, length)
