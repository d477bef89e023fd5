"""Published weights in and out: detectron2's files and names (BoxTeacher, and AdelaiDet's CondInst
and BoxInst), and the ImageNet files that their training starts from.

Nothing in a file is executed: it holds tensors, numpy arrays and plain values, or it is refused.

`python -m boxteacher.published IN OUT [--preset NAME] [--field value ...]` makes a checkpoint out
of a published one, or, if IN is one of ours, a published one out of it.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from .checkpoint import FORMAT, CheckpointError, load_checkpoint, load_weights, save_checkpoint
from .command_line import Parser
from .config import Config
from .data import Batch
from .errors import UserError, run
from .fcos import Detections
from .model import CondInst, Encoded, Size, build_model, fit_boxes
from .presets import from_preset
from .pseudo_labels import take_assigned


class PublishedError(UserError):
    """A file or a state that is no published model; the message is for the user."""


# --- names ----------------------------------------------------------------------------------------

# (ours, theirs), applied in this order in both directions; of two that overlap the longer is first
BODY = [
    ("stem.1.", "stem.conv1.norm."),
    ("stem.0.", "stem.conv1."),
    *((f"layer{i}.", f"res{i + 1}.") for i in (1, 2, 3, 4)),
    (".downsample.1.", ".shortcut.norm."),
    (".downsample.0.", ".shortcut."),
    *((f".bn{i}.", f".conv{i}.norm.") for i in (1, 2, 3)),
    (".conv2.offset.", ".conv2_offset."),
    ("features.0.0.", "patch_embed.proj."),
    ("features.0.2.", "patch_embed.norm."),
    *((f"features.{2 * i + 1}.", f"layers.{i}.blocks.") for i in range(4)),
    *((f"features.{2 * i + 2}.", f"layers.{i}.downsample.") for i in range(3)),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
    *((f"norms.{i}.", f"norm{i + 1}.") for i in range(3)),
]
REST = [
    *((f"backbone.fpn.inner_blocks.{i}.0.", f"backbone.fpn_lateral{i + 3}.") for i in range(3)),
    *((f"backbone.fpn.layer_blocks.{i}.0.", f"backbone.fpn_output{i + 3}.") for i in range(3)),
    ("backbone.fpn.extra_blocks.", "backbone.top_block."),
    ("head.controller.", "controller."),
    ("head.class_tower.", "proposal_generator.fcos_head.cls_tower."),
    ("head.box_tower.", "proposal_generator.fcos_head.bbox_tower."),
    ("head.class_logits.", "proposal_generator.fcos_head.cls_logits."),
    ("head.distances.", "proposal_generator.fcos_head.bbox_pred."),
    ("head.centerness.", "proposal_generator.fcos_head.ctrness."),
    ("mask_branch.out.", "mask_branch.tower.4."),
]


def rename(name: str, pairs: list[tuple[str, str]], to_ours: bool) -> str:
    """Pairs that begin with a dot may stand anywhere in a name, the others at its beginning."""
    for ours, theirs in pairs:
        old, new = (theirs, ours) if to_ours else (ours, theirs)
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name[len(old) :]
    return name


def our_name(name: str) -> str:
    """Their name of a weight -> ours. Unknown names stay what they are."""
    if name.startswith("backbone.bottom_up."):
        return "backbone.body." + rename(name.removeprefix("backbone.bottom_up."), BODY, True)
    return rename(name, REST, True)


def their_name(name: str) -> str:
    """Our name of a weight -> theirs."""
    if name.startswith("backbone.body."):
        return "backbone.bottom_up." + rename(name.removeprefix("backbone.body."), BODY, False)
    return rename(name, REST, False)


COCO_NAMES = """
    person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant
    stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe
    backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat
    baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon
    bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch
    potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone microwave
    oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush
