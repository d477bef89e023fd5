"""backbone.py: the variants that published models use: MSRA strides, deformable convs, Swin."""

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from boxteacher.backbone import DeformableConv, ResNet, Swin, WindowAttention, without_drop_path
from boxteacher.command_line import parse
from boxteacher.config import Config, ConfigError
from boxteacher.model import PIXELS, build_model, make_teacher
from train import make_state

# --- ResNet ---------------------------------------------------------------------------------------


def test_stride_in_1x1():
    torch.manual_seed(0)
    plain = ResNet("resnet50", "frozen_bn", 2, None).eval()
    msra = ResNet("resnet50", "frozen_bn", 2, None, stride_in_1x1=True).eval()
    msra.load_state_dict(plain.state_dict())
    for stage in (msra.layer2, msra.layer3, msra.layer4):
        strides = [(block.conv1.stride[0], block.conv2.stride[0]) for block in stage]
        assert strides == [(2, 1)] + [(1, 1)] * (len(stage) - 1)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name, features in plain(images).items():
            assert msra(images)[name].shape == features.shape
            assert not torch.allclose(msra(images)[name], features)


def sample(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Bilinear, from [C, H, W]; beyond the border lie zeros."""
    _, height, width = image.shape
    total = np.zeros(len(image))
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return total


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_conv_by_loops(stride):
    torch.manual_seed(0)
    conv = DeformableConv(nn.Conv2d(2, 3, 3, stride, 1, bias=False)).double()
    nn.init.normal_(conv.offset.weight, std=0.5)
    nn.init.normal_(conv.offset.bias)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        found, maps = conv(x)[0].numpy(), conv.offset(x)[0].numpy()
    weight, image = conv.weight.detach().numpy(), x[0].numpy()
    for i in range(found.shape[1]):
        for j in range(found.shape[2]):
            total = np.zeros(3)
            for k in range(9):
                # channels (y0, x0, y1, x1, ...): DeformConv2d's order of the first 18
                y = i * stride - 1 + k // 3 + maps[2 * k, i, j]
                column = j * stride - 1 + k % 3 + maps[2 * k + 1, i, j]
                modulation = 1 / (1 + np.exp(-maps[18 + k, i, j]))
                total += modulation * weight[:, :, k // 3, k % 3] @ sample(image, y, column)
            np.testing.assert_allclose(found[:, i, j], total, atol=1e-10)


def test_deformable_convs_start_as_half_the_plain_ones():
    torch.manual_seed(0)
    state_dict = torchvision.models.resnet50(weights=None).state_dict()
    body = ResNet("resnet50", "frozen_bn", 2, state_dict, deformable=True)
    kinds = [type(block.conv2) for block in body.layer1]
    assert DeformableConv not in kinds
    for number, stage in ((2, body.layer2), (3, body.layer3), (4, body.layer4)):
        for i, block in enumerate(stage):
            conv, weight = block.conv2, state_dict[f"layer{number}.{i}.conv2.weight"]
            assert torch.equal(conv.weight, weight)
            x = torch.randn(1, conv.in_channels, 6, 6)
            plain = nn.functional.conv2d(x, weight, stride=conv.stride, padding=1)
            with torch.no_grad():
                torch.testing.assert_close(conv(x), plain / 2, atol=1e-5, rtol=1e-4)


# --- Swin -----------------------------------------------------------------------------------------


def test_windows_agree_with_torchvision_on_maps_of_several_windows():
    torch.manual_seed(0)
    for shift in (0, 3):
        ours = WindowAttention(8, [7, 7], [shift, shift], 2).double()
        theirs = ShiftedWindowAttention(8, [7, 7], [shift, shift], 2).double()
        theirs.load_state_dict(ours.state_dict())
        for height, width in ((14, 21), (8, 13)):
            x = torch.randn(2, height, width, 8, dtype=torch.float64)
            torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("height", "width"), [(7, 7), (5, 12)])
def test_one_window_is_cut_by_the_shift(height, width):
    """By loops over pairs of tokens, in the map's own coordinates."""
    torch.manual_seed(0)
    size, shift, dim, heads = 7, 3, 8, 2
    attention = WindowAttention(dim, [size, size], [shift, shift], heads).double()
    nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(1, height, width, dim, dtype=torch.float64)
    high, wide = -(-height // size) * size, -(-width // size) * size
    padded = nn.functional.pad(x, (0, 0, 0, wide - width, 0, high - height))[0]
    qkv = attention.qkv(padded).unflatten(-1, (3, heads, dim // heads)).detach()
    table = attention.relative_position_bias_table.detach()

    def place(at: int, side: int) -> tuple[int, int, bool]:
        """Window, position in it, and whether the roll brought it there from the other end."""
        rolled = (at - shift) % side
        return rolled // size, rolled % size, at < shift

    expected = torch.zeros(high, wide, heads, dim // heads, dtype=torch.float64)
    tokens = [(i, j) for i in range(high) for j in range(wide)]
    places = {(i, j): (place(i, high), place(j, wide)) for i, j in tokens}
    for i, j in tokens:
        (row_window, row, row_part), (column_window, column, column_part) = places[i, j]
        logits, values = [], []
        for other in tokens:
            (rw, r, rp), (cw, c, cp) = places[other]
            if (rw, cw) == (row_window, column_window) and (rp, cp) == (row_part, column_part):
                bias = table[(row - r + size - 1) * (2 * size - 1) + column - c + size - 1]
                product = (qkv[i, j, 0] * qkv[other][1]).sum(-1) / math.sqrt(dim / heads)
                logits.append(product + bias)
                values.append(qkv[other][2])
        shares = torch.stack(logits).softmax(0)
        expected[i, j] = (shares[..., None] * torch.stack(values)).sum(0)
    expected = attention.proj(expected.flatten(2))[None, :height, :width]
    torch.testing.assert_close(attention(x), expected)


def test_swin_has_torchvisions_features_under_norms_of_its_own():
    torch.manual_seed(0)
    net = torchvision.models.swin_t(weights=None).eval()
    body = Swin("swin_t", 2, net.state_dict()).eval()
    assert body.out_channels == [192, 384, 768]
    images = torch.randn(1, 3, 256, 288)
    with torch.no_grad():
        outputs, x = body(images), images
        for i, layer in enumerate(net.features):
            x = layer(x)
            if i in (3, 5, 7):
                level = (i - 3) // 2
                expected = nn.functional.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
                output = outputs[f"p{level + 3}"]
                torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("freeze_at", "frozen"),
    [(0, ()), (1, ("features.0.",)), (2, ("features.0.", "features.1.", "features.2."))],
)
def test_swin_freezes_the_embedding_and_the_first_stage_with_its_merging(freeze_at, frozen):
    body = Swin("swin_t", freeze_at, None)
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen or "-")), name


def drop_rates(module: nn.Module) -> list[float]:
    return [m.p for m in module.modules() if isinstance(m, torchvision.ops.StochasticDepth)]


def test_drop_path_grows_from_zero_and_spares_frozen_stages():
    expected = [0.2 * i / 11 for i in range(12)]
    assert drop_rates(Swin("swin_t", 0, None)) == pytest.approx(expected)
    assert drop_rates(Swin("swin_t", 2, None)) == pytest.approx([0, 0, *expected[2:]])
    assert drop_rates(Swin("swin_t", 0, None, drop_path=0.0)) == [0] * 12
    assert not any(drop_rates(without_drop_path(Swin("swin_t", 0, None))))


def test_the_teacher_has_no_drop_path_in_train_mode():
    cfg = Config(backbone="swin_t", mask_norm="gn")
    student = build_model(cfg, 2).train()
    teacher = make_teacher(student).train()
    assert max(drop_rates(student)) == 0.2
    assert not any(drop_rates(teacher))
    images = torch.randn(8, 3, 64, 64)  # many, so that some block is skipped
    with torch.no_grad():
        first, again = teacher.backbone(images), teacher.backbone(images)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(student.backbone(images)[0], student.backbone(images)[0])
    assert not any(p.requires_grad for p in teacher.parameters())
    assert any(p.requires_grad for p in student.parameters())


# --- configuration --------------------------------------------------------------------------------


def test_pixels():
    image = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    image[:, :, 20:] = image[:, :, :, 50:] = 0
    for pixel_format, order in (("rgb", [0, 1, 2]), ("bgr", [2, 1, 0])):
        cfg = Config(backbone="resnet18", pixel_format=pixel_format)
        model = build_model(cfg, 2)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in PIXELS[pixel_format])
        expected = (image[:, order] - mean) / std
        expected[:, :, 20:] = expected[:, :, :, 50:] = 0
        torch.testing.assert_close(model.normalize(image, [(20, 50)]), expected)


@pytest.mark.parametrize(("optimizer", "weight_decay"), [("adamw", 0.05), ("sgd", 1e-4)])
def test_weight_decay_is_for_everything_that_trains(optimizer, weight_decay):
    fields = dict(backbone="swin_t", optimizer=optimizer, weight_decay=weight_decay)
    state = make_state(Config(**fields, pretrained=False), 2, torch.device("cpu"))
    trained = {id(p) for p in state.student.parameters() if p.requires_grad}
    (everything,) = state.optimizer.param_groups
    assert {id(p) for p in everything["params"]} == trained
    assert everything["weight_decay"] == weight_decay
    assert everything.get("momentum") == (0.9 if optimizer == "sgd" else None)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["shapes", "--deformable"], "deformable is for bottlenecks"),
        (["coco_boxteacher_swin_b_3x", "--stride-in-1x1"], "stride_in_1x1 is for bottlenecks"),
    ],
)
def test_variants_that_cannot_be_meant(argv, word):
    with pytest.raises(ConfigError, match=word):
        parse(argv)
