"""The configuration: presets, the command line, what is refused, and the file kept with a run."""

import dataclasses
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxteacher import config
from boxteacher.command_line import parse
from boxteacher.config import FIELDS, Config, ConfigError, validate
from boxteacher.presets import PRESETS, from_preset


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- presets ------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_meant_and_has_evidence(name):
    cfg = parse([name])
    assert cfg.preset == name
    assert config.warnings(cfg) == []
    assert "here:" in PRESETS[name].evidence
    for field, value in PRESETS[name].changes.items():
        assert getattr(cfg, field) == value


def test_the_default_preset_is_shapes():
    assert parse([]) == parse(["shapes"]) == from_preset("shapes")
    assert parse([]).dataset == "shapes"


def test_all_coco_presets_exist():
    names = {
        f"coco_{mode}_{depth}_{schedule}"
        for mode in ("condinst", "boxinst", "boxteacher")
        for depth in ("r50", "r101")
        for schedule in ("1x", "3x")
    }
    names |= {"coco_boxteacher_r101_dcn_3x", "coco_boxteacher_swin_b_3x"}
    assert set(PRESETS) == names | {"shapes", "nuclei"}


def test_coco_recipes_are_the_published_ones():
    """Written out from the method's description, section 6 (and 2 for CondInst)."""
    one, three = parse(["coco_boxteacher_r50_1x"]), parse(["coco_boxteacher_r101_3x"])
    assert replace(one, preset="custom") == Config()
    assert (one.steps, one.lr_drops, one.lr) == (90_000, (60_000, 80_000), 0.01)
    assert (one.batch_size, one.optimizer, one.momentum, one.weight_decay) == (16, "sgd", 0.9, 1e-4)
    assert (one.warmup_steps, one.weak_warmup_steps) == (1000, 10_000)
    assert one.student_augmentation == "strong"
    assert (three.steps, three.lr_drops) == (270_000, (210_000, 250_000))
    assert (three.backbone, three.student_augmentation) == ("resnet101", "strong_blur")
    assert (three.warmup_steps, three.weak_warmup_steps) == (1000, 10_000)
    condinst = parse(["coco_condinst_r50_3x"])
    assert (condinst.mask_channels, condinst.max_mask_locations) == (8, 500)
    assert condinst.student_augmentation == "none"
    boxinst = parse(["coco_boxinst_r50_1x"])
    assert (boxinst.mask_channels, boxinst.max_mask_locations) == (16, 64)
    assert boxinst.student_augmentation == "none"
    dcn, swin = parse(["coco_boxteacher_r101_dcn_3x"]), parse(["coco_boxteacher_swin_b_3x"])
    assert dcn == replace(three, preset=dcn.preset, deformable=True)
    assert (swin.optimizer, swin.lr, swin.weight_decay) == ("adamw", 1e-4, 0.05)
    assert (swin.backbone, swin.drop_path, swin.steps) == ("swin_b", 0.2, 270_000)


def test_mode_brings_its_recipe_unless_overruled():
    cfg = parse(["shapes", "--mode", "condinst", "--mask-channels", "12"])
    assert (cfg.mode, cfg.mask_channels, cfg.max_mask_locations) == ("condinst", 12, 500)
    from_teacher = parse(["coco_boxteacher_r50_1x", "--mode", "boxinst"])
    assert replace(from_teacher, preset="") == replace(parse(["coco_boxinst_r50_1x"]), preset="")
    assert parse(["shapes", "--mode", "boxinst"]) == replace(parse(["shapes"]), mode="boxinst")
    assert parse(["shapes", "--mode", "boxteacher"]) == parse(["shapes"])


# --- steps scale the schedule -------------------------------------------------


def test_a_shorter_run_scales_its_schedule():
    cfg = parse(["coco_boxteacher_r50_1x", "--steps", "9000"])
    assert (cfg.warmup_steps, cfg.weak_warmup_steps, cfg.lr_drops) == (100, 1000, (6000, 8000))
    assert config.warnings(cfg) == []


