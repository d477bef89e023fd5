"""CondInst's masks (arXiv 2003.05664): shared features, and a tiny network for each instance.

N images · K instances · H8, W8 the stride-8 grid of P3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 8  # channels between the dynamic layers


def num_dynamic_params(mask_channels: int) -> int:
    """Weights and biases of the layers (2 + mask_channels) -> 8 -> 8 -> 1: 233 for 16 channels."""
    return sum(dynamic_sizes(mask_channels))


def dynamic_sizes(mask_channels: int) -> list[int]:
    """The numbers of parameters, in their order: three weights, then three biases."""
    return [(2 + mask_channels) * HIDDEN, HIDDEN * HIDDEN, HIDDEN, HIDDEN, HIDDEN, 1]


def aligned_upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling that keeps the sample points of strided grids aligned: x[..., i] is at
    pixel factor//2 + i*factor of the result, as location (i, j) of a stride-s level is at
    s//2 + s*i.

    x [N, C, h, w]. Returns [N, C, factor*h, factor*w].
    """
    height, width = x.shape[-2:]
    if x.shape[1] == 0:  # torch refuses to pad or to resize nothing
        return x.reshape(len(x), 0, factor * height, factor * width)
    for dim in (-2, -1):  # F.pad does so too, but compiled its backward fails: seen in torch 2.15
        first, last = x.narrow(dim, 0, 1), x.narrow(dim, -1, 1)
        x = torch.cat((first, x, last), dim)
    size = (factor * (height + 1) + 1, factor * (width + 1) + 1)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    start = factor - factor // 2  # x[..., 0] is now at factor and belongs at factor // 2
    return x[..., start : start + factor * height, start : start + factor * width]


class MaskBranch(nn.Module):
    """Mask features for all instances of an image, at stride 8 (CondInst).

    P3, P4, P5 each through conv-norm-relu, upsampled to stride 8 and summed; `num_convs` more such
    blocks; a 1x1 conv to `out_channels`. `norm(channels)` makes a normalization layer.
    """

    def __init__(
        self,
        in_channels: int = 256,
        channels: int = 128,
        out_channels: int = 16,
        num_convs: int = 4,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()

        def block(inputs: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
            return nn.Sequential(conv, norm(channels), nn.ReLU(inplace=True))

        self.refine = nn.ModuleList(block(in_channels) for _ in range(3))
        self.tower = nn.Sequential(*(block(channels) for _ in range(num_convs)))
        self.out = nn.Conv2d(channels, out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """P3, P4, P5, each [N, in_channels, H8 / 2^i, W8 / 2^i]. Returns [N, out_channels, H8, W8]."""
        x = self.refine[0](features[0])
        for i in (1, 2):
            x = x + aligned_upsample(self.refine[i](features[i]), 2**i)
        return self.out(self.tower(x))


def dynamic_mask_logits(
    mask_features: Tensor, params: Tensor, locations: Tensor, sizes_of_interest: Tensor
) -> Tensor:
    """Every instance's own three 1x1 convs over [relative coordinates; features] (CondInst).

    The relative coordinate (location - pixel) / soi is affine in the pixel's position (x, y):

        W [coordinates; features] + b
            = [W_features, -W_x/soi, -W_y/soi, b + W_xy · location/soi] [features; x; y; 1]

    so the first layer is one matrix product per image for all its instances; the other two are
    small batched products.

    mask_features [N, C, H8, W8], pixels (8j + 4, 8i + 4); params [N, K, 8(C+2) + 64 + 8 + 17]: the
    three weights, then the three biases; locations [N, K, 2] (x, y) in pixels; sizes_of_interest
    [N, K] in pixels. Returns logits [N, K, H8, W8]. Runs in float32 under autocast: bfloat16 cannot
    count pixels beyond 256.
    """
    num_images, channels, height, width = mask_features.shape
    num_instances, device = params.shape[1], params.device
    with torch.autocast(device.type, enabled=False):
        dtype = torch.promote_types(params.dtype, torch.float32)
        params, mask_features = params.to(dtype), mask_features.to(dtype)
        w1, w2, w3, b1, b2, b3 = params.split(dynamic_sizes(channels), dim=-1)

        w1 = w1.unflatten(-1, (HIDDEN, 2 + channels))  # [N, K, 8, 2 + C]
        w_xy = w1[..., :2] / sizes_of_interest[..., None, None]
        offset = b1 + (w_xy * locations[..., None, :]).sum(-1)
        w1 = torch.cat((w1[..., 2:], -w_xy, offset[..., None]), dim=-1)  # [N, K, 8, C + 3]

        y = (torch.arange(height, device=device, dtype=dtype) * 8 + 4)[:, None].expand(-1, width)
        x = (torch.arange(width, device=device, dtype=dtype) * 8 + 4).expand(height, -1)
        pixels = torch.stack((x, y, torch.ones_like(x))).expand(num_images, -1, -1, -1)
        inputs = torch.cat((mask_features, pixels), dim=1).flatten(2)  # [N, C + 3, H8 W8]

        hidden = (w1.flatten(1, 2) @ inputs).relu()  # [N, 8K, H8 W8]
        hidden = hidden.view(num_images * num_instances, HIDDEN, height * width)
        w2 = w2.reshape(-1, HIDDEN, HIDDEN)
        hidden = torch.baddbmm(b2.reshape(-1, HIDDEN, 1), w2, hidden).relu()
        logits = torch.baddbmm(b3.reshape(-1, 1, 1), w3.reshape(-1, 1, HIDDEN), hidden)
    return logits.view(num_images, num_instances, height, width)
