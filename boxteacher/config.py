"""One flat, frozen configuration; presets are differences from it; the command line is its fields.

`Config()` is the published BoxTeacher R-50 1x recipe on COCO. `python train.py PRESET --lr 0.005`
takes a preset and replaces single fields; `--list` shows the presets, `--help` the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
import textwrap
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message is one line for the user."""


Backbone = Literal[
    "resnet10_half", "resnet18", "resnet34", "resnet50", "resnet101", "swin_t", "swin_b"
]


@dataclass(frozen=True)
class Config:
    preset: str = "custom"  # where these values started from
    mode: Literal["condinst", "boxinst", "boxteacher"] = "boxteacher"

    # --- data ---------------------------------------------------------------
    dataset: Literal["coco", "shapes"] = "coco"  # coco: any set in COCO's JSON format
    train_json: str = "data/coco/annotations/instances_train2017.json"
    train_images: str = "data/coco/train2017"
    val_json: str = "data/coco/annotations/instances_val2017.json"
    val_images: str = "data/coco/val2017"
    shapes_train: int = 4000  # size of the generated training set (dataset=shapes)
    shapes_val: int = 300
    shapes_size: int = 192  # side of the generated images, pixels
    train_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800)  # short side, one drawn per image
    train_max_size: int = 1333  # long side at most
    test_size: int = 800
    test_max_size: int = 1333
    train_scales: tuple[float, ...] = ()  # if given: enlarge by one of these, not to a short side
    test_scale: float = 0.0  # if > 0: enlarge by this factor at test time instead of to test_size
    crop: int = 0  # if > 0: random square crop of this many pixels after resizing (training)
    flip: bool = True  # random horizontal flip
    bottom_rows: int = 10  # of the original, outside for colour similarity (COCO: 10; else 0)
    aspect_grouping: bool = True  # batches of images that are all wide or all tall
    workers: int = 4  # data loading processes per rank

    # --- model --------------------------------------------------------------
    backbone: Backbone = "resnet50"
    pretrained: bool = True  # torchvision's ImageNet weights
    backbone_weights: str = ""  # a local file instead of torchvision's download
    norm: Literal["frozen_bn", "bn", "gn"] = "frozen_bn"  # in the backbone
    freeze_at: int = 2  # 2: stem and first stage do not train; 0: everything trains
    stride_in_1x1: bool = False  # ResNet with the original ("MSRA") weights: True
    deformable: bool = False  # ResNet: DCNv2 in the last three stages
    drop_path: float = 0.2  # Swin: stochastic depth of the last block (never in the teacher)
    pixel_format: Literal["rgb", "bgr"] = "rgb"  # bgr: deviation 1, as original weights want it
    fpn_channels: int = 256
    tower_convs: int = 4
    mask_branch_channels: int = 128
    mask_branch_convs: int = 4
    mask_channels: int = 16  # CondInst with true masks: 8
    size_unit: int = 64  # px: P3 answers for distances up to one, P4 to two, P5 to four ...
    mask_norm: Literal["bn", "gn"] = "bn"  # bn: as published; statistics are per rank

    # --- training -----------------------------------------------------------
    steps: int = 90_000
    batch_size: int = 16  # images of a step, over all ranks
    accumulate: int = 1  # a rank takes its images in as many parts, one after the other
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01  # for `lr_batch_size` images; sgd scales it linearly with batch_size
    lr_batch_size: int = 16
    weight_decay: float = 1e-4
    norm_decay: bool = True  # as published; False: none on biases, norms and Swin's position tables
    momentum: float = 0.9
    lr_schedule: Literal["step", "cosine"] = "step"
    lr_drops: tuple[int, ...] = (60_000, 80_000)  # x0.1 at each (lr_schedule=step)
    warmup_steps: int = 1000  # linear lr warm-up from 0.001 of it
    clip_grad: float = 0.0  # maximum gradient norm; 0: no clipping
    weak_warmup_steps: int = 10_000  # the pairwise and pseudo-mask losses grow over these
    seed: int = 0

    # --- losses and teacher -------------------------------------------------
    class_weight: float = 1.0
    box_weight: float = 1.0
    centerness_weight: float = 1.0
    mask_weight: float = 1.0  # dice against true masks (condinst)
    projection_weight: float = 1.0
    pairwise_weight: float = 1.0
    pseudo_mask_weight: float = 0.5  # lambda_p
    pseudo_affinity_weight: float = 0.1  # lambda_a
    color_threshold: float = 0.3  # tau of BoxInst's colour similarity
    affinity_threshold: float = 0.5  # tau_g
    mask_threshold: float = 0.5  # tau_m
    iou_threshold: float = 0.5  # tau_iou
    score_threshold: float = 0.0  # tau_c
    published_score: bool = False  # pseudo masks as the published code makes them
    max_mask_locations: int = 64  # per image; condinst: 500 per rank, at random
    teacher: bool = True  # False: BoxTeacher without a teacher (ablation; it is BoxInst then)
    ema_momentum: float = 0.999
    teacher_size: int = 800  # short side of the teacher's input; 0: the student's own size
    teacher_max_size: int = 1333
    student_augmentation: Literal["none", "weak", "strong", "strong_blur"] = "strong"

    # --- inference and evaluation -------------------------------------------
    pre_nms_threshold: float = 0.05
    pre_nms_top: int = 1000  # (location, class) pairs per level
    nms_threshold: float = 0.6
    max_detections: int = 100  # per image; also COCO's maxDets, which the headline AP honours
    eval_every: int = 0  # steps between evaluations; 0: at the end only

    # --- machine ------------------------------------------------------------
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on GPUs
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on GPUs
    checkpoint_every: int = 5000
    log_every: int = 20
    init: str = ""  # a checkpoint to start from (weights only)
    resume: bool = False  # go on from the run's last.pt
    out: str = ""  # where the run is written; empty: runs/PRESET


