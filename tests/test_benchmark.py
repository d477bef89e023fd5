"""The benchmark measures what it says. No test is about how fast anything is."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boxteacher.command_line import parse
from boxteacher.config import ConfigError
from boxteacher.tools import benchmark, benchmark_report, mask_rcnn, measure, synthetic
from boxteacher.tools.measure import Time

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
    assert sum(train["parts"].values()) == pytest.approx(train["seconds"], rel=0.05)
    assert train["of_peak"] == pytest.approx(
        sum(train["flops"].values()) / train["seconds"] / train["peak_rate"]
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
    state = synthetic.make_state(cfg, torch.device("cpu"))
    batch = synthetic.make_batch(cfg, state.teacher, 96, 128, 5, torch.device("cpu"))
    assert batch.images.shape == (2, 3, 96, 128)
    assert batch.valid.sum(1).tolist() == [5, 5]
    pseudo = state.teacher.make_pseudo_masks(batch)
    assert (pseudo.weights > 0)[batch.valid].float().mean() > 0.5


def test_boxinst_has_no_teacher_to_measure(capsys, monkeypatch):
    monkeypatch.setattr(measure, "peak_rate", lambda *_: 1e9)  # bfloat16 takes minutes on some CPUs
    results = benchmark.main([*TINY, "--mode", "boxinst", "--only", "train", "--dtype", "bfloat16"])
    assert set(results["train"]["parts"]) == PARTS - {"teacher", "pseudo labels"}
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (line["benchmark"], line["mode"], line["dtype"]) == ("train", "boxinst", "bfloat16")
    assert (line["batch"], line["size"], line["boxes"]) == (2, [64, 96], 3)


def test_files_are_decoded_where_there_are_none():
    words = "nuclei --workers 0 --batch-size 4 --crop 64 --train-scales 0.5 --train-json none.json"
    result = measure.measure_data(parse(words.split()), steps=2)
    assert (result["images"], result["steps"]) == (synthetic.FILES, 2)
    assert result["images_per_s"] > 0


def test_the_peak_is_that_of_the_fastest_of_products_and_convolutions(monkeypatch):
    """With a clock by which every call takes a second, it is the largest work: 256 channels."""
    monkeypatch.setattr(measure, "time_each", lambda *args: [Time(2.0, 2.0), Time(1.0, 1.0)])
    peak = measure.peak_rate(torch.float32, torch.device("cpu"))
    assert peak == 2 * (256 * 64 * 64) * 9 * 256


def test_an_epoch_of_a_json_of_coco_s_proportions(capsys):
    words = "--only data --synthetic-coco 48 --batch 8 --workers 1".split()
    result = benchmark.main(words)["data"]
    assert result["steps"] == 6
    assert 40 <= result["images"] <= 48  # some have no box
    assert result["read_seconds"] > 0
    assert result["resident_mib"] > 100
    assert 0 < result["worker_own_mib"] < result["worker_mib"]
    assert "read_cpu_seconds" in capsys.readouterr().out


def test_the_json_of_coco_s_proportions(tmp_path):
    with synthetic.training_data(parse([]), coco_images=1000) as cfg:
        text = Path(cfg.train_json).read_text()
    coco = json.loads(text)
    assert len(coco["images"]) == 1000
    assert len(coco["annotations"]) == 7270
    assert len(text) * 118.287 == pytest.approx(414e6, rel=0.2)  # bytes of instances_train2017


def test_a_run_reads_its_images():
    words = [*TINY, "--only", "run", "--batch-size", "4"]
    result = benchmark.main(words)["run"]
    assert result["steps"] == 1
    assert result["graphs"] >= result["graphs_in_second_half"] >= 0
    assert result["slowest_seconds"] >= result["seconds"] > 0


# --- in turns with torchvision --------------------------------------------------------------------


def test_both_programs_are_measured_in_processes_of_their_own(capsys):
    words = "--device cpu --size 64x64 --batch 1 --teacher-size 0 --mode boxinst --steps 1"
    results = benchmark.main([*words.split(), "--against", "torchvision"])
    assert list(results) == ["training", "inference"]
    for result in results.values():
        for unit in ("seconds", "cpu_seconds"):
            least, most = result[f"ratio_{unit}_range"]
            assert 0 < least <= result[f"ratio_{unit}"] <= most
        assert result["theirs_seconds"] > 0
        assert result["theirs_peak_mib"] != result["peak_mib"]
    assert "theirs_cpu_seconds" in capsys.readouterr().out


def test_mask_rcnn_has_as_much_to_do_as_in_a_run():
    cfg = parse("coco_boxinst_r50_1x --batch-size 1 --fpn-channels 64 --teacher-size 0".split())
    state = synthetic.make_state(cfg, torch.device("cpu"))
    batch = synthetic.make_batch(cfg, state.student, 192, 256, 4, torch.device("cpu"))
    network = mask_rcnn.make_mask_rcnn(192, 256, torch.device("cpu"))
    trained = {name for name, p in network.backbone.body.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}
    images, targets = mask_rcnn.their_batch(batch)
    assert images[0].shape == (3, 192, 256)
    assert targets[0]["masks"].shape == (4, 192, 256)
    seen = []
    network.roi_heads.mask_roi_pool.register_forward_hook(lambda _, __, rois: seen.append(rois))
    losses = network.train()(images, targets)
    assert torch.isfinite(sum(losses.values()))
    assert len(seen[0]) > len(targets[0]["boxes"])  # proposals too, not the boxes alone
    with torch.no_grad():
        [found] = network.eval()(images[:1])
    assert len(found["scores"]) == 100
    assert found["masks"].shape == (100, 1, 192, 256)


# --- the report -----------------------------------------------------------------------------------

SMALL = """--device cpu --backbone resnet50 --fpn-channels 64 --tower-convs 1 --workers 0 --batch 1
    --train-sizes 64 --train-max-size 96 --teacher-size 0 --size 64x96 --boxes 3 --steps 1
    --compile off --mode boxteacher""".split()


@pytest.mark.parametrize("name", benchmark_report.JOBS)
def test_every_job_is_a_command_that_is_understood(name):
    words = benchmark_report.JOBS[name].split()
    cfg, options = benchmark.read_arguments(words)
    assert cfg.batch_size in (8, 16)
    assert options.size == (800, 1333) or options.only in ("data", "run")
    benchmark.read_arguments([*words, *SMALL])


@pytest.fixture
def signals():
    """What this process does with them stays."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_report_says_what_was_measured_and_what_failed(tmp_path, monkeypatch, signals):
    jobs = {"good": "--only data", "bad": "--dtype int8", "slow": "--only run --steps 100000"}
    monkeypatch.setattr(benchmark_report, "JOBS", jobs)
    run_job = benchmark_report.run_job

    def impatient(words: list[str], log: Path, seconds: float) -> tuple[list[dict], str]:
        return run_job(words, log, 1 if log.stem == "slow" else 300)

    monkeypatch.setattr(benchmark_report, "run_job", impatient)
    out = tmp_path / "report"
    done = benchmark.main(["--report", str(out), "--workers", "0", "--train-sizes", "64"])
    assert done == json.loads((out / "results.json").read_text())
    [result] = done["good"]["results"]
    assert (result["benchmark"], done["good"]["failure"]) == ("data", "")
    assert "dtype" in done["bad"]["failure"]
    assert done["slow"] == {
        "words": "--only run --steps 100000 --workers 0 --train-sizes 64".split(),
        "failure": "stopped after 1 seconds",
        "results": [],
    }
    text = (out / "report.md").read_text()
    assert f"| good | data | {result['images_per_s']:.2f} |" in text
    assert f"Failed: {done['bad']['failure']}" in text


