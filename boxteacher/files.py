"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError


class WriteError(UserError):
    """A file that cannot be written: the disk is full, the folder read-only, the name too long."""

    def __init__(self, path: Path, error: OSError) -> None:
        reason = error.strerror or type(error).__name__
        super().__init__(f"cannot write {path}: {reason}; all that was written before is unharmed")


@contextlib.contextmanager
def whole_file(path: str | Path, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write to. `path` always holds complete content, the old or the new, even if the
    process is killed or the power fails.

    It is written under another name, flushed to the disk and then renamed. `shared`: several
    processes may do so at the same time, each under a name of its own. Raises WriteError.
    """
    target, unfinished = _places(path, shared)
    handled = sys.exc_info()[1]  # by the caller, which may save because of it
    try:
        _prepare(target)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
        # The new name must reach the disk too.
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot
                os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:
        # torch.save makes a RuntimeError of what happens to it: a full disk, a signal.
        is_torchs = isinstance(error, RuntimeError) and error.__context__ not in (None, handled)
        cause = error.__context__ if is_torchs else error
        if isinstance(cause, OSError):
            raise WriteError(Path(path), cause) from None
        if is_torchs:
            raise cause from None
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _places(path: str | Path, shared: bool) -> tuple[Path, Path]:
    """Where links lead to, and the name of the file while it is written."""
    target = Path(os.path.realpath(path))
    own = f".{os.getpid()}" * shared
    return target, target.with_name(f".{target.name}{own}.unfinished")


def _prepare(target: Path) -> None:
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    target.parent.mkdir(parents=True, exist_ok=True)


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, in order, also behind links. No folder is entered twice."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
        else:
            seen.add(real)
            found += [Path(place, name) for name in names]
    return sorted(found)


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path, shared=True) as file:
        file.write(text.encode(errors="replace"))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """A line of JSON at the end of a file. Raises WriteError."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise WriteError(path, error) from None


def check_writable(path: Path) -> None:
    """Raise WriteError if `path` could not be written now. What it holds stays."""
    target, trial = _places(path, shared=True)
    try:
        _prepare(target)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise WriteError(path, error) from None
