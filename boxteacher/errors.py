"""Errors that the user can solve, and how a program reports them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """The base of all errors with a message for the user: one line with what, where, what to do."""


def printable(text: str, limit: int = 2000) -> str:
    """Text from a file as one line that is safe to print, of `limit` characters at most. Control
    characters (line breaks, escape codes) and lone surrogates become spaces."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 10 * limit])
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def run(main: Callable[[], object]) -> None:
    """Run a program. A UserError ends it with its message instead of a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
