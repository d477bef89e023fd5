"""Errors that the user can solve, and how a program reports them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """The base of all errors with a message for the user: one line with what, where, what to do."""


def run(main: Callable[[], object]) -> None:
    """Run a program. A UserError ends it with its message instead of a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
