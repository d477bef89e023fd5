"""How fast it is, where the time goes, and how far that is from what the machine could do.

    python -m boxteacher.tools.benchmark [PRESET] [--field value ...] [--batch B] [--size HxW]
        [--boxes G] [--steps N] [--only data|inference|train] [--profile trace.json]

Measures data loading alone, inference, and the training step with its parts; prints one JSON line
for each and a table. Fields are those of train.py (`--teacher-size 0`, `--device cpu`, ...).

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
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train
from boxteacher.coco import DataError
from boxteacher.command_line import parse
from boxteacher.config import Config, ConfigError
from boxteacher.data import Batch, Sample, collate, make_train_loader, make_train_set
from boxteacher.distributed import init_distributed
from boxteacher.ema import update_teacher
from boxteacher.losses import box_masks
from boxteacher.model import CondInst, fit_boxes, resize_images
from boxteacher.shapes import CLASS_NAMES, load_shapes_image, make_shapes_coco
from boxteacher.transforms import augment

PARTS = ("data", "inference", "train")


class Meter:
    """Differences of a reading (a clock, a counter) from one lap to the next, by part."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read, self.parts = read, defaultdict(float)
        self.last = read()

    def lap(self, part: str) -> None:
        now = self.read()
        self.parts[part] += now - self.last
        self.last = now


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
    cfg = dataclasses.replace(cfg, pretrained=False, backbone_weights="", init="")
    torch.manual_seed(0)
    num_classes = 80 if cfg.dataset == "coco" else len(CLASS_NAMES)
    state = train.make_state(cfg, num_classes, device)
    for network in filter(None, (state.student, state.teacher)):
        nn.init.zeros_(network.head.class_logits.bias)  # p = 0.5
        nn.init.constant_(network.head.distances.bias, 4.0)  # boxes of 8 by 8 strides
    for group in state.optimizer.param_groups:
        group["lr"] = 0.0
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
            limits = cfg.teacher_size, cfg.teacher_max_size
            normalized, sizes = resize_images(normalized, sizes, *limits)
        detections = network.detect(network.encode(normalized))
    for n, (image, found) in enumerate(zip(images, detections, strict=True)):
        chosen = fit_boxes(found.boxes, sizes[n], size)[0][:boxes].cpu()
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
    """Batches that the loader yields, with nobody else at work."""
    with tempfile.TemporaryDirectory() as folder:
        source = (
            f"shapes of {cfg.shapes_size} pixels" if cfg.dataset == "shapes" else cfg.train_json
        )
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


def measure_inference(
    network: CondInst, batch: Batch, autocast: torch.autocast, steps: int, warmup: int
) -> dict[str, Any]:
    """One image at a time, as evaluation does, down to masks of full size."""
    device, found = batch.images.device, []
    images, sizes = batch.images[:1], batch.sizes[:1]

    def predict() -> None:
        with autocast:
            found[:] = network.predict(images, sizes, sizes)

    network.eval()
    seconds = statistics.median(time_each(predict, steps, warmup, device))
    network.train()
    return {"seconds": seconds, "images_per_s": 1 / seconds, "detections": len(found[0].scores)}


def training_step(
    cfg: Config,
    state: train.State,
    model: nn.Module,
    batch: Batch,
    autocast: torch.autocast,
    lap: Callable[[str], None],
) -> None:
    """The step of train.py without schedules and records."""
    teacher, pseudo = state.teacher, None
    if teacher is not None:
        update_teacher(teacher, state.student, cfg.ema_momentum)
        lap("optimizer and EMA")
        with autocast:
            pseudo = teacher.make_pseudo_masks(
                batch, cfg.teacher_size, cfg.teacher_max_size, score_threshold=cfg.score_threshold
            )
        lap("pseudo labels")
    images = augment(batch.images, batch.sizes, cfg.student_augmentation, torch.Generator())
    lap("augment")
    with autocast:
        losses, _ = model(images, batch, 1.0, pseudo)
    lap("student forward")
    sum(losses.values()).backward()
    lap("backward")
    if cfg.clip_grad:
        nn.utils.clip_grad_norm_(state.student.parameters(), cfg.clip_grad)
    state.optimizer.step()
    state.optimizer.zero_grad()
    lap("optimizer and EMA")