FIELDS: dict[str, Any] = typing.get_type_hints(Config)  # name -> type

# The fields in which the published recipes of the three methods differ. `--mode` brings them along.
MODES: dict[str, dict[str, Any]] = {
    "condinst": dict(mask_channels=8, max_mask_locations=500, student_augmentation="none"),
    "boxinst": dict(mask_channels=16, max_mask_locations=64, student_augmentation="none"),
    "boxteacher": dict(mask_channels=16, max_mask_locations=64, student_augmentation="strong"),
}


class Preset(NamedTuple):
    changes: dict[str, Any]  # differences from Config()
    evidence: str  # what is known about its result


_SMALL: dict[str, Any] = dict(  # a recipe for two CPU cores, from scratch
    bottom_rows=0,
    aspect_grouping=False,
    workers=1,
    backbone="resnet10_half",
    pretrained=False,
    norm="bn",
    freeze_at=0,
    fpn_channels=64,
    tower_convs=2,
    mask_branch_channels=64,
    mask_branch_convs=2,
    steps=1800,
    batch_size=8,
    optimizer="adamw",
    lr=1e-3,
    lr_schedule="cosine",
    warmup_steps=50,
    clip_grad=1.0,
    weak_warmup_steps=100,
    ema_momentum=0.99,  # 0.999 would average over most of so short a run
    student_augmentation="none",  # other colours pay in long runs only
    teacher_size=0,
    checkpoint_every=500,
)

