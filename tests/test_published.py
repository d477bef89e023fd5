"""Published checkpoints in and out: names, files, and what is refused."""

import collections
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from golden.synthetic import PUBLISHED

from boxteacher import published
from boxteacher.backbone import ResNet, Swin
from boxteacher.checkpoint import CheckpointError, load_checkpoint, read_file, save_checkpoint
from boxteacher.config import Config, ConfigError
from boxteacher.model import CondInst, build_model
from boxteacher.presets import MODES
from boxteacher.published import (
    export_published,
    import_published,
    load_backbone,
    load_initial_weights,
    read_backbone,
    to_published,
)

ROOT = Path(__file__).parents[1]
KEYS = ROOT.parent / "shared" / "golden"
FILES = {  # published key list: mode, backbone, number of keys, CRC of their names and shapes
    "r50_1x": ("boxteacher", "r50", 744, 150992304),
    "r101_3x": ("boxteacher", "r101", 1254, 4234837409),
    "r101_dcn_3x": ("boxteacher", "r101_dcn", 1374, 1239220109),
    "swin_base_3x": ("boxteacher", "swin", 924, 1988795872),
    "condinst_r50": ("condinst", "r50", 372, 4255416974),
    "boxinst_r50": ("boxinst", "r50", 372, 2770609064),
}


def published_model(mode: str, backbone: str, device: str = "cpu") -> CondInst:
    config = Config(mode=mode, pixel_format="bgr", **MODES[mode], **PUBLISHED[backbone][0])
    with torch.device(device):
        return build_model(config, 80)


