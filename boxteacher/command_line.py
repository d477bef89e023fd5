"""The command line of every program here: `[PRESET] --field value ...`."""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

from .config import FIELDS, Config, ConfigError, _nearest, _typed, _wanted
from .presets import PRESETS, from_preset


def parse(argv: Sequence[str]) -> Config:
    """The configuration that `[PRESET] --field value ...` asks for; without a preset: shapes.

    --help and --list print and exit. ConfigError, one line, for what is unknown or cannot be meant.
    """
    words = list(argv)
    for option, text in (("--help", help_text), ("-h", help_text), ("--list", list_presets)):
        if option in words:
            print(text())
            raise SystemExit(0)
    name = words.pop(0) if words and not _OPTION.match(words[0]) else "shapes"
    given = read_options(words)
    return from_preset(given.pop("preset", name), **given)


_OPTION = re.compile(r"--?[A-Za-z]")  # not -0.1


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """Fields and their values from `--field value`, `--field=value`, `--flag`, `--no-flag`.

    Dashes and underscores are the same. Lists: `--train-sizes 640,800` or `--train-sizes 640 800`.
    """
    given: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not _OPTION.match(word):
            raise ConfigError(f"what is {word!r} for? fields are set with --field value")
        option, equals, value = word.lstrip("-").partition("=")
        values = [value] if equals else []
        while not equals and words and not _OPTION.match(words[0]):
            values.append(words.pop(0))
        field = option.replace("-", "_")
        if not values and FIELDS.get(field.removeprefix("no_")) is bool:
            values = ["false" if field.startswith("no_") else "true"]
            field = field.removeprefix("no_")
        if field not in FIELDS:
            options = ["--" + name.replace("_", "-") for name in FIELDS]
            raise ConfigError(f"no option --{option}{_nearest('--' + option, options)}")
        if not values or (len(values) > 1 and typing.get_origin(FIELDS[field]) is not tuple):
            raise ConfigError(f"--{option} takes one value, got {' '.join(values) or 'none'}")
        given[field] = _typed(field, " ".join(values))
    return given


def help_text() -> str:
    """Every field with its type, default and the comment that stands beside it in Config."""
    lines = ["usage: train.py [PRESET] [--field value ...] | --list | --help"]
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # --- (.+?) -+", line):
            lines += ["", heading[1]]
        elif field := re.fullmatch(r"    (\w+): .+? = (.+?)(?:  # (.+))?", line):
            name, default, comment = field.groups(default="")
            option = f"  --{name.replace('_', '-')} {default}"
            lines.append(f"{option:42} {_wanted(name)}{comment and '; '}{comment}")
    return "\n".join(lines)


def list_presets() -> str:
    """Every preset with its evidence and with what it changes in Config()."""
    lines = []
    for name, (changes, evidence) in PRESETS.items():
        shown = [f"{f}={v}" for f, v in changes.items() if v != getattr(Config(), f)]
        lines += [f"{name}: {evidence}"]
        lines += textwrap.wrap(" ".join(shown), 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
