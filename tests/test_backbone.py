"""backbone.py: shapes, freezing, norms, MobileNetV2. And ImageNet weights from a file
(published.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import train
from boxteacher.backbone import Backbone, MobileNetV2, ResNet, group_norm
from boxteacher.checkpoint import CheckpointError
from boxteacher.config import Config, ConfigError
from boxteacher.data import make_train_loader, make_train_set
from boxteacher.model import build_model
from boxteacher.presets import from_preset
from boxteacher.published import (
    download_backbone,
    load_backbone,
    load_initial_weights,
    read_backbone,
)


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
    body = ResNet(name, "frozen_bn", 2)
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
    net = Backbone(ResNet("resnet18", "bn", 0), 16).eval()
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
    body = ResNet("resnet18", "bn", freeze_at)
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in frozen), name


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("frozen_bn", FrozenBatchNorm2d), ("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm)],
)
def test_norms(norm, kind):
    body = ResNet("resnet18", norm, 0)
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


def loaded(name: str, norm: str, weights: dict) -> ResNet:
    body = ResNet(name, norm, 2)
    load_backbone(body, name, weights, "file")
    return body


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_weights_from_a_file_give_torchvisions_features(tmp_path, weights, norm):
    path = tmp_path / "resnet18.pth"
    torch.save(weights, path)
    body = loaded("resnet18", norm, read_backbone(path)).eval()
    net = torchvision.models.resnet18(weights=None).eval()
    net.load_state_dict(weights)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        torch.testing.assert_close(body(images)["p5"], x)


def test_weights_without_a_classifier_or_with_another_one_will_do(weights):
    headless = {k: v for k, v in weights.items() if not k.startswith("fc.")}
    body = loaded("resnet18", "frozen_bn", headless)
    assert torch.equal(body.stem[0].weight, weights["conv1.weight"])
    other = {**headless, "fc.weight": torch.zeros(21, 512), "fc.bias": torch.zeros(21)}
    body = loaded("resnet18", "frozen_bn", other)
    assert torch.equal(body.stem[0].weight, weights["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("resnet18", {"norm": "frozen_bn"}),
        ("resnet18", {"norm": "bn"}),
        ("resnet50", {"norm": "frozen_bn", "stride_in_1x1": True, "deformable": True}),
        ("swin_t", {}),
        ("mobilenet_v2", {"norm": "frozen_bn"}),
        ("mobilenet_v2", {"norm": "bn"}),
    ],
)
def test_a_file_replaces_the_backbone_and_leaves_the_rest_as_it_was_drawn(tmp_path, name, fields):
    torch.manual_seed(0)
    weights = torchvision.models.get_model(name, weights=None).state_dict()
    weights = {k: v + 1 if k.endswith("num_batches_tracked") else v for k, v in weights.items()}
    torch.save(weights, tmp_path / "net.pth")
    cfg = Config(backbone=name, backbone_weights=str(tmp_path / "net.pth"), **fields)
    fresh, model = (build_model(cfg, 3) for _ in range(2) if torch.manual_seed(1))
    load_initial_weights(model, cfg)
    drawn, found, used = fresh.state_dict(), model.state_dict(), set()
    for ours, value in found.items():
        theirs = ours.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.")
        theirs = theirs.removeprefix("backbone.body.")
        if theirs in weights and not theirs.endswith("num_batches_tracked"):
            used.add(theirs)
            assert torch.equal(value, weights[theirs]), ours
        else:
            assert torch.equal(value, drawn[ours]), ours
    classifier = ("fc.", "norm.", "head.", "classifier.", "features.18.")
    unused = {k for k in weights.keys() - used if not k.startswith(classifier)}
    assert all(k.endswith("num_batches_tracked") for k in unused)
    new = {k for k in found if ".offset." in k or ".norms." in k}
    assert bool(new) == (name not in ("resnet18", "mobilenet_v2"))
    assert not any(found[k].any() for k in new if ".offset." in k)


def refused(call, *words):
    """The call fails with one clear line that has these words."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_weights_file():
    refused(lambda: read_backbone("nowhere/r18.pth"), "nowhere/r18.pth")