PRESETS: dict[str, Preset] = {
    "shapes": Preset(
        _SMALL
        | dict(
            dataset="shapes",
            workers=0,  # painting costs less than a process that disturbs two busy cores
            train_sizes=(160,),  # the teacher sees more, as on COCO
            train_max_size=160,
            teacher_size=192,
            test_size=192,
            test_max_size=192,
            size_unit=48,
            max_mask_locations=16,
            weak_warmup_steps=400,  # 100: in some runs large masks stay boxes for ever
        ),
        "here: 43.5, 41.4, 43.6 mask AP, 3 seeds (BoxInst 40.3, 41.3, 43.0; CondInst 54.7)",
    ),
    "nuclei": Preset(
        _SMALL
        | dict(
            train_json="../shared/data/nuclei/annotations/boxes_train.json",
            train_images="../shared/data/nuclei/images/train",
            val_json="../shared/data/nuclei/annotations/instances_val.json",
            val_images="../shared/data/nuclei/images/val",
            train_scales=(1.5, 1.75, 2.0),  # half of the nuclei have a side under 20 pixels
            train_max_size=4096,
            test_scale=2.0,
            test_max_size=4096,
            crop=192,
            teacher_size=224,
            size_unit=32,
            steps=1000,
            max_detections=1000,
        ),
        "here: 43.0 mask AP, seed 0 (BoxInst 26.6, CondInst 45.8)",
    ),
}

_PUBLISHED = {  # mask AP on COCO test-dev, and on val where it is known
    ("condinst", "r50", "1x"): "35.9 AP on test-dev, 36.2 on val",
    ("condinst", "r50", "3x"): "37.7 AP on test-dev, 37.5 on val",
    ("boxinst", "r50", "1x"): "30.7 AP on val",
    ("boxinst", "r50", "3x"): "32.1 AP on test-dev",
    ("boxteacher", "r50", "1x"): "32.9 AP on test-dev, 32.2 on val (32.6 unaugmented)",
    ("boxteacher", "r50", "3x"): "35.0 AP on test-dev, 34.8 on val",
    ("boxteacher", "r101", "3x"): "36.5 AP on test-dev",
    ("boxteacher", "r101_dcn", "3x"): "37.6 AP on test-dev",
    ("boxteacher", "swin_b", "3x"): "40.6 AP on test-dev",
}
_BACKBONES: dict[str, dict[str, Any]] = {
    "r50": dict(backbone="resnet50"),
    "r101": dict(backbone="resnet101"),
    "r101_dcn": dict(backbone="resnet101", deformable=True),
    "swin_b": dict(backbone="swin_b", optimizer="adamw", lr=1e-4, weight_decay=0.05),
}


def _coco_preset(mode: str, backbone: str, schedule: str) -> Preset:
    """The published recipes on COCO: 90k ("1x") or 270k ("3x") steps of 16 images."""
    changes = {"mode": mode, **_BACKBONES[backbone], **MODES[mode]}
    if schedule == "3x":
        changes |= dict(steps=270_000, lr_drops=(210_000, 250_000))
        if mode == "boxteacher":
            changes["student_augmentation"] = "strong_blur"
    published = _PUBLISHED.get((mode, backbone, schedule), "no number in our sources")
    return Preset(changes, f"published {published}; here: not run")


PRESETS |= {
    f"coco_{mode}_{backbone}_{schedule}": _coco_preset(mode, backbone, schedule)
    for mode in MODES
    for backbone in ("r50", "r101")
    for schedule in ("1x", "3x")
}
PRESETS |= {
    f"coco_boxteacher_{backbone}_3x": _coco_preset("boxteacher", backbone, "3x")
    for backbone in ("r101_dcn", "swin_b")
}


