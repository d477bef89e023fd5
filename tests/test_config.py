"""The configuration: presets, the command line, what is refused, and the file kept with a run."""

import dataclasses
import json
import re
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxteacher import config
from boxteacher.command_line import parse
from boxteacher.config import FIELDS, Config, ConfigError, validate
from boxteacher.presets import MODES, PRESETS, from_preset, override


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- presets ------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_has_evidence(name):
    cfg = parse([name])
    assert cfg.preset == name
    assert config.warnings(cfg) == []
    assert "here:" in PRESETS[name].evidence
    for field, value in PRESETS[name].changes.items():
        assert getattr(cfg, field) == value


def test_the_default_preset_is_shapes():
    assert parse([]) == parse(["shapes"]) == from_preset("shapes")
    assert parse([]).dataset == "shapes"


def test_all_published_recipes_are_presets():
    names = {
        f"coco_{mode}_{depth}_{schedule}"
        for mode in ("condinst", "boxinst", "boxteacher")
        for depth in ("r50", "r101")
        for schedule in ("1x", "3x")
    }
    names |= {"coco_boxteacher_r101_dcn_3x", "coco_boxteacher_swin_b_3x"}
    names |= {
        f"voc_{m}_{b}" for m in ("condinst", "boxinst", "boxteacher") for b in ("r50", "r101")
    }
    names |= {f"cityscapes_{m}_r50" for m in ("condinst", "boxinst", "boxteacher")}
    assert set(PRESETS) == names | {"shapes", "nuclei", "photos"}


def test_coco_recipes_are_the_published_ones():
    """Written out from the method's description, section 6 (and 2 for CondInst)."""
    one, three = parse(["coco_boxteacher_r50_1x"]), parse(["coco_boxteacher_r101_3x"])
    assert replace(one, preset="custom") == Config()
    assert (one.steps, one.lr_drops, one.lr) == (90_000, (60_000, 80_000), 0.01)
    assert (one.batch_size, one.optimizer, one.weight_decay) == (16, "sgd", 1e-4)
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
    assert (swin.backbone, swin.steps) == ("swin_b", 270_000)


@pytest.mark.parametrize("mode", ["condinst", "boxinst", "boxteacher"])
def test_recipes_of_voc_and_cityscapes(mode):
    """Batch 8 at 0.005; VOC in epochs of 10,582 images, Cityscapes in steps."""
    masks = "instances" if mode == "condinst" else "boxes"
    for backbone in ("r50", "r101"):
        voc = parse([f"voc_{mode}_{backbone}"])
        assert (voc.batch_size, config.scaled_lr(voc), voc.metric) == (8, 0.005, "voc")
        assert (voc.epochs, voc.steps) == (36, round(36 * 10_582 / 8))
        assert voc.lr_drops == (round(27 * 10_582 / 8), round(33 * 10_582 / 8))
        assert (voc.train_sizes, voc.train_max_size) == (Config().train_sizes, 1333)
        assert voc.train_json.endswith(f"{masks}_trainaug.json")
        assert parse([f"voc_{mode}_{backbone}"], 10_582) == voc
    city = parse([f"cityscapes_{mode}_r50"])
    assert (city.batch_size, config.scaled_lr(city), city.metric) == (8, 0.005, "cityscapes")
    assert (city.steps, city.lr_drops, city.epochs) == (24_000, (18_000,), 0)
    assert (min(city.train_sizes), max(city.train_sizes), city.train_max_size) == (800, 1024, 2048)
    assert (city.test_size, city.test_max_size) == (1024, 2048)
    assert city.train_json.endswith(f"{masks}_train.json")
    coco = parse([f"coco_{mode}_r50_1x"])
    for cfg in (city, parse([f"voc_{mode}_r50"])):
        assert (cfg.mode, cfg.bottom_rows) == (mode, 0)
        for field in MODES[mode]:
            assert getattr(cfg, field) == getattr(coco, field)


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


@pytest.mark.parametrize(
    "argv",
    [["coco_boxteacher_r50_1x", "--steps", "180"], ["--steps", "180"], ["voc_boxteacher_r50"]],
)
def test_a_run_that_goes_on_keeps_its_schedule(argv):
    """Else a learning rate that has fallen would rise again, and warm-ups would come back."""
    run = parse(["coco_boxteacher_r50_1x", "--steps", "90", "--pseudo-start", "20"])
    argv = [*argv, "--resume", "--out", "x"]
    cfg = parse(argv, 40, read_run=lambda folder: run)
    assert cfg.steps == 180  # 36 epochs of 40 images in steps of 8, too
    assert (cfg.lr_drops, cfg.pseudo_start) == (run.lr_drops, 20) == ((60, 80), 20)
    assert (cfg.warmup_steps, cfg.weak_warmup_steps) == (1, 10)
    cfg = parse([*argv, "--lr-drops", "120"], 40, read_run=lambda folder: run)
    assert cfg.lr_drops == (120,)


