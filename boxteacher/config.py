"""The configuration of a run: one flat, frozen record, and what is checked in it.

`Config()` is the published BoxTeacher recipe on COCO (R-50, 1x). presets.py holds the other recipes
as differences from it. command_line.py makes an option of each field: the headings and comments
below are the text of --help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UserError


class ConfigError(UserError):
    """A configuration that cannot work."""


ResNets = Literal["resnet10_half", "resnet18", "resnet34", "resnet50", "resnet101"]
PseudoScore = Literal["mask_aware", "detection", "constant", "published"]
Backbone = Literal[ResNets, "swin_t", "swin_b", "mobilenet_v2"]


@dataclass(frozen=True)
class Config:
    preset: str = "custom"  # the recipe of all values that are not given
    mode: Literal["condinst", "boxinst", "boxteacher"] = "boxteacher"  # the method

    # --- data ---------------------------------------------------------------
    dataset: Literal["coco", "shapes"] = "coco"  # files in COCO's JSON format, or generated images
    train_json: str = "data/coco/annotations/instances_train2017.json"  # boxes (condinst: masks)
    train_images: str = "data/coco/train2017"  # the folder of its images
    val_json: str = "data/coco/annotations/instances_val2017.json"  # masks; "": no evaluation
    val_images: str = "data/coco/val2017"  # the folder of its images
    shapes_train: int = 4000  # number of generated training images (dataset=shapes)
    shapes_val: int = 300  # number of generated validation images
    shapes_size: int = 192  # their side in pixels
    train_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800)  # short side, one drawn per image
    train_max_size: int = 1333  # long side at most
    test_size: int = 800  # short side at test time
    test_max_size: int = 1333  # long side at most, at test time and for the teacher
    train_scales: tuple[float, ...] = ()  # if given: factors to enlarge by, not train_sizes
    test_scale: float = 0.0  # if > 0: the same at test time, not test_size
    crop: int = 0  # if > 0: train on random square crops of so many pixels
    flip: bool = True  # mirror half of the training images
    contrast: Literal["none", "stretch"] = "none"  # stretch: for dark images (microscopes, X-ray)
    bottom_rows: int = 10  # not used by pairwise losses (COCO: 10, else 0)
    workers: int = 4  # data loading workers of each process

    # --- model --------------------------------------------------------------
    backbone: Backbone = "resnet50"  # the network below the feature pyramid
    pretrained: bool = True  # start from torchvision's ImageNet weights
    backbone_weights: str = ""  # a local file to use instead of torchvision's weights
    norm: Literal["frozen_bn", "bn", "gn"] = "frozen_bn"  # normalization in the backbone
    freeze_at: int = 2  # 2: stem and first stage do not train; 0: everything trains
    stride_in_1x1: bool = False  # ResNet: needed by the original ("MSRA") weights
    deformable: bool = False  # ResNet: DCNv2 in the last three stages
    pixel_format: Literal["rgb", "bgr"] = "rgb"  # bgr (deviation 1) is for the original weights
    fpn_channels: int = 256  # of the feature pyramid and the head
    tower_convs: int = 4  # layers of each tower of the head
    mask_branch_channels: int = 128  # of its layers
    mask_branch_convs: int = 4  # layers, before the last one
    mask_channels: int = 16  # of the mask branch's output; published for condinst: 8
    size_unit: int = 64  # pixels: P3 takes distances up to 1 unit, P4 up to 2, P5 up to 4 ...
    mask_norm: Literal["bn", "gn"] = "bn"  # in the mask branch; bn: of each process alone

    # --- training -----------------------------------------------------------
    steps: int = 90_000  # scales lr_drops and pseudo_start; fewer: warm-ups too
    epochs: float = 0.0  # if > 0: steps are those of so many passes over the training images
    batch_size: int = 16  # images of a step, of all processes
    accumulate: int = 1  # a process takes its images in so many parts, to save memory
    optimizer: Literal["sgd", "adamw"] = "sgd"  # published: sgd, for Swin adamw
    lr: float = 0.01  # sgd: for 16 images, scaled linearly with batch_size
    weight_decay: float = 1e-4  # of all weights that train
    lr_schedule: Literal["step", "cosine"] = "step"  # of lr after the warm-up
    lr_drops: tuple[int, ...] = (60_000, 80_000)  # lr is divided by 10 at these (lr_schedule=step)
    warmup_steps: int = 1000  # lr grows linearly from 0.001 of it
    clip_grad: float = 0.0  # maximum gradient norm; 0: no clipping
    weak_warmup_steps: int = 10_000  # warm-up of the pairwise and pseudo-mask losses
    seed: int = 0  # of first weights, order of images and random draws

    # --- losses and teacher -------------------------------------------------
    pairwise_weight: float = 1.0  # of BoxInst's pairwise loss
    pairwise_ends: bool = False  # no pairwise loss after pseudo_start, in mode boxinst too
    pseudo_mask_weight: float = 0.5  # lambda_p, of the noise-aware pixel loss
    pseudo_affinity_weight: float = 0.1  # lambda_a, of the noise-reduced affinity loss
    color_threshold: float = 0.3  # tau: pairs of pixels with this color similarity are learned
    affinity_threshold: float = 0.5  # tau_g: pairs with this affinity in a pseudo mask are learned
    mask_threshold: float = 0.5  # tau_m: least probability inside a pseudo mask
    iou_threshold: float = 0.5  # tau_iou: least IoU of a detection with the box that takes its mask
    score_threshold: float = 0.0  # tau_c: least score of a pseudo mask
    use_masks: bool = False  # boxteacher: true masks replace the teacher's, where there are some
    pseudo_score: PseudoScore = "mask_aware"  # weight of a pseudo mask; published: authors' code
    max_mask_locations: int = 64  # that learn a mask, per image; condinst: per process, at random
    pseudo_start: int = 0  # steps of BoxInst before the first pseudo masks
    ema_momentum: float = 0.999  # of the teacher's moving average
    teacher_size: int = 800  # short side of the teacher's input; 0: the student's own size
    student_augmentation: Literal["none", "weak", "strong", "strong_blur"] = "strong"  # of color

    # --- inference and evaluation -------------------------------------------
    max_detections: int = 100  # per image; also COCO's maxDets, in all columns
    metric: Literal["coco", "voc", "cityscapes"] = "coco"  # the rules of the AP table
    eval_every: int = 0  # steps between evaluations; 0: at the end only

    # --- machine ------------------------------------------------------------
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: the GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on GPUs
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on GPUs
    checkpoint_every: int = 5000  # steps
    log_every: int = 20  # steps
    init: str = ""  # a checkpoint to start from (weights only)
    resume: bool = False  # continue from the run's last.pt
    out: str = ""  # the folder of the run; empty: runs/PRESET


def is_due(config: Config, step: int, every: int) -> bool:
    """Whether what happens every so many steps happens after `step` steps. 0: at the end only."""
    return step == config.steps or (every > 0 and step % every == 0)


FIELDS: dict[str, Any] = typing.get_type_hints(Config)  # name -> type
LR_IMAGES = 16  # SGD: `lr` is for a step of so many images
USUAL_LR = {"sgd": (0.01, 0.01), "adamw": (1e-4, 1e-3)}  # for LR_IMAGES; the published 0.01, 1e-4


def scaled_lr(config: Config) -> float:
    """The learning rate after the warm-up: SGD's `lr` is for 16 images, and scaled linearly."""
    return config.lr * (config.batch_size / LR_IMAGES if config.optimizer == "sgd" else 1.0)


