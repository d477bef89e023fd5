"""One flat, frozen configuration; presets are differences from it; the command line is its fields.

`Config()` is the published BoxTeacher R-50 1x recipe on COCO. `python train.py PRESET --lr 0.005`
takes a preset and replaces single fields; `--list` shows the presets, `--help` the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UserError


class ConfigError(UserError):
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
    bottom_rows: int = 10  # of the original, outside for color similarity (COCO: 10; else 0)
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
    color_threshold: float = 0.3  # tau of BoxInst's color similarity
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
    max_detections: int = 100  # per image; also COCO's maxDets, which the headline AP honors
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


# --- JSON and text ------------------------------------------------------------


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
