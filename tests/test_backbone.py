"""backbone.py: shapes, freezing, norms, and weights from a file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from boxteacher.backbone import Backbone, ResNet, WeightsError, pretrained_state_dict


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).state_dict()


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet10_half", [64, 128, 256]),
        ("resnet18", [128, 256, 512]),
        ("resnet50", [512, 1024, 2048]),
    ],
)
def test_shapes(name, channels):
    body = ResNet(name, "frozen_bn", 2, None)
    assert body.out_channels == channels
    net = Backbone(body, 32).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, pyramid = body(images), net(images)
    assert list(maps) == ["p3", "p4", "p5"]
    for i, (c, x) in enumerate(zip(channels, maps.values(), strict=True)):
        assert x.shape == (2, c, 8 >> i, 12 >> i)
    sizes = [tuple(p.shape) for p in pyramid]
    assert sizes == [(2, 32, h, w) for h, w in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))]


def test_pyramid_is_laterals_upsampled_sums_and_two_more_levels_from_p5():
    torch.manual_seed(0)
    net = Backbone(ResNet("resnet18", "bn", 0, None), 16).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, pyramid = list(net.body(images).values()), net(images)
        lateral = [block[0] for block in net.fpn.inner_blocks]
        output = [block[0] for block in net.fpn.layer_blocks]
        inner = [conv(x) for conv, x in zip(lateral, maps, strict=True)]
        inner[1] = inner[1] + F.interpolate(inner[2], size=(4, 6), mode="nearest")
        inner[0] = inner[0] + F.interpolate(inner[1], size=(8, 12), mode="nearest")
        expected = [conv(x) for conv, x in zip(output, inner, strict=True)]
        expected.append(net.fpn.extra_blocks.p6(expected[2]))
        expected.append(net.fpn.extra_blocks.p7(expected[3].relu()))
    for p, want in zip(pyramid, expected, strict=True):
        torch.testing.assert_close(p, want)
    convs = [m for m in net.fpn.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 8
    assert all(conv.bias is not None for conv in convs)
    assert [conv.stride for conv in convs[-2:]] == [(2, 2)] * 2
    assert {conv.kernel_size for conv in lateral} == {(1, 1)}
    assert {conv.kernel_size for conv in output + convs[-2:]} == {(3, 3)}


@pytest.mark.parametrize(
    ("freeze_at", "frozen"), [(0, set()), (1, {"stem"}), (2, {"stem", "layer1"})]
)
def test_freeze_at(freeze_at, frozen):
    body = ResNet("resnet18", "bn", freeze_at, None)
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in frozen), name


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("frozen_bn", FrozenBatchNorm2d), ("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm)],
)
def test_norms(norm, kind):
    body = ResNet("resnet18", norm, 0, None)
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.GroupNorm)
    found = [m for m in body.modules() if isinstance(m, kinds)]
    assert len(found) == 20
    assert all(isinstance(m, kind) for m in found)
    trained = {
        name for name, _ in body.named_parameters() if "bn" in name or "downsample.1" in name
    }
    assert bool(trained) == (norm != "frozen_bn")
    if norm == "gn":
        groups = {(m.num_channels, m.num_groups) for m in body.modules() if type(m) is kind}
        assert groups == {(64, 16), (128, 32), (256, 32), (512, 32)}


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_weights_from_a_file_give_torchvisions_features(tmp_path, weights, norm):
    path = tmp_path / "resnet18.pth"
    torch.save(weights, path)
    body = ResNet("resnet18", norm, 2, pretrained_state_dict("resnet18", str(path))).eval()
    net = torchvision.models.resnet18(weights=None).eval()
    net.load_state_dict(weights)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        torch.testing.assert_close(body(images)["p5"], x)


def test_weights_without_a_classifier_or_with_another_one_will_do(weights):
    headless = {k: v for k, v in weights.items() if not k.startswith("fc.")}
    body = ResNet("resnet18", "frozen_bn", 2, headless)
    assert torch.equal(body.stem[0].weight, weights["conv1.weight"])
    other = {**headless, "fc.weight": torch.zeros(21, 512), "fc.bias": torch.zeros(21)}
    body = ResNet("resnet18", "frozen_bn", 2, other)
    assert torch.equal(body.stem[0].weight, weights["conv1.weight"])


def refused(call, *words):
    """The call fails with one clear line that has these words."""
    with pytest.raises(WeightsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_weights_file():
    refused(lambda: pretrained_state_dict("resnet18", "nowhere/r18.pth"), "nowhere/r18.pth")


def test_file_that_holds_no_weights(tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("these are not weights")
    refused(lambda: pretrained_state_dict("resnet18", str(path)), str(path))
    torch.save([1, 2, 3], path)
    refused(lambda: pretrained_state_dict("resnet18", str(path)), str(path))
    cut = tmp_path / "cut.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    cut.write_bytes(path.read_bytes()[:5000])
    refused(lambda: pretrained_state_dict("resnet18", str(cut)), str(cut))


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_weights_of_another_network(weights, name):
    refused(lambda: ResNet(name, "frozen_bn", 2, weights), name)


def test_weights_with_missing_unknown_or_misshapen_entries(weights):
    short = {k: v for k, v in weights.items() if k != "layer3.0.conv1.weight"}
    refused(lambda: ResNet("resnet18", "bn", 2, short), "layer3.0.conv1.weight")
    more = {**weights, "head.weight": torch.zeros(1)}
    refused(lambda: ResNet("resnet18", "bn", 2, more), "head.weight")
    bad = {**weights, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    refused(lambda: ResNet("resnet18", "bn", 2, bad), "conv1.weight")


def test_a_network_without_published_weights_says_how_to_go_on():
    words = ("resnet10_half", "--backbone-weights", "--no-pretrained")
    refused(lambda: pretrained_state_dict("resnet10_half"), *words)


def test_download_that_fails_says_how_to_go_on(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    refused(
        lambda: pretrained_state_dict("resnet50"),
        "resnet50",
        "no network",
        "--backbone-weights",
        "--no-pretrained",
    )