def test_file_that_holds_no_weights(tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("these are not weights")
    refused(lambda: read_backbone(path), str(path))
    torch.save([1, 2, 3], path)
    refused(lambda: read_backbone(path), str(path))
    cut = tmp_path / "cut.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    cut.write_bytes(path.read_bytes()[:5000])
    refused(lambda: read_backbone(cut), str(cut))


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_weights_of_another_network(weights, name):
    refused(lambda: loaded(name, "frozen_bn", weights), name)


def test_weights_with_missing_unknown_or_misshapen_entries(weights):
    short = {k: v for k, v in weights.items() if k != "layer3.0.conv1.weight"}
    refused(lambda: loaded("resnet18", "bn", short), "layer3.0.conv1.weight")
    more = {**weights, "head.weight": torch.zeros(1)}
    refused(lambda: loaded("resnet18", "bn", more), "head.weight")
    bad = {**weights, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    refused(lambda: loaded("resnet18", "bn", bad), "conv1.weight")


def test_weights_that_do_not_fit_change_nothing(weights):
    body = ResNet("resnet18", "bn", 2)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    bad = {**weights, "layer4.1.conv2.weight": torch.zeros(1)}
    refused(
        lambda: load_backbone(body, "resnet18", bad, "file"), "layer4.1.conv2.weight [1] for [512"
    )
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


# --- MobileNetV2 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mobilenet():
    """torchvision's network, whose batch norms have seen images."""
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(weights=None).train()
    net(torch.randn(4, 3, 64, 64) + 1)
    return net.eval()


@pytest.fixture(scope="module")
def mobilenet_file(mobilenet, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.pth"
    torch.save(mobilenet.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_mobilenets_features_are_the_last_of_each_stride(mobilenet, mobilenet_file, norm):
    cfg = Config(backbone="mobilenet_v2", backbone_weights=mobilenet_file, norm=norm)
    model = build_model(cfg, 2).eval()
    load_initial_weights(model, cfg)
    body, images = model.backbone.body, torch.randn(2, 3, 64, 96)
    last = {}
    with torch.no_grad():
        maps, x = body(images), images
        for layer in mobilenet.features[:-1]:  # the last one only widens the map
            x = layer(x)
            last[64 // x.shape[-2]] = x
    assert list(maps) == ["p3", "p4", "p5"]
    assert body.out_channels == [32, 96, 320]
    for i, (channels, found) in enumerate(zip(body.out_channels, maps.values(), strict=True)):
        assert found.shape == (2, channels, 8 >> i, 12 >> i)
        torch.testing.assert_close(found, last[8 << i])


@pytest.mark.parametrize(("freeze_at", "stride"), [(0, 1), (1, 2), (2, 4)])
def test_mobilenet_is_frozen_up_to_a_stride(freeze_at, stride):
    """1 freezes the stem alone, not the block after it."""
    body, x = MobileNetV2("bn", freeze_at), torch.randn(2, 3, 64, 64)
    for i, layer in enumerate(body.features):
        x = layer(x)
        is_frozen = 64 // x.shape[-1] <= stride and (freeze_at == 2 or i == 0)
        assert all(p.requires_grad != is_frozen for p in layer.parameters()), i


def test_groups_divide_the_channels():
    body = MobileNetV2("gn", 0)
    norms = {m.num_channels: m.num_groups for m in body.modules() if type(m) is nn.GroupNorm}
    assert norms[16] == 4
    assert norms[144] == 24  # 32 do not divide it
    assert norms[192] == norms[960] == 32
    for channels in range(4, 400):
        norm = group_norm(channels)
        assert norm.num_groups <= min(32, channels // 4)


@pytest.mark.parametrize(
    ("norm", "freeze_at"), [("frozen_bn", 2), ("frozen_bn", 0), ("bn", 1), ("gn", 0)]
)
def test_mobilenet_trains(mobilenet_file, norm, freeze_at):
    source = dict(pretrained=False) if norm == "gn" else dict(backbone_weights=mobilenet_file)
    cfg = from_preset(
        "photos",
        **source,
        **dict(norm=norm, freeze_at=freeze_at, dataset="shapes", shapes_train=2, shapes_size=64),
        **dict(train_sizes=(64,), teacher_size=64, batch_size=2, workers=0, steps=1),
    )
    torch.manual_seed(0)
    train_set = make_train_set(cfg)
    state = train.make_state(cfg, len(train_set.class_names), torch.device("cpu"))
    train.speed_up(state)
    before = {name: p.detach().clone() for name, p in state.student.named_parameters()}
    (parts,) = make_train_loader(train_set, cfg)
    losses, _ = train.train_step(state, parts)
    assert all(torch.isfinite(loss) for loss in losses.values())
    stuck = {
        name
        for name, p in state.student.backbone.body.named_parameters()
        if torch.equal(p, before[f"backbone.body.{name}"])
    }
    frozen = tuple(f"features.{i}." for i in range((0, 1, 4)[freeze_at]))
    assert stuck == {n for n in stuck if n.startswith(frozen)}
    assert bool(stuck) == bool(freeze_at)


def test_mobilenets_weights_with_missing_or_unknown_entries(mobilenet):
    weights, body = mobilenet.state_dict(), MobileNetV2("frozen_bn", 2)

    def load(changed: dict) -> None:
        load_backbone(body, "mobilenet_v2", changed, "file")

    name = "features.4.conv.0.1.running_mean"
    refused(lambda: load({k: v for k, v in weights.items() if k != name}), name, "mobilenet_v2")
    refused(lambda: load({**weights, "features.19.0.weight": torch.zeros(1)}), "features.19.0")
    load({k: v for k, v in weights.items() if not k.startswith(("classifier.", "features.18."))})


def test_mobilenets_options_that_do_not_fit():
    for field in ("stride_in_1x1", "deformable"):
        with pytest.raises(ConfigError, match=f"{field} is for bottlenecks"):
            from_preset("photos", **{field: True})
    with pytest.raises(ConfigError, match="norm=frozen_bn needs pretrained weights"):
        from_preset("photos", pretrained=False)
    with pytest.raises(ConfigError, match="norm=gn does not fit torchvision's weights"):
        from_preset("photos", norm="gn")
    with pytest.raises(ConfigError, match="freeze_at=2 needs pretrained weights"):
        from_preset("photos", pretrained=False, norm="gn")


# --- downloads ------------------------------------------------------------------------------------


def test_a_network_without_published_weights_says_how_to_go_on():
    words = ("resnet10_half", "--backbone-weights", "--no-pretrained")
    refused(lambda: download_backbone("resnet10_half"), *words)


def test_download_that_fails_says_how_to_go_on(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    refused(
        lambda: download_backbone("resnet50"),
        "resnet50",
        "no network",
        "--backbone-weights",
        "--no-pretrained",
    )
