"""Backbones from torchvision, and the feature pyramid P3 to P7 (FPN arXiv 1612.03144, as FCOS uses it).

Every backbone here maps images [N, 3, H, W] to {"p3": stride 8, "p4": 16, "p5": 32} and names `out_channels`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


class WeightsError(RuntimeError):
    """Backbone weights that cannot be had; the message says how to go on."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_bn": FrozenBatchNorm2d,
    "bn": nn.BatchNorm2d,
    "gn": group_norm,
}


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier: stem, layer1 .. layer4.

    `freeze_at` = 2 stops training of the stem and the first stage, 1 of the stem, 0 of nothing.
    """

    def __init__(self, name: str, norm: str, freeze_at: int, state_dict: dict | None) -> None:
        super().__init__()
        net = torchvision.models.get_model(name, weights=None, norm_layer=NORMS[norm])
        if state_dict is not None:
            load_backbone(net, state_dict, name)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        expansion = net.layer4[-1].expansion
        self.out_channels = [128 * expansion, 256 * expansion, 512 * expansion]
        for stage in (self.stem, self.layer1)[:freeze_at]:
            stage.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        p3 = self.layer2(self.layer1(self.stem(images)))
        p4 = self.layer3(p3)
        return {"p3": p3, "p4": p4, "p5": self.layer4(p4)}


def load_backbone(net: nn.Module, state_dict: dict, name: str) -> None:
    """ImageNet weights into a torchvision classifier; its last layer may be missing, nothing else may."""
    result = net.load_state_dict(state_dict, strict=False)
    missing = [k for k in result.missing_keys if not k.startswith("fc.")]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    unused = [k for k in result.unexpected_keys if not k.endswith("num_batches_tracked")]
    if missing or unused:
        raise WeightsError(f"weights do not fit {name}: missing {missing[:5]}, unused {unused[:5]}")


def pretrained_state_dict(name: str, path: str = "") -> dict:
    """torchvision's ImageNet weights, downloaded once, or those of a local file."""
    if path:
        if not Path(path).is_file():
            raise WeightsError(f"backbone_weights: no such file: {path}")
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        return torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    except OSError as error:
        raise WeightsError(
            f"cannot download ImageNet weights of {name} ({error}): give a local file with "
            "--backbone-weights FILE, or train from scratch with --pretrained false --norm bn --freeze-at 0"
        ) from error


class Backbone(nn.Module):
    """A backbone with its feature pyramid: images to P3 .. P7 of `channels` channels, strides 8 to 128.

    Lateral 1x1 and output 3x3 convs without norm, nearest upsampling, sum; P6 from P5 and P7 from relu(P6) by
    stride-2 3x3 convs.
    """

    def __init__(self, body: nn.Module, channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            body.out_channels, channels, extra_blocks=LastLevelP6P7(channels, channels)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.fpn(OrderedDict(self.body(images))).values())