def published_weights(mode: str, backbone: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """As in a published file, at random; the networks of boxteacher differ."""
    model = published_model(mode, backbone, device)
    weights = to_published(model.state_dict(), 4999)
    if mode != "boxteacher":
        return weights
    teacher = to_published({n: v + 1 if "conv" in n else v for n, v in model.state_dict().items()})
    return {f"teacher.{n}": v for n, v in teacher.items()} | {
        f"student.{n}": v for n, v in weights.items()
    }


def lines(weights) -> list[str]:
    return sorted(f"{name} {list(value)}" for name, value in weights.items())


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_names_and_shapes_are_the_published_ones(name):
    mode, backbone, count, crc = FILES[name]
    weights = published_weights(mode, backbone, "meta")
    found = lines({key: value.shape for key, value in weights.items()})
    assert len(found) == count
    if (KEYS / f"keys_{name}.json").is_file():
        assert found == lines(json.loads((KEYS / f"keys_{name}.json").read_text()))
    assert zlib.crc32("\n".join(found).encode()) == crc


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_each_name_leads_back(backbone):
    names = published_model("boxteacher", backbone, "meta").state_dict().keys() - {"head.scales"}
    assert all(published.our_name(published.their_name(name)) == name for name in names)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_round_trip_of_a_network(backbone):
    weights = to_published(published_model("boxteacher", backbone).state_dict(), 12)
    again = to_published(published.from_published(weights), 12)
    assert_same(again, weights)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def condinst_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("published") / "condinst.pth"
    extra = {"iteration": 89999, "__author__": "somebody"}
    torch.save({"model": published_weights("condinst", "r50"), **extra}, path)
    return path


def edited(path: Path, edit) -> Path:
    """Another file in its folder, with its weights changed."""
    content = torch.load(path, weights_only=True)
    edit(content["model"])
    torch.save(content, path.with_name("edited.pth"))
    return path.with_name("edited.pth")


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_boxteacher_file_to_checkpoint_and_back(tmp_path):
    weights = published_weights("boxteacher", "r50")
    torch.save(weights, tmp_path / "in.pth")  # bare, without "model"
    state = import_published(tmp_path / "in.pth", "coco_boxteacher_r50_1x")
    assert state["step"] == 4999
    assert not state.pop("notes")
    assert state["config"]["preset"] == "coco_boxteacher_r50_1x"
    assert (state["config"]["stride_in_1x1"], state["config"]["pixel_format"]) == (True, "bgr")
    assert state["class_names"][:2] == ["person", "bicycle"]
    assert state["category_ids"][-2:] == [89, 90]
    save_checkpoint(tmp_path / "ours.pt", state)
    assert_same(export_published(load_checkpoint(tmp_path / "ours.pt"), "ours.pt")[0], weights)
    for changes in ({"size_unit": 32}, {"backbone": "mobilenet_v2"}):
        other = state | {"config": state["config"] | changes}
        assert "ours.pt: only models with size_unit=64" in refusal(
            export_published, other, "ours.pt"
        )
    shorter = {n: v for n, v in state["student"].items() if "mask_branch.tower.3" not in n}
    message = refusal(export_published, state | {"student": shorter}, "ours.pt")
    assert "mask_branch_convs=4" in message
    model = published_model("boxteacher", "r50")
    init = Config(**state["config"] | {"init": str(tmp_path / "in.pth")})
    load_initial_weights(model, init)
    assert_same(model.state_dict(), state["teacher"])
    for field, value, option in (
        ("pixel_format", "rgb", "add --pixel-format bgr"),
        ("stride_in_1x1", False, "add --stride-in-1x1"),
    ):
        wrong = dataclasses.replace(init, **{field: value})
        assert option in refusal(load_initial_weights, model, wrong)
    ours = dataclasses.replace(init, init=str(tmp_path / "ours.pt"))
    assert load_initial_weights(model, ours) == []
    assert_same(model.state_dict(), state["teacher"])
    for other in (init, ours):  # the weights fit, but the levels are for other sizes
        [note] = load_initial_weights(model, dataclasses.replace(other, size_unit=32))
        assert "size_unit=64, not 32" in note


def test_the_weights_say_what_they_are(condinst_file):
    state = import_published(condinst_file)
    config = Config(**state["config"])
    assert (config.mode, config.backbone, config.mask_channels) == ("condinst", "resnet50", 8)
    assert state["teacher"] is None
    names = ("__author__", "iteration")
    assert state["notes"] == [f"{condinst_file}: not used: {name}" for name in names]
    for backbone, changes in (("r101_dcn", {"deformable": True}), ("swin", {})):
        weights = published_weights("boxteacher", backbone, "meta")
        found, _ = published.describe(published.split_networks(weights, "file"), "file")
        assert found.get("stride_in_1x1", False) is False
        assert found["mode"] == "boxteacher"
        assert found.items() >= changes.items()


def test_program_converts_both_ways(condinst_file, tmp_path, capsys):
    ours, back = str(tmp_path / "ours.pt"), str(tmp_path / "back.pkl")
    published.main([str(condinst_file), ours, "--preset", "coco_condinst_r50_1x"])
    assert "not used: iteration" in capsys.readouterr().err
    published.main([ours, back])
    assert "note" not in capsys.readouterr().out
    assert_same(read_file(back)["model"], torch.load(condinst_file)["model"])
    with pytest.raises(ConfigError, match="no other options"):
        published.main([ours, back, "--lr", "1"])
    # A model of this program's own settings: names do not hold them.
    state = load_checkpoint(ours)
    state["config"] |= {"pixel_format": "rgb", "stride_in_1x1": False}
    save_checkpoint(ours, state)
    published.main([ours, back])
    said = capsys.readouterr().out
    assert "pixel_format=rgb: give --pixel-format rgb\n" in said
    assert "stride_in_1x1=False: give --no-stride-in-1x1\n" in said
    published.main([back, ours, "--pixel-format", "rgb", "--no-stride-in-1x1"])
    config = load_checkpoint(ours)["config"]
    assert (config["pixel_format"], config["stride_in_1x1"]) == ("rgb", False)
    argv = [str(condinst_file), ours, "--preset", "coco_boxinst_r50_1x"]
    assert "choose another preset" in refusal(published.main, argv)
    command = [sys.executable, "-m", "boxteacher.published", "none.pth", "out.pt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "error: none.pth: no such checkpoint file\n"
    assert done.returncode == 1


def test_weights_that_do_not_fit_are_all_named(condinst_file):
    def edit(weights):
        del weights["controller.bias"], weights["backbone.fpn_lateral3.weight"]
        weights["roi_heads.a"] = weights["backbone.bottom_up.res9.b"] = torch.zeros(1)
        weights["backbone.top_block.p6.bias"] = torch.zeros(3)

    message = refusal(import_published, edited(condinst_file, edit))
    assert "2 missing: backbone.fpn_lateral3.weight, controller.bias" in message
    assert "2 unused: backbone.bottom_up.res9.b, roi_heads.a" in message
    assert "1 mis-shaped: backbone.top_block.p6.bias [3] for [256]" in message
    model = published_model("condinst", "r50")
    init = Config(init=str(edited(condinst_file, edit)))
    assert "2 missing" in refusal(load_initial_weights, model, init)


def test_constants_are_compared_and_counters_may_be_absent(condinst_file):
    def other_sizes(weights):
        weights["mask_head.sizes_of_interest"] += 1

    def other_length(weights):
        weights["pixel_std"] = torch.ones(2)

    def old_file(weights):
        del weights["mask_head._iter"], weights["mask_branch.refine.0.1.num_batches_tracked"]
        weights["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)

    message = refusal(import_published, edited(condinst_file, other_sizes))
    assert "mask_head.sizes_of_interest is [65, 129, 257, 513, 1025]" in message
    message = refusal(import_published, edited(condinst_file, other_length))
    assert "pixel_std is [1.0, 1.0], here it is always [1.0, 1.0, 1.0]" in message
    state = import_published(edited(condinst_file, old_file))
    notes = "\n".join(state["notes"])
    assert "has no mask_head._iter: set anew" in notes
    assert "has no mask_branch.refine.0.1.num_batches_tracked: set anew" in notes
    assert state["student"]["mask_branch.refine.0.1.num_batches_tracked"] == 0


def test_other_files_are_refused(tmp_path, condinst_file):
    def made(content, name="file.pth", save=torch.save):
        save(content, tmp_path / name)
        return tmp_path / name

    refused = [
        (tmp_path / "none.pth", "no such checkpoint file"),
        (made([1, 2], "list.pth"), "holds a list"),
        (made({"model": {"a": "text"}}, "text.pth"), "a is a str, not a tensor"),
        (made(torchvision.models.resnet18().state_dict(), "r18.pth"), "no BoxTeacher, BoxInst"),
        (made({"student.a": torch.zeros(1)}, "half.pth"), "teacher"),
        (
            made({"student.a": torch.zeros(1), "teacher.a": torch.zeros(1), "b": torch.zeros(1)}),
            "b",
        ),
    ]
    cut = tmp_path / "cut.pth"
    cut.write_bytes(condinst_file.read_bytes()[:1000])
    for path, word in [*refused, (cut, "cut.pth: not loaded")]:
        assert word in refusal(import_published, path)


def test_training_starts_from_init_else_from_a_file_else_from_torchvision(tmp_path, monkeypatch):
    fields = dict(backbone="resnet18", fpn_channels=64, mask_branch_channels=32)
    torch.manual_seed(0)
    nets = [torchvision.models.resnet18(weights=None).state_dict() for _ in range(2)]
    monkeypatch.setattr(published, "download_backbone", lambda name: nets[0])
    torch.save(nets[1], tmp_path / "net.pth")
    other = build_model(Config(**fields), 3)
    weights = {"student": other.state_dict(), "teacher": None, "config": {}}
    save_checkpoint(tmp_path / "init.pt", weights)
    drawn = build_model(Config(**fields), 3).state_dict()

    def first_weight(**changes):
        model = build_model(Config(**fields), 3)
        model.load_state_dict(drawn)
        load_initial_weights(model, Config(**fields, **changes))
        return model.backbone.body.stem[0].weight

    file, init = str(tmp_path / "net.pth"), str(tmp_path / "init.pt")
    assert torch.equal(first_weight(pretrained=False), drawn["backbone.body.stem.0.weight"])
    assert torch.equal(first_weight(), nets[0]["conv1.weight"])
    assert torch.equal(first_weight(backbone_weights=file), nets[1]["conv1.weight"])
    assert torch.equal(
        first_weight(backbone_weights=file, pretrained=False), nets[1]["conv1.weight"]
    )
    started = first_weight(init=init, backbone_weights=file)
    assert torch.equal(started, other.backbone.body.stem[0].weight)


@pytest.mark.parametrize("is_zip", [True, False])
def test_files_of_old_torch_and_with_numpy(tmp_path, is_zip):
    content = collections.OrderedDict(a=torch.ones(2), b=np.arange(3, dtype=np.float32))
    extra = {"model": content, "lr": np.float64(0.5), "__author__": "somebody"}
    torch.save(extra, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    content = read_file(tmp_path / "a.pth")
    assert content.keys() == {"model", "lr", "__author__"}
    found = published.split_networks(content, "a.pth")
    assert_same(found["model"], {"a": torch.ones(2), "b": torch.arange(3.0)})


# --- what a pickle may do -------------------------------------------------------------------------


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.mkdir, ("evil",), "mkdir"),
        (eval, ("1",), "eval"),
        (np.load, ("x",), "load"),
        (torch.nn.Linear, (1, 1), "Linear"),
        (getattr, ("a", "b"), "getattr"),
    ],
)
def test_code_in_a_file_is_refused_by_name(tmp_path, monkeypatch, function, args, name):
    monkeypatch.chdir(tmp_path)
    content = {"model": {"a": Evil(function, *args)}}
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
    torch.save(content, tmp_path / "evil.pth")
    for file in ("evil.pkl", "evil.pth"):
        with pytest.raises(CheckpointError, match=rf"{file}: not loaded: .*{name}"):
            read_file(tmp_path / file)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="not loaded") as caught:
        read_file(tmp_path / "raw.pth")
    assert "weights_only" not in str(caught.value)  # torch's advice to run it all the same
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("protocol", [0, 2, 3, 5])
def test_arrays_in_pickles(tmp_path, protocol):
    arrays = {
        "f": np.random.rand(2, 3).astype(np.float32),
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "scalar": np.float32(2),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol))
    found = read_file(tmp_path / "a.pkl")["model"]
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(published.as_tensor(found[name], name), value)


