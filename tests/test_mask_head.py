"""mask_head.py against slow references: Python loops in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from boxteacher.mask_head import (
    MaskBranch,
    aligned_upsample,
    dynamic_mask_logits,
    dynamic_sizes,
    mask_windows,
    pixel_positions,
    read_maps,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_numbers_of_dynamic_parameters():
    assert dynamic_sizes(16) == [144, 64, 8, 8, 8, 1]
    assert [sum(dynamic_sizes(channels)) for channels in (16, 8)] == [233, 169]


# --- upsampling -----------------------------------------------------------------------------------


def slow_aligned_upsample(x, factor):
    """Pixel Y of the result reads the input at (Y - factor // 2) / factor, the border repeated."""
    height, width = x.shape
    out = torch.zeros(factor * height, factor * width, dtype=x.dtype)
    for row in range(factor * height):
        for column in range(factor * width):
            v, u = max(row - factor // 2, 0) / factor, max(column - factor // 2, 0) / factor
            y, x_ = int(v), int(u)
            y2, x2 = min(y + 1, height - 1), min(x_ + 1, width - 1)
            top = (1 - (u - x_)) * x[y, x_] + (u - x_) * x[y, x2]
            bottom = (1 - (u - x_)) * x[y2, x_] + (u - x_) * x[y2, x2]
            out[row, column] = (1 - (v - y)) * top + (v - y) * bottom
    return out


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (1, 3)])
def test_aligned_upsample(factor, size):
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    up = aligned_upsample(x, factor)
    for n in range(2):
        for c in range(2):
            torch.testing.assert_close(up[n, c], slow_aligned_upsample(x[n, c], factor))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_aligned_upsample_keeps_sample_points(factor):
    """A ramp sampled at factor//2 + factor*i comes back between its first and last samples."""
    rows, columns = torch.arange(6 * factor).double()[:, None], torch.arange(5 * factor).double()
    ramp = 3 * rows - 2 * columns + 1
    half = factor // 2
    up = aligned_upsample(ramp[None, None, half::factor, half::factor], factor)[0, 0]
    assert up.shape == ramp.shape
    interior = slice(half, half + 5 * factor + 1), slice(half, half + 4 * factor + 1)
    torch.testing.assert_close(up[interior], ramp[interior], atol=1e-9, rtol=0)


# --- the mask branch ------------------------------------------------------------------------------


def test_mask_branch():
    branch = MaskBranch(8, 12, 16, num_convs=4).eval()
    features = [torch.randn(2, 8, 16 >> i, 24 >> i) for i in range(3)]
    with torch.no_grad():
        x = 0
        for i, (block, feature) in enumerate(zip(branch.refine, features, strict=True)):
            y = F.conv2d(feature, block[0].weight, None, padding=1)
            x = x + aligned_upsample((y / (1 + 1e-5) ** 0.5).relu(), 2**i)
        for block in branch.tower:
            x = (F.conv2d(x, block[0].weight, None, padding=1) / (1 + 1e-5) ** 0.5).relu()
        x = F.conv2d(x, branch.out.weight, branch.out.bias)
        out = branch(features)
    assert out.shape == (2, 16, 16, 24)
    torch.testing.assert_close(out, x)


def test_mask_branch_structure():
    branch = MaskBranch()
    convs = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
    shapes = [tuple(conv.weight.shape) for conv in convs]
    assert shapes == [(128, 256, 3, 3)] * 3 + [(128, 128, 3, 3)] * 4 + [(16, 128, 1, 1)]
    assert [conv.bias is None for conv in convs] == [True] * 7 + [False]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in branch.modules()) == 7
    for conv in convs:  # Kaiming uniform with a = 1: +- sqrt(3 / fan in), which has this deviation
        fan_in = conv.weight[0].numel()
        assert conv.weight.abs().max() <= (3 / fan_in) ** 0.5
        assert conv.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    with_group_norm = MaskBranch(8, 16, 4, 2, lambda channels: nn.GroupNorm(4, channels))
    assert sum(isinstance(m, nn.GroupNorm) for m in with_group_norm.modules()) == 5


