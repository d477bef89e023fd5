"""Published weights in and out: detectron2's files and names (BoxTeacher, and AdelaiDet's CondInst
and BoxInst), and the ImageNet weights that training starts from.

A file may hold tensors, numpy arrays and plain values. Others are refused, and nothing is executed.

`python -m boxteacher.published IN OUT [--preset NAME] [--field value ...]` turns a published
checkpoint into one of ours, or one of ours into a published one.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.ops import box_iou

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    check_finite,
    check_fit,
    is_ours,
    load_weights,
    read_file,
    save_checkpoint,
)
from .command_line import Parser
from .config import Config, ConfigError, from_dict
from .data import Batch, listed
from .errors import run
from .fcos import Detections
from .files import whole_file
from .mask_head import mask_windows, pixel_positions, read_maps
from .model import CondInst, Encoded, Size, build_model, scale_boxes
from .presets import from_preset
from .pseudo_labels import take_assigned

# --- names ----------------------------------------------------------------------------------------

# (ours, theirs), applied in this order in both directions; of two that overlap the longer is first
NAMES = [
    *((f"backbone.fpn.inner_blocks.{i}.0.", f"backbone.fpn_lateral{i + 3}.") for i in range(3)),
    *((f"backbone.fpn.layer_blocks.{i}.0.", f"backbone.fpn_output{i + 3}.") for i in range(3)),
    ("backbone.fpn.extra_blocks.", "backbone.top_block."),
    *((f"backbone.body.norms.{i}.", f"backbone.bottom_up.norm{i + 1}.") for i in range(3)),
    ("backbone.body.", "backbone.bottom_up."),
    (".stem.1.", ".stem.conv1.norm."),
    (".stem.0.", ".stem.conv1."),
    *((f".layer{i}.", f".res{i + 1}.") for i in (1, 2, 3, 4)),
    (".downsample.1.", ".shortcut.norm."),
    (".downsample.0.", ".shortcut."),
    *((f".bn{i}.", f".conv{i}.norm.") for i in (1, 2, 3)),
    (".conv2.offset.", ".conv2_offset."),
    (".features.0.0.", ".patch_embed.proj."),
    (".features.0.2.", ".patch_embed.norm."),
    *((f".features.{2 * i + 1}.", f".layers.{i}.blocks.") for i in range(4)),
    *((f".features.{2 * i + 2}.", f".layers.{i}.downsample.") for i in range(3)),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
    ("head.controller.", "controller."),
    ("head.class_tower.", "proposal_generator.fcos_head.cls_tower."),
    ("head.box_tower.", "proposal_generator.fcos_head.bbox_tower."),
    ("head.class_logits.", "proposal_generator.fcos_head.cls_logits."),
    ("head.distances.", "proposal_generator.fcos_head.bbox_pred."),
    ("head.centerness.", "proposal_generator.fcos_head.ctrness."),
    ("mask_branch.out.", "mask_branch.tower.4."),
]


def rename(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Replace parts of a weight's name (old, new): anywhere if they begin with a dot, else at its
    beginning. What is unknown stays."""
    for old, new in pairs:
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name[len(old) :]
    return name


def inverse(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(new, old) for old, new in pairs]


def our_name(name: str) -> str:
    return rename(name, inverse(NAMES))


def their_name(name: str) -> str:
    return rename(name, NAMES)


# Published files do not name their classes: category id -> name, in the order of the labels
COCO_CLASSES = {
    number: name
    for number, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"])
    if name not in ("__background__", "N/A")  # ids that COCO does not use
}


# --- one network's weights ------------------------------------------------------------------------

SCALE = "proposal_generator.fcos_head.scales.{}.scale"  # five of [1]; ours is one [5]
ITERATION = "mask_head._iter"  # drives the warm-up of the weak losses
CONSTANTS = {  # what their files repeat from their configuration; here it is code
    "mask_head.sizes_of_interest": [64, 128, 256, 512, 1024],
    "pixel_mean": [103.53, 116.28, 123.675],
    "pixel_std": [1.0, 1.0, 1.0],
}
# What a file may lack: old ones do not have these entries, and none of them is a weight
OPTIONAL = re.compile(r"^mask_head\.|(num_batches_tracked|relative_position_index)$")


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One network's weights under our names, without constants and the iteration."""
    ours: dict[str, Tensor] = {}
    scales = [name for name in map(SCALE.format, range(5)) if name in weights]
    for name, value in weights.items():
        if name.endswith("relative_position_index"):
            ours[our_name(name)] = value.flatten()
        elif name not in (*scales, *CONSTANTS, ITERATION):
            ours[our_name(name)] = value
    if scales:
        ours["head.scales"] = torch.cat([weights[name].reshape(1) for name in scales])
    return ours