def from_preset(name: str, **given: Any) -> Config:
    """A preset with the `given` fields in place of its own, checked.

    Some fields follow others, unless given too. `mode` brings what its published recipe has other
    than that of the preset's mode (MODES). `steps` moves lr_drops in proportion and, where it
    shortens the run, shortens both warm-ups likewise: while the weak losses are still warming up,
    masks stay boxes.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}{_nearest(name, PRESETS)} (--list shows all)")
    config = dataclasses.replace(Config(preset=name), **PRESETS[name].changes)
    follow: dict[str, Any] = {}
    if given.get("mode", config.mode) != config.mode:
        old, new = MODES[config.mode], MODES[given["mode"]]
        follow |= {field: value for field, value in new.items() if value != old[field]}
    if "steps" in given:
        steps, shorter = given["steps"], min(given["steps"], config.steps)
        follow["lr_drops"] = tuple(drop * steps // config.steps for drop in config.lr_drops)
        for field in ("warmup_steps", "weak_warmup_steps"):
            follow[field] = getattr(config, field) * shorter // config.steps
    config = dataclasses.replace(config, **(follow | given))
    files = [f for f in ("train_json", "train_images", "val_json", "val_images") if f in given]
    if files and config.dataset == "shapes":
        raise ConfigError(
            f"{files[0]}: preset {name} generates its images and reads no files;"
            " start from preset nuclei (small) or coco_boxteacher_r50_1x (GPUs)"
        )
    validate(config)
    return config


# --- what can be meant --------------------------------------------------------

_AT_LEAST_1 = """steps batch_size accumulate lr_batch_size checkpoint_every log_every shapes_train
    shapes_val shapes_size train_max_size test_size test_max_size teacher_max_size fpn_channels
    max_detections mask_branch_channels mask_channels max_mask_locations pre_nms_top""".split()
_AT_MOST_1 = """momentum ema_momentum color_threshold affinity_threshold mask_threshold
    iou_threshold score_threshold pre_nms_threshold nms_threshold drop_path""".split()


def validate(config: Config) -> None:
    """Raise ConfigError, one line that says what to do, for values that cannot be meant."""

    def refuse(is_wrong: bool, message: str) -> None:
        if is_wrong:
            raise ConfigError(message)

    c = config
    for field, kind in FIELDS.items():
        if kind in (int, float):
            value, least = getattr(c, field), 1 if field in _AT_LEAST_1 else 0
            refuse(not least <= value < math.inf, f"{field} must be {least} or more, got {value}")
            is_over = field in _AT_MOST_1 and value > 1
            refuse(is_over, f"{field} must be between 0 and 1, got {value}")
    refuse(
        c.batch_size % max(c.accumulate, 1) != 0,
        f"batch_size={c.batch_size} cannot be taken in accumulate={c.accumulate} equal parts",
    )
    refuse(c.lr == 0, "lr is 0, so nothing would be learned")
    refuse(min(c.train_sizes, default=0) < 1, "train_sizes wants positive short sides")
    refuse(min(c.train_scales, default=1) <= 0, "train_scales wants positive factors")
    for name, short, long, is_used in (
        ("train_max_size", max(c.train_sizes), c.train_max_size, not c.train_scales),
        ("test_max_size", c.test_size, c.test_max_size, not c.test_scale),
        ("teacher_max_size", c.teacher_size, c.teacher_max_size, True),
    ):
        message = f"{name}={long} keeps the short side from being {short}: raise {name}"
        refuse(is_used and short > long, message)
    small = c.fpn_channels % 32 != 0 or c.fpn_channels < 64
    refuse(small, "fpn_channels must be a multiple of 32, 64 at least (the head's GroupNorm)")
    refuse(list(c.lr_drops) != sorted(c.lr_drops), "lr_drops must be in ascending order")
    from_scratch = not (c.pretrained or c.backbone_weights or c.init)
    refuse(
        from_scratch and c.norm == "frozen_bn" and c.backbone.startswith("resnet"),
        "norm=frozen_bn without pretrained weights would freeze statistics that were never"
        " measured: use --norm bn or --norm gn",
    )
    refuse(
        from_scratch and c.freeze_at > 0,
        f"freeze_at={c.freeze_at} without pretrained weights would keep layers at random values:"
        " use --freeze-at 0",
    )
    refuse(
        c.norm == "gn" and c.pretrained and not c.backbone_weights,
        "norm=gn does not fit torchvision's weights, which are for batch norm:"
        " use --norm bn, or from scratch --no-pretrained --freeze-at 0",
    )
    for field in ("stride_in_1x1", "deformable"):
        message = f"{field} is for bottlenecks: it wants resnet50 or resnet101, not {c.backbone}"
        refuse(getattr(c, field) and c.backbone not in ("resnet50", "resnet101"), message)
    refuse(c.freeze_at > 2, f"freeze_at must be 0, 1 or 2, got {c.freeze_at}")
    refuse(c.resume and bool(c.init), "init starts a run, resume goes on with one: give only one")


def warnings(config: Config) -> list[str]:
    """One line for each thing that is allowed but seldom meant."""
    c, lines = config, []
    if c.mode != "condinst" and 2 * c.weak_warmup_steps > c.steps:
        lines.append(
            f"weak_warmup_steps={c.weak_warmup_steps} is over half of steps={c.steps}:"
            " with the pairwise loss still warming up, masks stay boxes"
        )
    if 2 * c.warmup_steps > c.steps:
        lines.append(f"warmup_steps={c.warmup_steps} is over half of steps={c.steps}")
    if c.lr_schedule == "step" and max(c.lr_drops, default=0) >= c.steps:
        lines.append(f"lr_drops={c.lr_drops} reaches beyond steps={c.steps}: lr stays high")
    if c.backbone_weights.endswith(".pkl") and c.pixel_format == "rgb":
        lines.append(
            f"backbone_weights={c.backbone_weights}: detectron2's files mostly want"
            " --pixel-format bgr, and MSRA's (but for DCN) --stride-in-1x1 too"
        )
    return lines


# --- command line, JSON -------------------------------------------------------


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


def to_json(config: Config) -> str:
    """The whole configuration, to be kept with the run."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "configuration") -> Config:
    """What `to_json` wrote; missing fields take their defaults. Errors name `where`."""
    try:
        return from_dict(json.loads(text), where)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None


