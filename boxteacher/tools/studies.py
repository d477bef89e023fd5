"""The studies: configurations that `boxteacher.tools.study` trains and compares."""

from __future__ import annotations

from typing import NamedTuple

from boxteacher.presets import PRESETS


class C(NamedTuple):
    """A configuration. Two fields name another one, whose run with the same seed comes first."""

    label: str
    words: str  # of train.py's command line
    start_from: str = ""  # the one whose weights are the first weights
    masks_from: str = ""  # self-training: the one that makes the masks to learn from
    reference: str = "BoxInst"  # the one to compare with


FIRST = "BoxInst, first part"  # the start of all others
CONDINST = "--mode condinst --mask-channels 16"  # the network of the other modes
THRESHOLD = "--mask-threshold 0.7"  # chosen on seed 10


def second_part(preset: str, steps: int, masks: str) -> list[C]:
    """What so many more steps make of a BoxInst run. `masks`: words for a file with true masks."""
    more = f"--steps {steps} --lr 0.0005 --weak-warmup-steps 1"
    teacher = f"{preset} --mode boxteacher {more}"
    side = PRESETS[preset].changes.get("train_sizes", [0])[0]
    changes = {  # of BoxTeacher
        "BoxTeacher": THRESHOLD,
        "BoxTeacher, threshold 0.5": "",
        "pixel loss only": f"{THRESHOLD} --pseudo-affinity-weight 0",
        "affinity loss only": f"{THRESHOLD} --pseudo-mask-weight 0",
        "detection's score": f"{THRESHOLD} --pseudo-score detection",
        "constant score": f"{THRESHOLD} --pseudo-score constant",
        "published code's score": f"{THRESHOLD} --pseudo-score published",
        "weak colors": f"{THRESHOLD} --student-augmentation weak",
        "strong colors": f"{THRESHOLD} --student-augmentation strong",
        **{f"EMA {m}": f"{THRESHOLD} --ema-momentum {m}" for m in ("0", "0.9", "0.999")},
        "teacher at 1.2x": f"{THRESHOLD} --teacher-size {side * 6 // 5} --test-max-size {2 * side}",
    }
    return [
        C("BoxInst", f"{preset} --mode boxinst {more}", FIRST),
        C("self-training", f"{preset} {CONDINST} {more}", FIRST, FIRST),
        *(C(label, f"{teacher} {words}".strip(), FIRST) for label, words in changes.items()),
        C("CondInst", f"{preset} {CONDINST} {more} {masks}".strip(), FIRST),
    ]


NUCLEI_MASKS = "--train-json ../shared/data/nuclei/annotations/instances_train.json"

STUDIES: dict[str, list[C]] = {
    "shapes": [
        C(FIRST, "shapes --mode boxinst"),
        *second_part("shapes", 600, ""),
        C("CondInst from scratch", "shapes --mode condinst --steps 2400"),
    ],
    "nuclei": [
        C(FIRST, "nuclei --mode boxinst"),
        *second_part("nuclei", 333, NUCLEI_MASKS)[:3],
        second_part("nuclei", 333, NUCLEI_MASKS)[-1],
        C("CondInst from scratch", f"nuclei --mode condinst --steps 1333 {NUCLEI_MASKS}"),
    ],
    "length": [
        C(f"{mode} x{x}", f"shapes --mode {mode} --steps {int(x * 1800)}", "", "", f"boxinst x{x}")
        for x in (0.5, 1, 2, 4)
        for mode in ("boxinst", "boxteacher", "condinst")
    ],
}
