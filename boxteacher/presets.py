"""The recipes: differences from `Config()`, each with what is known of its result."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from .config import Config, ConfigError, nearest, validate


class Preset(NamedTuple):
    changes: dict[str, Any]  # differences from Config()
    evidence: str  # what is known of its result


# The fields in which the published recipes of the three methods differ. `--mode` changes them too.
MODES: dict[str, dict[str, Any]] = {
    "condinst": dict(mask_channels=8, max_mask_locations=500, student_augmentation="none"),
    "boxinst": dict(mask_channels=16, max_mask_locations=64, student_augmentation="none"),
    "boxteacher": dict(mask_channels=16, max_mask_locations=64, student_augmentation="strong"),
}


# --- small: two CPU cores, from scratch -----------------------------------------------------------

SMALL: dict[str, Any] = dict(
    bottom_rows=0,
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
    weak_warmup_steps=400,  # with 100, large masks remain filled boxes in some runs
    pseudo_start=1200,  # not the paper's: over so few steps, an earlier start helps less
    ema_momentum=0.99,  # 0.999 would average over most of so short a run
    student_augmentation="none",  # other colors help in long runs only
    teacher_size=0,
    checkpoint_every=500,
)

PRESETS: dict[str, Preset] = {
    "shapes": Preset(
        SMALL
        | dict(
            dataset="shapes",
            workers=0,  # all images are painted before the first step
            train_sizes=(192,),  # the images' own size, for student, teacher and test alike
            train_max_size=192,
            test_size=192,
            test_max_size=192,
            size_unit=48,
            max_mask_locations=16,
            # Not the paper's. Over these steps the paper's losses gain less (docs/study.md).
            pairwise_ends=True,
            pseudo_mask_weight=2.0,
        ),
        "here: 40.0 and 41.3 mask AP, 2 seeds (BoxInst 38.2, 37.4); CondInst, 2400 steps: 64.9",
    ),
    "nuclei": Preset(
        SMALL
        | dict(
            train_json="../shared/data/nuclei/annotations/boxes_train.json",
            train_images="../shared/data/nuclei/images/train",
            val_json="../shared/data/nuclei/annotations/instances_val.json",
            val_images="../shared/data/nuclei/images/val",
            contrast="stretch",  # many images use a tenth of the range
            train_scales=(1.5, 1.75, 2.0),  # half of the nuclei have a side under 20 pixels
            train_max_size=4096,
            test_scale=2.0,
            test_max_size=4096,
            crop=192,
            teacher_size=224,
            size_unit=32,
            weak_warmup_steps=250,
            max_detections=1000,
        ),
        "here: 52.3 mask AP, 5 seeds (BoxInst 49.4, CondInst 53.7)",
    ),
    "photos": Preset(
        SMALL
        | dict(
            train_json="data/photos/train.json",
            train_images="data/photos/train",
            val_json="data/photos/val.json",
            val_images="data/photos/val",
            train_sizes=(288,),  # with several, all images would be padded to the largest
            train_max_size=480,
            teacher_size=320,
            test_size=320,
            test_max_size=480,
            backbone="mobilenet_v2",
            pretrained=True,
            norm="frozen_bn",
            freeze_at=2,
            size_unit=32,  # objects of 30 pixels belong to P3, of 300 to P6
            max_mask_locations=32,
            steps=900,  # half an hour
            lr=5e-4,  # 1e-3 is for random weights
            weak_warmup_steps=225,
            pseudo_start=600,
        ),
        "here: not run",
    ),
}


# --- COCO: the published recipes, on GPUs ---------------------------------------------------------

BACKBONES: dict[str, dict[str, Any]] = {
    "r50": dict(backbone="resnet50"),
    "r101": dict(backbone="resnet101"),
    "r101_dcn": dict(backbone="resnet101", deformable=True),
    "swin_b": dict(backbone="swin_b", optimizer="adamw", lr=1e-4, weight_decay=0.05),
}
PUBLISHED = {  # (mode, backbone, schedule): mask AP on COCO
    ("condinst", "r50", "1x"): "published 35.9 AP on test-dev, 36.2 on val",
    ("condinst", "r50", "3x"): "published 37.7 AP on test-dev, 37.5 on val",
    ("condinst", "r101", "1x"): "no published AP known",
    ("condinst", "r101", "3x"): "no published AP known",
    ("boxinst", "r50", "1x"): "published 30.7 AP on val",
    ("boxinst", "r50", "3x"): "published 32.1 AP on test-dev",
    ("boxinst", "r101", "1x"): "no published AP known",
    ("boxinst", "r101", "3x"): "no published AP known",
    ("boxteacher", "r50", "1x"): "published 32.9 AP on test-dev, 32.2 on val (32.6 unaugmented)",
    ("boxteacher", "r50", "3x"): "published 35.0 AP on test-dev, 34.8 on val",
    ("boxteacher", "r101", "1x"): "no published AP known",
    ("boxteacher", "r101", "3x"): "published 36.5 AP on test-dev",
    ("boxteacher", "r101_dcn", "3x"): "published 37.6 AP on test-dev",
    ("boxteacher", "swin_b", "3x"): "published 40.6 AP on test-dev",
}


def coco_changes(mode: str, backbone: str, schedule: str) -> dict[str, Any]:
    """1x is 90,000 steps of 16 images, 3x is 270,000, with blurred images for BoxTeacher."""
    changes = {"mode": mode, **BACKBONES[backbone], **MODES[mode]}
    if schedule == "3x":
        changes |= dict(steps=270_000, lr_drops=(210_000, 250_000))
        if mode == "boxteacher":
            changes["student_augmentation"] = "strong_blur"
    return changes


PRESETS |= {
    "_".join(("coco", *recipe)): Preset(coco_changes(*recipe), f"{published}; here: not run")
    for recipe, published in PUBLISHED.items()
}


# --- Pascal VOC and Cityscapes: the published recipes ---------------------------------------------

# SGD's learning rate is for 16 images, so it is 0.005 for these 8. What is not published (warm-ups,
# the teacher's size) is as on COCO, where the teacher sees images of test size.
VOC: dict[str, Any] = dict(
    train_json="data/voc/boxes_trainaug.json",
    train_images="data/VOCdevkit/VOC2012/JPEGImages",
    val_json="data/voc/instances_val.json",
    val_images="data/VOCdevkit/VOC2012/JPEGImages",
    bottom_rows=0,
    batch_size=8,
    steps=47_619,  # 36 epochs of the 10,582 images of the augmented training set
    epochs=36,
    lr_drops=(35_714, 43_651),  # 27 and 33 epochs
    metric="voc",
)
CITYSCAPES: dict[str, Any] = dict(
    train_json="data/cityscapes/boxes_train.json",
    train_images="data/cityscapes/leftImg8bit/train",
    val_json="data/cityscapes/instances_val.json",
    val_images="data/cityscapes/leftImg8bit/val",
    train_sizes=(800, 832, 864, 896, 928, 960, 992, 1024),
    train_max_size=2048,
    test_size=1024,
    test_max_size=2048,
    teacher_size=1024,
    bottom_rows=0,
    batch_size=8,
    steps=24_000,
    lr_drops=(18_000,),
    metric="cityscapes",
)
PUBLISHED_ELSEWHERE = {  # (data set, mode, backbone): mask AP on its validation set
    ("voc", "boxteacher", "r50"): "published 38.6 AP, 66.4 AP50, 38.7 AP75",
    ("voc", "boxteacher", "r101"): "published 40.3 AP, 67.8 AP50, 41.3 AP75",
    ("cityscapes", "boxteacher", "r50"): "published 21.7 AP, 47.5 AP50 (from COCO: 26.8, 54.2)",
}


def other_preset(data: str, mode: str, backbone: str) -> Preset:
    """CondInst learns from the masks, in the file that has them."""
    changes = {"voc": VOC, "cityscapes": CITYSCAPES}[data]
    changes = {"mode": mode, **BACKBONES[backbone], **MODES[mode], **changes}
    if mode == "condinst":
        changes["train_json"] = changes["train_json"].replace("boxes_", "instances_")
    published = PUBLISHED_ELSEWHERE.get((data, mode, backbone), "no published AP known")
    return Preset(changes, f"{published}; here: not run")


PRESETS |= {
    f"{data}_{mode}_{backbone}": other_preset(data, mode, backbone)
    for data, backbone in (("voc", "r50"), ("voc", "r101"), ("cityscapes", "r50"))
    for mode in MODES
}


# --- from a preset to a configuration -------------------------------------------------------------


def from_preset(preset: str, images: int = 0, **given: Any) -> Config:
    """The configuration of a preset, with the `given` fields replaced (see `override`)."""
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}{nearest(preset, PRESETS)} (--list shows all)")
    config = dataclasses.replace(Config(preset=preset), **PRESETS[preset].changes)
    return override(config, images, **given)


def override(config: Config, images: int = 0, **given: Any) -> Config:
    """`config` with the `given` fields replaced. It is checked.

    With `epochs`, the number of training `images` gives `steps`. While it is not known (0), `steps`
    is the config's.

    Some fields follow others, unless they are given too. `mode` changes those in which its
    published recipe differs from that of the config's mode (MODES). `steps` moves `lr_drops` and
    `pseudo_start` in proportion. If it makes the run shorter, it also makes both warm-ups shorter,
    since masks are filled boxes until the weak losses act. With `resume` all these stay: what the
    run has behind it would change.
    """
    files = [f for f in ("train_json", "train_images", "val_json", "val_images") if given.get(f)]
    if files and given.get("dataset", config.dataset) == "shapes":
        raise ConfigError(
            f"{files[0]}: preset {config.preset} generates its images and reads no files;"
            " start from preset nuclei, photos (both small) or coco_boxteacher_r50_1x (GPUs)"
        )

    if "steps" in given and given.get("epochs"):
        raise ConfigError("steps and epochs are both lengths of the run: give only one")
    epochs = given.setdefault("epochs", 0.0 if "steps" in given else config.epochs)
    if images and 0 < epochs < 2**32:  # else `validate` refuses it
        batch_size = given.get("batch_size", config.batch_size)
        given["steps"] = max(round(epochs * images / max(batch_size, 1)), 1)

    follow: dict[str, Any] = {}
    if given.get("mode", config.mode) != config.mode:
        old, new = MODES[config.mode], MODES[given["mode"]]
        follow |= {field: value for field, value in new.items() if value != old[field]}
    if "steps" in given and not given.get("resume"):
        steps, shorter = given["steps"], min(given["steps"], config.steps)
        follow["lr_drops"] = tuple(drop * steps // config.steps for drop in config.lr_drops)
        follow["pseudo_start"] = config.pseudo_start * steps // config.steps
        for field in ("warmup_steps", "weak_warmup_steps"):
            follow[field] = getattr(config, field) * shorter // config.steps
    config = dataclasses.replace(config, **(follow | given))
    validate(config)
    return config