def test_what_is_given_is_not_scaled_but_warned_about():
    argv = ["coco_boxteacher_r50_1x", "--steps=900", "--weak-warmup-steps=451"]
    assert parse(argv).weak_warmup_steps == 451
    (line,) = config.warnings(parse(argv))
    assert "weak_warmup_steps=451" in line
    assert config.warnings(parse([*argv, "--mode", "condinst"])) == []
    assert config.warnings(parse([*argv, "--weak-warmup-steps", "450"])) == []
    (line,) = config.warnings(parse(["coco_boxinst_r50_1x", "--steps=900", "--warmup-steps=500"]))
    assert line.startswith("warmup_steps=500")
    (line,) = config.warnings(parse(["coco_boxinst_r50_1x", "--pairwise-ends"]))
    assert "no pairwise loss at all" in line
    (line,) = config.warnings(parse(["coco_boxinst_r50_1x", "--steps=900", "--lr-drops=600,900"]))
    assert "lr_drops" in line


def test_the_learning_rate_of_sgd_follows_batch_size():
    argv = ["coco_boxteacher_r50_1x", "--batch-size", "4"]
    assert config.scaled_lr(parse(argv)) == 0.0025
    assert config.scaled_lr(parse([*argv, "--optimizer", "adamw"])) == 0.01


# --- lengths in epochs --------------------------------------------------------


def test_epochs_become_steps_when_the_number_of_images_is_known():
    """36 epochs of 400 images in steps of 8, or of 4; the drops stay at 27 and 33 epochs."""
    cfg = parse(["voc_boxteacher_r50"], 400)
    assert cfg.steps == 1800
    assert cfg.lr_drops == pytest.approx((1350, 1650), abs=1)
    assert (cfg.warmup_steps, cfg.weak_warmup_steps) == (37, 378)  # as short in proportion
    assert config.warnings(cfg) == []
    assert parse(["voc_boxteacher_r50", "--batch-size", "4"], 400).steps == 3600
    more = parse(["voc_boxteacher_r50"], 100_000)
    assert (more.steps, more.warmup_steps) == (450_000, 1000)
    assert parse(["voc_boxteacher_r50"], 1).steps == 4  # 4.5, to the even one
    assert parse(["voc_boxteacher_r50", "--epochs", "0.01"], 10).steps == 1


def test_what_is_given_is_not_moved_by_epochs():
    argv = ["voc_boxteacher_r50", "--lr-drops", "500,600", "--weak-warmup-steps", "100"]
    cfg = parse(argv, 400)
    assert (cfg.steps, cfg.lr_drops, cfg.weak_warmup_steps) == (1800, (500, 600), 100)


def test_the_start_of_pseudo_masks_follows_the_length():
    cfg = from_preset("shapes", steps=100, pseudo_start=60)
    assert override(cfg, steps=50).pseudo_start == 30
    assert override(cfg, steps=1000).pseudo_start == 600
    assert override(cfg, steps=50, pseudo_start=7).pseudo_start == 7
    assert override(cfg, steps=200, resume=True).pseudo_start == 60  # the teacher goes on


def test_a_run_that_goes_on_keeps_its_start_of_pseudo_masks():
    """The command that began the run is given again, with --resume. The preset has 1200."""
    for length in (["--steps", "900"], ["--epochs", "10"]):
        run = parse(["nuclei", *length], 720)
        assert (run.steps, run.pseudo_start) == (900, 600)
        runs = {"runs/nuclei": run}
        again = parse(["nuclei", *length, "--resume"], 720, runs.get)
        assert (again.steps, again.pseudo_start) == (900, 600)


def test_steps_and_epochs_replace_each_other():
    steps = parse(["voc_boxteacher_r50", "--steps", "900"], 400)
    assert (steps.steps, steps.epochs) == (900, 0)
    epochs = parse(["coco_boxteacher_r50_1x", "--epochs", "12"], 118_287)
    assert (epochs.steps, epochs.epochs) == (88_715, 12)
    assert parse(["voc_boxteacher_r50", "--epochs", "0"], 400).steps == 47_619
    assert "give only one" in refusal("voc_boxteacher_r50", "--epochs", "2", "--steps", "9")
    assert parse(["shapes", "--steps", "9"], 400).steps == 9


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 10**6))
def test_any_length_of_any_preset_is_without_warning(name, steps):
    assert config.warnings(from_preset(name, steps=steps)) == []