def from_dict(values: Any, where: str = "configuration") -> Config:
    """The same from `dataclasses.asdict`. Types are checked; whether it can be meant is not."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: wants an object of fields, got a {type(values).__name__}")
    for field in values:
        if field not in FIELDS:
            raise ConfigError(f"{where}: no field {field!r}{_nearest(str(field), FIELDS)}")
    try:
        return Config(**{field: _typed(field, value) for field, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


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


def _typed(field: str, value: Any) -> Any:
    """A word of the command line, or a value from a JSON file, as the field's type."""
    kind, choices = FIELDS[field], _choices(field)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (int, float):
            return _number(kind, value)
        if typing.get_origin(kind) is tuple:
            items = re.split(r"[,\s]+", value.strip("()[], ")) if isinstance(value, str) else value
            return tuple(_number(typing.get_args(kind)[0], item) for item in items if item != "")
        if isinstance(value, str) and (kind is str or value in choices):
            return value
    except (ValueError, KeyError, TypeError):
        pass
    nearest = _nearest(str(value), choices) if choices else ""
    raise ConfigError(f"{field} wants {_wanted(field)}, got {value!r}{nearest}")


def _number(kind: type, value: Any) -> int | float:
    number = kind(str(value))  # by way of text, so that 1.5 is no whole number, nor True
    if not math.isfinite(number):
        raise ValueError
    return number


def _choices(field: str) -> tuple[str, ...]:
    kind = FIELDS[field]
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _wanted(field: str) -> str:
    if choices := _choices(field):
        return "one of " + ", ".join(choices)
    return {
        str: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        tuple[int, ...]: "whole numbers such as 640,800",
        tuple[float, ...]: "numbers such as 1.5,2",
    }[FIELDS[field]]


def _nearest(word: str, names: Iterable[str]) -> str:
    return f"; the nearest is {difflib.get_close_matches(word.lower(), names, 1, cutoff=0)[0]}"
