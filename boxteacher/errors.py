"""Errors that the user can solve, and how a program ends.

Exit codes: 0 done, 1 an error, 75 stopped by a signal and saved (sysexits.h's "try again later"),
130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a full quota


class UserError(Exception):
    """The base of all errors with a message for the user: one line with what, where, what to do."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the run, and all of it is saved."""


def printable(text: str, limit: int = 2000) -> str:
    """Text from a file as one line that is safe to print, of `limit` characters at most. Control
    characters (line breaks, escape codes) and lone surrogates become spaces."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 10 * limit])
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def run(main: Callable[[], object]) -> None:
    """Run a program. What the user can solve or has asked for ends it with one line instead of a
    traceback. Under torchrun only the first process of a machine to fail prints it."""
    for name in ("stdout", "stderr"):  # closed by the caller
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # print names that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except Stopped as stop:
        end(75, str(stop))
    except KeyboardInterrupt:
        end(130, "interrupted")
    except UserError as error:
        end(1, f"error: {error}")
    except Exception as error:
        is_unread = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO)
        if is_unread and stdout_is_broken():  # train.py --list | head, or a closed terminal
            sys.exit(141)
        if "TORCHELASTIC_ERROR_FILE" in os.environ and "by peer" in str(error):  # gloo's words
            end(1, "error: another process of this run has ended; torchrun says which and how")
        if isinstance(error, OSError) and (error.filename is not None or error.errno in NO_SPACE):
            end(1, f"error: {error.filename or 'standard output'}: {error.strerror}")
        if str(error).startswith("DataLoader worker (pid"):  # torch's words
            advice = "too little memory? lower --workers; --resume continues a training"
            end(1, f"error: {str(error).strip().rstrip('.')}; {advice}")
        if not is_first_to_fail():
            sys.exit(1)
        raise


def end(code: int, message: str) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody reads it
        if is_first_to_fail():
            print(printable(message), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, complain, and exit with 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def is_first_to_fail() -> bool:
    """Whether no other process of torchrun on this machine has failed before. torchrun gives each
    of them a file, in folders next to each other."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if file:
            (Path(file).parent.parent / "failed").touch(exist_ok=False)
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def stdout_is_broken() -> bool:
    """Whether nobody reads it. Then what is left to write goes nowhere."""
    reader = select.poll()
    reader.register(sys.stdout.fileno(), 0)
    is_broken = bool(reader.poll(0))
    if is_broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_broken