def test_a_report_goes_on_where_it_stopped(tmp_path, monkeypatch, signals):
    ran, failures = [], {"bad": "no memory"}

    def run_job(words: list[str], log: Path, seconds: float) -> tuple[list[dict], str]:
        ran.append(log.stem)
        log.touch()
        return [], failures.get(log.stem, "")

    monkeypatch.setattr(benchmark_report, "run_job", run_job)
    monkeypatch.setattr(benchmark_report, "JOBS", {"good": "--only data", "bad": "--only run"})
    command = ["--report", str(tmp_path)]
    benchmark.main(command)
    assert ran == ["good", "bad"]
    monkeypatch.setattr(
        benchmark_report, "JOBS", {"bad": "--only run", "good": "--only data", "new": "--only data"}
    )
    ran.clear()
    benchmark.main(command)
    assert ran == ["new", "bad"]  # what has failed comes last
    ran.clear()
    benchmark.main([*command, "--batch", "4"])
    assert ran == ["bad", "good", "new"]  # other words
    ran.clear()
    monkeypatch.setattr(benchmark_report, "CALL_SECONDS", 0)
    benchmark.main(command)
    assert ran == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_report_has_the_job_that_ran(tmp_path, monkeypatch, signals, number):
    jobs = {"slow": "--only run --steps 100000", "other": "--only data"}
    monkeypatch.setattr(benchmark_report, "JOBS", jobs)

    class Interrupted(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:  # while the job runs
                os.kill(os.getpid(), number)
            return super().wait()

    monkeypatch.setattr(benchmark_report.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(["--report", str(tmp_path)])
    done = json.loads((tmp_path / "results.json").read_text())
    assert {name: job["failure"] for name, job in done.items()} == {"slow": "interrupted"}
    assert "Failed: interrupted" in (tmp_path / "report.md").read_text()


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
        ("--synthetic-coco 1", "2 images"),
        ("--against detectron", "torchvision"),
        ("--against torchvision --profile t.json", "--profile is of a training step"),
        ("--only data --profile t.json", "--profile is of a training step"),
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