def to_published(weights: Mapping[str, Tensor], iteration: float = 0) -> dict[str, Tensor]:
    """The inverse of `from_published`."""
    theirs: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "head.scales":
            theirs |= {SCALE.format(i): scale.reshape(1) for i, scale in enumerate(value)}
        elif name.endswith("relative_position_index"):
            theirs[their_name(name)] = value.view(49, 49)
        else:
            theirs[their_name(name)] = value
    sizes = CONSTANTS["mask_head.sizes_of_interest"]
    theirs["mask_head.sizes_of_interest"] = torch.tensor(sizes, dtype=torch.int64)
    theirs[ITERATION] = torch.tensor([float(iteration)])
    return theirs


def fit_network(
    weights: Mapping[str, Tensor], model_state: Mapping[str, Tensor], what: str
) -> tuple[dict[str, Tensor], list[str]]:
    """One network's weights (their names) as a whole state of our model, and which optional entries
    they lack. Those keep the values of `model_state`.

    Raises CheckpointError, with their names, if a weight is missing, unused or mis-shaped, or if a
    constant is not ours.
    """
    wanted = to_published(model_state)
    absent = [name for name in wanted if name not in weights and OPTIONAL.search(name)]
    wanted = {n: v for n, v in wanted.items() if n not in (*absent, *CONSTANTS)}
    check_fit({n: v for n, v in weights.items() if n not in CONSTANTS}, wanted, what)
    for name in CONSTANTS.keys() & weights.keys():
        found, ours = weights[name].flatten().tolist(), CONSTANTS[name]
        if len(found) != len(ours) or not np.allclose(found, ours):
            raise CheckpointError(f"{what}: {name} is {found}, here it is always {ours}")
    return {**model_state, **from_published(weights)}, absent


# --- what a file holds ----------------------------------------------------------------------------


BACKBONES = ("resnet50", "resnet101", "swin_t", "swin_b")
HIDDEN = ("pixel_format", "stride_in_1x1")  # fields that do not show in the weights
Networks = dict[str, dict[str, Tensor]]  # student and teacher (BoxTeacher), or model alone


def split_networks(content: Mapping[str, Any], what: str) -> Networks:
    """The weights of each network in a file. BoxTeacher's names begin with student. and teacher."""
    # detectron2 saves weights under "model", next to the state of the run. Some files are bare.
    weights = content.get("model", content)
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{what}: holds no weights by name, so it is no published model")
    # One network, or two
    networks: Networks = {"student": {}, "teacher": {}, "model": {}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        part, rest = (part, rest) if part in ("student", "teacher") else ("model", name)
        networks[part][rest] = as_tensor(value, f"{what}: {name}")
    if not networks["student"] and not networks["teacher"]:
        return {"model": networks["model"]}
    strays = list(networks.pop("model"))
    strays += [f"{part}.*" for part, found in networks.items() if not found]
    if strays:
        raise CheckpointError(f"{what}: neither student nor teacher, or one is missing: {strays}")
    return networks


def as_tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.itemsize <= 8:
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))  # a writable copy
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what} is a {type(value).__name__}, not a tensor")
    return value


