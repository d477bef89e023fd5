"""The studies: configurations that `boxteacher.tools.study` trains and compares."""

from __future__ import annotations

from typing import NamedTuple


class C(NamedTuple):
    """A configuration. Two fields name another one, whose run with the same seed comes first."""

    label: str
    words: str  # of train.py's command line
    start_from: str = ""  # the one whose weights are the first weights
    masks_from: str = ""  # self-training: the one that makes the masks to learn from
    reference: str = ""  # the one to compare with, by default the study's first


FIRST, BOXINST, SELF_TRAINING = "BoxInst, first part", "BoxInst", "self-training"
PAPER = "--no-pairwise-ends --pseudo-mask-weight 0.5"  # the losses of the papers, to the end
ENDS = "--pairwise-ends --pseudo-mask-weight 2"  # chosen on seed 10 of the shapes
THRESHOLD = "--mask-threshold 0.7"  # the same
CONDINST = "--mode condinst --mask-channels 16"  # the network of the other modes
MORE = "--steps 600 --lr 0.0005 --warmup-steps 16 --weak-warmup-steps 1"  # a second part
MASKS = "--train-json ../shared/data/nuclei/annotations/instances_train.json"


def two_parts(changes: dict[str, str]) -> list[C]:
    """What 600 more steps make of a BoxInst run on the shapes, and CondInst with the steps of both
    parts. `changes`: further rows, BoxTeacher with other words."""
    paper = f"shapes --pseudo-start 0 {PAPER}"
    teacher = {"BoxTeacher": THRESHOLD, "BoxTeacher, pairwise loss ends": ENDS} | changes
    second = {
        BOXINST: f"{paper} {MORE} --mode boxinst",
        SELF_TRAINING: f"shapes {CONDINST} {MORE}",
        "BoxInst, pairwise loss ends": f"{paper} {MORE} --mode boxinst --pairwise-ends",
        **{label: f"{paper} {MORE} {words}".strip() for label, words in teacher.items()},
        "CondInst": f"shapes {CONDINST} {MORE}",
    }
    return [
        C(FIRST, f"{paper} --mode boxinst --steps 1800", "", "", BOXINST),
        *(
            C(label, words, FIRST, FIRST if label == SELF_TRAINING else "", BOXINST)
            for label, words in second.items()
        ),
        C("CondInst from scratch", "shapes --mode condinst --steps 2400", reference=BOXINST),
    ]


STUDIES: dict[str, list[C]] = {
    "shapes": two_parts(
        {
            "threshold 0.5": "",
            "pixel loss only": f"{THRESHOLD} --pseudo-affinity-weight 0",
            "affinity loss only": f"{THRESHOLD} --pseudo-mask-weight 0",
            "detection's score": f"{THRESHOLD} --pseudo-score detection",
            "constant score": f"{THRESHOLD} --pseudo-score constant",
            "published code's score": f"{THRESHOLD} --pseudo-score published",
            "weak colors": f"{THRESHOLD} --student-augmentation weak",
            "strong colors": f"{THRESHOLD} --student-augmentation strong",
            "EMA 0": f"{THRESHOLD} --ema-momentum 0",
            "EMA 0.9": f"{THRESHOLD} --ema-momentum 0.9",
            "EMA 0.999": f"{THRESHOLD} --ema-momentum 0.999",
            "teacher at 1.2x": f"{THRESHOLD} --teacher-size 230 --test-max-size 384",
        },
    ),
    "nuclei": [
        C(BOXINST, "nuclei --mode boxinst"),
        C("BoxTeacher", "nuclei"),
        C("CondInst", f"nuclei --mode condinst {MASKS}"),
        C("BoxTeacher from the first step", "nuclei --pseudo-start 0"),
        C("BoxTeacher, pairwise loss ends", "nuclei --pairwise-ends"),
        C(FIRST, "nuclei --mode boxinst --steps 1200 --weak-warmup-steps 250"),
        C(SELF_TRAINING, f"nuclei {CONDINST} {MORE}", FIRST, FIRST),
    ],
    "default": [
        C("BoxInst", "shapes --mode boxinst"),
        C("BoxTeacher", "shapes"),
        C("BoxInst, the paper's losses", f"shapes --mode boxinst {PAPER}"),
        C("BoxTeacher, the paper's losses", f"shapes {PAPER}"),
        C("CondInst", "shapes --mode condinst"),
    ],
    "length": [
        C(f"{mode} x{x}", f"shapes --mode {mode} --steps {int(x * 1800)}", "", "", f"boxinst x{x}")
        for x in (0.5, 1, 2, 4)
        for mode in ("boxinst", "boxteacher", "condinst")
    ],
}
