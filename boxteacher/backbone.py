"""Backbones from torchvision, and the feature pyramid P3 to P7 (FPN arXiv 1612.03144, as in FCOS).

Every backbone here maps images [N, 3, H, W] to {"p3": stride 8, "p4": 16, "p5": 32} and names their
`out_channels`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import swin_transformer
from torchvision.models.resnet import BasicBlock
from torchvision.ops import DeformConv2d, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


def group_norm(channels: int) -> nn.GroupNorm:
    """As many groups as divide the channels: 32 at most, of 4 channels or more each."""
    most = min(32, channels // 4)
    return nn.GroupNorm(max(n for n in range(1, most + 1) if channels % n == 0), channels)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Batch norm with constant statistics: y = scale * x + shift.

    It needs one pass (torchvision's needs two), and bfloat16 stays bfloat16 under autocast
    (torchvision's makes it float32).
    """

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
    """torchvision's ResNet without its classifier. Weights have torchvision's names, except that
    `conv1` is `stem.0` here and `bn1` is `stem.1`.

    `freeze_at`: 2 stops training of the stem and the first stage, 1 of the stem, 0 of nothing.
    `stride_in_1x1`: a stage halves the map in its first 1x1 conv, not in its first 3x3 conv. The
    original weights (Caffe, "MSRA") need this. `deformable`: DCNv2 in the last three stages.
    """

    def __init__(
        self,
        name: str,
        norm: str,
        freeze_at: int,
        stride_in_1x1: bool = False,
        deformable: bool = False,
    ) -> None:
        super().__init__()
        if name == "resnet10_half":
            net = HalfResNet(BasicBlock, [1, 1, 1, 1], norm_layer=NORMS[norm])
        else:
            net = torchvision.models.get_model(name, weights=None, norm_layer=NORMS[norm])
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        widest = net.layer4[0].conv1.out_channels * net.layer4[0].expansion
        self.out_channels = [widest // 4, widest // 2, widest]
        # The published variants of the last three stages
        for stage in (self.layer2, self.layer3, self.layer4):
            if stride_in_1x1:
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
            if deformable:
                for block in stage:
                    block.conv2 = DeformableConv(block.conv2)
        # Parts that do not train
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
    """A 3x3 convolution with learned offsets and modulation (DCNv2, arXiv 1811.11168).

        y(p) = Σ_k w_k · m_k(p) · x(p + p_k + Δ_k(p)),   Δ = (a, b),  m = sigmoid(c)

    a, b, c: nine maps each, from a convolution of the same input. (a, b) are DeformConv2d's 18
    offsets. That convolution starts at zero. Then nothing is displaced, and the output is half of
    the plain convolution's.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Replaces `conv`, 3x3 without bias or dilation, and takes its weights."""
        stride, padding = conv.stride[0], conv.padding[0]
        super().__init__(conv.in_channels, conv.out_channels, 3, stride, padding, bias=False)
        self.weight = conv.weight
        self.offset = nn.Conv2d(conv.in_channels, 27, 3, stride, padding)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.offset(x)
        return super().forward(x, maps[:, :18], maps[:, 18:].sigmoid())


# --- MobileNetV2 ----------------------------------------------------------------------------------

MOBILENET_ENDS = {6: "p3", 13: "p4", 17: "p5"}  # the last layers of strides 8, 16 and 32


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 (arXiv 1801.04381) without its classifier. Weights have
    torchvision's names.

    The last 1x1 conv, to 1280 channels, is left out. It would add 7 % to the multiplications and
    23 % to the weights, and the pyramid would reduce its channels again.

    `freeze_at`: 2 stops training of all layers up to stride 4, 1 of the first conv, 0 of nothing.
    """

    def __init__(self, norm: str, freeze_at: int) -> None:
        super().__init__()
        net = torchvision.models.mobilenet_v2(weights=None, norm_layer=NORMS[norm])
        self.features = net.features[:18]
        self.out_channels = [self.features[i].out_channels for i in MOBILENET_ENDS]
        self.features[: (0, 1, 4)[freeze_at]].requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, outputs = images, {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in MOBILENET_ENDS:
                outputs[MOBILENET_ENDS[i]] = x
        return outputs


# --- Swin -----------------------------------------------------------------------------------------

SWINS = {  # channels after the patch embedding; blocks and attention heads of the four stages
    "swin_t": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin_b": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
}
DROP_PATH = 0.2  # as in the published Swin-B configuration of BoxTeacher


class Swin(nn.Module):
    """torchvision's Swin Transformer without its classifier, with a LayerNorm on each output.
    Weights have torchvision's names, and these norms are `norms`.

    `freeze_at`: 2 stops training of the patch embedding and of the first stage with the merging
    after it, 1 of the embedding, 0 of nothing. In training a block is skipped with a probability
    that grows from 0 in the first block to DROP_PATH in the last (stochastic depth, arXiv
    1603.09382). Frozen blocks are never skipped.
    """

    def __init__(self, name: str, freeze_at: int) -> None:
        super().__init__()
        channels, depths, heads = SWINS[name]
        block = swin_transformer.SwinTransformerBlock
        block = functools.partial(block, attn_layer=WindowAttention)
        net = swin_transformer.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=channels,
            depths=depths,
            num_heads=heads,
            window_size=[7, 7],
            stochastic_depth_prob=DROP_PATH,
            block=block,
        )
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

    The map is rolled by the shift. Tokens that are neighbors only through this do not see each
    other.

    Differs from torchvision's on maps that are only one window high or wide (sides of at most 224
    pixels). torchvision does not shift there. Here the shift cuts that window too, as in Swin's
    detection code.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H, W, C] of any H and W. Zeros fill the last windows. Returns the same shape."""
        # Pad to whole windows
        height, width = x.shape[1:3]
        size, shift = self.window_size[0], self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        rows, columns = x.shape[1] // size, x.shape[2] // size
        # Roll the map. Add to each window's logits what depends on positions
        bias = self.get_relative_position_bias()  # [1, heads, size², size²]
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            bias = bias + shift_mask(rows, columns, size, shift, x.device)[:, None].to(bias.dtype)
        # Attend within each window
        qkv = self.qkv(into_windows(x, size)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # [N, windows, heads, size², C / heads]
        x = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype))
        x = self.proj(x.transpose(2, 3).flatten(3))  # [N, windows, size², C]
        # Put the windows together again, roll back, cut off the padding
        x = x.unflatten(1, (rows, columns)).unflatten(3, (size, size)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width]


