"""What `boxteacher.tools.benchmark` measures, and how. Times are medians after warm-up steps."""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import train
from boxteacher.config import Config
from boxteacher.data import Batch, make_train_loader, make_train_set
from boxteacher.model import Instances
from boxteacher.tools.synthetic import training_data

# --- time and memory ------------------------------------------------------------------------------


class Time(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all threads of this process


def clock(device: torch.device) -> float:
    """Seconds, after the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_each(
    run: Callable, steps: int, warmup: int, device: torch.device, repeat: int = 1
) -> list[Time]:
    """Times of one call. With `repeat` calls between two looks at the clock, the CPU can be ahead
    of the GPU, as in a training run."""
    times = []
    for _ in range(warmup + steps):
        started, cpu_started = clock(device), time.process_time()
        for _ in range(repeat):
            run()
        seconds = clock(device) - started
        times.append(Time(seconds / repeat, (time.process_time() - cpu_started) / repeat))
    return times[warmup:]


def medians(times: list[Time]) -> dict[str, float]:
    return {name: statistics.median(getattr(t, name) for t in times) for name in Time._fields}


def peak_memory_mib(device: torch.device) -> float:
    """GPU: most held by tensors since the last reset. CPU: most held by this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_mib(process: int | str = "self") -> tuple[float, float]:
    """Memory that a process holds, and what of it no other shares. 0 where Linux does not say."""
    file = Path(f"/proc/{process}/smaps_rollup")
    lines = file.read_text().splitlines()[1:] if file.exists() else []
    mib = {line.split(":")[0]: int(line.split()[1]) / 2**10 for line in lines}
    return mib.get("Rss", 0.0), mib.get("Private_Clean", 0.0) + mib.get("Private_Dirty", 0.0)


def peak_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s that this machine reaches: the best of products and 3x3 convolutions of several sizes,
    each at the best of some calls."""
    on_gpu = device.type == "cuda"
    images, sides = (16, (4096, 8192)) if on_gpu else (1, (512, 1024))
    work: list[tuple[int, Callable]] = []
    for n in sides:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        work.append((2 * n**3, partial(torch.matmul, a, b)))
    for channels, side in ((64, 128), (256, 64), (512, 32)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(images, channels, side, side, device=device)
            weight = torch.randn(channels, channels, 3, 3, device=device)
            x, weight = (t.to(dtype, memory_format=layout) for t in (x, weight))
            work.append((2 * x.numel() * 9 * channels, partial(F.conv2d, x, weight, padding=1)))
    repeat = 10 if on_gpu else 1
    return max(flop / min(time_each(run, 3, 1, device, repeat)).seconds for flop, run in work)


# --- our program ----------------------------------------------------------------------------------


def measure_data(cfg: Config, steps: int, coco_images: int = 0) -> dict[str, Any]:
    """Reading and checking the JSON, then batches of the loader, while nothing else runs: with
    `coco_images`, one epoch. Memory: of this process after reading, and of a worker at the end,
    where `worker_own_mib` is what it does not share."""
    with training_data(cfg, coco_images) as cfg:
        made, moments, warmup = [], [], 1 + 2 * cfg.workers  # what is prepared at the start
        before = memory_mib()[0]
        [read] = time_each(lambda: made.append(make_train_set(cfg)), 1, 0, torch.device("cpu"))
        result: dict[str, Any] = {f"read_{name}": value for name, value in read._asdict().items()}
        after = memory_mib()[0]
        result |= {"images": len(made[0]), "resident_mib": after, "read_mib": after - before}
        steps = coco_images // cfg.batch_size if coco_images else steps
        cfg = dataclasses.replace(cfg, steps=warmup + steps, accumulate=1)
        for _ in make_train_loader(made[0], cfg):
            moments.append(time.perf_counter())
            if len(moments) == cfg.steps:
                workers = [memory_mib(worker.pid) for worker in multiprocessing.active_children()]
    result["seconds"] = (moments[-1] - moments[warmup - 1]) / steps
    result["images_per_s"] = cfg.batch_size / result["seconds"]
    result["worker_mib"], result["worker_own_mib"] = max(workers, default=(0.0, 0.0))
    return result | {"workers": cfg.workers, "steps": steps}


def measure_run(state: train.State, steps: int) -> dict[str, Any]:
    """Steps of a run with its loader, on images of many sizes, and how many graphs torch has
    compiled at the end and in the second half."""
    with training_data(state.cfg) as cfg:
        cfg = dataclasses.replace(cfg, steps=steps, accumulate=1)
        batches, graphs = iter(make_train_loader(make_train_set(cfg), cfg)), [0]

        def step() -> None:
            train.train_step(state, next(batches))
            graphs.append(counters["stats"]["unique_graphs"])

        times = time_each(step, steps, 0, state.device)
    result = medians(times) | {"slowest_seconds": max(times).seconds, "graphs": graphs[-1]}
    result |= {"graphs_in_second_half": graphs[-1] - graphs[steps // 2], "steps": steps}
    return result | {"images_per_s": cfg.batch_size / result["seconds"]}


def predict(state: train.State, batch: Batch) -> list[Instances]:
    """One image, as in evaluation, down to its masks."""
    with state.autocast:
        return state.evaluated_model.predict(batch.images[:1], batch.sizes[:1], batch.sizes[:1])


def measure_inference(state: train.State, batch: Batch, steps: int, warmup: int) -> dict[str, Any]:
    state.evaluated_model.eval()
    result: dict[str, Any] = {"detections": len(predict(state, batch)[0].scores)}
    result |= medians(time_each(partial(predict, state, batch), steps, warmup, state.device))
    state.evaluated_model.train()
    return result | {"images_per_s": 1 / result["seconds"]}


def metered_step(state: train.State, batch: Batch, read: Callable[[], float]) -> dict[str, float]:
    """One step of train.py. Returns the differences of a reading (a clock, a counter) by the part
    of the step that was running."""
    parts, running, last = defaultdict(float), ["optimizer and EMA"], read()

    def lap() -> None:
        nonlocal last
        now = read()
        parts[running[-1]] += now - last
        last = now

    with ExitStack() as patches:

        def meter(owner: Any, name: str, part: str) -> None:
            function = getattr(owner, name)

            def metered(*args: Any, **kwargs: Any) -> Any:
                lap()
                running.append(part)
                result = function(*args, **kwargs)
                lap()
                running.pop()
                return result

            patches.enter_context(mock.patch.object(owner, name, metered))

        if state.teacher is not None:
            meter(state.teacher, "make_pseudo_masks", "pseudo labels")
            meter(state.teacher, "encode", "teacher")  # within the pseudo labels
        meter(train, "augment", "augment")
        meter(state.model, "forward", "student forward")
        meter(Tensor, "backward", "backward")
        train.train_step(state, [batch])
    lap()
    return dict(parts)


def measure_training(
    state: train.State, batch: Batch, flops: dict[str, float], steps: int, warmup: int
) -> dict[str, Any]:
    """The step and its parts. On a GPU the parts come from steps of their own, because a lap waits
    for the device. There they add up to more than the whole, and the waits of a step are counted.
    """
    device, dtype, laps = state.device, getattr(torch, state.cfg.dtype), []
    read, peak = partial(clock, device), peak_rate(dtype, device)
    times = time_each(lambda: laps.append(metered_step(state, batch, read)), steps, warmup, device)
    result: dict[str, Any] = medians(times)
    result["parts"] = {p: statistics.median(lap[p] for lap in laps[warmup:]) for p in laps[0]}
    if device.type == "cuda":
        run = partial(train.train_step, state, [batch])
        result |= medians(time_each(run, steps, 2, device, repeat=5))
        result["waits"] = count_waits(run)
    peak = max(peak, peak_rate(dtype, device))  # before and after, since machines slow down
    of_peak = sum(flops.values()) / result["seconds"] / peak
    result |= {"flops": flops, "peak_rate": peak, "of_peak": of_peak}
    return result | {"images_per_s": len(batch.sizes) / result["seconds"]}


def count_waits(run: Callable) -> dict[str, int]:
    """The lines of code at which a call makes the CPU wait for the GPU, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits))


def count_flops(state: train.State, batch: Batch) -> dict[str, float]:
    """FLOPs by part as torch counts them: two per multiply-add of convolutions, matrix products
    and attention, forward and backward; nothing else (nor DCN's deformable convolutions).
    """
    with FlopCounterMode(display=False) as counter:
        return metered_step(state, batch, counter.get_total_flops)