def metered_step(step: Callable, teacher: CondInst | None, meter: Meter) -> None:
    """One step with a lap round the teacher's network, which runs inside make_pseudo_masks."""

    def encode(normalized: Tensor) -> Any:
        meter.lap("pseudo labels")  # what comes before: normalizing, resizing
        encoded = type(teacher).encode(teacher, normalized)
        meter.lap("teacher")
        return encoded

    hidden = mock.patch.object(teacher, "encode", encode) if teacher else nullcontext()
    with hidden:
        step(meter.lap)


def measure_training(
    step: Callable, teacher: CondInst | None, steps: int, warmup: int, device: torch.device
) -> dict[str, Any]:
    """Medians of the whole step and of its parts. On a GPU these come from steps of their own,
    since a lap waits for the device, and so they add up to more than the whole.
    """
    laps = []
    for _ in range(warmup + steps):
        meter = Meter(lambda: clock(device))
        metered_step(step, teacher, meter)
        laps.append(meter.parts)
    parts = {p: statistics.median(lap[p] for lap in laps[warmup:]) for p in laps[0]}
    seconds = statistics.median(sum(lap.values()) for lap in laps[warmup:])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        seconds = statistics.median(time_each(step, steps, 2, device))
    return {"seconds": seconds, "parts": parts}


def count_flops(step: Callable, teacher: CondInst | None) -> dict[str, float]:
    """FLOPs by part as torch counts them: two per multiply-add of convolutions, matrix products
    and attention, forward and backward; nothing else (nor DCN's deformable convolutions).
    """
    with FlopCounterMode(display=False) as counter:
        meter = Meter(counter.get_total_flops)
        metered_step(step, teacher, meter)
    return dict(meter.parts)


# --- command line ---------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The benchmark's own options; the rest is a configuration, as for train.py."""

    def size(text: str) -> tuple[int, int]:
        height, width = (max(int(side), 32) for side in text.split("x"))
        return height, width

    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=size, default=(512, 640))
    parser.add_argument("--boxes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--profile", default="")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    if "--help" in rest or "-h" in rest:
        print(__doc__, "Fields and presets: python train.py --help, --list", sep="\n")
        raise SystemExit(0)
    cfg = parse(rest if rest and not rest[0].startswith("-") else ["coco_boxteacher_r50_1x", *rest])
    if options.batch < 1 or options.boxes < 1 or options.steps < 0:
        raise ConfigError("--batch and --boxes want 1 or more, --steps 0 or more")
    return dataclasses.replace(cfg, batch_size=options.batch), options


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
    cfg = train.settle(cfg, device)
    dtype = getattr(torch, cfg.dtype)
    autocast = torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16)
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
    batch = make_batch(cfg, state.judged, *options.size, options.boxes, device)
    model = state.student

    def step(lap: Callable[[str], None] = lambda part: None) -> None:
        training_step(cfg, state, model, batch, autocast, lap)

    # in plain torch: what is compiled hides its operations
    flops = count_flops(step, state.teacher) if "train" in wanted else {}
    model = train.speed_up(cfg, state, device)
    peak = matmul_peak(dtype, device)
    if "inference" in wanted:
        report("inference", measure_inference(state.judged, batch, autocast, steps, warmup))
    if "train" in wanted:
        result = measure_training(step, state.teacher, steps, warmup, device)
        result |= {"images_per_s": cfg.batch_size / result["seconds"], "flops": flops}
        mfu = sum(flops.values()) / result["seconds"] / peak
        report("train", result | {"matmul_peak": peak, "mfu": mfu})
    if options.profile:
        with torch.profiler.profile() as trace:
            step()
        trace.export_chrome_trace(options.profile)
    print(show_table(results, peak))
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