def describe(networks: Networks, what: str) -> tuple[dict[str, Any], int]:
    """The configuration fields that a file's weights imply, and the number of its classes.

    The weights do not show the order of colors (BGR here), nor the stride of ResNets. It is in the
    1x1 convs, but with deformable convs in the 3x3 ones, as in the published configurations.
    """
    weights = next(iter(networks.values()))
    fields: dict[str, Any] = {"pixel_format": "bgr"}
    try:
        num_classes = len(weights["proposal_generator.fcos_head.cls_logits.weight"])
        fields["mask_channels"] = len(weights["mask_branch.tower.4.weight"])
        # The backbone, by the width of its embedding (Swin) or the depth of a stage (ResNet)
        if "backbone.bottom_up.patch_embed.proj.weight" in weights:
            embedding = len(weights["backbone.bottom_up.patch_embed.proj.weight"])
            fields["backbone"] = {96: "swin_t", 128: "swin_b"}[embedding]
        else:
            res4 = [n for n in weights if re.fullmatch(r".*\.res4\.\d+\.conv3\.weight", n)]
            fields["backbone"] = {6: "resnet50", 23: "resnet101"}[len(res4)]
            fields["deformable"] = any("conv2_offset" in name for name in weights)
            fields["stride_in_1x1"] = not fields["deformable"]
    except KeyError as error:
        raise CheckpointError(f"{what}: no BoxTeacher, BoxInst or CondInst ({error})") from None
    # The method
    if "model" not in networks:
        fields["mode"] = "boxteacher"
    else:
        fields["mode"] = "condinst" if fields["mask_channels"] == 8 else "boxinst"
    return fields, num_classes


# --- ImageNet weights of backbones ----------------------------------------------------------------

# How a backbone differs from torchvision's classifier, by the first word of its name: our name of
# a weight and torchvision's; beginnings of torchvision's names that are not used here
TORCHVISION = {
    "resnet": ([("stem.0.", "conv1."), ("stem.1.", "bn1.")], ("fc.",)),
    "swin": ([], ("norm.", "head.")),
    "mobilenet": ([], ("features.18.", "classifier.")),
}
# What stays as it was built: offsets of deformable convs, norms after Swin's stages, counters
OURS_ALONE = re.compile(r"\.conv2\.offset\.|^norms\.|num_batches_tracked$")

CAFFE2 = [  # Detectron's blob names -> detectron2's, as regular expressions
    (r"_", "."),
    (r"^(res\.)?conv1\.", "stem.conv1."),
    (r"\.branch1\.", ".shortcut."),
    (r"\.branch2([abc])\.", lambda m: f".conv{'abc'.index(m[1]) + 1}."),
    (r"\.bn\.s$", ".norm.weight"),
    (r"\.bn\.b$", ".norm.bias"),
    (r"\.bn\.rm$", ".norm.running_mean"),
    (r"\.bn\.riv$", ".norm.running_var"),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"^(pred|fc1000)\.", "fc."),
]


def caffe2_name(name: str) -> str:
    for pattern, replacement in CAFFE2:
        name = re.sub(pattern, replacement, name)
    return name


def read_backbone(path: str | Path) -> dict[str, Tensor]:
    """ImageNet weights under torchvision's names, from a file of torchvision, of detectron2 (.pkl,
    also with the blob names of its predecessor) or of Swin's authors (.pth)."""
    # The dict of weights, wherever it is in the file
    content = read_file(path)
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    if "conv1_w" in content:
        content = {caffe2_name(k): v for k, v in content.items() if not k.endswith("_momentum")}
    if not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: holds no weights by name")
    # Their names and shapes -> torchvision's
    weights = {}
    for name, value in content.items():
        if name.endswith("attn_mask"):  # follows from the size of the training images
            continue
        value = as_tensor(value, f"{path}: {name}")
        if name.endswith("relative_position_index"):
            value = value.flatten()
        if name == "stem.conv1.bias" and not value.any():  # blob files have one of zeros
            continue
        name = re.sub(r"^stem\.fc\.|^linear\.", "fc.", name)
        name = our_name(f"backbone.bottom_up.{name}").removeprefix("backbone.body.")
        weights[rename(name, TORCHVISION["resnet"][0])] = value
    # Some files hold batch norm as a scale and a shift only. With these statistics (eps is 1e-5)
    # it does nothing before them, as in detectron2.
    for name in [n for n in weights if re.search(r"(bn\d|downsample\.1)\.weight$", n)]:
        norm = name.removesuffix("weight")
        weights.setdefault(norm + "running_mean", torch.zeros_like(weights[name]))
        weights.setdefault(norm + "running_var", torch.ones_like(weights[name]) - 1e-5)
    return weights


