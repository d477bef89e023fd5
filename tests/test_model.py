"""The whole model: its losses against a slow recomputation, its pseudo masks, its predictions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

from boxteacher import fcos, losses
from boxteacher.config import Config
from boxteacher.data import Batch
from boxteacher.mask_head import aligned_upsample, dynamic_mask_logits
from boxteacher.masks import decode_mask
from boxteacher.model import PseudoMasks, build_model, scale_boxes
from boxteacher.presets import from_preset
from boxteacher.shapes import make_shapes_image
from boxteacher.transforms import View, resized_size

torch.set_num_threads(1)

MODES = ("condinst", "boxinst", "boxteacher")
SIZES = [(64, 64), (50, 64), (64, 41)]  # (h, w) of the images, without their padding to 64
BOXES = [  # of each image; two that overlap, a tiny one, one at the border; none in the last image
    [[3.0, 4.0, 40.5, 33.2], [20.0, 18.0, 61.0, 60.0], [50.0, 3.0, 57.0, 11.0]],
    [[8.3, 6.1, 55.9, 50.0]],
    [],
]
LABELS = [[0, 2, 1], [1], []]
NAMES = {
    "condinst": ["class", "box", "centerness", "mask"],
    "boxinst": ["class", "box", "centerness", "projection", "pairwise"],
    "boxteacher": [
        *("class", "box", "centerness", "projection", "pairwise"),
        *("pseudo_mask", "pseudo_affinity"),
    ],
}


def tiny_config(mode="boxteacher", **changes):
    """A network of a second's training. Group norm: no image of a batch depends on the others."""
    small = dict(fpn_channels=64, tower_convs=1, mask_branch_channels=16, mask_branch_convs=1)
    small |= dict(size_unit=64, backbone="resnet18", teacher_size=0)
    return from_preset(
        "shapes", **({"mode": mode, "norm": "gn", "mask_norm": "gn"} | small | changes)
    )


def make_model(mode="boxteacher", **changes):
    """Not as initialized: the head says something different at every location."""
    torch.manual_seed(1)
    model = build_model(tiny_config(mode, **changes), num_classes=3)
    with torch.no_grad():
        for layer in (model.head.class_logits, model.head.centerness, model.head.distances):
            layer.weight.normal_(std=0.1)
        model.head.class_logits.bias.fill_(-1)
        model.head.distances.bias.fill_(1)
        model.head.controller.weight.normal_(std=0.03)
        model.head.controller.bias.normal_(std=0.4)[-1] = 1.0  # more foreground than background
    return model.train()


def configure(model, **changes):
    """Other options for a model that exists."""
    model.cfg = dataclasses.replace(model.cfg, **changes)
    return model


def make_batch(which=(0, 1, 2), side=64) -> Batch:
    """Some of the images above, padded to side x side. A true mask is its box less its corners."""
    count, slots = len(which), 8
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    boxes, centers = torch.zeros(count, slots, 4), torch.zeros(count, slots, 2)
    labels = torch.zeros(count, slots, dtype=torch.int64)
    valid = torch.zeros(count, slots, dtype=torch.bool)
    masks = torch.zeros(count, slots, side // 4, side // 4, dtype=torch.bool)
    for n, image in enumerate(which):
        h, w = SIZES[image]
        picture = torch.from_numpy(make_shapes_image(7, image, 64)[0]).permute(2, 0, 1)
        images[n, :, :h, :w] = picture[:, :h, :w]
        for g, (x1, y1, x2, y2) in enumerate(BOXES[image]):
            boxes[n, g], labels[n, g] = torch.tensor([x1, y1, x2, y2]), LABELS[image][g]
            valid[n, g] = True
            y, x = torch.meshgrid(*[torch.arange(2, side, 4.0)] * 2, indexing="ij")
            middle = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2])
            centers[n, g] = middle
            far = (x - middle[0]).abs() / (x2 - x1) + (y - middle[1]).abs() / (y2 - y1)
            masks[n, g] = far < 0.5
    return Batch(
        images=images,
        sizes=[SIZES[i] for i in which],
        boxes=boxes,
        labels=labels,
        valid=valid,
        centers=centers,
        masks=masks,
        has_mask=valid.clone(),
        cut_rows=[6 if i == 1 else 0 for i in which],
        image_ids=[100 + i for i in which],
    )


def make_pseudo(batch: Batch) -> PseudoMasks:
    """Left halves of the boxes; the second box of the first image has none."""
    rows, columns = batch.images.shape[-2] // 4, batch.images.shape[-1] // 4
    half = batch.boxes.clone()
    half[..., 2] = (half[..., 0] + half[..., 2]) / 2
    weights = 0.9 - 0.2 * torch.rand(batch.valid.shape, generator=torch.Generator().manual_seed(1))
    weights = weights * batch.valid
    weights[0, 1] = 0
    masks = losses.box_masks(half, rows, columns) & (weights > 0)[..., None, None]
    return PseudoMasks(masks, weights)