# --- ImageNet weights -----------------------------------------------------------------------------


def caffe2_names(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """torchvision's names -> Detectron's blobs, batch norm folded into scale and shift."""
    blobs = {"conv1_b": np.zeros(64, np.float32)}
    for name, value in weights.items():
        layer, *rest = name.split(".")
        if "running" in name or "num_batches" in name:
            continue
        kind = rest[-1]
        if layer in ("conv1", "fc"):
            blob = {"conv1": "conv1", "fc": "fc1000"}[layer] + {"weight": "_w", "bias": "_b"}[kind]
        elif layer == "bn1":
            blob = "res_conv1_bn" + {"weight": "_s", "bias": "_b"}[kind]
        else:
            part = {"downsample": "branch1"}.get(rest[1]) or "branch2" + "abc"[int(rest[1][-1]) - 1]
            is_norm = rest[1].startswith("bn") or rest[1:3] == ["downsample", "1"]
            suffix = {"weight": "_bn_s", "bias": "_bn_b"}[kind] if is_norm else "_w"
            blob = f"res{int(layer[-1]) + 1}_{rest[0]}_{part}{suffix}"
        blobs[blob] = value.numpy()
    return blobs


def detectron2_names(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, value in weights.items():
        if name.startswith("fc."):
            renamed["stem." + name] = value.numpy()
        elif "num_batches" not in name:
            name = name if name.startswith("layer") else "stem." + name
            for old, new in (
                ("downsample.0", "shortcut"),
                ("downsample.1", "shortcut.norm"),
                ("bn1", "conv1.norm"),
                ("bn2", "conv2.norm"),
                ("bn3", "conv3.norm"),
                ("layer1", "res2"),
                ("layer2", "res3"),
                ("layer3", "res4"),
                ("layer4", "res5"),
            ):
                name = name.replace(old, new)
            renamed[name] = value.numpy()
    return renamed


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return torchvision.models.resnet50().state_dict()


def test_backbone_from_detectron2s_pickle(tmp_path, resnet50):
    content = {"model": detectron2_names(resnet50), "__author__": "a", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, 2))
    found = read_backbone(tmp_path / "R-50.pkl")
    assert_same(found, {k: v for k, v in resnet50.items() if "num_batches" not in k})


def test_backbone_from_blobs(tmp_path, resnet50):
    blobs = caffe2_names(resnet50) | {"conv1_w_momentum": np.zeros(1)}
    for i, content in enumerate((blobs, {"blobs": blobs})):
        path = tmp_path / f"{i}.pkl"
        path.write_bytes(pickle.dumps(content, 2))
        body = ResNet("resnet50", "frozen_bn", 2, stride_in_1x1=True)
        load_backbone(body, "resnet50", read_backbone(path), str(path))
        assert torch.equal(body.layer3[1].conv2.weight, resnet50["layer3.1.conv2.weight"])
        norm = body.layer4[0].downsample[1]
        x = torch.randn(1, 2048, 2, 2)
        affine = x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        torch.testing.assert_close(norm(x), affine)


def test_blobs_that_are_not_understood_are_named(tmp_path, resnet50):
    blobs = caffe2_names(resnet50)
    blobs["conv1_b"] = np.ones(64, np.float32)  # a bias that would be lost
    blobs["res6_0_branch2a_w"] = np.zeros(1)
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps(blobs))
    body, weights = ResNet("resnet50", "frozen_bn", 2), read_backbone(tmp_path / "odd.pkl")
    with pytest.raises(CheckpointError, match=r"2 unused: conv1.bias, .*6.0.conv1.weight"):
        load_backbone(body, "resnet50", weights, "odd.pkl")


