"""How fast it is, where the time goes, and how far that is from what the machine could do.

    python -m boxteacher.tools.benchmark [PRESET] [--batch B] [--size HxW] [--field value ...]

Measures data loading alone, inference, and the training step with its parts; prints one JSON line
for each and a table. Fields are those of train.py (`--teacher-size 0`, `--device cpu`, ...), but
`--steps N` is the number of steps to measure (3, on a GPU 20).

Weights are random, with biases that let the network detect something everywhere. Some of what the
teacher detects are the boxes to learn from, so there are pseudo masks to make. The learning rate is
0: every step does the same work. docs/performance.md says how to read the numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train
from boxteacher import errors
from boxteacher.command_line import Parser, split_preset
from boxteacher.config import Config, ConfigError
from boxteacher.data import Batch, Sample, collate, make_train_loader, make_train_set
from boxteacher.distributed import init_distributed
from boxteacher.losses import box_masks
from boxteacher.model import CondInst, resize_images, scale_boxes
from boxteacher.presets import from_preset
from boxteacher.shapes import CLASS_NAMES, load_shapes_image, make_shapes_coco

PARTS = ("data", "inference", "train")


class Meter:
    """Differences of a reading (a clock, a counter), by the part that is running."""

    def __init__(self, read: Callable[[], float], rest: str) -> None:
        """`rest` is the part that runs while no other does."""
        self.read, self.parts = read, defaultdict(float)
        self.running, self.last = [rest], read()

    def lap(self) -> None:
        now = self.read()
        self.parts[self.running[-1]] += now - self.last
        self.last = now

    def around(self, function: Callable, part: str) -> Callable:
        """The function, with its reading added to a part."""

        def metered(*args: Any, **kwargs: Any) -> Any:
            self.lap()
            self.running.append(part)
            result = function(*args, **kwargs)
            self.lap()
            self.running.pop()
            return result

        return metered


def clock(device: torch.device) -> float:
    """Seconds, after the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_each(run: Callable, steps: int, warmup: int, device: torch.device) -> list[float]:
    seconds = []
    for _ in range(warmup + steps):
        started = clock(device)
        run()
        seconds.append(clock(device) - started)
    return seconds[warmup:]


def peak_memory_mib(device: torch.device) -> float:
    """GPU: most held by tensors since the last reset. CPU: most held by this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product: what the machine reaches at its best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / min(time_each(lambda: a @ b, steps=10, warmup=2, device=device))


# --- synthetic weights, images and boxes ----------------------------------------------------------


def make_state(cfg: Config, device: torch.device) -> train.State:
    """Random weights that detect 100 objects an image; nothing is downloaded."""
    cfg = dataclasses.replace(cfg, pretrained=False, backbone_weights="", init="", lr=0.0)
    torch.manual_seed(0)
    num_classes = 80 if cfg.dataset == "coco" else len(CLASS_NAMES)
    state = train.make_state(cfg, num_classes, device)
    for network in filter(None, (state.student, state.teacher)):
        nn.init.zeros_(network.head.class_logits.bias)  # p = 0.5
        nn.init.constant_(network.head.distances.bias, 4.0)  # boxes of 8 by 8 strides
    return state


def make_batch(
    cfg: Config, network: CondInst, height: int, width: int, boxes: int, device: torch.device
) -> Batch:
    """`cfg.batch_size` noisy images, each with `boxes` boxes that `network` detects in it."""
    generator = torch.Generator().manual_seed(0)
    shape = (cfg.batch_size, 3, height, width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2), None, None
    size, samples = (height, width), []
    batch = collate([Sample(image, *none, 0, 0, size) for image in images]).to(device)
    with torch.no_grad():
        normalized, sizes = network.normalize(batch.images, batch.sizes), batch.sizes
        if cfg.teacher_size:
            limits = cfg.teacher_size, cfg.test_max_size
            normalized, sizes = resize_images(normalized, sizes, *limits)
        detections = network.detect(network.encode(normalized))
    for n, (image, found) in enumerate(zip(images, detections, strict=True)):
        chosen = scale_boxes(found.boxes, sizes[n], size)[0][:boxes].cpu()
        masks = has_mask = None
        if cfg.mode == "condinst":
            masks = box_masks(chosen, height, width, stride=1)[:, 2::4, 2::4]
            has_mask = torch.ones(len(chosen)).bool()
        centers, labels = (chosen[:, :2] + chosen[:, 2:]) / 2, found.labels[:boxes].cpu()
        samples.append(Sample(image, chosen, labels, centers, masks, has_mask, 10, n, size))
    return collate(samples).to(device)


def make_jpegs(folder: Path, count: int = 64, size: int = 560) -> dict[str, str]:
    """Shapes as JPEG files of as many pixels as COCO's have. Returns the fields that name them."""
    coco, paint = make_shapes_coco(0, count, size), load_shapes_image(0, size)
    for entry in coco["images"]:
        pixels = paint(entry)
        entry["file_name"] += ".jpg"
        Image.fromarray(pixels).save(folder / entry["file_name"], quality=95)
    (folder / "coco.json").write_text(json.dumps(coco))
    return {"train_json": str(folder / "coco.json"), "train_images": str(folder)}