def full_masks(found) -> torch.Tensor:
    return torch.from_numpy(np.stack([decode_mask(code) for code in found.masks]))


def gradients(model, values):
    """Of the sum of the losses, by parameter."""
    model.zero_grad()
    sum(values.values()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# --- the losses, once more and slowly -------------------------------------------------------------


def positives_of(locations, boxes):
    """{location: box} by FCOS's rules, one location and one box after the other."""
    found = {}
    for p in range(len(locations.xy)):
        (x, y), stride = locations.xy[p].tolist(), locations.strides[p].item()
        low, high = locations.size_ranges[p].tolist()
        best_area = math.inf
        for g, (x1, y1, x2, y2) in enumerate(boxes):
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            in_x = max(cx - 1.5 * stride, x1) < x < min(cx + 1.5 * stride, x2)
            in_y = max(cy - 1.5 * stride, y1) < y < min(cy + 1.5 * stride, y2)
            longest = max(x - x1, x2 - x, y - y1, y2 - y)
            area = (x2 - x1) * (y2 - y1)
            if in_x and in_y and low <= longest <= high and area < best_area:
                best_area, found[p] = area, g
    return found


def mask_logits_at(model, encoded, image, location):
    """[H, W] of one location: the controller as a dense convolution, the head for it alone."""
    dense = fcos.flatten_levels(
        [model.head.controller(f) for f in encoded.predictions.box_features]
    )
    xy, stride = encoded.locations.xy[location], encoded.locations.strides[location]
    logits_s8 = dynamic_mask_logits(
        encoded.mask_features[image][None],
        dense[image, location][None, None],
        xy[None, None],
        model.cfg.size_unit / 8 * stride[None, None],
    )
    return aligned_upsample(logits_s8, 2)[0, 0]


def dice(x, y):
    return 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum() + 1e-5)


def neighbors(rows, columns):
    """(dy, dx, slice of the pixels i, slice of their neighbors j inside the map)."""
    for dy, dx in losses.NEIGHBORS:
        here = (
            slice(max(-dy, 0), rows - max(dy, 0)),
            slice(max(-dx, 0), columns - max(dx, 0)),
        )
        there = (slice(max(dy, 0), rows + min(dy, 0)), slice(max(dx, 0), columns + min(dx, 0)))
        yield here, there


def pair_term(m, here, there):
    return -(m[here] * m[there] + (1 - m[here]) * (1 - m[there])).log()


