"""The benchmark measures what it says. No test is about how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boxteacher.command_line import parse
from boxteacher.config import ConfigError
from boxteacher.tools import benchmark

torch.set_num_threads(1)

TINY = """shapes --fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1
    --device cpu --workers 0 --shapes-size 64 --train-sizes 64 --train-max-size 64
    --teacher-size 0 --size 64x96 --boxes 3 --steps 1""".split()
PARTS = {"teacher", "pseudo labels", "augment", "student forward", "backward", "optimizer and EMA"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict, Path]:
    trace = tmp_path_factory.mktemp("benchmark") / "trace.json"
    return benchmark.main([*TINY, "--profile", str(trace)]), trace


def test_data_inference_and_training_are_measured(measured):
    results, _ = measured
    assert list(results) == ["data", "inference", "train"]
    for result in results.values():
        assert result["seconds"] > 0
        assert result["peak_mib"] > 10
    for name in ("data", "train"):
        assert results[name]["images_per_s"] == pytest.approx(2 / results[name]["seconds"])
    assert results["inference"]["detections"] == 100


def test_a_step_is_the_sum_of_its_parts(measured):
    train = measured[0]["train"]
    assert set(train["parts"]) == set(train["flops"]) == PARTS
    assert sum(train["parts"].values()) == pytest.approx(train["seconds"], rel=1e-6)
    assert train["mfu"] == pytest.approx(
        sum(train["flops"].values()) / train["seconds"] / train["matmul_peak"]
    )


def test_flops_are_those_of_convolutions_and_products(measured):
    """The teacher runs the student's network; all of it trains here, so backward is twice that,
    except for the gradient with regard to the image."""
    flops = measured[0]["train"]["flops"]
    assert flops["teacher"] == pytest.approx(flops["student forward"], rel=0.1)
    stem = 2 * (2 * (3 * 7 * 7 * 64) * (32 * 48))  # two images, half as wide and high behind it
    assert flops["backward"] == 2 * flops["student forward"] - stem
    assert flops["augment"] == flops["optimizer and EMA"] == 0


def test_the_profile_is_a_chrome_trace(measured):
    names = {event.get("name") for event in json.loads(measured[1].read_text())["traceEvents"]}
    assert "aten::convolution" in names


@pytest.mark.parametrize("teacher_size", [0, 128])
def test_there_are_boxes_and_pseudo_masks_to_learn_from(teacher_size):
    words = [*TINY[: TINY.index("--size")], "--teacher-size", str(teacher_size)]
    cfg = parse([*words, "--batch-size", "2"])
    state = benchmark.make_state(cfg, torch.device("cpu"))
    batch = benchmark.make_batch(cfg, state.teacher, 96, 128, 5, torch.device("cpu"))
    assert batch.images.shape == (2, 3, 96, 128)
    assert batch.valid.sum(1).tolist() == [5, 5]
    pseudo = state.teacher.make_pseudo_masks(batch)
    assert (pseudo.weights > 0)[batch.valid].float().mean() > 0.5


def test_boxinst_has_no_teacher_to_measure(capsys):
    results = benchmark.main([*TINY, "--mode", "boxinst", "--only", "train", "--dtype", "bfloat16"])
    assert set(results["train"]["parts"]) == PARTS - {"teacher", "pseudo labels"}
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (line["benchmark"], line["mode"], line["dtype"]) == ("train", "boxinst", "bfloat16")
    assert (line["batch"], line["size"], line["boxes"]) == (2, [64, 96], 3)


def test_files_are_decoded_where_there_are_none(tmp_path):
    words = "nuclei --workers 0 --batch-size 4 --crop 64 --train-scales 0.5 --train-json none.json"
    result = benchmark.measure_data(parse(words.split()), steps=2)
    assert "JPEG" in result["source"]
    assert result["images_per_s"] > 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--size 512", "--size"),
        ("--size axb", "--size"),
        ("--dtype float16", "bfloat16"),
        ("--only everything", "inference"),
        ("--batch 0", "batch_size must be 1 or more"),
        ("--lr x", "lr: 'x' is not a number"),
        ("--batc 1", "nearest is --batch"),
        ("--siz 3", "nearest is --size"),
        ("--steps -1", "steps must"),
        ("--boxes 0", "--boxes must be 1 or more"),
        ("shape", "nearest is shapes"),
    ],
)
def test_bad_options_end_with_one_line(words, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        benchmark.read_arguments(words.split())
    assert "\n" not in str(caught.value)


def test_it_is_a_program(tmp_path):
    command = [sys.executable, "-m", "boxteacher.tools.benchmark", "--dtype", "int8"]
    root = Path(__file__).parents[1]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