""".split()  # in label order; _ stands for a space
COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CLASSES = dict(  # published files do not name their classes: category id -> name
    zip(
        (n for n in range(1, 91) if n not in COCO_UNUSED_IDS),
        (name.replace("_", " ") for name in COCO_NAMES),
        strict=True,
    )
)


# --- one network's weights ------------------------------------------------------------------------

SCALE = "proposal_generator.fcos_head.scales.{}.scale"  # five of [1]; ours is one [5]
ITERATION = "mask_head._iter"
CONSTANTS = {  # what their files repeat from their configuration; here it is code
    "mask_head.sizes_of_interest": [64, 128, 256, 512, 1024],
    "pixel_mean": [103.53, 116.28, 123.675],
    "pixel_std": [1.0, 1.0, 1.0],
}
# What a file may lack: old ones have no such entries, and none of them is a weight.
OPTIONAL = ("mask_head.", "num_batches_tracked", "relative_position_index")


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One network's weights under our names. Constants are compared with ours and left out."""
    ours: dict[str, Tensor] = {}
    scales = [name for name in map(SCALE.format, range(5)) if name in weights]
    for name, value in weights.items():
        if name in CONSTANTS:
            if not np.allclose(value.flatten().tolist(), CONSTANTS[name]):
                found = value.flatten().tolist()
                raise PublishedError(f"{name} is {found}, here it is always {CONSTANTS[name]}")
        elif name.endswith("relative_position_index"):
            ours[our_name(name)] = value.flatten()
        elif name not in scales and name != ITERATION:
            ours[our_name(name)] = value
    if scales:
        ours["head.scales"] = torch.cat([weights[name].reshape(1) for name in scales])
    return ours


def to_published(weights: Mapping[str, Tensor], iteration: float = 0) -> dict[str, Tensor]:
    """The inverse of `from_published`; the iteration counter drives the warm-up of weak losses."""
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


def check_fit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> list[str]:
    """Raise PublishedError, which names every unused, missing or mis-shaped entry, unless `weights`
    (their names) fill a model whose state is `wanted` (our names). Returns which of OPTIONAL it
    lacks."""
    theirs = {name: tuple(value.shape) for name, value in to_published(wanted).items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    absent = [n for n in theirs if n not in found and n.endswith(OPTIONAL[1:])]
    absent += [n for n in theirs if n not in found and n.startswith(OPTIONAL[0])]
    problems = {
        "unused": sorted(found.keys() - theirs.keys() - CONSTANTS.keys()),
        "missing": sorted(theirs.keys() - found.keys() - set(absent)),
        "mis-shaped": [
            f"{name} {list(found[name])} for {list(theirs[name])}"
            for name in sorted(theirs.keys() & found.keys())
            if theirs[name] != found[name]
        ],
    }
    if any(problems.values()):
        lists = [f"{len(p)} {kind}: {', '.join(p)}" for kind, p in problems.items() if p]
        raise PublishedError(f"{what}: does not fit the model; " + "; ".join(lists))
    return absent


# --- what a file holds ----------------------------------------------------------------------------


class Published(NamedTuple):
    """A published model's file, under its own names."""

    networks: dict[str, dict[str, Tensor]]  # student and teacher (BoxTeacher), or model alone
    set_aside: list[str]  # other things in the file, by name


def split_networks(content: Mapping[str, Any], what: str) -> Published:
    """The weights of each network in a file. BoxTeacher's names begin with student. and teacher."""
    weights = content.get("model", content)
    if not isinstance(weights, Mapping) or not all(isinstance(k, str) for k in weights):
        raise PublishedError(f"{what}: holds no weights by name, so it is no published model")
    weights = {name: as_tensor(value, f"{what}: {name}") for name, value in weights.items()}
    set_aside = sorted(str(key) for key in content if key != "model") if "model" in content else []
    networks = {
        part: {
            n.removeprefix(f"{part}."): w for n, w in weights.items() if n.startswith(f"{part}.")
        }
        for part in ("student", "teacher")
    }
    if not any(networks.values()):
        return Published({"model": weights}, set_aside)
    strays = [name for name in weights if not name.startswith(("student.", "teacher."))]
    strays += [f"{part}.*" for part, found in networks.items() if not found]
    if strays:
        raise PublishedError(f"{what}: neither student nor teacher, or one is missing: {strays}")
    return Published(networks, set_aside)


def describe(published: Published, what: str) -> tuple[dict[str, Any], int]:
    """The configuration fields that a file's weights imply, and the number of its classes.

    Only the stride of ResNets does not show in the weights: it is in the 1x1 convs, but with
    deformable convs in the 3x3 ones, as in the published configurations.
    """
    weights = next(iter(published.networks.values()))
    try:
        num_classes = len(weights["proposal_generator.fcos_head.cls_logits.weight"])
        fields: dict[str, Any] = {"mask_channels": len(weights["mask_branch.tower.4.weight"])}
        if "backbone.bottom_up.patch_embed.proj.weight" in weights:
            embedding = len(weights["backbone.bottom_up.patch_embed.proj.weight"])
            fields["backbone"] = {96: "swin_t", 128: "swin_b"}[embedding]
        else:
            res4 = [n for n in weights if re.fullmatch(r".*\.res4\.\d+\.conv3\.weight", n)]
            fields["backbone"] = {6: "resnet50", 23: "resnet101"}[len(res4)]
            fields["deformable"] = any("conv2_offset" in name for name in weights)
            fields["stride_in_1x1"] = not fields["deformable"]
    except KeyError as error:
        raise PublishedError(f"{what}: no BoxTeacher, BoxInst or CondInst ({error})") from None
    if "model" not in published.networks:
        fields["mode"] = "boxteacher"
    else:
        fields["mode"] = "condinst" if fields["mask_channels"] == 8 else "boxinst"
    return fields | {"pixel_format": "bgr"}, num_classes


def as_tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.array(value))  # a copy: writable, and in native layout
    if not isinstance(value, Tensor):
        raise PublishedError(f"{what} is a {type(value).__name__}, not a tensor")
    return value


