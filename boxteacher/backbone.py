"""Backbones from torchvision, and the feature pyramid P3 to P7 (FPN arXiv 1612.03144, as in FCOS).

Every backbone here maps images [N, 3, H, W] to {"p3": stride 8, "p4": 16, "p5": 32} and names their
`out_channels`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import swin_transformer
from torchvision.models.resnet import BasicBlock
from torchvision.ops import DeformConv2d, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


class WeightsError(RuntimeError):
    """Backbone weights that cannot be had; the message says how to go on."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Batch norm with statistics that stay, scale * x + shift, in one pass; torchvision's needs
    two. And bfloat16 stays bfloat16 under autocast; torchvision's makes it float32."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_bn": FrozenBatchNorm,
    "bn": nn.BatchNorm2d,
    "gn": group_norm,
}


# --- ResNet ---------------------------------------------------------------------------------------


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier: stem, layer1 .. layer4.

    `freeze_at` = 2 stops training of the stem and the first stage, 1 of the stem, 0 of nothing.
    `stride_in_1x1`: a stage halves the map in its first 1x1 conv, as the original (Caffe, "MSRA")
    weights want it, not in its first 3x3 conv. `deformable`: DCNv2 in the last three stages.
    """

    def __init__(
        self,
        name: str,
        norm: str,
        freeze_at: int,
        stride_in_1x1: bool = False,
        deformable: bool = False,
        state_dict: dict | None = None,
    ) -> None:
        super().__init__()
        if name == "resnet10_half":
            net = HalfResNet(BasicBlock, [1, 1, 1, 1], norm_layer=NORMS[norm])
        else:
            net = torchvision.models.get_model(name, weights=None, norm_layer=NORMS[norm])
        if state_dict is not None:
            load_backbone(net, state_dict, name, optional=("fc.",))
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        widest = net.layer4[0].conv1.out_channels * net.layer4[0].expansion
        self.out_channels = [widest // 4, widest // 2, widest]
        for stage in (self.layer2, self.layer3, self.layer4):
            if stride_in_1x1:
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
            if deformable:
                for block in stage:
                    block.conv2 = DeformableConv(block.conv2)
        for stage in (self.stem, self.layer1)[:freeze_at]:
            stage.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        p3 = self.layer2(self.layer1(self.stem(images)))
        p4 = self.layer3(p3)
        return {"p3": p3, "p4": p4, "p5": self.layer4(p4)}


class HalfResNet(torchvision.models.ResNet):
    """Stages half as wide (32, 64, 128, 256) behind the usual stem: for small machines."""

    def _make_layer(self, block: type[nn.Module], planes: int, *args: Any, **kw: Any) -> nn.Module:
        return super()._make_layer(block, planes // 2, *args, **kw)


class DeformableConv(DeformConv2d):
    """A 3x3 conv that looks where it wants, as hard as it wants (DCNv2, arXiv 1811.11168).

        y(p) = Σ_k w_k · m_k(p) · x(p + p_k + Δ_k(p)),   Δ = (a, b),  m = sigmoid(c)

    a, b, c: nine maps each, by a conv on the same input; (a, b) are DeformConv2d's 18 offsets.
    That conv starts at zero: nothing is displaced, and the output is half of the plain conv's.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Takes the place of `conv`, weights included."""
        stride, padding = conv.stride[0], conv.padding[0]
        super().__init__(conv.in_channels, conv.out_channels, 3, stride, padding, bias=False)
        self.weight = conv.weight
        self.offset = nn.Conv2d(conv.in_channels, 27, 3, stride, padding)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.offset(x)
        return super().forward(x, maps[:, :18], maps[:, 18:].sigmoid())


# --- Swin -----------------------------------------------------------------------------------------

SWINS = {  # channels after the patch embedding; blocks and attention heads of the four stages
    "swin_t": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin_b": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
}


class Swin(nn.Module):
    """torchvision's Swin Transformer without its classifier, with a LayerNorm on each output.

    `freeze_at` = 2 stops training of the patch embedding and of the first stage with the merging
    after it, 1 of the embedding, 0 of nothing. `drop_path`: the last block's chance to be skipped
    while training, growing from 0 at the first block (stochastic depth, arXiv 1603.09382).
    """

    def __init__(
        self, name: str, freeze_at: int, state_dict: dict | None = None, drop_path: float = 0.2
    ) -> None:
        super().__init__()
        channels, depths, heads = SWINS[name]
        net = swin_transformer.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=channels,
            depths=depths,
            num_heads=heads,
            window_size=[7, 7],
            stochastic_depth_prob=drop_path,
            block=functools.partial(
                swin_transformer.SwinTransformerBlock, attn_layer=WindowAttention
            ),
        )
        if state_dict is not None:
            load_backbone(net, state_dict, name, optional=("head.", "norm."))
        self.features = net.features  # embedding, stage 1, merging, stage 2, merging, ... stage 4
        self.out_channels = [2 * channels, 4 * channels, 8 * channels]
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.out_channels)
        for part in self.features[: (0, 1, 3)[freeze_at]]:
            without_drop_path(part.requires_grad_(False))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.features[1](self.features[0](images))  # [N, H/4, W/4, channels]
        outputs = {}
        for i, norm in enumerate(self.norms):
            x = self.features[2 * i + 3](self.features[2 * i + 2](x))
            outputs[f"p{i + 3}"] = norm(x).permute(0, 3, 1, 2)
        return outputs