def test_a_longer_run_keeps_its_warmups_and_moves_its_drops():
    cfg = parse(["coco_boxteacher_r50_1x", "--steps", "180000"])
    assert (cfg.warmup_steps, cfg.weak_warmup_steps) == (1000, 10_000)
    assert cfg.lr_drops == (120_000, 160_000)


def test_what_is_given_is_not_scaled_but_warned_about():
    argv = ["coco_boxteacher_r50_1x", "--steps=900", "--weak-warmup-steps=451"]
    assert parse(argv).weak_warmup_steps == 451
    (line,) = config.warnings(parse(argv))
    assert "weak_warmup_steps=451" in line
    assert config.warnings(parse([*argv, "--mode", "condinst"])) == []
    assert config.warnings(parse([*argv, "--weak-warmup-steps", "450"])) == []
    (line,) = config.warnings(parse(["coco_boxinst_r50_1x", "--steps=900", "--warmup-steps=500"]))
    assert line.startswith("warmup_steps=500")
    (line,) = config.warnings(parse(["coco_boxinst_r50_1x", "--steps=900", "--lr-drops=600,900"]))
    assert "lr_drops" in line


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 10**6))
def test_any_length_of_any_preset_is_without_warning(name, steps):
    assert config.warnings(from_preset(name, steps=steps)) == []


# --- the command line ---------------------------------------------------------


def test_spellings():
    cfg = parse(["nuclei", "--train_scales", "1.5,2", "--train-sizes", "64", "96", "--lr=1e-4"])
    assert (cfg.train_scales, cfg.train_sizes, cfg.lr) == ((1.5, 2.0), (64, 96), 1e-4)
    assert parse(["nuclei", "--train-scales", "", "--test-scale", "0"]).train_scales == ()
    assert parse(["--steps", "7", "--steps", "8"]).steps == 8
    assert parse(["--preset", "nuclei"]) == parse(["nuclei"])
    assert parse(["--out", "--seed=3"[2:]]).out == "seed=3"
    assert parse(["--out=--odd"]).out == "--odd"


@pytest.mark.parametrize(
    ("argv", "flip"),
    [
        ([], True),
        (["--flip"], True),
        (["--flip", "false"], False),
        (["--flip=False"], False),
        (["--no-flip"], False),
        (["--no_flip", "--flip", "true"], True),
    ],
)
def test_booleans(argv, flip):
    assert parse([*argv, "--seed", "1"]).flip is flip


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["shape"], "no preset 'shape'; the nearest is shapes"),
        (["coco_boxtecher_r50_1x"], "the nearest is coco_boxteacher_r50_1x"),
        (["--lrr", "1"], "no option --lrr; the nearest is --lr"),
        (["-stepps=3"], "the nearest is --steps"),
        (["--weak-warmup", "3"], "the nearest is --weak-warmup-steps"),
        (["--no-lr"], "no option --no-lr; the nearest is --"),
        (["--mode", "boxtecher"], "condinst, boxinst, boxteacher, got 'boxtecher'; the nearest is"),
        (["--lr", "abc"], "lr wants a number, got 'abc'"),
        (["--lr", "nan"], "lr wants a number, got 'nan'"),
        (["--lr", "inf"], "lr wants a number"),
        (["--steps", "1.5"], "steps wants a whole number, got '1.5'"),
        (["--flip", "maybe"], "flip wants true or false, got 'maybe'"),
        (["--train-sizes", "640,x"], "train_sizes wants whole numbers such as 640,800"),
        (["--train-scales", "1,nan"], "train_scales wants numbers"),
        (["--steps"], "--steps takes one value, got none"),
        (["--out", "a", "b"], "--out takes one value, got a b"),
        (["shapes", "nuclei"], "'nuclei'"),
    ],
)
def test_what_is_not_understood_is_refused(argv, words):
    assert words in refusal(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "steps must be 1 or more"),
        (["--batch-size", "-3"], "batch_size must be 1 or more"),
        (["--lr", "-0.1"], "lr must be 0 or more"),
        (["--lr", "0"], "nothing would be learned"),
        (["--iou-threshold", "1.5"], "iou_threshold must be between 0 and 1"),
        (["--ema-momentum", "2"], "ema_momentum must be between 0 and 1"),
        (["--train-sizes="], "train_sizes"),
        (["--train-sizes", "96,0"], "train_sizes"),
        (["--train-scales", "1,-2"], "train_scales"),
        (["--train-sizes", "256"], "raise train_max_size"),
        (["--test-size", "256"], "raise test_max_size"),
        (["--teacher-size", "1500"], "raise teacher_max_size"),
        (["--fpn-channels", "40"], "multiple of 32"),
        (["--lr-drops", "800,600"], "ascending"),
        (["--norm", "frozen_bn"], "use --norm bn or --norm gn"),
        (["--freeze-at", "2"], "use --freeze-at 0"),
        (["--pretrained", "--norm", "gn"], "--no-pretrained"),
        (["--resume", "--init", "x.pt"], "give only one"),
        (["--train-json", "x.json"], "start from preset nuclei"),
    ],
)
def test_what_cannot_be_meant_is_refused(argv, words):
    assert words in refusal("shapes", *argv)