# --- what is measured -----------------------------------------------------------------------------


def measure_data(cfg: Config, steps: int) -> dict[str, Any]:
    """Batches of the loader, while nothing else runs."""
    with tempfile.TemporaryDirectory() as folder:
        source = cfg.train_json
        if cfg.dataset == "shapes":
            source = f"shapes of {cfg.shapes_size} pixels"
        cfg = dataclasses.replace(cfg, shapes_train=64)
        if cfg.dataset == "coco" and not Path(cfg.train_json).is_file():
            source = "64 synthetic JPEGs of 560x560"
            cfg = dataclasses.replace(cfg, **make_jpegs(Path(folder)))
        warmup = 1 + 2 * cfg.workers  # what workers prepare before the first batch is asked for
        cfg = dataclasses.replace(cfg, steps=warmup + steps, accumulate=1)
        batches = make_train_loader(make_train_set(cfg), cfg)
        moments = [time.perf_counter() for _ in batches]
    seconds = (moments[-1] - moments[warmup - 1]) / steps
    rate = {"seconds": seconds, "images_per_s": cfg.batch_size / seconds}
    return rate | {"workers": cfg.workers, "source": source}


def measure_inference(state: train.State, batch: Batch, steps: int, warmup: int) -> dict[str, Any]:
    """One image at a time, as evaluation does, down to masks of full size."""
    network, found = state.evaluated_model, []
    images, sizes = batch.images[:1], batch.sizes[:1]

    def predict() -> None:
        with state.autocast:
            found[:] = network.predict(images, sizes, sizes)

    network.eval()
    seconds = statistics.median(time_each(predict, steps, warmup, state.device))
    network.train()
    return {"seconds": seconds, "images_per_s": 1 / seconds, "detections": len(found[0].scores)}


def metered_step(state: train.State, batch: Batch, read: Callable[[], float]) -> dict[str, float]:
    """One step of train.py. Returns the differences of a reading by the step's parts."""
    meter = Meter(read, rest="optimizer and EMA")
    with ExitStack() as patches:

        def measure(owner: Any, name: str, part: str) -> None:
            function = meter.around(getattr(owner, name), part)
            patches.enter_context(mock.patch.object(owner, name, function))

        if state.teacher is not None:
            measure(state.teacher, "make_pseudo_masks", "pseudo labels")
            measure(state.teacher, "encode", "teacher")  # within the pseudo labels
        measure(train, "augment", "augment")
        measure(state.model, "forward", "student forward")
        measure(Tensor, "backward", "backward")
        train.train_step(state, [batch])
    meter.lap()
    return dict(meter.parts)


def measure_training(state: train.State, batch: Batch, steps: int, warmup: int) -> dict[str, Any]:
    """Medians of the whole step and of its parts. On a GPU these come from steps of their own,
    because a lap waits for the device. There the parts add up to more than the whole.
    """
    device = state.device
    laps = [metered_step(state, batch, lambda: clock(device)) for _ in range(warmup + steps)]
    parts = {p: statistics.median(lap[p] for lap in laps[warmup:]) for p in laps[0]}
    seconds = statistics.median(sum(lap.values()) for lap in laps[warmup:])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run = partial(train.train_step, state, [batch])
        seconds = statistics.median(time_each(run, steps, 2, device))
    return {"seconds": seconds, "parts": parts}


