"""Work for `boxteacher.tools.benchmark`: weights, images, boxes and files that need no download.

Weights are random, with biases that let the network detect something everywhere. Some of what the
teacher detects are the boxes to learn from, so there are pseudo masks to make. The learning rate is
0: every step does the same work.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import train
from boxteacher.config import Config
from boxteacher.data import Batch, Sample, collate
from boxteacher.losses import box_masks
from boxteacher.model import CondInst, resize_images, scale_boxes
from boxteacher.shapes import CLASS_NAMES

FILES = 64  # photographs, where none are named
SIZES = (480, 640), (640, 480), (427, 640), (640, 427), (375, 500), (612, 612), (333, 500)  # theirs
COCO_IMAGES, COCO_ANNOTATIONS = 118_287, 860_001


def make_state(cfg: Config, device: torch.device) -> train.State:
    """Random weights that detect 100 objects an image."""
    cfg = dataclasses.replace(
        cfg, pretrained=False, backbone_weights="", init="", lr=0.0, pseudo_start=0
    )
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
    count, size = cfg.batch_size, (height, width)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        padded = F.pad(images, (0, -width % 32, 0, -height % 32)).to(device)
        seen, sizes = network.normalize(padded, [size] * count), [size] * count
        if cfg.teacher_size:
            seen, sizes = resize_images(seen, sizes, cfg.teacher_size, cfg.test_max_size)
        detections = network.detect(network.encode(seen))
    samples = []
    for n, found in enumerate(detections):
        chosen = scale_boxes(found.boxes, sizes[n], size)[0][:boxes].cpu()
        masks = has_mask = None
        if cfg.mode == "condinst":
            masks = box_masks(chosen, height, width, stride=1)[:, 2::4, 2::4]
            has_mask = torch.ones(len(chosen)).bool()
        centers, labels = (chosen[:, :2] + chosen[:, 2:]) / 2, found.labels[:boxes].cpu()
        samples.append(Sample(images[n], chosen, labels, centers, masks, has_mask, 10, n, size))
    return collate(samples).to(device)


@contextmanager
def training_data(cfg: Config, coco_images: int = 0) -> Iterator[Config]:
    """The configuration, with files to read: its own if they exist, else synthetic JPEGs.

    coco_images > 0: a JSON of that many images, with as many annotations as COCO has for each. The
    images are small and all the same file, because it is the JSON that is measured.
    """
    if not coco_images and (cfg.dataset == "shapes" or Path(cfg.train_json).is_file()):
        yield dataclasses.replace(cfg, shapes_train=FILES)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = dict(train_json=f"{folder}/coco.json", train_images=folder, dataset="coco")
        cfg = dataclasses.replace(cfg, **files)
        sizes, rng = [SIZES[n % len(SIZES)] for n in range(FILES)], np.random.default_rng(0)
        if coco_images:
            sizes = [(64, 64)]
            cfg = dataclasses.replace(cfg, train_sizes=(64,), train_scales=(), crop=0)
        for n, (height, width) in enumerate(sizes):
            colors = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            image = Image.fromarray(colors).resize((width, height))
            image.save(Path(folder, f"{n}.jpg"), quality=95)
        write_json(Path(cfg.train_json), sizes, coco_images or FILES, rng)
        yield cfg


def write_json(
    path: Path, sizes: list[tuple[int, int]], num_images: int, rng: np.random.Generator
) -> None:
    """COCO's format. Every annotation is the same circle of 25 points. They are written one by one,
    so that this process does not grow."""
    angles = np.linspace(0, 2 * np.pi, 25)
    circle = (32 + 29.97 * np.stack((np.cos(angles), np.sin(angles)), axis=1)).round(2)
    shape = {"bbox": [2, 2, 60, 60], "area": 2827.43, "iscrowd": 0}
    shape = json.dumps(shape | {"segmentation": [circle.flatten().tolist()]})[1:]
    with path.open("w") as file:
        categories = [{"id": k, "name": f"class {k}"} for k in range(80)]
        file.write(f'{{"categories": {json.dumps(categories)}, "images": [')
        for n in range(num_images):
            height, width = sizes[n % len(sizes)]
            entry = {"id": n, "file_name": f"{n % len(sizes)}.jpg", "width": width}
            file.write(", " * (n > 0) + json.dumps(entry | {"height": height}))
        file.write('], "annotations": [')
        for n in range(num_images * COCO_ANNOTATIONS // COCO_IMAGES):
            ids = f'"id": {n}, "image_id": {rng.integers(num_images)}, "category_id": {n % 80}'
            file.write(f"{', ' * (n > 0)}{{{ids}, {shape}")
        file.write("]}")
