"""Single operations against the published code's outputs (shared/golden; see its README)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

from boxteacher import losses
from boxteacher.ema import ema_momentum
from boxteacher.fcos import Predictions, assign_targets, detect, flatten_levels, make_locations
from boxteacher.mask_head import aligned_upsample, dynamic_mask_logits
from boxteacher.model import resize_images
from boxteacher.pseudo_labels import assign_to_boxes
from boxteacher.transforms import resized_size

PATH = Path(__file__).parents[2] / "shared" / "golden" / "golden_ops.npz"
pytestmark = pytest.mark.skipif(not PATH.is_file(), reason=f"no golden values at {PATH}")
STRIDES = (8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as data:
        arrays = {key: data[key] for key in data.files}
    return lambda key: torch.from_numpy(arrays[key])


def close(actual, expected, atol=0.0, rtol=1e-6):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def empty_maps(sizes):
    return [torch.zeros(1, 1, h, w) for h, w in sizes]


def maps_of_image(height, width):
    return empty_maps([(-(-height // s), -(-width // s)) for s in STRIDES])


# --- mask head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_aligned_bilinear(golden, factor):
    out = aligned_upsample(golden("aligned_bilinear/in"), factor)
    close(out, golden(f"aligned_bilinear/out_x{factor}"), atol=3e-7)


def test_mask_head(golden):
    image, level = golden("mask_head/in/im_inds"), golden("mask_head/in/fpn_levels")
    soi = golden("mask_head/sizes_of_interest")[level].float()
    features = golden("mask_head/in/mask_feats")[image]  # one instance an image
    logits = dynamic_mask_logits(
        features,
        golden("mask_head/in/params")[:, None],
        golden("mask_head/in/locations")[:, None],
        soi[:, None],
    )
    close(aligned_upsample(logits, 2), golden("mask_head/out_logits"), atol=1e-5, rtol=1e-5)


# --- FCOS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "size"), [(0, (3, 4)), (1, (2, 5)), (4, (3, 2))])
def test_compute_locations(golden, level, size):
    sizes = [(1, 1)] * 5
    sizes[level] = size
    locations = make_locations(empty_maps(sizes))
    mine = locations.xy[locations.strides == STRIDES[level]]
    assert torch.equal(mine, golden(f"compute_locations/{size[0]}_{size[1]}_{STRIDES[level]}"))


def padded_boxes(golden, prefix, number):
    boxes = torch.zeros(number, 8, 4)
    valid = torch.zeros(number, 8, dtype=torch.bool)
    for n in range(number):
        mine = golden(f"{prefix}/in/boxes{n}")
        boxes[n, : len(mine)], valid[n, : len(mine)] = mine, True
    return boxes, valid


@pytest.mark.parametrize("centers_of", ["box_center", "bitmask_center"])
def test_fcos_targets(golden, centers_of):
    boxes, valid = padded_boxes(golden, "fcos_targets", 3)
    classes = torch.zeros(3, 8, dtype=torch.int64)
    for n in range(3):
        mine = golden(f"fcos_targets/in/classes{n}")
        classes[n, : len(mine)] = mine
    # of a rasterized box, the centroid in pixel indices
    corners = boxes if centers_of == "box_center" else boxes.trunc()
    centers = (corners[..., :2] + corners[..., 2:]) / 2
    features = maps_of_image(*golden("fcos_targets/in/hw").tolist())
    locations = make_locations(features)
    targets = assign_targets(locations, boxes, classes, valid, centers)

    first_box = valid.sum(1).cumsum(0) - valid.sum(
        1
    )  # published boxes are numbered over all images
    start = positives = 0
    for level, size in enumerate(locations.level_sizes):
        here = slice(start, start + size)
        key = f"fcos_targets/{centers_of}/{{}}/{level}"
        labels = golden(key.format("labels")).long().view(3, size)
        is_positive = labels < 80
        assert torch.equal(targets.is_positive[:, here], is_positive)
        assert torch.equal(targets.labels[:, here], torch.where(is_positive, labels, -1))
        box = (targets.box_index[:, here] + first_box[:, None])[is_positive]
        published = golden(key.format("target_inds")).long().view(3, size)[is_positive]
        assert torch.equal(box, published)
        distances = golden(key.format("reg_targets")).view(3, size, 4)
        close(targets.distances[:, here][is_positive], distances[is_positive])
        start, positives = start + size, positives + int(is_positive.sum())
    assert positives > 50


def test_fcos_targets_big(golden):
    boxes, valid = padded_boxes(golden, "fcos_targets_big", 2)
    features = maps_of_image(*golden("fcos_targets_big/in/hw").tolist())
    locations = make_locations(features)
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2
    no_labels = torch.zeros(2, 8, dtype=torch.int64)
    targets = assign_targets(locations, boxes, no_labels, valid, centers)

    level_of = [i for i, size in enumerate(locations.level_sizes) for _ in range(size)]
    first_box = [0, int(valid[0].sum())]
    mine = {}
    for n, p in targets.is_positive.nonzero().tolist():
        key = (level_of[p], n, *locations.xy[p].tolist())
        mine[key] = targets.box_index[n, p].item() + first_box[n], targets.distances[n, p]
    names = ("fpn_levels", "im_inds", "locations", "target_inds", "reg_targets")
    published = [golden(f"fcos_targets_big/{name}") for name in names]
    assert len(mine) == len(published[0])
    for level, image, xy, box, distances in zip(*published, strict=True):
        my_box, my_distances = mine[(level.item(), image.item(), *xy.tolist())]
        assert my_box == box
        close(my_distances, distances)


def test_proposals(golden):
    def levels(name):
        return [golden(f"proposals/in/{name}/{level}") for level in range(5)]

    logits, distances, centerness, top = map(levels, ("logits", "reg", "ctr", "top"))
    locations = make_locations(logits)
    predictions = Predictions(
        flatten_levels(logits), flatten_levels(distances), flatten_levels(centerness)[..., 0], []
    )
    (found,) = detect(predictions, locations, 0.05, 1000, 0.6, 15)
    index = found.location_index
    close(found.boxes, golden("proposals/out/boxes"), atol=1e-5)
    close(found.scores, golden("proposals/out/scores"))
    assert torch.equal(found.labels, golden("proposals/out/classes"))
    assert torch.equal(locations.xy[index], golden("proposals/out/locations"))
    level_of = torch.tensor(locations.level_sizes).cumsum(0)
    assert torch.equal(torch.bucketize(index, level_of, right=True), golden("proposals/out/levels"))
    assert torch.equal(flatten_levels(top)[0][index], golden("proposals/out/top"))


# --- losses ---------------------------------------------------------------------------------------


def test_focal(golden):
    target = golden("focal/in/targets")
    labels = torch.where(target.sum(1) > 0, target.argmax(1), -1)
    close(losses.focal_loss(golden("focal/in/logits"), labels).sum(), golden("focal/sum"))


def test_iou(golden):
    predicted, target = golden("iou/in/pred"), golden("iou/in/target")
    loss = losses.giou_loss(predicted, target)
    centerness = losses.centerness_targets(target)
    close(1 - loss, golden("iou/giou"), atol=2e-7)
    close(centerness, golden("iou/ctrness_targets"))
    close(loss.sum(), golden("iou/giou_loss_sum"))
    close((loss * centerness).sum(), golden("iou/giou_loss_weighted_sum"))


def every_pixel_alone(logits):
    """One instance per pixel i, its box that pixel: only the weights of i remain. [1, HW, H, W]."""
    height, width = logits.shape
    alone = torch.eye(height * width, dtype=torch.bool).view(1, -1, height, width)
    return logits.expand(1, height * width, -1, -1), alone


def test_pairwise_of_every_pixel_and_direction(golden):
    for logits, published in zip(
        golden("mask_losses/in/logits")[:, 0], golden("mask_losses/pairwise"), strict=True
    ):
        height, width = logits.shape
        masks, alone = every_pixel_alone(logits)
        for k in range(8):
            edges = torch.zeros(1, 8, height, width, dtype=torch.bool)
            edges[:, k] = True
            terms, weights = losses.color_pairwise_sums(masks, edges, alone)
            # outside the map the term is 0 and so is its weight
            close(terms.view(height, width), published[k] * weights.view(height, width), atol=2e-6)
            dy, dx = losses.NEIGHBORS[k]
            assert weights.sum() == (height - abs(dy)) * (width - abs(dx))


def test_projection_and_dice(golden):
    probs = golden("mask_losses/in/logits")[:, 0].sigmoid()
    target = golden("mask_losses/in/target")[:, 0]
    close(losses.projection_loss(probs, target), golden("mask_losses/project"))
    close(losses.dice_loss(probs, target), golden("mask_losses/dice"))


def test_mask_loss_gradient(golden):
    """The gradient of the sum of the means of pairwise (8 directions), projection and dice."""
    logits = golden("mask_losses/in/logits").clone().requires_grad_()
    target = golden("mask_losses/in/target")
    everything = torch.ones(3, 8, 20, 24, dtype=torch.bool)
    sums, _ = losses.color_pairwise_sums(logits, everything, everything[:, :1])
    projection = losses.projection_loss(logits.sigmoid(), target)
    dice = losses.dice_loss(logits.sigmoid(), target)
    total = sums.sum() / everything.numel() + projection.mean() + dice.mean()
    (gradient,) = torch.autograd.grad(total, logits)
    close(gradient, golden("mask_losses/grad_of_mean_sum"), atol=2e-8, rtol=1e-4)


def slow_pairwise(logits):
    """-log(p_i p_j + (1-p_i)(1-p_j)) in float64, 0 outside. [H, W] -> [8, H, W]."""
    p = logits.double().sigmoid()
    height, width = p.shape
    out = torch.zeros(8, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for k, (dy, dx) in enumerate(losses.NEIGHBORS):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    q = p[y + dy, x + dx]
                    out[k, y, x] = -(p[y, x] * q + (1 - p[y, x]) * (1 - q)).log()
    return out


@pytest.mark.parametrize("threshold", [0.5, 0.25, 0.6, 0.75, 0.9])
def test_affinity(golden, threshold):
    masks, inside = golden("affinity/in/masks"), golden("affinity/in/image_mask") > 0
    logits = golden("mask_losses/in/logits")[0, 0]
    terms = slow_pairwise(logits)
    student, alone = every_pixel_alone(logits)
    for mask, affinity in zip(masks, golden("affinity/out"), strict=True):
        # with every pixel on its own, which neighbors count shows in the loss
        loss = losses.affinity_loss(
            student, mask.expand_as(student), alone, inside[None], threshold
        ).view(mask.shape)
        counts = (affinity >= threshold).double()
        expected = (counts * terms).sum(0) / counts.sum(0).clamp(min=1)
        close(loss.double(), expected, atol=2e-6, rtol=1e-5)


def test_color_similarity(golden):
    image = golden("color_sim/in/image_rgb").permute(2, 0, 1)[None]
    inside = golden("color_sim/in/image_mask_s4")[None] > 0
    small = F.avg_pool2d(image.float(), 4).floor()
    assert torch.equal(small[0].to(torch.uint8), golden("color_sim/down_rgb_byte"))
    lab = losses.rgb_to_lab(small)[0]
    similarity = losses.color_similarity(image, inside)
    for version in ("torch", "skimage"):
        close(lab, golden(f"color_sim/lab_{version}"), atol=5e-5, rtol=0)
        published = golden(f"color_sim/out_{version}")
        close(similarity, published, atol=5e-5, rtol=0)
        assert torch.equal(similarity >= 0.3, published >= 0.3)


# --- teacher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(6))
def test_pseudo_labels_are_assigned_as_with_the_published_code_corrected(golden, case):
    detections, boxes = golden(f"pseudo/{case}/det_boxes"), golden(f"pseudo/{case}/gt_boxes")
    ious = box_iou(detections.view(-1, 4), boxes.view(-1, 4))
    assigned = assign_to_boxes(ious, golden(f"pseudo/{case}/det_scores"))
    assert torch.equal(assigned, golden(f"pseudo/{case}/fixed_assigned"))


def test_ema(golden):
    for step, momentum in zip(golden("ema/iters"), golden("ema/momentum"), strict=True):
        assert ema_momentum(int(step)) == pytest.approx(float(momentum), abs=1e-12)


def test_schedules(golden):
    train = pytest.importorskip("train", reason="train.py is not importable from here")
    cfg = SimpleNamespace(
        weak_warmup_steps=10_000, warmup_steps=1000, lr_drops=(60_000, 80_000), lr_schedule="step"
    )
    for iteration, factor in zip(golden("warmup/iters"), golden("warmup/factors"), strict=True):
        if iteration > 0:  # published iterations are counted from 1: step 0 is iteration 1
            mine = train.weak_factor(cfg, int(iteration) - 1)
            assert mine == pytest.approx(float(factor), abs=1e-12)
    for step, factor in zip(golden("lr/iters"), golden("lr/factors"), strict=True):
        assert train.lr_factor(cfg, int(step)) == pytest.approx(float(factor), rel=1e-9)
    mine = [train.lr_factor(cfg, step) for step in range(1002)]
    assert mine == pytest.approx(golden("lr/first_1002").tolist(), rel=1e-9)


@pytest.mark.parametrize(
    "size", ["480_640", "512_640", "640_427", "500_1333", "801_1203", "333_500"]
)
def test_resized_sizes(golden, size):
    height, width = map(int, size.split("_"))
    assert list(resized_size(height, width, 800, 1333)) == golden(f"resize/full_{size}").tolist()


def test_teachers_resize(golden):
    """Sizes and pixels: bilinear, no antialiasing, no aligned corners."""
    inputs = [golden("resize/in0"), golden("resize/in1")]
    sizes = [tuple(x.shape[1:]) for x in inputs]
    images = torch.zeros(2, 3, 32, 32)
    for image, x in zip(images, inputs, strict=True):
        image[:, : x.shape[1], : x.shape[2]] = x
    resized, new_sizes = resize_images(images, sizes, 32, 64)
    for n, (height, width) in enumerate(new_sizes):
        published = golden(f"resize/small{n}")
        assert (height, width) == published.shape[1:]
        close(resized[n, :, :height, :width], published, atol=1e-6)
        assert not resized[n, :, height:].any()
        assert not resized[n, :, :, width:].any()
    assert resized_size(20, 50, 40, 64) == tuple(
        golden("resize/out_size_20x50_max64_min40").tolist()
    )
