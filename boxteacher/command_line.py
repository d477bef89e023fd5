"""The command line of every program here: an option for each field of Config.

    python train.py nuclei --lr 0.005 --train-scales 1.5,2 --no-flip

The preset is the first word. Lists have commas. A switch is on with --flip and off with --no-flip.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from .config import FIELDS, Config, ConfigError, as_word, from_word, nearest
from .presets import PRESETS, from_preset, override

DEFAULT = "shapes"  # the preset, if the first word is none
SCHEDULE = ("lr_drops", "pseudo_start", "warmup_steps", "weak_warmup_steps")


def parse(
    argv: Sequence[str], images: int = 0, read_run: Callable[[str], Config] | None = None
) -> Config:
    """The command line of train.py, for so many training images (0: not known, see `override`).
    --help and --list print and exit.

    With --resume and without a preset, what is not given is as in the run that goes on:
    read_run(folder). With both, so is what would follow from the length (SCHEDULE).
    """
    preset, words = split_preset(argv, default=DEFAULT)
    text = f"Train BoxTeacher, BoxInst or CondInst. The values below are those of preset {preset}."
    parser = Parser("train.py [PRESET] [--field value ...]", text, from_preset(preset))
    _, given = parser.read(words)
    if given.get("resume") and given.get("init"):
        raise ConfigError("init starts a run, resume goes on with one: give only one")
    if given.get("resume") and preset not in argv[:1] and read_run:
        folder = given.get("out") or f"runs/{DEFAULT}"
        return override(read_run(folder), images, **(given | {"out": folder}))
    if given.get("resume") and read_run:
        run = read_run(given.get("out") or f"runs/{preset}")
        given = {field: getattr(run, field) for field in SCHEDULE} | given
    return from_preset(**({"preset": preset, "images": images} | given))


def split_preset(argv: Sequence[str], default: str) -> tuple[str, Sequence[str]]:
    """The preset, which is the first word unless that is an option, and the words after it."""
    has_preset = argv and not argv[0].startswith("-")
    return (argv[0], argv[1:]) if has_preset else (default, argv)


class Parser(argparse.ArgumentParser):
    """argparse with an option for each field of Config (if `fields`), and with ConfigErrors of one
    line.

    --help shows the fields with their values in `config`. Without one, it shows only the options
    that a program adds.
    """

    def __init__(
        self, usage: str, description: str | None, config: Config | None = None, fields: bool = True
    ) -> None:
        style = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
        super().__init__(None, usage, description, formatter_class=style, allow_abbrev=False)
        if not fields:
            return
        # "version" is argparse's action that prints a text and exits
        self.add_argument("--list", action="version", version=list_presets(), help="all presets")
        group = self
        for line in inspect.getsource(Config).splitlines():
            if heading := re.fullmatch(r"    # --- (.+?) -+", line):
                group = self.add_argument_group(heading[1])
            elif found := re.fullmatch(r"    (\w+): .+? = .+?(?:  # (.+))?", line):
                field, comment = found.groups(default="")
                if field == "preset":  # the first word
                    continue
                settings = option_settings(field, comment, config)
                group.add_argument("--" + field.replace("_", "-"), **settings)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        message = message.replace("ignored explicit argument", "takes no value, got")
        hint = "expected one value; if it begins with a dash, write --field=value"
        raise ConfigError(message.replace("expected one argument", hint))

    def read(self, words: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
        """All options, and those of them that are fields of Config and were given."""
        options, unknown = self.parse_known_args(words)
        if unknown:
            word = unknown[0].partition("=")[0]
            hint = "; write --field value, a list as --field 1,2, a switch as --field or --no-field"
            hint += " (the preset comes first)"
            hint = nearest(word, self._option_string_actions) if word.startswith("-") else hint
            raise ConfigError(f"no option {word}{hint}")
        given = {k: v for k, v in vars(options).items() if k in FIELDS and v is not None}
        return options, given


def option_settings(field: str, comment: str, config: Config | None) -> dict[str, Any]:
    """A field as argparse's `add_argument` takes it. The help is the comment next to the field."""
    kind, value = FIELDS[field], getattr(config, field, "")
    if kind is bool:
        settings, comment = {"action": argparse.BooleanOptionalAction}, f"now {value}; {comment}"
    else:
        read = functools.partial(from_word, field)
        settings = {"type": read, "metavar": as_word(value) or "''"}
    if typing.get_origin(kind) is Literal:
        comment += f"; one of {', '.join(typing.get_args(kind))}"
    return settings | {"help": comment.replace("%", "%%") if config else argparse.SUPPRESS}


def list_presets() -> str:
    """Every preset with its evidence and with what it changes in Config()."""
    lines, not_run = [], ["", "Recipes that were not run here:"]
    for name, (changes, evidence) in PRESETS.items():
        changes = {f: as_word(v) for f, v in changes.items() if v != getattr(Config(), f)}
        shown = " ".join(f"{field}={word}" for field, word in changes.items())
        known, is_not_run, _ = evidence.partition("; here: not run")
        wrapped = textwrap.wrap(shown, 96, initial_indent="    ", subsequent_indent="    ")
        (not_run if is_not_run else lines).extend([f"{name}: {known}", *wrapped])
    return "\n".join(lines + not_run)