# --- the command line ---------------------------------------------------------


def test_spellings():
    cfg = parse(["nuclei", "--train-scales", "1.5,2", "--train-sizes", "64, 96", "--lr=1e-4"])
    assert (cfg.train_scales, cfg.train_sizes, cfg.lr) == ((1.5, 2.0), (64, 96), 1e-4)
    assert parse(["nuclei", "--train-scales", "", "--test-scale", "0"]).train_scales == ()
    assert parse(["--steps", "7", "--steps", "8"]).steps == 8
    with pytest.raises(ConfigError, match=r"no option nuclei; .*the preset comes first"):
        parse(["--lr", "0.1", "nuclei"])
    with pytest.raises(ConfigError, match="no option --preset"):
        parse(["--preset", "nuclei"])
    assert parse(["--out", "--seed=3"[2:]]).out == "seed=3"
    assert parse(["--out=--odd"]).out == "--odd"


@pytest.mark.parametrize(
    ("argv", "flip"),
    [
        ([], True),
        (["--flip"], True),
        (["--no-flip"], False),
        (["--no-flip", "--flip"], True),
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
        (["--lr", "abc"], "lr: 'abc' is not a number"),
        (["--lr", "nan"], "lr: 'nan' is not a number"),
        (["--lr", "inf"], "lr: 'inf' is not a number"),
        (["--steps", "1.5"], "steps: '1.5' is not a whole number"),
        (["--train-sizes", "640,x"], "train_sizes: 'x' is not a whole number"),
        (["--train-sizes", "64,,x"], "train_sizes: '' is not a whole number"),
        (["--train-scales", "1,nan"], "train_scales: 'nan' is not a number"),
        (["--train-scales", "1,inf"], "train_scales: 'inf' is not a number"),
        (["--steps"], "--steps: expected one value"),
        (
            ["--out", "--odd"],
            "--out: expected one value; if it begins with a dash, write --field=value",
        ),
        (["--out", "a", "b"], "no option b; write --field value"),
        (["--train-sizes", "64", "96"], "no option 96; write --field value, a list as --field 1,2"),
        (
            ["--flip", "maybe"],
            "no option maybe; write --field value, a list as --field 1,2, a switch as --field or",
        ),
        (["--flip=maybe"], "--flip/--no-flip: takes no value, got 'maybe'"),
        (["--train_sizes", "64"], "no option --train_sizes; the nearest is --train-sizes"),
        (["--weak", "3"], "no option --weak; the nearest is --"),
        (["--lst"], "no option --lst; the nearest is --list"),
        (["nucli", "--help"], "no preset 'nucli'; the nearest is nuclei"),
        (["shapes", "nuclei"], "no option nuclei"),
    ],
)
def test_what_is_not_understood_is_refused(argv, words):
    assert words in refusal(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "steps must be 1 or more"),
        (["--steps", "9" * 20], "steps must be 1 or more, and under 2**32"),
        (["--epochs", "1e308"], "epochs must be 0 or more, and under 2**32"),
        (["--batch-size", "-3"], "batch_size must be 1 or more"),
        (["--lr", "-0.1"], "lr must be 0 or more"),
        (["--shapes-size", "32"], "shapes_size must be 64 or more, got 32"),
        (["--lr", "0"], "nothing would be learned"),
        (["--seed", "1764300000000000000"], "seed must be 0 or more, and under 2**32"),
        (["--size-unit", "0"], "size_unit must be 1 or more"),
        (["--teacher-size", "32"], "teacher_size must be 0 or 64 or more"),
        (["--mask-norm", "gn", "--mask-branch-channels", "3"], "4 or more for mask_norm=gn"),
        (["--iou-threshold", "1.5"], "iou_threshold must be between 0 and 1"),
        (["--ema-momentum", "2"], "ema_momentum must be between 0 and 1"),
        (["--train-sizes="], "train_sizes"),
        (["--train-sizes", "96,0"], "train_sizes"),
        (["--train-scales", "1,-2"], "train_scales"),
        (["--train-sizes", "256"], "raise train_max_size"),
        (["--test-size", "256"], "raise test_max_size"),
        (["--teacher-size", "1500"], "raise test_max_size"),
        (["--fpn-channels", "40"], "multiple of 32"),
        (["--lr-drops", "800,600"], "ascending"),
        (["--lr-drops=-5,600"], "0 or more"),
        (["--norm", "frozen_bn"], "use --norm bn or --norm gn"),
        (["--freeze-at", "2"], "use --freeze-at 0"),
        (["--pretrained", "--norm", "gn"], "--no-pretrained"),
        (["--resume", "--init", "x.pt"], "give only one"),
        (["--train-json", "x.json"], "start from preset nuclei"),
    ],
)
def test_what_cannot_work_is_refused(argv, words):
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