def test_backbone_from_swins_authors(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.swin_t()
    theirs = {"norm.weight": torch.ones(768), "head.bias": torch.zeros(1000)}
    for name, value in net.state_dict().items():
        if name.startswith("features."):
            name = published.their_name(f"backbone.body.{name}").removeprefix("backbone.bottom_up.")
            square = name.endswith("relative_position_index")
            theirs[name] = value.view(49, 49) if square else value
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": theirs}, tmp_path / "swin.pth")
    body = Swin("swin_t", 2)
    load_backbone(body, "swin_t", read_backbone(tmp_path / "swin.pth"), "swin.pth")
    for name, value in body.features.state_dict().items():
        assert torch.equal(value, net.state_dict()[f"features.{name}"]), name


def test_backbone_from_torchvisions_file(tmp_path, resnet50):
    torch.save(resnet50, tmp_path / "resnet50.pth")
    assert_same(read_backbone(tmp_path / "resnet50.pth"), resnet50)


def test_backbones_that_are_no_weights_are_refused(tmp_path, resnet50):
    body = ResNet("resnet50", "frozen_bn", 2)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    holed = resnet50 | {"conv1.weight": torch.full_like(resnet50["conv1.weight"], torch.nan)}
    assert "conv1.weight; give another file" in refusal(
        load_backbone, body, "resnet50", holed, "a.pth"
    )
    assert_same(body.state_dict(), before)
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    assert "no weights by name" in refusal(read_backbone, tmp_path / "numbers.pth")
    content = pickle.dumps({"a": np.zeros(1, np.longdouble)})
    (tmp_path / "long.pkl").write_bytes(content)
    assert "not a tensor" in refusal(read_backbone, tmp_path / "long.pkl")
    torch.save({"format": np.zeros(2)}, tmp_path / "odd.pt")
    assert "not a checkpoint of this program" in refusal(load_checkpoint, tmp_path / "odd.pt")
