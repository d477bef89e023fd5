"""The studies: configurations that `boxteacher.tools.study` trains and compares."""

from __future__ import annotations

from typing import NamedTuple

from boxteacher.presets import PRESETS


class C(NamedTuple):
    """A configuration."""

    label: str
    words: str  # of train.py's command line
    reference: str = ""  # the label to compare with, by default the study's first
    masks_from: str = ""  # self-training: the label whose run makes the masks to learn from


STEPS = PRESETS["shapes"].changes["steps"]
SIDE = PRESETS["shapes"].changes["train_sizes"][0]
TEACHER = "shapes --mode boxteacher"
NUCLEI = "../shared/data/nuclei/annotations/instances_train.json"  # with masks

STUDIES: dict[str, list[C]] = {
    "methods_shapes": [  # learning rates and warm-ups: the preset's, until they are tuned
        C("BoxInst", "shapes --mode boxinst --lr 0.001 --weak-warmup-steps 400"),
        C("BoxTeacher", "shapes --mode boxteacher --lr 0.001 --weak-warmup-steps 400"),
        C("CondInst", "shapes --mode condinst --lr 0.001"),
        C("self-training", "shapes --mode condinst --lr 0.001", masks_from="BoxInst"),
    ],
    "methods_nuclei": [
        C("BoxInst", "nuclei --mode boxinst --lr 0.001 --weak-warmup-steps 250"),
        C("BoxTeacher", "nuclei --mode boxteacher --lr 0.001 --weak-warmup-steps 250"),
        C("CondInst", f"nuclei --mode condinst --lr 0.001 --train-json {NUCLEI}"),
        C("self-training", "nuclei --mode condinst --lr 0.001", masks_from="BoxInst"),
    ],
    "length_shapes": [
        C(f"{mode} x{x}", f"shapes --mode {mode} --steps {int(x * STEPS)}", f"boxinst x{x}")
        for x in (0.5, 1, 2, 4)
        for mode in ("boxinst", "boxteacher", "condinst")
    ],
    "pseudo_losses": [
        C("none", f"{TEACHER} --pseudo-mask-weight 0 --pseudo-affinity-weight 0"),
        C("pixel", f"{TEACHER} --pseudo-affinity-weight 0"),
        C("affinity", f"{TEACHER} --pseudo-mask-weight 0"),
        C("both", TEACHER),
    ],
    "score": [
        C("mask-aware", TEACHER),
        C("detection", f"{TEACHER} --pseudo-score detection"),
        C("constant", f"{TEACHER} --pseudo-score constant"),
        C("published", f"{TEACHER} --pseudo-score published"),
    ],
    "augmentation": [
        C(f"{m} x{x} {colors}", f"{words} --student-augmentation {colors}", f"{m} x{x} none")
        for m in ("condinst", "boxteacher")
        for x in (1, 2)
        for words in (f"shapes --mode {m} --steps {x * STEPS}",)
        for colors in ("none", "weak", "strong")
    ],
    "ema": [C(m, f"{TEACHER} --ema-momentum {m}") for m in ("0", "0.9", "0.99", "0.999")],
    "teacher_size": [
        C(f"{x}x", f"{TEACHER} --teacher-size {int(x * SIDE)} --test-max-size {2 * SIDE}")
        for x in (1, 1.2)
    ],
}
