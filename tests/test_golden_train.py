"""One training step of the published models on synthetic weights and images, in float64.

Losses agree to 1e-6 (the published focal loss and pseudo-label weights stayed float32), gradient
norms to 2e-5: a ReLU or maximum within rounding of its edge may fall on the other side.
"""

import dataclasses
import functools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden.compare import SOURCES, assert_summary, load, match, unpack
from golden.synthetic import recolor, synthetic_model, training_images

from boxteacher import fcos
from boxteacher.data import Batch
from boxteacher.losses import box_masks
from boxteacher.mask_head import pixel_positions
from boxteacher.model import make_teacher, scale_boxes
from boxteacher.published import masks_for_boxes_as_published, to_published
from boxteacher.transforms import resized_size

VARIANTS = {"b": "boxteacher", "c2": "boxinst", "d": "condinst"}
LOSSES = {
    "class": "loss_fcos_cls",
    "box": "loss_fcos_loc",
    "centerness": "loss_fcos_ctr",
    "mask": "loss_mask",
    "projection": "loss_prj",
    "pairwise": "loss_pairwise",
    "pseudo_mask": "loss_mask",
    "pseudo_affinity": "loss_mask_affinity",
}
WEAK_FACTOR = 0.5  # step 5000 of 10000
TEACHER_SIZE = (320, 448)