# --- words: the values on the command line --------------------------------------------------------


def as_word(value: Any) -> str:
    """A value as one writes it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def from_word(field: str, word: str) -> Any:
    """The value of a field, the inverse of `as_word`. ConfigError if the field cannot hold it."""
    kind, arguments = FIELDS[field], typing.get_args(FIELDS[field])
    if kind is str:
        return word
    if kind in (int, float):
        return number(field, kind, word)
    if typing.get_origin(kind) is tuple:
        return tuple(number(field, arguments[0], part) for part in word.split(",") if word)
    choices = {"True": True, "False": False} if kind is bool else {name: name for name in arguments}
    if word not in choices:
        names, hint = ", ".join(choices), nearest(word, choices)
        raise ConfigError(f"{field} must be one of {names}, got {word!r}{hint}")
    return choices[word]


def number(field: str, kind: type, word: str) -> int | float:
    """Neither infinite nor NaN."""
    with contextlib.suppress(ValueError):
        value = kind(word)
        if abs(value) < math.inf:
            return value
    wanted = "a whole number" if kind is int else "a number"
    raise ConfigError(f"{field}: {word!r} is not {wanted}")


def nearest(word: str, names: Iterable[str]) -> str:
    """The end of an error message: the name that the user probably meant."""
    return f"; the nearest is {difflib.get_close_matches(word.lower(), names, 1, cutoff=0)[0]}"


# --- values that cannot work ----------------------------------------------------------------------

AT_LEAST_1 = """steps batch_size accumulate checkpoint_every log_every shapes_train shapes_val
    shapes_size train_max_size test_size test_max_size fpn_channels mask_branch_channels
    mask_channels size_unit max_mask_locations max_detections""".split()
AT_MOST_1 = """ema_momentum color_threshold affinity_threshold mask_threshold iou_threshold
    score_threshold""".split()


def validate(config: Config) -> None:
    """Raise ConfigError for the first of the problems."""
    for problem in problems(config):
        raise ConfigError(problem)


def problems(config: Config) -> Iterator[str]:
    """A line for each value or combination that cannot work: what it is, and what to do."""
    c = config
    # numbers on their own; comparisons with NaN are false
    for field, kind in FIELDS.items():
        value, least = getattr(c, field), 1 if field in AT_LEAST_1 else 0
        most = math.inf if kind is float and field != "epochs" else 2**32
        if kind in (int, float) and not least <= value < most:
            limit = ", and under 2**32" * (most < math.inf)
            yield f"{field} must be {least} or more{limit}, got {value}"
        if field in AT_MOST_1 and value > 1:
            yield f"{field} must be between 0 and 1, got {value}"
    if c.lr == 0:
        yield "lr is 0, so nothing would be learned"
    if c.batch_size % c.accumulate:
        yield f"batch_size={c.batch_size} cannot be taken in accumulate={c.accumulate} equal parts"
    if [0, *c.lr_drops] != sorted([0, *c.lr_drops]):
        yield "lr_drops must be 0 or more, in ascending order"
    if c.fpn_channels % 32 or c.fpn_channels < 64:
        yield "fpn_channels must be a multiple of 32, 64 at least (the head's GroupNorm)"
    if c.mask_norm == "gn" and c.mask_branch_channels < 4:
        yield "mask_branch_channels must be 4 or more for mask_norm=gn"
    if c.freeze_at > 2:
        yield f"freeze_at must be 0, 1 or 2, got {c.freeze_at}"

    if c.dataset == "shapes" and c.shapes_size < 64:
        yield f"shapes_size must be 64 or more, got {c.shapes_size}"

    # sizes of images: a limit on the long side must not be less than the short side
    if 0 < c.teacher_size < 64:
        yield f"teacher_size must be 0 or 64 or more, got {c.teacher_size}"
    if min(c.train_sizes, default=0) < 1:
        yield "train_sizes must be short sides of 1 pixel or more"
    if not all(0 < scale < math.inf for scale in c.train_scales):
        yield f"train_scales must be factors above 0, got {c.train_scales}"
    for limit, field, short, is_used in (
        ("train_max_size", "train_sizes", max(c.train_sizes), not c.train_scales),
        ("test_max_size", "test_size", c.test_size, not c.test_scale),
        ("test_max_size", "teacher_size", c.teacher_size, c.mode == "boxteacher"),
    ):
        if is_used and short > getattr(c, limit):
            yield f"{limit}={getattr(c, limit)} is less than {field}={short}: raise {limit}"

    # first weights: what is frozen must have some, and they must fit
    has_weights = c.pretrained or c.backbone_weights or c.init
    if not has_weights and c.norm == "frozen_bn" and not c.backbone.startswith("swin"):
        yield "norm=frozen_bn needs pretrained weights: without them use --norm bn or --norm gn"
    if not has_weights and c.freeze_at > 0:
        yield f"freeze_at={c.freeze_at} needs pretrained weights: without them use --freeze-at 0"
    if c.norm == "gn" and c.pretrained and not c.backbone_weights:
        yield (
            "norm=gn does not fit torchvision's weights, which are for batch norm:"
            " use --norm bn, or from scratch --no-pretrained --freeze-at 0"
        )
    for field in ("stride_in_1x1", "deformable"):
        if getattr(c, field) and c.backbone not in ("resnet50", "resnet101"):
            yield f"{field} is for bottlenecks: use resnet50 or resnet101, not {c.backbone}"
    if c.use_masks and c.mode != "boxteacher":
        yield f"use_masks is for mode boxteacher, not {c.mode} (condinst needs all masks)"


def warnings(config: Config) -> list[str]:
    """One line for each value that works but is probably a mistake, or that changes another one."""
    c, lines = config, []
    if not c.val_json:
        lines.append("val_json is empty: without a validation set there will be no tables of AP")
    root = 1.0 if c.optimizer == "sgd" else (c.batch_size / LR_IMAGES) ** 0.5
    low, high = (rate * root for rate in USUAL_LR[c.optimizer])
    if not low / 4 <= c.lr <= 4 * high:
        usual = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
        lines.append(
            f"lr={c.lr} is far from what is usual with {c.optimizer} and batch_size={c.batch_size}:"
            f" {usual}" + " (it is scaled with the batch size)" * (c.optimizer == "sgd")
        )
    if c.mode != "condinst" and 2 * c.weak_warmup_steps > c.steps:
        lines.append(
            f"weak_warmup_steps={c.weak_warmup_steps} is over half of steps={c.steps}:"
            " before the pairwise loss acts, masks are filled boxes"
        )
    if c.mode != "condinst" and c.pairwise_ends and c.pseudo_start == 0 < c.steps - 1:
        lines.append("pairwise_ends with pseudo_start=0: there is no pairwise loss at all")
    if c.mode == "boxteacher" and c.pseudo_start >= c.steps:
        lines.append(f"pseudo_start={c.pseudo_start} is beyond steps={c.steps}: no pseudo masks")
    if 2 * c.warmup_steps > c.steps:
        lines.append(f"warmup_steps={c.warmup_steps} is over half of steps={c.steps}")
    if c.lr_schedule == "step" and max(c.lr_drops, default=0) >= c.steps:
        lines.append(f"lr_drops={c.lr_drops} reaches beyond steps={c.steps}: lr stays high")
    if c.backbone_weights.endswith(".pkl") and c.pixel_format == "rgb":
        lines.append(
            f"backbone_weights={c.backbone_weights}: detectron2's files mostly need"
            " --pixel-format bgr, and MSRA's (except for DCN) --stride-in-1x1 too"
        )
    return lines


# --- going on with a run --------------------------------------------------------------------------

# Another value of these would be another network, or another order of images.
MEANING = """mode dataset shapes_train shapes_size backbone norm freeze_at stride_in_1x1 deformable
    pixel_format fpn_channels tower_convs mask_branch_channels mask_branch_convs mask_channels
    size_unit mask_norm batch_size accumulate optimizer seed use_masks""".split()
# These change nothing in what is learned from here on.
CHOICES = """preset metric workers pretrained backbone_weights eval_every device compile
    checkpoint_every log_every init resume out""".split()


def changes_on_resume(before: Config, now: Config) -> list[str]:
    """One line for each field that changes what a run does from now on. ConfigError, with all
    names, if a field changes that makes it another run."""
    changed = [f for f in FIELDS if getattr(before, f) != getattr(now, f) and f not in CHOICES]
    words = [[as_word(getattr(c, f)) or "''" for c in (before, now)] for f in changed]
    lines = [f"{f} was {old}, now {new}" for f, (old, new) in zip(changed, words, strict=True)]
    if fixed := [line for f, line in zip(changed, lines, strict=True) if f in MEANING]:
        raise ConfigError(
            f"resume: that would be another run: {'; '.join(fixed)}. Without a preset, --resume"
            " takes all from the run"
        )
    return [f"resume: {line}" for line in lines]


# --- what is kept with a run ----------------------------------------------------------------------


def to_json(config: Config) -> str:
    """The whole configuration, as the run's config.json shows it."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(values: Any, where: str) -> Config:
    """The inverse of `dataclasses.asdict`. Missing fields take their defaults.

    Names and types are checked, with `where` in the error. `validate` checks the rest.
    """
    try:
        if not isinstance(values, dict):
            raise ConfigError(f"no fields by name, but a {type(values).__name__}")
        for field, value in values.items():
            if field not in FIELDS:
                raise ConfigError(f"no field {field!r}{nearest(str(field), FIELDS)}")
            if from_word(field, as_word(value)) != value:
                raise ConfigError(f"{field}: {value!r} is of the wrong type")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Config(**values)


def of_checkpoint(values: Any, path: str, given: dict[str, Any]) -> Config:
    """The configuration in a checkpoint, with the `given` fields replaced. It is not validated.
    Raises ConfigError if files are given, but the data are generated."""
    cfg = dataclasses.replace(from_dict(values, path), **given)
    files = {"train_json", "train_images", "val_json", "val_images"}
    if cfg.dataset == "shapes" and given.keys() & files:
        raise ConfigError(f"{path} is about generated images; to read files, add --dataset coco")
    return cfg