class WindowAttention(swin_transformer.ShiftedWindowAttention):
    """Attention within windows of 7x7 tokens, shifted by 3 in every other block (Swin, sec. 3.2).

    The map is rolled by the shift; tokens that only this makes neighbors do not see each other.

    Differs from torchvision, which gives up the shift where a map is but one window high or wide;
    here the shift cuts that window too, as in Swin's detection code. (Sides of at most 224 pixels.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H, W, C] of any H and W: zeros fill the last windows. Returns the same shape."""
        height, width = x.shape[1:3]
        size, shift = self.window_size[0], self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        rows, columns = x.shape[1] // size, x.shape[2] // size
        bias = self.get_relative_position_bias()  # [1, heads, size², size²]
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            bias = bias + shift_mask(rows, columns, size, shift, x.device)[:, None].to(bias.dtype)
        qkv = self.qkv(into_windows(x, size)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # [N, windows, heads, size², C / heads]
        x = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype))
        x = self.proj(x.transpose(2, 3).flatten(3))  # [N, windows, size², C]
        x = x.unflatten(1, (rows, columns)).unflatten(3, (size, size)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width]


def into_windows(x: Tensor, size: int) -> Tensor:
    """Maps [N, H, W, C] cut into squares: [N, windows, size², C]."""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def shift_mask(
    rows: int, columns: int, size: int, shift: int, device: torch.device | None = None
) -> Tensor:
    """Added to the attention in a rolled map: -100 between tokens from opposite ends of it, else 0.
    Returns [rows * columns, size², size²]."""

    def was_rolled(side: int) -> Tensor:
        return torch.arange(side, device=device) >= side - shift

    came_from = 2 * was_rolled(rows * size)[:, None] + was_rolled(columns * size).int()
    part = into_windows(came_from[None, :, :, None], size)[0, :, :, 0]
    return -100.0 * (part[:, :, None] != part[:, None, :])


def without_drop_path(module: nn.Module) -> nn.Module:
    """Switches stochastic depth off for good, in train mode too."""
    for part in module.modules():
        if isinstance(part, torchvision.ops.StochasticDepth):
            part.p = 0.0
    return module


# --- weights --------------------------------------------------------------------------------------


def load_backbone(
    net: nn.Module, state_dict: dict, name: str, optional: tuple[str, ...] = ()
) -> None:
    """ImageNet weights into a torchvision classifier. Only batch norm's counters and what begins
    with one of `optional` (the last layers, which are not used) may be missing or another."""

    def matters(key: str) -> bool:
        return not key.startswith(optional) and not key.endswith("num_batches_tracked")

    wanted = {k: tuple(v.shape) for k, v in net.state_dict().items() if matters(k)}
    found = {k: tuple(v.shape) for k, v in state_dict.items() if matters(k)}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unused": sorted(found.keys() - wanted.keys()),
        "mis-shaped": sorted(k for k in wanted.keys() & found.keys() if wanted[k] != found[k]),
    }
    if any(problems.values()):
        lists = [f"{len(p)} {kind}: {', '.join(p)}" for kind, p in problems.items() if p]
        raise WeightsError(f"backbone_weights do not fit {name}; " + "; ".join(lists))
    net.load_state_dict({k: state_dict[k] for k in found}, strict=False)


def read_weights(path: str) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def pretrained_state_dict(
    name: str, path: str = "", read: Callable[[str], dict] = read_weights
) -> dict:
    """torchvision's ImageNet weights, downloaded once, or what `read` finds in a local file."""
    if path:
        if not Path(path).is_file():
            raise WeightsError(f"backbone_weights: no such file: {path}")
        try:
            state_dict = read(path)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise WeightsError(f"backbone_weights: {path} cannot be read: {reason}") from None
        if not isinstance(state_dict, dict):
            raise WeightsError(f"backbone_weights: {path} holds no dict of weights")
        return state_dict
    try:
        return torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    except (OSError, ValueError) as error:  # no network; no weights of that name
        raise WeightsError(
            f"cannot download ImageNet weights of {name} ({error}): give a local file with "
            "--backbone-weights FILE, or train from scratch with --no-pretrained --norm bn "
            "--freeze-at 0"
        ) from error


# --- feature pyramid ------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A backbone with its feature pyramid: images to P3 .. P7 of `channels` channels, strides 8 to
    128.

    Lateral 1x1 and output 3x3 convs without norm, nearest upsampling, sum; P6 from P5 and P7 from
    relu(P6) by stride-2 3x3 convs.
    """

    def __init__(self, body: nn.Module, channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            body.out_channels, channels, extra_blocks=LastLevelP6P7(channels, channels)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.fpn(OrderedDict(self.body(images))).values())
