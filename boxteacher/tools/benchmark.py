"""How fast it is, where the time goes, and how far that is from what the machine could do.

    python -m boxteacher.tools.benchmark [PRESET] [--batch B] [--size HxW] [--field value ...]

Measures data loading alone, inference, and the training step with its parts; prints one JSON line
for each and a table. Fields are those of train.py (`--teacher-size 0`, `--device cpu`, ...), but
`--steps N` is the number of steps to measure (3, on a GPU 20). Other measurements:

    --against torchvision            its Mask R-CNN, in turns with ours
    --only run                       steps with the loader, on images of many sizes
    --only data --synthetic-coco     reading a JSON of COCO's size: time and memory
    --report OUT                     everything on a GPU, into a folder

docs/performance.md says how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import train
from boxteacher import errors
from boxteacher.command_line import Parser, split_preset
from boxteacher.config import Config, ConfigError
from boxteacher.distributed import init_distributed
from boxteacher.presets import from_preset
from boxteacher.tools import measure
from boxteacher.tools.benchmark_report import write_report
from boxteacher.tools.mask_rcnn import measure_in_turns
from boxteacher.tools.synthetic import COCO_IMAGES, make_batch, make_state

PARTS = ("data", "inference", "train")
Results = dict[str, dict[str, Any]]


def read_arguments(argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The configuration, and the benchmark's own options."""

    def height_x_width(text: str) -> tuple[int, int]:
        height, width = (max(int(side), 32) for side in text.split("x"))
        return height, width

    preset, words = split_preset(argv, default="coco_boxteacher_r50_1x")
    parser = Parser("python -m boxteacher.tools.benchmark [PRESET] [--field value ...]", __doc__)
    add = parser.add_argument
    add("--batch", dest="batch_size", type=int, metavar="B", help="images (2)")
    add("--size", type=height_x_width, default=(512, 640), metavar="HxW", help="pixels (512x640)")
    add("--boxes", type=int, default=8, metavar="G", help="boxes of each image (8)")
    add("--only", choices=(*PARTS, "run"), help="measure only this")
    coco = dict(type=int, nargs="?", const=COCO_IMAGES, default=0, metavar="IMAGES")
    add("--synthetic-coco", **coco, help="data: of a JSON of COCO's size, or of fewer images")
    add("--against", choices=["torchvision"], help="measure only both programs, in turns")
    add("--profile", default="", metavar="FILE", help="write a Chrome trace of one step")
    add("--report", default="", metavar="OUT", help="run all jobs of a GPU; OUT is a folder")
    options, given = parser.read(words)
    if options.boxes < 1:
        raise ConfigError(f"--boxes must be 1 or more, got {options.boxes}")
    if options.profile and (options.against or options.only == "data"):
        raise ConfigError("--profile is of a training step: not with --against or --only data")
    cfg = from_preset(**({"preset": preset, "batch_size": 2} | given))
    if options.synthetic_coco and options.synthetic_coco < cfg.batch_size:
        raise ConfigError(f"--synthetic-coco must be {cfg.batch_size} images (a batch) or more")
    return cfg, options


def show_table(results: Results) -> str:
    """Times and rates in columns. Below them all else, a line for each measurement."""
    lines = ["", f"{'':22}{'seconds':>9}{'images/s':>10}{'GFLOP':>9}{'TFLOP/s':>9}{'of peak':>9}"]
    of_peak = [0.0]

    def row(name: str, seconds: float, images: float = 0, flops: float = 0) -> None:
        lines.append(f"{name:22}{seconds:9.4f}" + (f"{images / seconds:10.2f}" if images else ""))
        if flops:
            of_peak.append(flops / seconds / results["train"]["peak_rate"])
            work = f"{flops / 1e9:9.1f}{flops / seconds / 1e12:9.3f}{of_peak[-1]:9.1%}"
            lines[-1] = f"{lines[-1]:41}{work}"

    for name, result in results.items():
        seconds, flops = result["seconds"], result.get("flops", {})
        row(name, seconds, result["images_per_s"] * seconds, sum(flops.values()))
        for part, of_part in result.get("parts", {}).items():
            row(f"  {part}", of_part, 0, flops.get(part, 0))
    if max(of_peak) > 1:
        lines.append("Over 100 %: the machine was busier whenever its peak was measured.")
    for name, result in results.items():
        shown = ("seconds", "images_per_s", "parts", "flops")  # above
        others = {k: v for k, v in result.items() if k not in shown}
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in others.items()]
        lines.append(f"{name}: {', '.join(words)}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> Results:
    cfg, options = read_arguments(argv)
    if options.report:
        return write_report(Path(options.report), argv)
    device = init_distributed(cfg.device)
    on_gpu = device.type == "cuda"
    steps, warmup = options.steps or (20 if on_gpu else 3), 5 if on_gpu else 1
    cfg = train.resolve_auto(cfg, device)
    wanted = [options.only] if options.only else PARTS
    setting = {
        **{name: getattr(cfg, name) for name in ("preset", "mode", "backbone", "teacher_size")},
        **{"batch": cfg.batch_size, "size": options.size, "boxes": options.boxes, "steps": steps},
        **{"dtype": cfg.dtype, "compile": cfg.compile == "on"},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        **{"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "torch": torch.__version__},
    }
    results: Results = {}

    def report(name: str, run: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        result = run(*arguments)
        results[name] = {"peak_mib": measure.peak_memory_mib(device)} | result
        print(json.dumps({"benchmark": name} | setting | results[name]), flush=True)

    if options.against:
        wanted = ["against"]
        turns = measure_in_turns(cfg, options.size, options.boxes, steps, warmup)
        for name, result in turns.items():
            report(name, lambda result=result: result)
    if "data" in wanted:
        rounds = max(steps, 64 // cfg.batch_size)
        report("data", measure.measure_data, cfg, rounds, options.synthetic_coco)
    if {"inference", "train", "run"} & set(wanted):
        state = make_state(cfg, device)
        batch = make_batch(cfg, state.evaluated_model, *options.size, options.boxes, device)
        # in plain torch: what is compiled hides its operations
        flops = measure.count_flops(state, batch) if "train" in wanted else {}
        train.speed_up(state)
    if "inference" in wanted:
        report("inference", measure.measure_inference, state, batch, steps, warmup)
    if "train" in wanted:
        report("train", measure.measure_training, state, batch, flops, steps, warmup)
    if "run" in wanted:
        report("run", measure.measure_run, state, steps)
    print(show_table(results), flush=True)
    if options.profile:
        with torch.profiler.profile() as trace:
            train.train_step(state, [batch])
            measure.clock(device)
        trace.export_chrome_trace(options.profile)
    return results


if __name__ == "__main__":
    errors.run(lambda: main(sys.argv[1:]))