# --- the dynamic head -----------------------------------------------------------------------------


def slow_dynamic_logits(features, params, location, soi):
    """One instance: three 1x1 convs with its own parameters, pixel by pixel. features [C, H, W]."""
    channels, height, width = features.shape
    inputs, numbers = 2 + channels, params.tolist()
    take = iter(numbers)
    weights = [
        [[next(take) for _ in range(n_in)] for _ in range(n_out)]
        for n_in, n_out in ((inputs, 8), (8, 8), (8, 1))
    ]
    biases = [[next(take) for _ in range(n)] for n in (8, 8, 1)]
    assert next(take, None) is None
    out = torch.zeros(height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            x = [(location[0] - (8 * j + 4)) / soi, (location[1] - (8 * i + 4)) / soi]
            x += features[:, i, j].tolist()
            for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                x = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]
                x = [v + b for v, b in zip(x, bias, strict=True)]
                if layer < 2:
                    x = [max(v, 0.0) for v in x]
            out[i, j] = x[0]
    return out


def head_inputs(num_images, num_instances, channels, height, width):
    features = torch.randn(num_images, channels, height, width, dtype=torch.float64)
    params = torch.randn(num_images, num_instances, sum(dynamic_sizes(channels))).double()
    locations = torch.rand(num_images, num_instances, 2).double() * 8 * max(height, width)
    soi = 64.0 * 2 ** torch.randint(0, 5, (num_images, num_instances)).double()
    return features, params, locations, soi


@pytest.mark.parametrize("channels", [16, 8])
def test_dynamic_mask_logits(channels):
    features, params, locations, soi = head_inputs(2, 3, channels, 4, 5)
    logits = dynamic_mask_logits(features, params, locations, soi)
    assert logits.shape == (2, 3, 4, 5)
    for n in range(2):
        for k in range(3):
            expected = slow_dynamic_logits(
                features[n], params[n, k], locations[n, k].tolist(), soi[n, k].item()
            )
            torch.testing.assert_close(logits[n, k], expected, atol=1e-9, rtol=1e-9)


def test_dynamic_mask_logits_gradient():
    features, params, locations, soi = head_inputs(1, 2, 2, 2, 3)
    assert gradcheck(
        lambda f, p: dynamic_mask_logits(f, p, locations, soi),
        (features.requires_grad_(), params.requires_grad_()),
    )