def count_flops(state: train.State, batch: Batch) -> dict[str, float]:
    """FLOPs by part as torch counts them: two per multiply-add of convolutions, matrix products
    and attention, forward and backward; nothing else (nor DCN's deformable convolutions).
    """
    with FlopCounterMode(display=False) as counter:
        return metered_step(state, batch, counter.get_total_flops)


# --- command line ---------------------------------------------------------------------------------


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
    add("--only", choices=PARTS, help="measure only this")
    add("--profile", default="", metavar="FILE", help="write a Chrome trace of one step")
    options, given = parser.read(words)
    if options.boxes < 1:
        raise ConfigError(f"--boxes must be 1 or more, got {options.boxes}")
    return from_preset(**({"preset": preset, "batch_size": 2} | given)), options


def show_table(results: dict[str, dict[str, Any]], peak: float) -> str:
    lines = ["", f"{'':22}{'seconds':>9}{'images/s':>10}{'GFLOP':>9}{'TFLOP/s':>9}{'of peak':>9}"]

    def line(name: str, seconds: float, images: float = 0, flops: float = 0) -> None:
        rate = f"{images / seconds:10.2f}" if images else f"{'':10}"
        work = f"{flops / 1e9:9.1f}{flops / seconds / 1e12:9.3f}{flops / seconds / peak:9.1%}"
        lines.append(f"{name:22}{seconds:9.4f}{rate}{work if flops else ''}")

    for name, result in results.items():
        seconds, flops = result["seconds"], result.get("flops", {})
        line(name, seconds, result["images_per_s"] * seconds, sum(flops.values()))
        for part, of_part in result.get("parts", {}).items():
            line(f"  {part}", of_part, 0, flops.get(part, 0))
    lines.append(f"peak of matrix products: {peak / 1e12:.3f} TFLOP/s")
    memory = ", ".join(f"{name} {r['peak_mib']:.0f} MiB" for name, r in results.items())
    return "\n".join([*lines, f"peak memory: {memory}"])


def main(argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    cfg, options = read_arguments(argv)
    device = init_distributed(cfg.device)
    on_gpu = device.type == "cuda"
    steps, warmup = options.steps or (20 if on_gpu else 3), 5 if on_gpu else 1
    cfg = train.resolve_auto(cfg, device)
    dtype = getattr(torch, cfg.dtype)
    wanted = [options.only] if options.only else PARTS
    setting = {
        **{name: getattr(cfg, name) for name in ("preset", "mode", "backbone", "teacher_size")},
        **{"batch": cfg.batch_size, "size": options.size, "boxes": options.boxes, "steps": steps},
        **{"dtype": cfg.dtype, "compile": cfg.compile == "on"},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        **{"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "torch": torch.__version__},
    }
    results: dict[str, dict[str, Any]] = {}

    def report(name: str, result: dict[str, Any]) -> None:
        results[name] = result | {"peak_mib": peak_memory_mib(device)}
        print(json.dumps({"benchmark": name} | results[name] | setting), flush=True)

    if "data" in wanted:
        report("data", measure_data(cfg, max(steps, 64 // cfg.batch_size)))
    state = make_state(cfg, device)
    batch = make_batch(cfg, state.evaluated_model, *options.size, options.boxes, device)
    # in plain torch: what is compiled hides its operations
    flops = count_flops(state, batch) if "train" in wanted else {}
    train.speed_up(state)
    peak = matmul_peak(dtype, device)
    if "inference" in wanted:
        report("inference", measure_inference(state, batch, steps, warmup))
    if "train" in wanted:
        result = measure_training(state, batch, steps, warmup)
        result |= {"images_per_s": cfg.batch_size / result["seconds"], "flops": flops}
        mfu = sum(flops.values()) / result["seconds"] / peak
        report("train", result | {"matmul_peak": peak, "mfu": mfu})
    if options.profile:
        with torch.profiler.profile() as trace:
            train.train_step(state, [batch])
        trace.export_chrome_trace(options.profile)
    print(show_table(results, peak))
    return results


if __name__ == "__main__":
    errors.run(lambda: main(sys.argv[1:]))
