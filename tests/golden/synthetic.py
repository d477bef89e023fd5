"""The weights and images that the golden values were made with, from names and seeds alone.

A weight is drawn by its published name: n normal and u uniform from a RandomState seeded with the
name's CRC; the kind of layer says what becomes of them. A teacher's weights are the student's with
5 % of noise. Images are slow color waves with soft textured ellipses.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from boxteacher.config import Config
from boxteacher.model import CondInst, build_model
from boxteacher.presets import MODES
from boxteacher.published import from_published, to_published

COUNTERS = ("num_batches_tracked", "_iter", "sizes_of_interest", "relative_position_index")
PUBLISHED = {  # the published backbones: fields and preset
    "r50": (dict(backbone="resnet50", stride_in_1x1=True), "coco_boxteacher_r50_1x"),
    "r101": (dict(backbone="resnet101", stride_in_1x1=True), "coco_boxteacher_r101_3x"),
    "r101_dcn": (dict(backbone="resnet101", deformable=True), "coco_boxteacher_r101_dcn_3x"),
    "swin": (dict(backbone="swin_b"), "coco_boxteacher_swin_b_3x"),
}


def synthetic_model(mode: str, backbone: str, network: str) -> CondInst:
    """The published model of 80 classes with synthetic weights; network: student or teacher."""
    config = Config(mode=mode, pixel_format="bgr", **MODES[mode], **PUBLISHED[backbone][0])
    model = build_model(config, 80)
    weights = to_published(model.state_dict())
    for name, value in weights.items():
        if not name.endswith(COUNTERS):
            drawn = make_weight(f"{network}.{name}", tuple(value.shape))
            weights[name] = torch.from_numpy(drawn)
    model.load_state_dict(from_published(weights))
    return model


def make_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32, by a name that begins with student. or teacher."""
    network, _, rest = name.partition(".")
    random = np.random.RandomState(zlib.crc32(f"student.{rest}".encode()))
    normal, uniform = random.standard_normal(shape), random.uniform(size=shape)
    weight = student_weight(rest, normal, uniform)
    if network == "teacher":
        random = np.random.RandomState(zlib.crc32(name.encode()))
        noise = 0.05 * random.standard_normal(shape).clip(-2, 2)
        if weight.size == 1 or rest.endswith("running_var"):
            weight = weight * (1 + noise)
        else:
            weight = weight + weight.std() * noise
    return weight.astype(np.float32)


def student_weight(name: str, n: np.ndarray, u: np.ndarray) -> np.ndarray:
    kind = name.rpartition(".")[2]
    fan_in = np.prod(n.shape[1:]) if n.ndim > 1 else 1
    xavier, he = n / np.sqrt(fan_in), n * np.sqrt(2 / fan_in)

    def less_mean(axes: tuple[int, ...], share: float) -> np.ndarray:
        return n - share * n.mean(axis=axes, keepdims=True)

    if kind.startswith("running_"):
        return 0.1 * n if kind == "running_mean" else 0.6 + 0.8 * u
    if name.startswith("backbone.bottom_up."):
        if any(part in name for part in (".layers.", ".patch_embed.", "bottom_up.norm")):  # Swin
            if kind == "relative_position_bias_table":
                return 0.3 * n
            if kind == "bias":
                return 0.1 * n
            return 0.8 + 0.4 * u if n.ndim == 1 else xavier * (1.3 if ".qkv." in name else 1.0)
        if "conv2_offset" in name:
            return 0.5 * (n if kind == "bias" else xavier)
        if kind == "bias":
            return 0.1 * n
        if n.ndim == 1:
            return 0.1 + 0.5 * u if ".conv3.norm." in name else 0.4 + 0.6 * u
        return 0.02 * he if ".stem." in name else he
    if name.startswith("backbone."):
        return 0.1 * n if kind == "bias" else xavier
    if kind == "scale":
        return 1 + 0.1 * n
    heads = {  # mean and deviation of the bias, deviation of the weight
        "cls_logits": (-4.6, 0.2, 0.0203),
        "bbox_pred": (3.8, 0.3, 0.03),
        "ctrness": (0.0, 0.2, 0.03),
        "controller": (0.0, 0.2, 0.012),
    }
    for head, (bias_mean, bias_std, weight_std) in heads.items():
        if head in name and kind == "bias":
            last = np.arange(len(n)) == len(n) - 1  # the last dynamic layer's bias
            return bias_mean + bias_std * n + 1.5 * last * (head == "controller")
        if head in name:
            return weight_std * (less_mean((1, 2, 3), 1.0) if head == "cls_logits" else n)
    if n.ndim == 1:
        return 0.1 * n if kind == "bias" else 0.8 + 0.4 * u
    if "mask_branch.tower.4" in name:
        return 1.5 * xavier
    spatial = less_mean((2, 3), 0.7 if "mask_branch" in name else 0.45)
    return spatial * np.sqrt(2 / fan_in) * (1.3 if "mask_branch" in name else 1.0)


def make_image(seed: int, height: int, width: int, num_blobs: int) -> np.ndarray:
    """uint8 RGB [height, width, 3]."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    image = np.zeros((height, width, 3))
    for channel in range(3):
        across, down = random.uniform(0.5, 2.0), random.uniform(0.5, 2.0)
        phase = random.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * (across * x / width + down * y / height) + phase)
        image[:, :, channel] = 110 + 40 * wave
    for _ in range(num_blobs):
        center_x, center_y = random.uniform(0.1, 0.9) * width, random.uniform(0.1, 0.9) * height
        radius_x, radius_y = random.uniform(0.06, 0.28) * width, random.uniform(0.06, 0.28) * height
        angle, color = random.uniform(0, np.pi), random.uniform(0, 255, size=3)
        frequency, phase = random.uniform(0.05, 0.35), random.uniform(0, 2 * np.pi)
        dx, dy = x - center_x, y - center_y
        along = (dx * np.cos(angle) + dy * np.sin(angle)) / radius_x
        across = (-dx * np.sin(angle) + dy * np.cos(angle)) / radius_y
        distance = np.sqrt(along * along + across * across)
        opacity = (1.0 / (1.0 + np.exp((distance - 1.0) * 18.0)))[:, :, None]
        texture = 18 * np.sin(frequency * x + phase) * np.cos(frequency * y - phase)
        image = image * (1 - opacity) + (color + texture[:, :, None]) * opacity
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def recolor(image: np.ndarray) -> np.ndarray:
    """Instead of the strong augmentation: a gain and a shift of each channel."""
    recolored = image * np.array([1.15, 0.85, 1.0]) + np.array([-12.0, 20.0, 6.0])
    return np.clip(np.rint(recolored), 0, 255).astype(np.uint8)


def inference_image() -> np.ndarray:
    return make_image(11, 317, 411, 9)


def training_images() -> list[np.ndarray]:
    return [make_image(21, 256, 320, 7), make_image(22, 288, 224, 6)]