def slow_losses(model, batch, weak_factor, pseudo):
    """The losses of the papers, image by image and instance by instance, unpadded boxes."""
    encoded = model.encode(model.normalize(batch.images, batch.sizes))
    logits, distances, centerness, _ = encoded.predictions
    sums, counts = (
        dict.fromkeys(NAMES[model.cfg.mode], 0.0),
        dict.fromkeys(NAMES[model.cfg.mode], 0.0),
    )
    for n, (height, width) in enumerate(batch.sizes):
        boxes = batch.boxes[n][batch.valid[n]]
        positives = positives_of(encoded.locations, boxes.tolist())
        for p in range(len(encoded.locations.xy)):
            for c in range(3):
                is_class = p in positives and batch.labels[n, positives[p]] == c
                probability = logits[n, p, c].sigmoid()
                right = probability if is_class else 1 - probability
                alpha = 0.25 if is_class else 0.75
                sums["class"] = sums["class"] - alpha * (1 - right) ** 2 * right.log()
        for p, g in positives.items():
            (x, y), stride = encoded.locations.xy[p].tolist(), encoded.locations.strides[p].item()
            x1, y1, x2, y2 = boxes[g].tolist()
            left, top, right, bottom = ((d / stride) for d in (x - x1, y - y1, x2 - x, y2 - y))
            target = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
            target = math.sqrt(target)
            a, b, c, d = distances[n, p]
            area, own = (left + right) * (top + bottom), (a + c) * (b + d)
            inner = (a.clamp(max=left) + c.clamp(max=right)) * (
                b.clamp(max=top) + d.clamp(max=bottom)
            )
            hull = (a.clamp(min=left) + c.clamp(min=right)) * (
                b.clamp(min=top) + d.clamp(min=bottom)
            )
            union = area + own - inner
            giou = (inner + 1) / (union + 1) - (hull - union) / hull
            probability = centerness[n, p].sigmoid()
            bce = -target * probability.log() - (1 - target) * (1 - probability).log()
            sums["box"] = sums["box"] + target * (1 - giou)
            sums["centerness"] = sums["centerness"] + bce
            for name, count in (("class", 1), ("box", target), ("centerness", 1)):
                counts[name] += count

        sampled = list(positives)
        if model.cfg.mode != "condinst":
            quota = max(model.cfg.max_mask_locations // max(len(set(positives.values())), 1), 1)
            quality = logits[n].max(-1).values.sigmoid() * centerness[n].sigmoid()
            sampled = []
            for g in set(positives.values()):
                own = sorted((p for p in positives if positives[p] == g), key=lambda p: -quality[p])
                sampled += own[:quota]
        rows, columns = batch.images.shape[-2] // 4, batch.images.shape[-1] // 4
        inside = torch.zeros(rows, columns)
        for i in range(rows):
            for j in range(columns):
                is_in = 4 * i + 2 < height - batch.cut_rows[n] and 4 * j + 2 < width
                inside[i, j] = float(is_in)
        lab = losses.rgb_to_lab(F.avg_pool2d(batch.images[n : n + 1].float(), 4).floor())[0]
        for p in sampled:
            g = positives[p]
            m = mask_logits_at(model, encoded, n, p).double().sigmoid()
            if model.cfg.mode == "condinst":
                sums["mask"] = sums["mask"] + dice(m, batch.masks[n, g].float())
                counts["mask"] += 1
                continue
            x1, y1, x2, y2 = (int(v) for v in boxes[g].tolist())
            box = torch.zeros(64, 64)
            box[y1 : y2 + 1, x1 : x2 + 1] = 1
            box = box[2::4, 2::4]
            for axis in (0, 1):
                shadow = dice(m.max(axis).values, box.max(axis).values)
                sums["projection"] = sums["projection"] + shadow
            counts["projection"] += 1
            for here, there in neighbors(rows, columns):
                alike = (
                    -(lab[(slice(None), *here)] - lab[(slice(None), *there)]).norm(dim=0) / 2
                ).exp() * inside[there]
                weight = (alike >= model.cfg.color_threshold) * box[here]
                sums["pairwise"] = sums["pairwise"] + (weight * pair_term(m, here, there)).sum()
                counts["pairwise"] += weight.sum().item()
            if pseudo is None or pseudo.weights[n, g] == 0:
                continue
            trust, t = pseudo.weights[n, g], pseudo.masks[n, g].float()
            sums["pseudo_mask"] = sums["pseudo_mask"] + trust * dice(m, t)
            smooth = (t + F.conv2d(t[None, None], torch.ones(1, 1, 3, 3) / 9, padding=1)[0, 0]) / 2
            value, total = 0.0, 0.0
            for here, there in neighbors(rows, columns):
                s, r = smooth[here], smooth[there]
                weight = (s * r + (1 - s) * (1 - r) >= 0.5) * box[here] * inside[there]
                value = value + (weight * pair_term(m, here, there)).sum()
                total = total + weight.sum()
            sums["pseudo_affinity"] = sums["pseudo_affinity"] + trust * value / max(total, 1)
            for name in ("pseudo_mask", "pseudo_affinity"):
                counts[name] += 1
    weak = dict.fromkeys(("pairwise", "pseudo_mask", "pseudo_affinity"), weak_factor)
    weak["pairwise"] *= model.cfg.pairwise_weight
    weak["pseudo_mask"] *= model.cfg.pseudo_mask_weight
    weak["pseudo_affinity"] *= model.cfg.pseudo_affinity_weight
    floor = {"box": 1e-6}
    return {
        name: weak.get(name, 1) * value / max(counts[name], floor.get(name, 1))
        for name, value in sums.items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_those_of_a_slow_recomputation(mode):
    changes = dict(pairwise_weight=0.7, pseudo_mask_weight=1.3, pseudo_affinity_weight=2.0)
    if mode != "condinst":  # less than there are positives, so that the choice counts
        changes["max_mask_locations"] = 9
    model, batch = make_model(mode, **changes), make_batch()
    pseudo = make_pseudo(batch) if mode == "boxteacher" else None
    values, _ = model(batch.images, batch, 0.4, pseudo)
    expected = slow_losses(model, batch, 0.4, pseudo)
    assert list(values) == NAMES[mode]
    for name in NAMES[mode]:
        assert values[name].item() == pytest.approx(expected[name].item(), rel=2e-4), name
        assert values[name].item() > 0


def test_the_published_weights_stand_in_the_configuration():
    cfg = Config()
    weights = (cfg.pairwise_weight, cfg.pseudo_mask_weight, cfg.pseudo_affinity_weight)
    assert weights == (1.0, 0.5, 0.1)


def test_without_pseudo_masks_boxteacher_has_the_losses_of_boxinst():
    batch = make_batch()
    values, _ = make_model("boxteacher")(batch.images, batch)
    expected, _ = make_model("boxinst")(batch.images, batch)
    assert values == expected


def test_the_weak_factor_scales_the_losses_without_true_masks_and_no_other():
    model, batch = make_model(), make_batch()
    pseudo = make_pseudo(batch)
    full, _ = model(batch.images, batch, 1.0, pseudo)
    part, _ = model(batch.images, batch, 0.25, pseudo)
    for name in NAMES["boxteacher"]:
        factor = 0.25 if name in ("pairwise", "pseudo_mask", "pseudo_affinity") else 1
        assert part[name].item() == pytest.approx(factor * full[name].item(), rel=1e-6), name


def test_a_pseudo_mask_that_is_empty_in_its_box_keeps_its_weight():
    model, batch = make_model(pseudo_mask_weight=0.5), make_batch((1,))
    pseudo = make_pseudo(batch)
    empty = PseudoMasks(torch.zeros_like(pseudo.masks), pseudo.weights)
    values, _ = model(batch.images, batch, 1.0, empty)
    weight = pseudo.weights[0, 0].item()
    assert values["pseudo_mask"].item() == pytest.approx(0.5 * weight, rel=1e-6)  # dice = 1


@pytest.mark.parametrize("mode", ["boxinst", "boxteacher"])
def test_true_masks_never_reach_the_losses_of_boxes(mode):
    model, batch = make_model(mode), make_batch()
    noise = torch.rand(batch.masks.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    variants = [
        batch,
        batch._replace(masks=noise, has_mask=noise[:, :, 0, 0]),
        batch._replace(masks=None, has_mask=None),
    ]
    results = []
    for variant in variants:
        model = make_model(mode)
        torch.manual_seed(3)
        pseudo = model.make_pseudo_masks(variant) if mode == "boxteacher" else None
        values, metrics = model(variant.images, variant, 1.0, pseudo)
        results.append((values, metrics, gradients(model, values)))
    for values, metrics, grads in results[1:]:
        assert values == results[0][0]
        for name in metrics.keys() - {"pseudo_mask_iou"}:  # which is measured, not learned
            assert torch.equal(metrics[name], results[0][1][name])
        assert all(torch.equal(grads[name], grad) for name, grad in results[0][2].items())


def test_condinst_does_learn_from_true_masks():
    model, batch = make_model("condinst"), make_batch()
    values, _ = model(batch.images, batch)
    other, _ = model(batch.images, batch._replace(masks=~batch.masks))
    assert values["mask"] != other["mask"]


# --- mixed supervision ----------------------------------------------------------------------------


def test_with_use_masks_and_no_mask_everything_is_as_without():
    batch, results = make_batch(), []
    none = batch._replace(has_mask=torch.zeros_like(batch.has_mask))
    for use_masks in (False, True):
        model = make_model(use_masks=use_masks)
        values, _ = model(batch.images, none, 1.0, make_pseudo(batch))
        results.append((values, gradients(model, values)))
    (values, grads), (others, other_grads) = results
    assert values == others
    assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())


def test_a_box_with_a_true_mask_learns_from_it_with_weight_1():
    """As if the teacher had said so. The metrics are about what it did say."""
    batch, pseudo = make_batch(), make_pseudo(make_batch())
    has_mask = torch.zeros_like(batch.has_mask)
    has_mask[0, 1] = has_mask[2, 0] = True  # the first of them got no detection
    some = batch._replace(has_mask=has_mask)
    masks, weights = pseudo.masks.clone(), pseudo.weights.clone()
    for place in ((0, 1), (2, 0)):
        masks[place], weights[place] = batch.masks[place], 1.0
    mixed, metrics = make_model(use_masks=True)(batch.images, some, 1.0, pseudo)
    wanted, _ = make_model()(batch.images, batch, 1.0, PseudoMasks(masks, weights))
    plain, plain_metrics = make_model()(batch.images, some, 1.0, pseudo)
    assert mixed == wanted
    assert mixed["pseudo_mask"] != plain["pseudo_mask"]
    assert torch.equal(metrics["mask_aware_score"], plain_metrics["mask_aware_score"])


# --- what warnings are made of --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["condinst", "boxinst"])
def test_boxes_without_a_location_are_counted(mode):
    """A box of 3 x 5 pixels between the locations (4 + 8 i, 4 + 8 j) has none."""
    batch = make_batch()
    boxes, valid = batch.boxes.clone(), batch.valid.clone()
    boxes[0, 5], valid[0, 5] = torch.tensor([21.0, 21, 24, 26]), True
    few = batch._replace(boxes=boxes, valid=valid, centers=(boxes[..., :2] + boxes[..., 2:]) / 2)
    _, before = make_model(mode)(batch.images, batch)
    _, after = make_model(mode)(batch.images, few)
    assert (after["lost_boxes"] - before["lost_boxes"]).tolist() == [1, 1]
    assert (after["lost_side"] - before["lost_side"]).tolist() == [3, 1]


def test_masks_of_all_ones_fill_their_boxes():
    model, batch = make_model("boxinst"), make_batch()
    for bias, fill in ((50.0, 1.0), (-50.0, 0.0)):
        with torch.no_grad():
            model.head.controller.weight.zero_()
            model.head.controller.bias.zero_()[-1] = bias
        _, metrics = model(batch.images, batch)
        above, below = metrics["mask_fill"].tolist()
        assert above / below == fill


# --- nothing to learn from is a case --------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_images_without_boxes_leave_detection_losses_and_a_gradient_for_every_parameter(mode):
    model, batch = make_model(mode), make_batch((2,))
    pseudo = model.make_pseudo_masks(batch) if mode == "boxteacher" else None
    values, metrics = model(batch.images, batch, 1.0, pseudo)
    assert {name for name, value in values.items() if value != 0} == {"class"}
    assert all(v.isfinite().all() for v in (*values.values(), *metrics.values()))
    for name, grad in gradients(model, values).items():
        assert grad is not None, name  # DDP waits for every parameter's
        assert grad.isfinite().all(), name
    only_background = model.encode(model.normalize(batch.images, batch.sizes)).predictions
    labels = torch.full(only_background.class_logits.shape[:2], -1)
    focal = losses.focal_loss(only_background.class_logits, labels).sum()
    assert values["class"].item() == pytest.approx(focal.item(), rel=1e-6)  # divided by 1


@pytest.mark.parametrize("mode", MODES)
def test_boxes_that_no_location_answers_for_leave_finite_losses(mode):
    """A box between the locations (4, 12, ...) has no positive; its pseudo mask has no instance."""
    batch = make_batch((0,))
    boxes = torch.zeros(1, 8, 4)
    boxes[0, 0] = torch.tensor([5.0, 5.0, 9.0, 9.0])
    batch = batch._replace(
        boxes=boxes, valid=torch.arange(8)[None] == 0, centers=boxes[..., :2] + 2
    )
    model = make_model(mode)
    pseudo = make_pseudo(batch) if mode == "boxteacher" else None
    values, _ = model(batch.images, batch, 1.0, pseudo)
    assert {name for name, value in values.items() if value != 0} == {"class"}
    assert all(grad.isfinite().all() for grad in gradients(model, values).values())


@pytest.mark.parametrize("mode", MODES)
def test_an_image_without_boxes_changes_nothing_but_the_class_loss_of_its_batch(mode):
    model = make_model(mode)
    together, alone = make_batch((0, 2)), make_batch((0,))
    pseudos = [make_pseudo(b) if mode == "boxteacher" else None for b in (together, alone)]
    values, _ = model(together.images, together, 1.0, pseudos[0])
    expected, _ = model(alone.images, alone, 1.0, pseudos[1])
    for name in NAMES[mode]:
        same = values[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
        assert same == (name != "class"), name


@pytest.mark.parametrize("mode", MODES)
def test_empty_slots_for_boxes_hold_nothing_that_counts(mode):
    """Whatever stands in the slots that are not valid, and however many there are."""
    model, batch = make_model(mode), make_batch()
    garbage = {
        name: torch.where(batch.valid.view(3, 8, *[1] * (x.ndim - 2)), x, x.new_full((), value))
        for name, x, value in (
            ("boxes", batch.boxes, float("nan")),
            ("centers", batch.centers, 30.0),
            ("labels", batch.labels, 99),
            ("masks", batch.masks, True),
        )
    }
    pseudo = make_pseudo(batch) if mode == "boxteacher" else None
    values, _ = model(batch.images, batch, 1.0, pseudo)
    other, _ = model(batch.images, batch._replace(**garbage), 1.0, pseudo)
    for name in NAMES[mode]:
        assert other[name].item() == pytest.approx(values[name].item(), rel=1e-6), name


# --- padding --------------------------------------------------------------------------------------


def test_padding_is_exactly_zero_for_the_network():
    for pixel_format in ("rgb", "bgr"):
        model = make_model(pixel_format=pixel_format)
        images = torch.full((2, 3, 64, 96), 255, dtype=torch.uint8)
        images[:, 0], images[:, 2] = 10, 30
        normalized = model.normalize(images, [(50, 96), (64, 41)])
        assert normalized.dtype == torch.float32
        assert (normalized[0, :, 50:] == 0).all()
        assert (normalized[1, :, :, 41:] == 0).all()
        first = {"rgb": (10 - 123.675) / 58.395, "bgr": 30 - 103.53}[pixel_format]
        assert normalized[0, 0, :50].unique().item() == pytest.approx(first, rel=1e-5)
        assert (normalized[1, :, :64, :41] != 0).all()


def test_an_image_does_not_depend_on_its_partners_in_the_batch():
    model, batch, alone = make_model().eval(), make_batch(), make_batch((1,))
    together = model.predict(batch.images, batch.sizes, [(100, 130)] * 3)[1]
    single = model.predict(alone.images, alone.sizes, [(100, 130)])[0]
    assert len(single.boxes) > 3
    assert torch.allclose(together.boxes, single.boxes, atol=1e-3)
    assert torch.allclose(together.scores, single.scores, atol=1e-5)
    assert torch.equal(together.labels, single.labels)
    assert (full_masks(together) ^ full_masks(single)).float().mean() < 1e-4
    many, one = model.make_pseudo_masks(batch), model.make_pseudo_masks(alone)
    assert many.weights[1].any()
    assert torch.allclose(many.weights[1], one.weights[0], atol=1e-5)
    assert torch.equal(many.masks[1], one.masks[0])


def test_what_stands_in_the_padding_of_the_images_does_not_count():
    model, batch = make_model(), make_batch()
    pseudo = make_pseudo(batch)
    students = batch.images.clone()
    for image, (h, w) in zip(students, batch.sizes, strict=True):
        image[:, h:], image[:, :, w:] = 200, 77
    values, _ = model(batch.images, batch, 1.0, pseudo)
    other, _ = model(students, batch, 1.0, pseudo)
    assert values == other


# --- the teacher's pseudo masks -------------------------------------------------------------------


def detections_at(model, *rows):
    """Let the detector of `model` find this: (box, score, label, location) for one image each."""
    found = [
        fcos.Detections(
            torch.tensor([r[0] for r in image]).reshape(-1, 4),
            torch.tensor([r[1] for r in image]),
            torch.tensor([r[2] for r in image], dtype=torch.int64),
            torch.tensor([r[3] for r in image], dtype=torch.int64),
        )
        for image in rows
    ]
    model.detect = lambda encoded: found


@pytest.mark.parametrize("short_side", [0, 96])
def test_pseudo_masks_are_those_of_a_slow_recomputation(short_side):
    """The first image's boxes: the first is met twice, the second once, the third never."""
    model, batch = make_model(teacher_size=short_side), make_batch()
    scale = 96 / 64 if short_side else 1.0
    images, sizes = model.normalize(batch.images, batch.sizes), batch.sizes
    if short_side:  # all three have the short side 96 then; 50 x 64 and 64 x 41 are scaled by more
        scales = [96 / 64, 96 / 50, 96 / 41]
        sizes = [(96, 96), (96, 123), (150, 96)]
        resized = torch.zeros(3, 3, 160, 128)
        for n, (h, w) in enumerate(batch.sizes):
            one = F.interpolate(images[n : n + 1, :, :h, :w], size=sizes[n], mode="bilinear")
            resized[n, :, : sizes[n][0], : sizes[n][1]] = one[0]
        images = resized
        assert [round(h * s) for (h, _), s in zip(batch.sizes, scales, strict=True)] == [
            96,
            96,
            150,
        ]
    first = [
        ([v * scale for v in (4, 4, 41, 33)], 0.8, 0, 9),
        ([v * scale for v in (2, 5, 39, 35)], 0.5, 1, 18),
        ([v * scale for v in (22, 20, 70, 59)], 0.6, 0, 45),  # reaches beyond the image
        ([v * scale for v in (40, 40, 60, 60)], 0.9, 2, 50),  # IoU under 0.5 with all boxes
    ]
    detections_at(model, first, [], first[:1])  # the last image has no box that could be met
    pseudo = model.make_pseudo_masks(batch)

    encoded = model.encode(images)
    candidates = []
    for box, score, _, location in first:
        box = torch.tensor(box)
        box = (box / scale).clamp(0, 64)
        logits = mask_logits_at(model, encoded, 0, location)
        m = aligned_upsample(logits.sigmoid()[None, None], 4)[..., : sizes[0][0], : sizes[0][1]]
        m = F.interpolate(m, size=(64, 64), mode="bilinear", align_corners=False)[0, 0]
        above, value, count = m > 0.5, 0.0, 0
        x1, y1, x2, y2 = (int(v) for v in box.tolist())
        for y in range(y1, min(y2, 63) + 1):
            for x in range(x1, min(x2, 63) + 1):
                if above[y, x]:
                    value, count = value + m[y, x].item(), count + 1
        candidates.append((math.sqrt(score * value / (count + 1e-6)), box, above))
    free, weights, masks = [0, 1, 2], [0.0] * 8, torch.zeros(8, 16, 16, dtype=torch.bool)
    for trust, box, above in sorted(candidates, key=lambda c: -c[0]):
        ious = box_iou(box[None], batch.boxes[0, free])[0]
        if len(free) and ious.max() >= 0.5:
            g = free.pop(int(ious.argmax()))
            weights[g] = trust
            masks[g] = above[2::4, 2::4] & losses.box_masks(batch.boxes[0, g], 16, 16)
    assert [w > 0 for w in weights[:3]] == [True, True, False]
    assert pseudo.weights[0].tolist() == pytest.approx(weights, rel=1e-4)
    assert torch.equal(pseudo.masks[0], masks)
    assert masks[0].any()
    assert masks[1].any()
    assert not pseudo.masks[1:].any()
    assert not pseudo.weights[1:].any()


def test_pseudo_masks_lie_in_their_boxes_with_weights_from_0_to_1():
    model, batch = make_model(iou_threshold=0.3), make_batch()
    many = dict(pre_nms_threshold=0.0, nms_threshold=0.9)
    model.detect = lambda encoded: fcos.detect(encoded.predictions, encoded.locations, **many)
    with torch.no_grad():
        model.head.distances.bias.fill_(3)  # boxes of about the right size
    pseudo = model.make_pseudo_masks(batch)
    assert pseudo.masks.shape == (3, 8, 16, 16)
    assert pseudo.masks.dtype == torch.bool
    assert not pseudo.weights.requires_grad
    assert (pseudo.weights > 0).sum() >= 2
    assert ((pseudo.weights >= 0) & (pseudo.weights <= 1)).all()
    assert not pseudo.weights[~batch.valid].any()
    assert not pseudo.masks[pseudo.weights == 0].any()
    assert not (pseudo.masks & ~losses.box_masks(batch.boxes, 16, 16)).any()


def test_the_thresholds_of_the_teacher_are_heard():
    model, batch = make_model(), make_batch((0,))
    detections_at(model, [([4.0, 4.0, 41.0, 33.0], 0.8, 0, 9)])
    full = model.make_pseudo_masks(batch)
    trust = full.weights[0, 0].item()
    assert 0 < trust < 1

    def labeled(**changes):
        return configure(model, **changes).make_pseudo_masks(batch)

    assert labeled(mask_threshold=0.6).masks.sum() < full.masks.sum()
    assert not labeled(mask_threshold=0.5, score_threshold=trust + 0.01).weights.any()
    assert labeled(score_threshold=trust - 0.01).weights.any()
    assert not labeled(score_threshold=0.0, iou_threshold=0.97).weights.any()


# --- predictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_predictions_have_the_size_asked_for_and_the_score_of_their_mode(mode):
    model, batch = make_model(mode).eval(), make_batch((1,))
    detections_at(
        model,
        [
            ([-5.0, 4.0, 41.0, 33.0], 0.8, 0, 9),
            ([70.0, 4.0, 80.0, 33.0], 0.7, 1, 18),  # beyond the image: empty when clipped
            ([2.0, 5.0, 64.0, 60.0], 0.5, 2, 18),
        ],
    )
    found = model.predict(batch.images, batch.sizes, [(75, 160)])[0]
    masks = full_masks(found)
    assert masks.shape == (2, 75, 160)
    assert found.labels.tolist() == [0, 2]
    expected = [[0, 4 * 1.5, 41 * 2.5, 33 * 1.5], [2 * 2.5, 5 * 1.5, 160, 75]]
    assert torch.allclose(found.boxes, torch.tensor(expected))

    encoded = model.encode(model.normalize(batch.images, batch.sizes))
    for d, (score, location) in enumerate([(0.8, 9), (0.5, 18)]):
        logits = mask_logits_at(model, encoded, 0, location)
        m = aligned_upsample(logits.sigmoid()[None, None], 4)[..., :50, :64]
        m = F.interpolate(m, size=(75, 160), mode="bilinear", align_corners=False)[0, 0]
        assert torch.equal(masks[d], m > 0.5)
        assert masks[d].any()
        if mode == "boxteacher":
            score = math.sqrt(score * m[m > 0.5].mean().item())
        assert found.scores[d].item() == pytest.approx(score, rel=1e-5)


def test_masks_of_many_detections_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    model, batch = make_model().eval(), make_batch((0,))
    rows = [([p, p, p + 30.0, p + 20.0], 1 - p / 40, p % 3, 2 * p) for p in range(20)]
    detections_at(model, rows)
    monkeypatch.setattr("boxteacher.model.MASK_CELLS", {"cpu": 1 << 30})
    at_once = model.predict(batch.images, batch.sizes, [(64, 64)])[0]
    monkeypatch.setattr("boxteacher.model.MASK_CELLS", {"cpu": 0})  # 8 at a time
    in_parts = model.predict(batch.images, batch.sizes, [(64, 64)])[0]
    assert len(at_once.scores) == 20
    assert torch.allclose(at_once.scores, in_parts.scores)
    assert at_once.masks == in_parts.masks


def test_one_image_is_predicted_as_the_data_set_would_have_it():
    """Resized to the test size, and the results in its own pixels."""
    model = make_model(test_size=80, test_max_size=96).eval()
    image = make_shapes_image(3, 0, 100)[0][:70]
    assert resized_size(70, 100, 80, 96) == (67, 96)
    view = View((70, 100), (67, 96), (0, 0, 67, 96), flip=False)
    padded = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    padded[0, :, :67] = torch.from_numpy(view.image(image).copy()).permute(2, 0, 1)
    expected = model.predict(padded, [(67, 96)], [(70, 100)])[0]
    found = model.predict_image(image)
    assert len(found.scores) > 3
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one, other)
    assert found.masks == expected.masks


def test_no_detections_and_empty_masks_are_ordinary_results():
    model, batch = make_model().eval(), make_batch((0, 2))
    with torch.no_grad():  # a mask that is nowhere over 0.5
        model.head.controller.weight.zero_()
        model.head.controller.bias.zero_()
        model.head.controller.bias[-1] = -5
    detections_at(model, [], [([4.0, 4.0, 30.0, 30.0], 0.8, 1, 9)])
    nothing, empty = model.predict(batch.images, batch.sizes, [(64, 70), (64, 41)])
    assert [len(x) for x in nothing] == [0, 0, 0, 0]
    assert nothing.boxes.shape == (0, 4)
    assert not full_masks(empty).any()
    assert empty.scores.tolist() == [0.0]
    pseudo = model.make_pseudo_masks(batch)
    assert not pseudo.weights.any()


def test_fitted_boxes_are_scaled_clipped_and_told_empty():
    boxes = torch.tensor(
        [[1.0, 2.0, 30.0, 40.0], [-9.0, -9.0, 99.0, 99.0], [20.0, 50.0, 21.0, 60.0]]
    )
    fitted, keep = scale_boxes(boxes, (50, 40), (100, 20))
    expected = [[0.5, 4, 15, 80], [0, 0, 20, 100], [10, 100, 10.5, 100]]
    assert torch.allclose(fitted, torch.tensor(expected))
    assert keep.tolist() == [True, True, False]


# --- a configuration becomes modules --------------------------------------------------------------


def test_build_model_reads_the_configuration():
    cfg = tiny_config(
        "boxinst",
        **dict(fpn_channels=96, mask_channels=4, mask_branch_channels=24, mask_branch_convs=2),
        **dict(tower_convs=3, color_threshold=0.2, affinity_threshold=0.7, max_mask_locations=5),
        **dict(max_detections=7, pixel_format="bgr"),
    )
    model = build_model(cfg, num_classes=5)
    assert model.cfg.mode == "boxinst"
    assert model.head.class_logits.weight.shape == (5, 96, 3, 3)
    assert len([m for m in model.head.box_tower if isinstance(m, torch.nn.Conv2d)]) == 3
    assert model.head.controller.out_channels == (2 + 4) * 8 + 64 + 8 + 17
    assert model.mask_branch.out.weight.shape == (4, 24, 1, 1)
    assert len(model.mask_branch.tower) == 2
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert model.cfg == cfg
    assert model.pixel_mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    model.eval()
    found = model.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [(32, 32)], [(32, 32)])
    assert len(found) == 1


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_build_model_knows_batch_norm_and_group_norm(norm):
    kinds = {type(m) for m in build_model(tiny_config(norm=norm, mask_norm=norm), 2).modules()}
    assert (torch.nn.BatchNorm2d in kinds) == (norm == "bn")
    model = build_model(tiny_config(norm=norm, mask_norm=norm), 2)
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_seed_builds_the_same_model():
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(build_model(tiny_config(), 3).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(("score", "wanted"), [("detection", 0.8), ("constant", 1.0)])
def test_other_scores_weigh_the_same_masks(score, wanted):
    found, pseudo = [([4, 4, 41, 33], 0.8, 0, 9)], {}
    for name in ("mask_aware", score):
        model, batch = make_model(pseudo_score=name, teacher_size=0), make_batch()
        detections_at(model, found, [], [])
        pseudo[name] = model.make_pseudo_masks(batch)
    assert torch.equal(pseudo[score].masks, pseudo["mask_aware"].masks)
    assert pseudo[score].weights[0, 0] == pytest.approx(wanted)
    assert 0 < pseudo["mask_aware"].weights[0, 0] < 0.8**0.5 + 1e-6
    assert pseudo[score].weights.count_nonzero() == 1