# --- ImageNet weights of backbones ----------------------------------------------------------------

CAFFE2 = [  # Detectron's blob names -> detectron2's, as regular expressions
    (r"^res_conv1_", "stem_conv1_"),
    (r"^conv1_", "stem_conv1_"),
    (r"_branch1_", "_shortcut_"),
    (r"_branch2([abc])_", lambda m: f"_conv{'abc'.index(m[1]) + 1}_"),
    (r"_bn_s$", "_norm_weight"),
    (r"_bn_b$", "_norm_bias"),
    (r"_bn_rm$", "_norm_running*mean"),
    (r"_bn_riv$", "_norm_running*var"),
    (r"_w$", "_weight"),
    (r"_b$", "_bias"),
    (r"^(?:pred|fc1000)_", "fc_"),
    (r"_", "."),
    (r"\*", "_"),
]


def read_backbone(path: str | Path) -> dict[str, Tensor]:
    """ImageNet weights under torchvision's names, from a file of torchvision, of detectron2 (.pkl,
    also with the blob names of its predecessor) or of Swin's authors (.pth)."""
    content = read_file(path)
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    if "conv1_w" in content:
        content = {caffe2_name(k): v for k, v in content.items() if not k.endswith("_momentum")}
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
        if name.startswith(("stem.", "res", "patch_embed.", "layers.")):
            name = rename(name, BODY, True)
        name = re.sub(r"^stem\.0\.", "conv1.", re.sub(r"^stem\.1\.", "bn1.", name))
        weights[name] = value
    for name in [n for n in weights if re.search(r"(bn\d|downsample\.1)\.weight$", n)]:
        # Batch norm folded into a scale and a shift: the identity of detectron2, whose eps is 1e-5
        norm = name.removesuffix("weight")
        weights.setdefault(norm + "running_mean", torch.zeros_like(weights[name]))
        weights.setdefault(norm + "running_var", torch.ones_like(weights[name]) - 1e-5)
    return weights


def caffe2_name(name: str) -> str:
    for pattern, replacement in CAFFE2:
        name = re.sub(pattern, replacement, name)
    return name


# --- files ----------------------------------------------------------------------------------------

try:
    from numpy._core import multiarray, numeric
except ImportError:  # numpy 1
    from numpy.core import multiarray, numeric