def printed(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as done:
        parse(argv)
    assert done.value.code == 0
    return capsys.readouterr().out


def test_help_shows_every_field_and_the_comment_next_to_it(capsys):
    for argv in (["--help"], ["nuclei", "-h"]):
        shown = printed(capsys, *argv)
        for field in dataclasses.fields(Config)[1:]:  # preset is no option but the first word
            assert re.search(rf"^  --{field.name.replace('_', '-')}[ ,]", shown, re.MULTILINE)
        assert "data loading workers of each process" in shown
        assert "one of condinst, boxinst, boxteacher" in " ".join(shown.split())


@pytest.mark.parametrize("name", PRESETS)
def test_help_shows_the_values_of_the_preset(capsys, name):
    shown, cfg = printed(capsys, name, "--help"), parse([name])
    for field, kind in [item for item in FIELDS.items() if item[0] != "preset"]:
        value, option = getattr(cfg, field), "--" + field.replace("_", "-")
        if kind is bool:
            assert re.search(rf"{option}, --no-\S+\s+now {value};", shown)
        else:
            words = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert f"  {option} {words or chr(39) * 2}" in shown


def test_help_is_about_the_command_it_belongs_to(capsys):
    """`python train.py` runs preset shapes: 1800 steps, not the 90,000 of Config()."""
    shown = printed(capsys, "--help")
    assert "those of preset shapes." in shown
    assert "  --lr 0.001 " in shown
    assert "  --steps 1800 " in shown
    assert "  --steps 900 " in printed(capsys, "photos", "--help")


def test_list_shows_all_presets_and_which_were_not_run(capsys):
    run, not_run = printed(capsys, "--list").split("\nRecipes that were not run here:\n")
    for name, preset in PRESETS.items():
        known, is_not_run, _ = preset.evidence.partition("; here: not run")
        assert f"{name}: {known}\n" in (not_run if is_not_run else run)
    assert "size_unit=48" in run
    assert "lr_drops=210000,250000" in not_run


# --- what a checkpoint keeps --------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_dict_round_trip(name):
    cfg = parse([name])
    assert config.from_dict(asdict(cfg), "") == cfg
    assert json.loads(config.to_json(cfg)) == json.loads(json.dumps(asdict(cfg)))


@given(st.floats(1e-9, 1e3), st.lists(st.floats(0.1, 9), max_size=4), st.text())
def test_the_file_kept_with_a_run_is_exact(lr, scales, out):
    cfg = Config(lr=lr, train_scales=tuple(scales), out=out)
    assert config.from_dict(asdict(cfg), "") == cfg
    kept = json.loads(config.to_json(cfg))
    assert (kept["lr"], kept["train_scales"], kept["out"]) == (lr, scales, out)


def test_fields_that_are_missing_take_defaults():
    assert config.from_dict({"steps": 5, "lr": 1}, "") == Config(steps=5, lr=1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepps": 1}, "no field 'stepps'; the nearest is steps"),
        ({"steps": 1.5}, "steps: '1.5' is not a whole number"),
        ({"steps": "5"}, "steps: '5' is of the wrong type"),
        ({"steps": True}, "steps: 'True' is not a whole number"),
        ({"lr": None}, "lr: 'None' is not a number"),
        ({"lr": float("nan")}, "lr: 'nan' is not a number"),
        ({"flip": 1}, "flip must be one of True, False, got '1'"),
        ({"out": 3}, "out: 3 is of the wrong type"),
        ({"mode": ["boxinst"]}, "mode must be one of"),
        ({"train_sizes": 3}, "train_sizes: 3 is of the wrong type"),
        ({"train_sizes": ((3,),)}, "train_sizes: '(3' is not a whole number"),
        ({"train_scales": (1.5, float("inf"))}, "train_scales: 'inf' is not a number"),
        ([1], "no fields by name, but a list"),
    ],
)
def test_a_dict_that_does_not_fit_is_refused(values, words):
    with pytest.raises(ConfigError) as caught:
        config.from_dict(values, "runs/x/last.pt")
    assert str(caught.value).startswith("runs/x/last.pt: ")
    assert words in str(caught.value)