def into_windows(x: Tensor, size: int) -> Tensor:
    """Maps [N, h, w, C] cut into squares: [N, windows, size², C]."""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def shift_mask(rows: int, columns: int, size: int, shift: int, device: torch.device) -> Tensor:
    """What to add to attention logits in a rolled map: -100 between tokens from opposite ends of
    it, else 0. Returns [rows * columns, size², size²]."""

    def was_rolled(side: int) -> Tensor:
        return torch.arange(side, device=device) >= side - shift

    came_from = 2 * was_rolled(rows * size)[:, None] + was_rolled(columns * size).int()
    part = into_windows(came_from[None, :, :, None], size)[0, :, :, 0]
    return -100.0 * (part[:, :, None] != part[:, None, :])


def without_drop_path(module: nn.Module) -> nn.Module:
    """Switches stochastic depth off, in train mode too. Returns the module."""
    for part in module.modules():
        if isinstance(part, torchvision.ops.StochasticDepth):
            part.p = 0.0
    return module


# --- feature pyramid ------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A backbone with its feature pyramid: images to P3 .. P7 of `channels` channels, strides 8 to
    128.

    Lateral 1x1 and output 3x3 convs have no norm. Maps are upsampled to the nearest and added. P6
    comes from P5 and P7 from relu(P6), by 3x3 convs of stride 2.
    """

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            body.out_channels, channels, extra_blocks=LastLevelP6P7(channels, channels)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.fpn(self.body(images)).values())