def download_backbone(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights. They are downloaded once."""
    try:
        return torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    # no network; no weights of that name; a damaged file in torch's cache
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"cannot get ImageNet weights of {name} ({error}): give a local file with "
            "--backbone-weights FILE, or train from scratch with --no-pretrained --norm bn "
            "--freeze-at 0"
        ) from error


def load_backbone(body: nn.Module, name: str, weights: Mapping[str, Tensor], what: str) -> None:
    """Copy ImageNet weights (torchvision's names) into a backbone of this name (Config.backbone).

    Batch norm's counters stay 0. Raises CheckpointError, with torchvision's names, if other weights
    are missing, unused or mis-shaped, and leaves the backbone as it was.
    """
    renamed, classifier = TORCHVISION[re.match("[a-z]+", name)[0]]
    own = {n: v for n, v in body.state_dict().items() if not OURS_ALONE.search(n)}
    found = {n: v for n, v in weights.items() if not n.startswith(classifier)}
    found = {n: v for n, v in found.items() if not n.endswith("num_batches_tracked")}
    check_fit(found, {rename(n, renamed): v for n, v in own.items()}, f"{what} ({name})")
    check_finite(found, f"{what} ({name})")
    body.load_state_dict({rename(n, inverse(renamed)): v for n, v in found.items()}, strict=False)


# --- published checkpoints ------------------------------------------------------------------------


def import_published(path: str | Path, preset: str = "", **given: Any) -> dict[str, Any]:
    """A published checkpoint as `save_checkpoint` takes it, and "notes" for the user.

    The configuration is the preset's (without one: what the weights imply, on COCO), but with the
    backbone's variant and the pixels of published weights. `given` fields overrule both. Raises
    CheckpointError, with all names, if a weight is missing, unused or mis-shaped.
    """
    content = read_file(path)
    networks = split_networks(content, str(path))
    fields, num_classes = describe(networks, str(path))
    if preset:
        config = _configure(fields, preset, given, str(path))
    else:
        config = dataclasses.replace(Config(), **(fields | given))
    # Each network's weights, completed with what the file may lack
    model_state = build_model(config, num_classes).state_dict()
    set_aside = content.keys() - {"model"} if "model" in content else ()
    notes = [f"{path}: not used: {name}" for name in sorted(map(str, set_aside))]
    state: dict[str, Any] = {"teacher": None, "iterations": {}}
    for part, weights in networks.items():
        ours, absent = fit_network(weights, model_state, f"{path} ({part})")
        notes += [f"{path}: {part} has no {name}: set anew" for name in absent]
        part = "student" if part == "model" else part
        state[part] = ours
        state["iterations"][part] = float(weights.get(ITERATION, torch.zeros(1)))
    # COCO's classes, or as many numbers
    classes = COCO_CLASSES
    if num_classes != len(classes):
        classes = {n: f"class {n}" for n in range(1, num_classes + 1)}
    return state | {
        "config": dataclasses.asdict(config),
        "class_names": list(classes.values()),
        "category_ids": list(classes),
        "step": int(state["iterations"]["student"]),
        "optimizer": None,
        "notes": notes,
    }


def _configure(
    fields: Mapping[str, Any], preset: str, given: Mapping[str, Any], what: str
) -> Config:
    """A preset for weights that imply `fields`."""
    config = from_preset(preset)
    for field in ("mode", "backbone", "deformable"):
        found, wanted = fields.get(field, False), getattr(config, field)
        if found != wanted:
            raise CheckpointError(
                f"{what}: its weights say {field}={found}, preset {preset} {field}={wanted};"
                " choose another preset"
            )
    variant = {f: v for f, v in fields.items() if f in HIDDEN}
    return from_preset(preset, **(variant | given))


def export_published(
    state: Mapping[str, Any], what: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's weights and counters by published names, and those of the HIDDEN fields that
    are not what `import_published` takes them for: who reads the file has to know them."""
    config = from_dict(state["config"], what)
    networks = {part: state[part] for part in ("teacher", "student") if state[part] is not None}
    iterations = state.get("iterations", {"student": state["step"]})
    weights: dict[str, Tensor] = {}
    for part, values in networks.items():
        tower = "mask_branch.tower.3.0.weight" in values, "mask_branch.tower.4.0.weight" in values
        if config.size_unit != 64 or config.backbone not in BACKBONES or tower != (True, False):
            raise CheckpointError(
                f"{what}: only models with size_unit=64, mask_branch_convs=4 and one of the"
                f" backbones {', '.join(BACKBONES)} have published names"
            )
        renamed = to_published(values, iterations.get(part, 0))
        prefix = f"{part}." if len(networks) == 2 else ""
        weights |= {prefix + name: value for name, value in renamed.items()}
    taken_for, _ = describe(split_networks(weights, what), what)
    ours = {field: getattr(config, field) for field in HIDDEN if field in taken_for}
    return weights, {field: value for field, value in ours.items() if value != taken_for[field]}


# --- where training starts ------------------------------------------------------------------------


CLASS_LAYERS = ("head.class_logits.weight", "head.class_logits.bias")  # a row for each class


def load_initial_weights(
    model: CondInst, cfg: Config, class_names: Sequence[str] = ()
) -> list[str]:
    """Load what training starts from: the checkpoint `cfg.init`, else the backbone in
    `cfg.backbone_weights`, else torchvision's backbone (`cfg.pretrained`), else nothing.

    The rest of the model keeps its random values. With `class_names`, classes of the checkpoint
    `cfg.init` are carried over by name, and notes say which. Without, there must be as many. Raises
    CheckpointError if a file cannot be read or does not fit, and leaves the model as it was.
    """
    body, name, path = model.backbone.body, cfg.backbone, cfg.backbone_weights
    notes: list[str] = []
    if cfg.init:
        weights, notes = _read_init(cfg, model.state_dict(), class_names)
        load_weights(model, weights, cfg.init)
    elif path:
        load_backbone(body, name, read_backbone(path), path)
    elif cfg.pretrained:
        load_backbone(body, name, download_backbone(name), "torchvision's weights")
    return notes


def _read_init(
    cfg: Config, model_state: Mapping[str, Tensor], class_names: Sequence[str]
) -> tuple[Mapping[str, Tensor], list[str]]:
    """The teacher of the checkpoint `cfg.init` if it has one, else its student, and notes.

    The checkpoint is one of ours or a published one. Three fields do not show in the shapes of
    weights. They are compared here.
    """
    path, content = cfg.init, read_file(cfg.init)
    if is_ours(content):
        content = Checkpoint(path, content)
        fields, weights = content.get("config", {}), content["teacher"] or content["student"]
        known = content.get("class_names", ())
    else:
        networks = split_networks(content, path)
        fields, num_classes = describe(networks, path)
        fields = {"size_unit": 64, **fields}
        known = tuple(COCO_CLASSES.values()) if num_classes == len(COCO_CLASSES) else ()
        theirs = networks.get("teacher") or networks["model"]
        wanted = {**model_state}
        if known and class_names:
            sizes = {name: (num_classes, *wanted[name].shape[1:]) for name in CLASS_LAYERS}
            wanted |= {name: wanted[name].new_zeros(size) for name, size in sizes.items()}
        weights, _ = fit_network(theirs, wanted, path)
    for field in HIDDEN:
        given = getattr(cfg, field)
        wanted = fields.get(field, given)
        if wanted != given:
            raise CheckpointError(
                f"{path}: made for {field}={wanted}, not {given}: add {option(field, wanted)}"
            )
    weights, notes = _carry_classes(weights, model_state, known, class_names, path)
    if (unit := fields.get("size_unit", cfg.size_unit)) != cfg.size_unit:
        notes.append(
            f"{path}: made for size_unit={unit!r}, not {cfg.size_unit}: its levels had objects of"
            f" other sizes, and its masks begin wrong (--size-unit {unit!r} keeps them)"
        )
    return weights, notes


def option(field: str, value: bool | str) -> str:
    """What sets one of the HIDDEN fields on the command line."""
    if field == "pixel_format":
        return f"--pixel-format {value}"
    return "--stride-in-1x1" if value else "--no-stride-in-1x1"


def _carry_classes(
    weights: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    known: Sequence[str],
    wanted: Sequence[str],
    path: str,
) -> tuple[Mapping[str, Tensor], list[str]]:
    """`weights` with the rows of `known` classes put where the `wanted` ones have them. Other rows
    are those of the model as it is. Unless both are given and differ, nothing changes."""
    if not known or not wanted or list(known) == list(wanted):
        return weights, []
    weights, both = dict(weights), [name for name in wanted if name in known]
    to, of = [wanted.index(name) for name in both], [known.index(name) for name in both]
    for layer in CLASS_LAYERS:
        rows, mine = weights.get(layer), model_state[layer].clone()
        if rows is not None and rows.shape == (len(known), *mine.shape[1:]):  # else: check_fit
            mine[to] = rows[of].to(mine)
            weights[layer] = mine
    kinds = {
        "carried over by name": both,
        "new": [name for name in wanted if name not in known],
        "not used": [name for name in known if name not in wanted],
    }
    lists = [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names]
    return weights, [f"init: {path}: classes: {', '.join(lists)}"]


# --- pseudo masks as the published code makes them ------------------------------------------------


def masks_for_boxes_as_published(
    teacher: CondInst, encoded: Encoded, n: int, found: Detections, seen_size: Size, batch: Batch
) -> tuple[Tensor, Tensor] | None:
    """`CondInst.masks_for_boxes` as in the published code, to compare numbers.

        mean = Σ 1(m > tau) m / Σ 1(m > tau), over the whole mask
        order = sqrt(c * mean);   weight = sqrt(sqrt(c) * mean)

    The last of equal IoUs wins. A box that the first detection took can be taken once more.
    """
    cfg, size = teacher.cfg, batch.sizes[n]
    boxes, is_box = scale_boxes(found.boxes, seen_size, size)
    if not is_box.any():
        return None
    ious = box_iou(boxes[is_box], batch.boxes[n]).masked_fill(~batch.valid[n], -1)
    maps = torch.cat([m for _, m in teacher.mask_maps(encoded, n, found.location_index[is_box])])
    rows, columns = pixel_positions(maps, seen_size, size)
    means = []
    for probs, _ in mask_windows(maps, rows, columns, cfg.mask_threshold):
        is_foreground = probs > cfg.mask_threshold
        means.append((probs * is_foreground).sum() / is_foreground.sum().clamp(min=1))
    mean, scores = torch.stack(means), found.scores[is_box]
    order, weights = (scores * mean).sqrt(), (scores.sqrt() * mean).sqrt()

    assigned = [-1] * ious.shape[1]
    free = list(reversed(range(ious.shape[1])))  # max() takes the first of equals
    for detection in order.argsort(descending=True, stable=True).tolist():
        if order[detection] < cfg.score_threshold or not free:
            break
        box = max(free, key=ious[detection].tolist().__getitem__)
        if ious[detection, box] >= cfg.iou_threshold:
            assigned[box] = detection
            if detection != 0:
                free.remove(box)
    samples = read_maps(maps, rows[2::4], columns[2::4])
    return take_assigned(samples > cfg.mask_threshold, weights, torch.tensor(assigned))


# --- the converter --------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    usage = "python -m boxteacher.published IN OUT [--preset NAME] [--field value ...]"
    parser = Parser(usage, __doc__)
    parser.add_argument("source", metavar="IN", help="a published checkpoint, or one of ours")
    parser.add_argument("target", metavar="OUT", help="the file to write")
    parser.add_argument("--preset", help="its recipe (default: what the weights say)")
    options, given = parser.read(argv)
    source, target = options.source, options.target
    content = read_file(source)
    if is_ours(content):
        if given:
            raise ConfigError(f"{source}: its configuration is known; give no other options")
        weights, hidden = export_published(Checkpoint(source, content), source)
        with whole_file(target) as file:
            torch.save({"model": weights}, file)
        print(f"{target}: {source} under published names")
        for field, value in hidden.items():
            print(f"note: its names do not say {field}={value}: give {option(field, value)}")
        return
    state = import_published(source, given.pop("preset", ""), **given)
    for note in state.pop("notes"):
        print(note, file=sys.stderr)
    save_checkpoint(target, state)
    config, names = state["config"], state["class_names"]
    print(f"{target}: {config['mode']}, {config['backbone']}, {len(names)} classes")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
