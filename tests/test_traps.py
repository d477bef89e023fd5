"""traps.py: each known trap is told once, and a good run is left in peace."""

import math

import pytest

from boxteacher import config
from boxteacher.command_line import parse
from boxteacher.traps import Traps

GOOD = {"similar_pair_share": 0.3, "mask_fill": 0.6, "lost_boxes": 0.02, "lost_side": 4.0}
GOOD |= {"pseudo_masks_share": 0.9, "pseudo_mask_iou": math.nan}


def warnings_of(lines, start=0, *words):
    """All warnings of a run of 1000 steps that logs `lines` metrics, one every 20 steps."""
    steps = ["--steps=1000", "--warmup-steps=50", "--pseudo-start=0"]
    traps = Traps(parse(["shapes", *steps, *words]), start)
    told = (traps.warnings(start + 20 * k, GOOD | line) for k, line in enumerate(lines, 1))
    return [warning for warnings in told for warning in warnings]


def test_a_good_run_has_no_warnings():
    assert warnings_of([{}] * 50) == []


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"similar_pair_share": 0.01}, "only 1.0% of the pairs of pixels look alike"),
        ({"similar_pair_share": 0.99}, "99.0% of the pairs of pixels look alike"),
        ({"mask_fill": 0.97}, "masks fill 97% of their boxes after half of the run"),
        ({"pseudo_masks_share": 0.0}, "no pseudo mask for 200 steps"),
        ({"lost_boxes": 0.25}, "25% of the boxes have no positive location"),
    ],
)
def test_a_trap_is_told_once(metrics, words):
    (text,) = warnings_of([metrics] * 50)
    assert words in text


def test_a_scale_that_helps_is_named():
    (text,) = warnings_of([{"lost_boxes": 0.3, "lost_side": 3.2}] * 20)
    assert "images 2.5 times as large would help (train_sizes" in text


def test_one_odd_step_is_no_trap():
    assert warnings_of([{}] * 20 + [{"similar_pair_share": 0.0, "lost_boxes": 0.5}]) == []
    assert warnings_of([{"similar_pair_share": 0.0}] * 9) == []


def test_a_few_logged_steps_are_no_trap_however_far_apart():
    traps = Traps(parse(["shapes", "--warmup-steps=50", "--pseudo-start=0"]))
    told = [traps.warnings(300 * k, GOOD | {"pseudo_masks_share": 0.0}) for k in (1, 2, 3)]
    assert [len(warnings) for warnings in told] == [0, 0, 1]


def test_filled_boxes_are_ordinary_in_the_first_half():
    assert warnings_of([{"mask_fill": 1.0}] * 25) == []


def test_pseudo_masks_are_waited_for_anew_after_each():
    """200 steps after the warm-up of 50, or after the last mask, or after a resumed run's start."""
    none, one = {"pseudo_masks_share": 0.0}, {}
    assert warnings_of([none] * 12) == []
    assert len(warnings_of([none] * 13)) == 1
    assert warnings_of([none] * 11 + [one] + [none] * 9) == []
    assert warnings_of([none] * 9, 500) == []
    assert len(warnings_of([none] * 10, 500)) == 1
    assert warnings_of([none] * 34, 0, "--pseudo-start=500") == []
    assert len(warnings_of([none] * 35, 0, "--pseudo-start=500")) == 1


@pytest.mark.parametrize(
    ("words", "is_far"),
    [
        ("coco_boxteacher_r50_1x", False),
        ("coco_boxteacher_r50_1x --batch-size 2", False),  # scaled by itself
        ("coco_boxteacher_r50_1x --batch-size 2 --lr 0.00125", True),  # scaled twice
        ("coco_boxteacher_r50_1x --lr 0.1", True),
        ("coco_boxteacher_swin_b_3x", False),
        ("coco_boxteacher_swin_b_3x --lr 0.01", True),
        ("shapes", False),
        ("nuclei --batch-size 2", False),
        ("photos --lr 0.00001", True),
    ],
)
def test_a_learning_rate_far_from_the_usual_is_told(words, is_far):
    told = [w for w in config.warnings(parse(words.split())) if "far from what is usual" in w]
    assert len(told) == is_far
