"""torchvision's Mask R-CNN in turns with ours, for `boxteacher.tools.benchmark`."""

from __future__ import annotations

import multiprocessing
import statistics
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import train
from boxteacher.config import Config, ConfigError
from boxteacher.data import Batch
from boxteacher.distributed import init_distributed
from boxteacher.errors import UserError
from boxteacher.losses import box_masks
from boxteacher.tools.measure import Time, medians, peak_memory_mib, predict, time_each
from boxteacher.tools.synthetic import make_batch, make_state


def measure_in_turns(
    cfg: Config, size: tuple[int, int], boxes: int, steps: int, warmup: int
) -> dict[str, dict[str, Any]]:
    """Training and inference of both programs, each in its own process: the ratios theirs / ours of
    `steps` pairs (median, least, greatest), the median times, the peak of memory."""
    if cfg.backbone != "resnet50" or cfg.deformable:
        raise ConfigError("against: torchvision's Mask R-CNN has --backbone resnet50")
    spawn, pipes, results = multiprocessing.get_context("spawn"), {}, {}
    with ExitStack() as stack:
        for name in ("ours", "theirs"):
            pipe, end = spawn.Pipe()
            pipes[name] = stack.enter_context(pipe)  # when it is closed, the process ends
            with end:  # closed here, so that no process that has failed is waited for
                spawn.Process(target=serve, args=(end, name, cfg, size, boxes)).start()
        for what in ("training", "inference"):
            taken, peaks = {name: [] for name in pipes}, {}
            for _ in range(warmup + steps):
                for name, pipe in pipes.items():
                    time, peaks[name] = ask(pipe, what)
                    taken[name].append(time)
            taken = {name: times[warmup:] for name, times in taken.items()}
            result: dict[str, Any] = medians(taken["ours"]) | {"peak_mib": peaks["ours"]}
            for unit, value in medians(taken["theirs"]).items():
                pairs = zip(taken["theirs"], taken["ours"], strict=True)
                ratios = [getattr(theirs, unit) / getattr(ours, unit) for theirs, ours in pairs]
                result[f"theirs_{unit}"] = value
                result[f"ratio_{unit}"] = statistics.median(ratios)
                result[f"ratio_{unit}_range"] = min(ratios), max(ratios)
            images = cfg.batch_size if what == "training" else 1
            result["theirs_peak_mib"] = peaks["theirs"]
            results[what] = result | {"images_per_s": images / result["seconds"]}
    return results


def ask(pipe: Connection, what: str) -> tuple[Time, float]:
    try:
        pipe.send(what)
        return pipe.recv()
    except (EOFError, OSError):
        raise UserError("against: a process has failed; its error stands above") from None


def serve(pipe: Connection, name: str, cfg: Config, size: tuple[int, int], boxes: int) -> None:
    """The process of a program. "training" or "inference" comes through the pipe. What one call
    took goes back, with the peak of memory so far."""
    device = init_distributed(cfg.device)
    state = make_state(train.resolve_auto(cfg, device), device)
    batch = make_batch(state.cfg, state.evaluated_model, *size, boxes, device)
    train.speed_up(state)
    network, repeat = state.evaluated_model, 5 if device.type == "cuda" else 1
    step, infer = partial(train.train_step, state, [batch]), partial(predict, state, batch)
    if name == "theirs":
        network, autocast = make_mask_rcnn(*size, device), state.autocast
        del state, step, infer
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=True)
        images, targets = their_batch(batch)

        def step() -> None:
            with autocast:
                losses = network(images, targets)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        def infer() -> None:
            with autocast, torch.no_grad():
                network(images[:1])

    runs = {"training": step, "inference": infer}
    while True:
        try:
            what = pipe.recv()
        except EOFError:  # the other process has ended
            return
        network.train(what == "training")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        [time] = time_each(runs[what], 1, 0, device, repeat)
        pipe.send((time, peak_memory_mib(device)))


def make_mask_rcnn(height: int, width: int, device: torch.device) -> nn.Module:
    """R-50, with what ours freezes frozen. Zeros in two layers make proposals of all anchors, and
    detections of proposals: all parts have as much to do as in a run."""
    options = dict(weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", **options)
    sides = dict(min_size=min(height, width), max_size=max(height, width))  # images keep their size
    network = MaskRCNN(backbone, num_classes=81, **sides)
    scores = network.roi_heads.box_predictor.cls_score
    for layer in (network.rpn.head.bbox_pred, scores):
        nn.init.zeros_(layer.weight)
    scores.bias.data[1] = 5.0
    return network.to(device, memory_format=torch.channels_last)


def their_batch(batch: Batch) -> tuple[list, list]:
    """Images and targets as torchvision takes them, with the boxes as masks."""
    height, width = batch.sizes[0]
    images = [image[:, :height, :width] / 255 for image in batch.images]
    targets = []
    for boxes, labels, valid in zip(batch.boxes, batch.labels, batch.valid, strict=True):
        masks = box_masks(boxes[valid], height, width, stride=1).byte()
        targets.append({"boxes": boxes[valid], "labels": labels[valid] + 1, "masks": masks})
    return images, targets