def test_dynamic_mask_logits_in_float32_and_autocast_on_a_large_image():
    features, params, locations, soi = head_inputs(1, 4, 16, 100, 168)
    exact = dynamic_mask_logits(features, params, locations, soi)
    inputs = [x.float() for x in (features, params, locations, soi)]
    single = dynamic_mask_logits(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = dynamic_mask_logits(*inputs)
    assert single.dtype == under_autocast.dtype == torch.float32
    assert torch.equal(single, under_autocast)
    torch.testing.assert_close(single.double(), exact, atol=1e-3, rtol=1e-4)


def test_dynamic_mask_logits_of_no_instances():
    features, params, locations, soi = head_inputs(2, 0, 16, 4, 5)
    logits = dynamic_mask_logits(features, params.requires_grad_(), locations, soi)
    assert logits.shape == (2, 0, 4, 5)
    logits.sum().backward()


def test_aligned_upsample_of_no_instances():
    assert aligned_upsample(torch.zeros(1, 0, 4, 5), 2).shape == (1, 0, 8, 10)


# --- from the stride-4 map to pixels --------------------------------------------------------------

SIZES = [  # H4, W4; the input's size without padding; the output's
    ((16, 24), (64, 96), (64, 96)),  # as it is, without padding
    ((16, 24), (57, 83), (57, 83)),
    ((16, 24), (50, 96), (75, 160)),  # enlarged by different factors
    ((16, 24), (61, 90), (600, 401)),
    ((24, 16), (96, 63), (33, 20)),  # made smaller, down to a pixel
    ((24, 16), (90, 62), (200, 17)),
    ((16, 16), (64, 37), (1, 1)),
    ((8, 8), (1, 3), (7, 9)),  # fewer pixels than a cell has
    ((64, 72), (256, 256), (300, 280)),
]


def map_of(kind, height, width):
    y, x = torch.arange(height).double()[:, None], torch.arange(width).double()
    if kind == "noise":
        return torch.rand(height, width).double()
    if kind == "disk":
        far = torch.hypot(y - height * torch.rand(()), x - width * torch.rand(()))
        return (min(height, width) / 4 - far).sigmoid()
    if kind == "corners":
        at_border = ((y == 0) | (y == height - 1)) & ((x == 0) | (x == width - 1))
        return 0.1 + 0.8 * at_border.double()
    return torch.full((height, width), {"empty": 0.4, "full": 0.6}[kind]).double()


KINDS = ("disk", "empty", "corners", "full", "noise", "disk", "disk")


def whole_masks(maps, size, output_size):
    maps = aligned_upsample(maps[None], 4)[:, :, : size[0], : size[1]]
    return F.interpolate(maps, size=output_size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize(("cells", "size", "output_size"), SIZES)
def test_maps_are_read_as_the_whole_image_is_made(cells, size, output_size):
    maps = torch.stack([map_of(kind, *cells) for kind in KINDS])
    rows, columns = pixel_positions(maps, size, output_size)
    whole = whole_masks(maps, size, output_size)
    torch.testing.assert_close(read_maps(maps, rows, columns), whole, atol=1e-12, rtol=0)
    every_4th = read_maps(maps, rows[2::4], columns[2::4])
    torch.testing.assert_close(every_4th, whole[:, 2::4, 2::4], atol=1e-12, rtol=0)

    some_rows = torch.randint(output_size[0], (len(maps), 5))  # other pixels of each map
    some_columns = torch.randint(output_size[1], (len(maps), 3))
    some = read_maps(maps, rows[some_rows], columns[some_columns])
    for d in range(len(maps)):
        expected = whole[d][some_rows[d]][:, some_columns[d]]
        torch.testing.assert_close(some[d], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_windows_hold_all_of_the_masks_that_whole_images_have(threshold):
    """At most one pixel in a million is on the other side of the threshold, by rounding."""
    differ = total = 0
    for cells, size, output_size in SIZES:
        maps = torch.stack([map_of(kind, *cells) for kind in KINDS]).float()
        whole = whole_masks(maps, size, output_size)
        windows = mask_windows(maps, *pixel_positions(maps, size, output_size), threshold)
        for kind, expected, (probs, (top, left)) in zip(KINDS, whole, windows, strict=True):
            mask = torch.zeros(output_size, dtype=torch.bool)
            mask[top : top + probs.shape[0], left : left + probs.shape[1]] = probs > threshold
            differ, total = differ + (mask ^ (expected > threshold)).sum(), total + mask.numel()
            assert mask.any() or kind != "full"
            assert probs.numel() == 0 or kind != "empty" or threshold < 0.4
    assert total > 1_000_000
    assert differ <= total / 1_000_000


def test_windows_are_not_much_larger_than_their_masks():
    maps = torch.zeros(1, 64, 64)
    maps[0, 20:30, 40:45] = 1
    positions = pixel_positions(maps, (256, 256), (512, 512))
    ((probs, (top, left)),) = mask_windows(maps, *positions, 0.5)
    rows, columns = (probs > 0.5).nonzero().unbind(1)
    assert (int(rows.min()), int(columns.min())) <= (8, 8)  # a cell has 8 x 8 pixels here
    assert probs.shape[0] - int(rows.max()) <= 9
    assert probs.shape[1] - int(columns.max()) <= 9
    assert (top, left) <= (20 * 8, 40 * 8)
    assert list(mask_windows(maps[:0], *positions, 0.5)) == []