def pad(images) -> torch.Tensor:
    height = max(-(-image.shape[0] // 32) * 32 for image in images)
    width = max(-(-image.shape[1] // 32) * 32 for image in images)
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for slot, image in zip(padded, images, strict=True):
        slot[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(image).permute(2, 0, 1)
    return padded


def make_batch(golden, with_masks: bool) -> Batch:
    images = training_images()
    padded = pad(images)
    rows, columns = (side // 4 for side in padded.shape[-2:])
    boxes, labels = torch.zeros(2, 8, 4), torch.zeros(2, 8, dtype=torch.int64)
    valid, masks = torch.zeros(2, 8).bool(), torch.zeros(2, 8, rows, columns).bool()
    for n in range(2):
        given = torch.from_numpy(golden[f"im{n}/gt_boxes"])
        count = len(given)
        boxes[n, :count], valid[n, :count] = given, True
        labels[n, :count] = torch.from_numpy(golden[f"im{n}/gt_classes"])
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2
    if with_masks:
        for n in range(2):
            full = unpack(golden[f"im{n}/gt_masks_packed"], golden[f"im{n}/gt_masks_shape"])
            sampled = full[:, 2::4, 2::4]
            masks[n, : len(full), : sampled.shape[1], : sampled.shape[2]] = sampled
            for g, mask in enumerate(full):
                y, x = mask.nonzero().float().mean(0)
                centers[n, g] = torch.stack((x, y))
    sizes = [image.shape[:2] for image in images]
    masks, has_mask = (masks, valid) if with_masks else (None, None)
    cut_rows = [10, 10]
    return Batch(padded, sizes, boxes, labels, valid, centers, masks, has_mask, cut_rows, [0, 1])


def remember_encoding(model) -> None:
    """`encode` answers every later call with its first result: what comes after it is cheap."""
    encode, first = model.encode, []

    def encode_once(normalized):
        if not first:
            first.append(encode(normalized))
        return first[0]

    model.encode = encode_once


@functools.cache
def run_step(variant: str) -> SimpleNamespace:
    """One forward and backward pass."""
    mode = VARIANTS[variant]
    golden = load("train_r50", "compact")
    batch = make_batch(golden, mode == "condinst")
    model = synthetic_model(mode, "r50", "student").double().train()
    remember_encoding(model)
    images, pseudo, teacher, detections = batch.images, None, None, []
    if mode == "boxteacher":
        teacher = make_teacher(synthetic_model(mode, "r50", "teacher")).double().train()
        size = dict(zip(("teacher_size", "test_max_size"), TEACHER_SIZE, strict=True))
        teacher.cfg = dataclasses.replace(teacher.cfg, **size)
        remember_encoding(teacher)
        detect = teacher.detect
        teacher.detect = lambda encoded: detections.extend(detect(encoded)) or detections
        pseudo = teacher.make_pseudo_masks(batch)
        images = pad([recolor(image) for image in training_images()])

    chosen = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("assign_targets", "sample_best_locations", "sample_random_locations"):
            function = getattr(fcos, name)

            def record(*args, name=name, function=function):
                chosen[name] = function(*args)
                return chosen[name]

            patch.setattr(fcos, name, record)
        losses, _ = model(images, batch, WEAK_FACTOR, pseudo)
    sum(losses.values()).backward()
    if teacher is not None:
        teacher.detect = detect
    return SimpleNamespace(
        batch=batch,
        images=images,
        model=model,
        teacher=teacher,
        pseudo=pseudo,
        detections=detections,
        losses=losses,
        targets=chosen.pop("assign_targets"),
        sample=next(iter(chosen.values())),
    )


def golden_step(source: str) -> dict:
    if source == "compact":
        return load("train_r50", source)
    return load("train_r50_f64", source)


def assert_losses(losses, golden, variant):
    names, values = golden[f"{variant}/loss_names"].tolist(), golden[f"{variant}/loss_values"]
    found = {LOSSES[name]: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx(dict(zip(names, values, strict=True)), rel=1e-6)
    total = float(golden[f"{variant}/loss_total"])
    assert sum(found.values()) == pytest.approx(total, rel=1e-6)


@SOURCES
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses(variant, source):
    assert_losses(run_step(variant).losses, golden_step(source), variant)


@SOURCES
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_every_parameter(variant, source):
    golden, model = golden_step(source), run_step(variant).model
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: g for n, g in to_published(gradients).items() if not n.startswith("mask_head.")}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    names = [name.removeprefix("student.") for name in golden[f"{variant}/grad_names"].tolist()]
    wanted = dict(zip(names, golden[f"{variant}/grad_norms"].tolist(), strict=True))
    assert norms == pytest.approx(wanted, rel=2e-5, abs=1e-12)
    for name, published in zip(names, golden[f"{variant}/grad_names"].tolist(), strict=True):
        for key in (name, published):
            assert_summary(gradients[name], golden, f"{variant}/grad/{key}", 5e-5)


@SOURCES
@pytest.mark.parametrize("variant", VARIANTS)
def test_target_assignment_and_sampled_instances(variant, source):
    golden, step = golden_step(source), run_step(variant)
    targets, (index, is_real) = step.targets, step.sample
    locations = step.model.encode(None).locations
    levels = torch.arange(5).repeat_interleave(torch.tensor(locations.level_sizes))
    first_box = torch.tensor([0, int(step.batch.valid[0].sum())])  # boxes count over all images

    order = [  # level, image, location
        (image, location)
        for level in range(5)
        for image in range(2)
        for location in (targets.is_positive[image] & (levels == level)).nonzero().flatten()
    ]
    images, positives = torch.tensor(order).T
    boxes = targets.box_index[images, positives] + first_box[images]
    assert images.tolist() == golden[f"{variant}/pos_im_inds"].tolist()
    assert boxes.tolist() == golden[f"{variant}/pos_gt_inds"].tolist()
    expected = torch.from_numpy(golden[f"{variant}/pos_reg_targets"])
    torch.testing.assert_close(targets.distances[images, positives], expected, atol=0, rtol=1e-6)

    images = torch.arange(2)[:, None].expand_as(index)[is_real]
    index = index[is_real]
    boxes = targets.box_index[images, index] + first_box[images]
    columns = [images, boxes, levels[index], *locations.xy[index].T]
    sampled = torch.stack([column.double() for column in columns]).T.tolist()
    keys = ("im_inds", "gt_inds", "levels")
    wanted = [golden[f"{variant}/mask_inst_{key}"] for key in keys]
    wanted += [*golden[f"{variant}/mask_inst_locations"].T]
    assert sorted(sampled) == sorted(np.stack(wanted).T.tolist())


@SOURCES
@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_norm_statistics_after_the_step(variant, source):
    golden, step = golden_step(source), run_step(variant)
    networks = {"student": step.model, "teacher": step.teacher}
    states = {who: to_published(m.state_dict()) for who, m in networks.items() if m is not None}
    prefix = f"{variant}/bn_after/"
    for key in (key for key in golden if key.startswith(prefix)):
        who, _, name = key.removeprefix(prefix).partition(".")
        if who not in networks:
            who, name = "student", key.removeprefix(prefix)
        np.testing.assert_allclose(states[who][name].numpy(), golden[key], rtol=1e-6, atol=1e-7)


# --- the teacher ----------------------------------------------------------------------------------


def assert_pseudo_masks(pseudo, golden, variant):
    for n in range(2):
        weights = golden[f"{variant}/im{n}/gt_masks_flags"]
        np.testing.assert_allclose(pseudo.weights[n, : len(weights)], weights, rtol=1e-6)
        packed = golden[f"{variant}/im{n}/gt_bitmasks_s4_packed"]
        wanted = unpack(packed, (len(weights), *pseudo.masks.shape[-2:]))
        assert torch.equal(pseudo.masks[n, : len(weights)], wanted)


@SOURCES
@torch.no_grad()
def test_detections_of_the_teacher(source):
    """On resized images, in the coordinates of the plain ones, with their mask-aware scores."""
    golden, step = golden_step(source), run_step("b")
    encoded = step.teacher.encode(None)
    for n, found in enumerate(step.detections):
        size = step.batch.sizes[n]
        resized = resized_size(*size, *TEACHER_SIZE)
        boxes, is_box = scale_boxes(found.boxes, resized, size)
        wanted = {k: golden[f"b/im{n}/det_{k}"] for k in ("boxes", "classes", "scores")}
        index = match(boxes[is_box], found.labels[is_box], wanted["boxes"], wanted["classes"])
        index = is_box.nonzero().flatten()[index]
        expected = torch.from_numpy(wanted["boxes"]).double()
        torch.testing.assert_close(boxes[index].double(), expected, atol=1e-4, rtol=0)

        maps = torch.cat(
            [m for _, m in step.teacher.mask_maps(encoded, n, found.location_index[index])]
        )
        positions = pixel_positions(maps, resized, size)
        scores = step.teacher.scores_in_boxes(maps, boxes[index], found.scores[index], *positions)
        expected = torch.from_numpy(wanted["scores"]).double()
        torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)


@SOURCES
def test_pseudo_masks(source):
    assert_pseudo_masks(run_step("b").pseudo, golden_step(source), "b")


@SOURCES
def test_pseudo_masks_of_the_published_code(source):
    """Variant a: as with pseudo_score="published"; what comes before it is variant b's."""
    golden, step = golden_step(source), run_step("b")
    teacher = step.teacher
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "masks_for_boxes", partial(masks_for_boxes_as_published, teacher))
        pseudo = teacher.make_pseudo_masks(step.batch)
    assert_pseudo_masks(pseudo, golden, "a")
    with torch.no_grad():
        losses, _ = step.model(step.images, step.batch, WEAK_FACTOR, pseudo)
    assert_losses(losses, golden, "a")


@SOURCES
def test_published_boxinst_samples_round_the_rasterized_box(source):
    """Variant c: given those centers, everything else is the same."""
    golden, step = golden_step(source), run_step("c2")
    centers = step.batch.centers.clone()
    for n, (height, width) in enumerate(step.batch.sizes):
        for g in step.batch.valid[n].nonzero().flatten():
            inside = box_masks(step.batch.boxes[n, g], height, width, stride=1)
            centers[n, g] = inside.nonzero().float().mean(0).flip(0)
    batch = step.batch._replace(centers=centers)
    with torch.no_grad():
        losses, _ = step.model(step.images, batch, WEAK_FACTOR)
    assert_losses(losses, golden, "c")