def test_pretrained_weights_from_anywhere_may_be_frozen():
    frozen = ["shapes", "--norm", "frozen_bn", "--freeze-at", "2"]
    for source in (["--pretrained"], ["--backbone-weights", "r18.pth"], ["--init", "last.pt"]):
        assert parse([*frozen, *source]).norm == "frozen_bn"


@pytest.mark.parametrize("field", [f for f, kind in FIELDS.items() if kind in (int, float)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_no_number_may_be_negative_or_not_finite(field, value):
    with pytest.raises(ConfigError, match=field):
        validate(replace(Config(), **{field: value}))


def test_help_and_list(capsys):
    for argv in (["--help"], ["nuclei", "-h"], ["--list"]):
        with pytest.raises(SystemExit) as done:
            parse(argv)
        assert done.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"  --{field.name.replace('_', '-')} " in shown
    assert "data loading processes per rank" in shown  # the comment beside the field
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.evidence}" in shown


# --- the file kept with a run -------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    cfg = parse([name])
    assert config.from_json(config.to_json(cfg)) == cfg
    assert config.from_dict(dataclasses.asdict(cfg)) == cfg


@given(st.floats(1e-9, 1e3), st.lists(st.floats(0.1, 9), max_size=4), st.text())
def test_json_round_trip_is_exact(lr, scales, out):
    cfg = Config(lr=lr, train_scales=tuple(scales), out=out)
    assert config.from_json(config.to_json(cfg)) == cfg


def test_json_of_an_older_program_takes_defaults():
    assert config.from_json('{"steps": 5, "lr": 1}') == Config(steps=5, lr=1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepps": 1}, "no field 'stepps'; the nearest is steps"),
        ({"steps": 1.5}, "steps wants a whole number, got 1.5"),
        ({"steps": True}, "steps wants a whole number"),
        ({"lr": None}, "lr wants a number, got None"),
        ({"lr": float("nan")}, "lr wants a number"),
        ({"out": 3}, "out wants text"),
        ({"mode": ["boxinst"]}, "mode wants one of"),
        ({"train_sizes": 3}, "train_sizes wants whole numbers"),
        ({"train_sizes": [[3]]}, "train_sizes wants whole numbers"),
        ([1], "wants an object"),
    ],
)
def test_json_that_does_not_fit_is_refused(values, words):
    with pytest.raises(ConfigError) as caught:
        config.from_json(json.dumps(values), "runs/x/config.json")
    assert str(caught.value).startswith("runs/x/config.json: ")
    assert words in str(caught.value)


def test_text_that_is_not_json_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        config.from_json('{"steps": 5')