# All that a file may call for: arrays, their types and scalars, ordered dicts, text to bytes
ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),
}
for core in ("numpy.core", "numpy._core"):
    ADMITTED[f"{core}.multiarray", "_reconstruct"] = multiarray._reconstruct
    ADMITTED[f"{core}.multiarray", "scalar"] = multiarray.scalar
    ADMITTED[f"{core}.numeric", "_frombuffer"] = numeric._frombuffer


class RestrictedUnpickler(pickle.Unpickler):
    """Builds numpy arrays and builtin containers, and names whatever else it is asked for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise PublishedError(f"wants to load {module}.{name}; only numpy arrays are admitted")
        return ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise PublishedError("wants to load something from outside the file")


def read_file(path: str | Path) -> dict[str, Any]:
    """The dict in a .pkl (pickled numpy arrays) or a .pth (tensors, and perhaps numpy arrays)."""
    path = Path(path)
    if not path.is_file():
        raise PublishedError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                content = RestrictedUnpickler(file, encoding="latin1").load()
        else:
            with torch.serialization.safe_globals(_numpy_globals()):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except PublishedError as error:
        raise PublishedError(f"{path}: not loaded: {error}") from None
    except Exception as error:  # a damaged file can fail in any way
        found = re.search(r"GLOBAL (\S+)", str(error))  # how torch.load names what it refuses
        reason = str(error).partition("\n")[0] or type(error).__name__
        if found:
            reason = f"wants to load {found[1]}; only tensors and numpy arrays are admitted"
        raise PublishedError(f"{path}: not loaded: {reason}") from None
    if not isinstance(content, Mapping):
        raise PublishedError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    return dict(content)


def _numpy_globals() -> list[Any]:
    numbers = "Float64 Float32 Float16 Int64 Int32 Int16 Int8 UInt8 Bool".split()
    types = [getattr(np.dtypes, f"{number}DType") for number in numbers]
    named = [(value, f"{module}.{name}") for (module, name), value in ADMITTED.items()]
    return types + [pair for pair in named if not pair[1].startswith(("_codecs", "collections"))]


# --- pseudo masks as the published code makes them ------------------------------------------------


def label_boxes_as_published(
    teacher: CondInst,
    encoded: Encoded,
    n: int,
    found: Detections,
    seen_size: Size,
    batch: Batch,
) -> tuple[Tensor, Tensor] | None:
    """`CondInst.label_boxes` as in the published code, to compare numbers with (published_score).

        mean = Σ 1(m > tau) m / Σ 1(m > tau), over the whole mask
        order = sqrt(c * mean);   weight = sqrt(sqrt(c) * mean)

    The last of equal IoUs wins. A box that the first detection took can be taken once more.
    """
    cfg, size = teacher.cfg, batch.sizes[n]
    boxes, is_box = fit_boxes(found.boxes, seen_size, size)
    if not is_box.any():
        return None
    ious = box_iou(boxes[is_box], batch.boxes[n]).masked_fill(~batch.valid[n], -1)
    probs = teacher.mask_probs(encoded, n, found.location_index[is_box], seen_size, size)
    is_foreground = probs > cfg.mask_threshold
    mean = (probs * is_foreground).sum((1, 2)) / is_foreground.sum((1, 2)).clamp(min=1)
    scores = found.scores[is_box]
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
    return take_assigned(is_foreground[:, 2::4, 2::4], weights, torch.tensor(assigned))


# --- published checkpoints ------------------------------------------------------------------------


def import_published(
    path: str | Path,
    build_model: Callable[[Config, int], nn.Module],
    preset: str = "",
    **given: Any,
) -> dict[str, Any]:
    """A published checkpoint as `save_checkpoint` would have it, and "notes" for the user.

    The configuration is the preset's (without one: what the weights imply, on COCO), but with the
    backbone's variant and the pixels of published weights; `given` fields overrule both. Raises
    CheckpointError, with all names, if a weight is missing, left over or of another shape.
    """
    try:
        found = split_networks(read_file(path), str(path))
        fields, num_classes = describe(found, str(path))
        if preset:
            _check_preset(fields, from_preset(preset), str(path))
            fields = {k: v for k, v in fields.items() if k in ("stride_in_1x1", "pixel_format")}
            config = from_preset(preset, **(fields | given))
        else:
            config = dataclasses.replace(Config(), **(fields | given))
        model_state = build_model(config, num_classes).state_dict()
        notes = [f"{path}: not used: {name}" for name in found.set_aside]
        state: dict[str, Any] = {"teacher": None, "iterations": {}}
        for part, weights in found.networks.items():
            absent = check_fit(weights, model_state, f"{path} ({part})")
            notes += [f"{path}: {part} has no {name}: set anew" for name in absent]
            part = "student" if part == "model" else part
            fresh = {name: value.clone() for name, value in model_state.items()}
            state[part] = fresh | from_published(weights)
            state["iterations"][part] = float(weights.get(ITERATION, torch.zeros(1)))
    except PublishedError as error:
        raise CheckpointError(str(error)) from None
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


def _check_preset(fields: Mapping[str, Any], config: Config, what: str) -> None:
    for field in ("mode", "backbone", "deformable"):
        found, wanted = fields.get(field, False), getattr(config, field)
        if found != wanted:
            raise CheckpointError(
                f"{what}: its weights say {field}={found}, preset {config.preset} {field}={wanted};"
                " choose another preset"
            )


def export_published(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `import_published`: weights and counters by published names."""
    if state["config"]["size_unit"] != 64:
        raise CheckpointError("only models with size_unit=64 have published names")
    networks = {part: state[part] for part in ("teacher", "student") if state[part] is not None}
    iterations = state.get("iterations", {"student": state["step"]})
    weights: dict[str, Tensor] = {}
    for part, values in networks.items():
        if "mask_branch.tower.3.0.weight" not in values or "mask_branch.tower.4.0.weight" in values:
            raise CheckpointError("only models with mask_branch_convs=4 have published names")
        renamed = to_published(values, iterations.get(part, 0))
        prefix = f"{part}." if len(networks) == 2 else ""
        weights |= {prefix + name: value for name, value in renamed.items()}
    return weights


