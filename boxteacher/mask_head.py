"""CondInst's masks (arXiv 2003.05664): shared features, a tiny network for each instance, and the
way from its map to pixels.

N images · K instances · C mask features · D masks of one image · H8, W8 the stride-8 grid of P3
H4, W4 that of stride 4 · h, w pixels of an image · r, c pixels of a window in it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 8  # channels between the dynamic layers


def dynamic_sizes(mask_channels: int) -> list[int]:
    """The numbers of parameters of the layers (2 + mask_channels) -> 8 -> 8 -> 1: three weights,
    then three biases. With 16 channels they are 233 together."""
    return [(2 + mask_channels) * HIDDEN, HIDDEN * HIDDEN, HIDDEN, HIDDEN, HIDDEN, 1]


def aligned_upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling that keeps the sample points of strided grids aligned: x[..., i] is at
    pixel factor//2 + i*factor of the result, as location (i, j) of a stride-s level is at
    s//2 + s*i.

    x [N, channels, h, w]. Returns [N, channels, factor*h, factor*w].
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

    P3, P4, P5 each pass conv-norm-relu, are upsampled to stride 8 and summed. `num_convs` more such
    blocks and a 1x1 conv to `out_channels` follow. `norm(channels)` makes a normalization layer.
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
        """P3, P4, P5 [N, in_channels, H8 / 2^i, W8 / 2^i] to [N, out_channels, H8, W8]."""
        x = self.refine[0](features[0])
        for i in (1, 2):
            x = x + aligned_upsample(self.refine[i](features[i]), 2**i)
        return self.out(self.tower(x))


def dynamic_mask_logits(
    mask_features: Tensor, params: Tensor, locations: Tensor, sizes_of_interest: Tensor
) -> Tensor:
    """Three 1x1 convs with parameters of each instance's own, over [relative coordinates;
    features] (CondInst, section 3.2).

    The first layer is a sum. The part of the features is one matrix product per image for all
    instances. The part of the relative coordinates is affine in column and row:

        W [coordinates; features] + b
            = W_f features + w_x (loc_x - x) / soi + w_y (loc_y - y) / soi + b

    mask_features [N, C, H8, W8], pixels (8j + 4, 8i + 4); params [N, K, 8(C+2) + 64 + 8 + 17]: the
    three weights, then the three biases; locations [N, K, 2] (x, y) in pixels; sizes_of_interest
    soi [N, K] in pixels. Returns logits [N, K, H8, W8]. Runs in float32 under autocast. Coordinates
    never enter a matrix product, which TF32 would round to 10 bits.
    """
    num_images, channels, height, width = mask_features.shape
    num_instances, device = params.shape[1], params.device
    with torch.autocast(device.type, enabled=False):
        dtype = torch.promote_types(params.dtype, torch.float32)
        params, mask_features = params.to(dtype), mask_features.to(dtype)
        w1, w2, w3, b1, b2, b3 = params.split(dynamic_sizes(channels), dim=-1)

        # Layer 1: [N, 8K, H8, W8] from the features, plus what depends on the column or the row.
        w1 = w1.unflatten(-1, (HIDDEN, 2 + channels))  # [N, K, 8, 2 + C]
        hidden = w1[..., 2:].flatten(1, 2) @ mask_features.flatten(2)
        hidden = hidden.unflatten(1, (-1, HIDDEN)).unflatten(-1, (height, width))
        x = torch.arange(width, device=device, dtype=dtype) * 8 + 4
        y = torch.arange(height, device=device, dtype=dtype) * 8 + 4
        relative_x = (locations[..., :1] - x) / sizes_of_interest[..., None]  # [N, K, W8]
        relative_y = (locations[..., 1:] - y) / sizes_of_interest[..., None]  # [N, K, H8]
        of_column = w1[..., 0, None] * relative_x[:, :, None]  # [N, K, 8, W8]
        of_row = w1[..., 1, None] * relative_y[:, :, None] + b1[..., None]  # [N, K, 8, H8]
        hidden = hidden.add_(of_column[..., None, :]).add_(of_row[..., :, None]).relu_()

        # Layers 2 and 3: a small product for each instance.
        hidden = hidden.view(num_images * num_instances, HIDDEN, height * width)
        w2 = w2.reshape(-1, HIDDEN, HIDDEN)
        hidden = torch.baddbmm(b2.reshape(-1, HIDDEN, 1), w2, hidden).relu_()
        logits = torch.baddbmm(b3.reshape(-1, 1, 1), w3.reshape(-1, 1, HIDDEN), hidden)
    return logits.view(num_images, num_instances, height, width)


def pixel_positions(
    maps: Tensor, size: tuple[int, int], output_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Rows [h] and columns [w] of an image, in cells of its stride-4 maps [D, H4, W4].

    The network's input without padding, of `size`, is resized to `output_size` h, w. Pixel o is at
    (o + 0.5) size / output_size - 0.5 in the input, and cell i at 4 i + 2.
    """

    def positions(cells: int, side: int, output_side: int) -> Tensor:
        pixels = torch.arange(output_side, device=maps.device, dtype=maps.dtype)
        pixels = ((pixels + 0.5) * (side / output_side) - 0.5).clamp(0, side - 1)
        return ((pixels - 2) / 4).clamp(0, cells - 1)

    return tuple(map(positions, maps.shape[1:], size, output_size))


def read_maps(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear interpolation of maps [D, H4, W4], of 2x2 cells or more, at `pixel_positions` [r]
    and [c], or [D, r] and [D, c]. Equal to `aligned_upsample` by 4, a cut to `size` and bilinear
    resizing: two steps in one, since the upsampled map is linear between pixels. Returns [D, r, c],
    columns contiguous.
    """
    for positions in (rows, columns):  # the columns are the lines of the second turn
        low = positions.long().clamp(max=maps.shape[1] - 2)
        weight = (positions - low)[..., None]
        low = low + maps.shape[1] * torch.arange(len(maps), device=maps.device)[:, None]
        lines = maps.flatten(0, 1)
        maps = F.embedding(low, lines).lerp_(F.embedding(low + 1, lines), weight).mT
    return maps


def mask_windows(
    maps: Tensor, rows: Tensor, columns: Tensor, threshold: float
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The masks of maps [D, H4, W4], each read only where it can be over the threshold.

    A pixel is a mean of four cells, and one of these must be over the threshold. The window holds
    all pixels less than a cell away from such cells. Yields for each map its probabilities
    [r, c] there, with r = c = 0 if there are none, and the window's corner (top, left).
    """
    is_over, spans = maps > threshold, []
    for positions, others in ((rows, 2), (columns, 1)):
        has_cell = is_over.any(others).to(maps.dtype)  # [D, cells of the axis]
        first = has_cell.argmax(1)
        last = has_cell.shape[1] - 1 - has_cell.flip(1).argmax(1)
        start = torch.searchsorted(positions, (first - 1).to(maps.dtype), right=True)
        stop = torch.searchsorted(positions, (last + 1).to(maps.dtype))
        spans += [start, torch.where(has_cell.any(1), stop, start)]
    for d, (top, bottom, left, right) in enumerate(torch.stack(spans, 1).tolist()):
        yield read_maps(maps[d : d + 1], rows[top:bottom], columns[left:right])[0], (top, left)