def load_initial_weights(model: nn.Module, config: Config) -> None:
    """What training starts from, `config.init`: a checkpoint's teacher if it has one, else its
    student; ours, or a published one. All of it has to fit, the number of classes included, and the
    variant of the backbone, which does not show in the shapes."""
    path = config.init
    if not path:
        return
    try:
        content = read_file(path)
        if content.get("format") == FORMAT:
            fields, weights = content.get("config", {}), content["teacher"] or content["student"]
        else:
            found = split_networks(content, path)
            fields, _ = describe(found, path)
            theirs = found.networks.get("teacher") or found.networks["model"]
            check_fit(theirs, model.state_dict(), path)
            weights = {**model.state_dict(), **from_published(theirs)}
    except PublishedError as error:
        raise CheckpointError(str(error)) from None
    for field in ("stride_in_1x1", "pixel_format"):
        given = getattr(config, field)
        wanted = fields.get(field, given)
        if wanted != given:
            name = field.replace("_", "-")
            switches = {True: f"--{name}", False: f"--no-{name}"}
            option = switches.get(wanted, f"--{name} {wanted}")
            raise CheckpointError(f"{path}: made for {field}={wanted}, not {given}: add {option}")
    load_weights(model, weights, path)


def main(argv: Sequence[str]) -> None:
    usage = "python -m boxteacher.published IN OUT [--preset NAME] [--field value ...]"
    parser = Parser(usage, __doc__)
    parser.add_argument("source", metavar="IN", help="a published checkpoint, or one of ours")
    parser.add_argument("target", metavar="OUT", help="the file to write")
    options, given = parser.read(argv)
    source, target = options.source, options.target
    try:
        is_ours = read_file(source).get("format") == FORMAT
    except PublishedError as error:
        raise CheckpointError(str(error)) from None
    if is_ours:
        torch.save({"model": export_published(load_checkpoint(source))}, target)
        print(f"{target}: {source} under published names")
        return
    state = import_published(source, build_model, given.pop("preset", ""), **given)
    for note in state.pop("notes"):
        print(note, file=sys.stderr)
    save_checkpoint(target, state)
    config = state["config"]
    print(f"{target}: {config['mode']}, {config['backbone']}, {len(state['class_names'])} classes")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
