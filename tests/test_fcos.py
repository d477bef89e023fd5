"""fcos.py against slow references: loops over images, levels, cells and boxes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from boxteacher import losses
from boxteacher.fcos import (
    FCOSHead,
    Locations,
    Predictions,
    Targets,
    assign_targets,
    detect,
    make_locations,
    sample_best_locations,
    sample_random_locations,
)

STRIDES = (8, 16, 32, 64, 128)
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pyramid(height, width, channels=32, batch=2):
    """Feature maps of an image of this size, every side rounded up as stride-2 convs do."""
    sizes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    return [torch.randn(batch, channels, h, w) for h, w in sizes]


def slow_locations(features):
    """(x, y, level) of every location in order."""
    return [
        (s * j + s // 2, s * i + s // 2, level)
        for level, (feature, s) in enumerate(zip(features, STRIDES, strict=True))
        for i in range(feature.shape[-2])
        for j in range(feature.shape[-1])
    ]


def test_make_locations():
    features = pyramid(96, 160)
    locations = make_locations(features)
    expected = slow_locations(features)
    assert locations.xy.tolist() == [[x, y] for x, y, _ in expected]
    assert locations.strides.tolist() == [STRIDES[level] for *_, level in expected]
    assert locations.size_ranges.tolist() == [list(RANGES[level]) for *_, level in expected]
    assert locations.level_sizes == [12 * 20, 6 * 10, 3 * 5, 2 * 3, 1 * 2]


# --- the head -------------------------------------------------------------------------------------


def test_head_forward_is_the_published_architecture():
    head, features = FCOSHead(5, 32, 2, 7), pyramid(64, 96)
    with torch.no_grad():
        for parameter in head.parameters():  # away from the start, where everything is nearly 0
            parameter.add_(0.1 * torch.randn_like(parameter))
        out = head(features)

        def run(tower, x):
            for conv, norm, _ in zip(tower[::3], tower[1::3], tower[2::3], strict=True):
                x = F.conv2d(x, conv.weight, conv.bias, padding=1)
                x = F.group_norm(x, 32, norm.weight, norm.bias).relu()
            return x

        start = 0
        for level, feature in enumerate(features):
            class_feature, box_feature = (
                run(t, feature) for t in (head.class_tower, head.box_tower)
            )
            distances = (head.scales[level] * head.distances(box_feature)).relu()
            for n in range(2):
                p = start
                for i in range(feature.shape[-2]):
                    for j in range(feature.shape[-1]):
                        for value, dense in (
                            (out.class_logits, head.class_logits(class_feature)),
                            (out.distances, distances),
                            (out.centerness_logits[..., None], head.centerness(box_feature)),
                        ):
                            torch.testing.assert_close(value[n, p], dense[n, :, i, j])
                        p += 1
            torch.testing.assert_close(out.box_features[level], box_feature)
            start = p
    assert out.class_logits.shape[1] == start


def test_head_init():
    head = FCOSHead(80)
    assert head.scales.tolist() == [1] * 5
    for name, p in head.named_parameters():
        module = head.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.Conv2d) and p.ndim == 4:
            assert p.std().item() == pytest.approx(0.01, rel=0.05), name
            assert p.mean().abs() < 1e-3
        elif isinstance(module, torch.nn.Conv2d) and name != "class_logits.bias":
            assert not p.any(), name
    assert head.controller.weight.shape == (233, 256, 3, 3)
    assert len(head.class_tower) == len(head.box_tower) == 12
    # the prior: everything starts as background of probability 0.01
    torch.testing.assert_close(head.class_logits.bias.sigmoid(), torch.full((80,), 0.01))


def test_dynamic_params_are_those_of_the_dense_conv_borders_included():
    features = pyramid(64, 96)
    head = FCOSHead(3, 32, 1, 11).double()
    features = [f.double() for f in features]
    torch.nn.init.normal_(head.controller.bias)
    dense = torch.cat([head.controller(f).flatten(2).transpose(1, 2) for f in features], dim=1)
    everywhere = torch.arange(dense.shape[1]).expand(2, -1)
    torch.testing.assert_close(head.dynamic_params(features, everywhere), dense)
    index = torch.tensor([[5, 5, dense.shape[1] - 1], [0, 97, 60]])
    expected = dense.gather(1, index[..., None].expand(-1, -1, 11))
    torch.testing.assert_close(head.dynamic_params(features, index), expected)
    assert head.dynamic_params(features, index[:, :0]).shape == (2, 0, 11)


def test_losses_are_float32_under_bfloat16_autocast():
    head, features = FCOSHead(3, 32, 1, 11), pyramid(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(features)
        assert head.controller(out.box_features[0]).dtype == torch.bfloat16  # it is on
        assert {x.dtype for x in out[:3]} == {torch.float32}
        labels = torch.zeros(out.centerness_logits.shape, dtype=torch.int64)
        focal = losses.focal_loss(out.class_logits, labels)
        giou = losses.giou_loss(out.distances, torch.ones_like(out.distances))
        assert focal.dtype == giou.dtype == torch.float32
        detect(out, make_locations(features))
    (focal.sum() + giou.sum()).backward()
    assert head.class_tower[0].weight.grad.isfinite().all()


# --- targets --------------------------------------------------------------------------------------


def slow_targets(features, boxes, labels, valid, centers):
    """For every location (label, box, distances in strides) or None. boxes etc. of one image."""
    result = []
    for x, y, level in slow_locations(features):
        stride, (low, high) = STRIDES[level], RANGES[level]
        best = None
        for g, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            cx, cy = centers[g].tolist()
            l, t, r, b = x - x1, y - y1, x2 - x, y2 - y
            is_inside = max(cx - 1.5 * stride, x1) < x < min(cx + 1.5 * stride, x2) and max(
                cy - 1.5 * stride, y1
            ) < y < min(cy + 1.5 * stride, y2)
            if valid[g] and is_inside and low <= max(l, t, r, b) <= high:
                area = (x2 - x1) * (y2 - y1)
                if best is None or area < best[0]:
                    best = area, labels[g].item(), g, [d / stride for d in (l, t, r, b)]
        result.append(best and best[1:])
    return result


def check_targets(features, boxes, labels, valid, centers):
    targets = assign_targets(make_locations(features), boxes, labels, valid, centers)
    for n in range(len(boxes)):
        expected = slow_targets(features, boxes[n], labels[n], valid[n], centers[n])
        for p, want in enumerate(expected):
            assert targets.is_positive[n, p].item() == (want is not None)
            if want is None:
                assert targets.labels[n, p] == -1
            else:
                assert (targets.labels[n, p].item(), targets.box_index[n, p].item()) == want[:2]
                assert targets.distances[n, p].tolist() == pytest.approx(want[2], abs=1e-5)
    assert targets.distances.isfinite().all()
    assert (targets.distances > 0).all()
    return targets


def centers_of(boxes):
    return (boxes[..., :2] + boxes[..., 2:]) / 2


@given(st.lists(st.tuples(*[st.integers(0, 80)] * 4), min_size=3, max_size=3), st.integers(0, 9))
@settings(max_examples=12)
def test_assign_targets(corners, seed):
    """Boxes at multiples of 4 pixels: locations on borders, ranges met exactly, equal areas."""
    torch.manual_seed(seed)
    boxes = torch.tensor([[*sorted((a, c)), *sorted((b, d))] for a, b, c, d in corners]).float()
    boxes = 4.0 * boxes[:, [0, 2, 1, 3]]
    boxes = torch.stack((boxes, boxes.flip(0) / 2))
    labels, valid = torch.randint(0, 9, (2, 3)), torch.rand(2, 3) < 0.8
    centers = centers_of(boxes) + 20 * torch.rand(2, 3, 2).round()
    check_targets(pyramid(320, 320, 1), boxes, labels, valid, centers)


def test_assign_targets_includes_both_ends_of_a_range():
    # (60, 60), a location of stride 8, and (56, 56), one of stride 16, see a box that reaches 64
    boxes = torch.tensor([[[30.0, 30.0, 124.0, 80.0]], [[30.0, 30.0, 120.0, 80.0]]])
    centers = torch.tensor([[[60.0, 60.0]], [[56.0, 56.0]]])
    one = torch.ones(2, 1, dtype=torch.int64)
    features = pyramid(128, 128, 1)
    targets = check_targets(features, boxes, one, one.bool(), centers)
    xy = make_locations(features).xy[:, 0]
    assert targets.is_positive[0, :256][xy[:256] == 60].any()  # longest = 64 at level 0
    assert targets.is_positive[1, 256:320][xy[256:320] == 56].any()  # longest = 64 at level 1


def test_assign_targets_within_a_stride_and_a_half_of_the_center():
    boxes = torch.tensor([10.0, 10.0, 70.0, 70.0]).expand(2, 1, 4)
    centers = torch.tensor([[[40.0, 40.0]], [[39.97, 40.0]]])  # x = 28 is 12 away, and 11.97
    one = torch.ones(2, 1, dtype=torch.int64)
    features = pyramid(96, 96, 1)
    targets = check_targets(features, boxes, one, one.bool(), centers)
    xy = make_locations(features).xy[:144]
    for n, expected in enumerate(([36, 44], [28, 36, 44])):
        columns = xy[targets.is_positive[n, :144]][:, 0].unique()
        assert columns.tolist() == expected


def test_assign_targets_smallest_box_wins_and_the_first_of_equals():
    boxes = torch.tensor([[[10.0, 10, 60, 60], [20, 20, 50, 50], [20, 20, 50, 50.0]]])
    labels, valid = torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.bool)
    targets = check_targets(pyramid(64, 64, 1), boxes, labels, valid, centers_of(boxes))
    assert set(targets.labels[targets.is_positive].tolist()) == {5}


def test_assign_targets_without_boxes():
    boxes, none = torch.rand(2, 8, 4) * 60, torch.zeros(2, 8, dtype=torch.bool)
    targets = check_targets(pyramid(64, 64, 1), boxes, none.long(), none, centers_of(boxes))
    assert not targets.is_positive.any()


# --- which locations get a mask -------------------------------------------------------------------


def targets_of(groups):
    """Targets whose positives belong to these boxes (-1: background). groups [N, P]."""
    groups = torch.as_tensor(groups)
    is_positive = groups >= 0
    # in the background the box is meaningless: it must not be looked at
    box_index = torch.where(is_positive, groups, 0)
    return Targets(groups, torch.ones(*groups.shape, 4), box_index, is_positive)


def slow_best(groups, quality, limit):
    chosen = []
    boxes = sorted({g for g in groups if g >= 0})
    for box in boxes:
        mine = [p for p, g in enumerate(groups) if g == box]
        mine.sort(key=lambda p: (-quality[p], p))
        chosen += mine[: max(limit // len(boxes), 1)]
    return sorted(chosen)


@given(
    st.integers(0, 10_000),
    st.integers(1, 12),
    st.integers(1, 20),
    st.floats(0, 1, allow_subnormal=False),
)
@settings(max_examples=80)
def test_sample_best_locations(seed, num_boxes, limit, share):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, num_boxes, (2, 40), generator=generator)
    groups[torch.rand(2, 40, generator=generator) >= share] = -1
    quality = torch.randint(0, 10, (2, 40), generator=generator) / 10  # with ties
    index, is_real = sample_best_locations(targets_of(groups), quality, num_boxes, limit)
    assert index.shape == is_real.shape == (2, min(max(limit, num_boxes), 40))
    for n in range(2):
        expected = slow_best(groups[n].tolist(), quality[n].tolist(), limit)
        assert sorted(index[n][is_real[n]].tolist()) == expected
        assert is_real[n].tolist() == sorted(is_real[n].tolist(), reverse=True)  # real ones first
        assert 0 <= index[n].min() <= index[n].max() < 40


def test_sample_best_locations_by_hand():
    groups = [[0, 0, 0, 2, -1, 2]]
    quality = torch.tensor([[0.1, 0.9, 0.5, 0.2, 1.0, 0.3]])
    index, is_real = sample_best_locations(targets_of(groups), quality, 3, 4)  # 2 boxes, 2 each
    assert set(index[is_real].tolist()) == {1, 2, 3, 5}
    index, is_real = sample_best_locations(
        targets_of(groups), quality, 3, 1
    )  # one each, over the limit
    assert set(index[is_real].tolist()) == {1, 5}
    _, is_real = sample_best_locations(targets_of([[-1] * 6]), quality, 3, 4)
    assert not is_real.any()


def test_sample_random_locations():
    is_positive = torch.rand(3, 50) < 0.4
    is_positive[1] = False
    number = int(is_positive.sum())
    for limit in (500, number, 7, 1):
        index, is_real = sample_random_locations(is_positive, limit)
        assert int(is_real.sum()) == min(limit, number)
        for n in range(3):
            mine = index[n][is_real[n]]
            assert len(set(mine.tolist())) == len(mine)
            assert is_positive[n][mine].all()
    seen = set()  # over all images, and not always the same ones
    for _ in range(200):
        index, is_real = sample_random_locations(is_positive, 3)
        seen |= {
            (n, p) for n, _ in is_real.nonzero().tolist() for p in index[n][is_real[n]].tolist()
        }
    assert len(seen) > 0.9 * number
    index, is_real = sample_random_locations(torch.zeros(2, 9, dtype=torch.bool))
    assert not is_real.any()
    assert is_real.shape == (2, 1)


# --- detections -----------------------------------------------------------------------------------


def slow_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union else 0.0


def slow_detect(class_logits, distances, centerness, locations, threshold, top, nms, limit):
    """[(score, label, location, box)] of one image, in descending score."""
    candidates, start = [], 0
    probs = class_logits.sigmoid() * centerness.sigmoid()[:, None]
    for size in locations.level_sizes:
        pairs = [
            (probs[p, c].item(), c, p)
            for p in range(start, start + size)
            for c in range(class_logits.shape[1])
        ]
        pairs.sort(key=lambda pair: -pair[0])
        candidates += [pair for pair in pairs[:top] if pair[0] > threshold]
        start += size
    candidates.sort(key=lambda pair: -pair[0])
    kept = []
    for prob, label, p in candidates:
        (x, y), s = locations.xy[p].tolist(), locations.strides[p].item()
        l, t, r, b = (d * s for d in distances[p].tolist())
        box = x - l, y - t, x + r, y + b
        if all(label != other or slow_iou(box, o_box) <= nms for _, other, _, o_box in kept):
            kept.append((math.sqrt(prob), label, p, box))
    if len(kept) > limit:
        kept = [detection for detection in kept if detection[0] >= kept[limit - 1][0]]
    return kept


def check_detections(predictions, locations, *options):
    results = detect(predictions, locations, *options)
    assert len(results) == len(predictions.class_logits)
    for n, found in enumerate(results):
        expected = slow_detect(*(x[n] for x in predictions[:3]), locations, *options)
        assert found.labels.tolist() == [label for _, label, _, _ in expected]
        assert found.location_index.tolist() == [p for _, _, p, _ in expected]
        assert found.scores.tolist() == pytest.approx([s for s, *_ in expected], abs=1e-6)
        boxes = torch.tensor([box for *_, box in expected]).reshape(-1, 4)
        torch.testing.assert_close(found.boxes, boxes, atol=1e-3, rtol=0)
    return results


@pytest.mark.parametrize(
    "options",
    [
        (0.05, 1000, 0.6, 100),  # the defaults
        (0.05, 20, 0.6, 100),
        (0.3, 1000, 0.3, 10),
        (0.0, 1000, 0.9, 1000),
        (0.999, 1000, 0.6, 100),  # nothing
    ],
)
def test_detect(options):
    features = pyramid(64, 96)
    locations = make_locations(features)
    number = len(locations.xy)
    logits, centerness = 2 * torch.randn(2, number, 3) - 1, torch.randn(2, number)
    distances = 2 * torch.rand(2, number, 4) + torch.rand(2, number, 1)  # overlapping boxes
    predictions = Predictions(logits, distances, centerness, [])
    results = check_detections(predictions, locations, *options)
    assert (sum(len(r.boxes) for r in results) == 0) == (options[0] > 0.99)


def test_detect_has_the_defaults_of_the_method():
    features = pyramid(64, 96)
    locations = make_locations(features)
    number = len(locations.xy)
    predictions = Predictions(
        torch.randn(1, number, 3), torch.rand(1, number, 4), torch.randn(1, number), []
    )
    for a, b in zip(
        detect(predictions, locations)[0],
        detect(predictions, locations, 0.05, 1000, 0.6, 100)[0],
        strict=True,
    ):
        assert torch.equal(a, b)


def chosen_predictions(locations, wanted, num_classes=2):
    """Predictions that are nothing but at the wanted (location, class, class logit, distances)."""
    number = len(locations.xy)
    logits, distances = torch.full((1, number, num_classes), -20.0), torch.ones(1, number, 4)
    for p, c, logit, reach in wanted:
        logits[0, p, c] = logit
        distances[0, p] = torch.tensor(reach)
    return Predictions(logits, distances, torch.full((1, number), 20.0), [])


def test_detections_tied_with_the_last_stay():
    locations = make_locations(pyramid(64, 64))
    small = [0.1] * 4
    wanted = [(0, 0, 3.0, small), (9, 0, 1.0, small), (20, 1, 1.0, small), (40, 0, 1.0, small)]
    wanted.append((50, 0, 0.5, small))
    predictions = chosen_predictions(locations, wanted)
    for limit, expected in (
        (1, {0}),
        (2, {0, 9, 20, 40}),
        (4, {0, 9, 20, 40}),
        (5, {0, 9, 20, 40, 50}),
    ):
        (found,) = detect(predictions, locations, 0.05, 1000, 0.6, limit)
        assert set(found.location_index.tolist()) == expected
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_boxes_of_other_classes_do_not_suppress_even_beyond_the_border():
    """A trap: shifting each class by (largest coordinate + 1) assumes that none is negative."""
    locations = make_locations(pyramid(64, 64))
    wanted = [
        (63, 0, 2.0, [6.25, 6.25, 0.5, 0.5]),  # (60, 60): box 10, 10, 64, 64
        (0, 1, 1.0, [7.375, 7.375, 0.0, 0.0]),  # (4, 4): box -55, -55, 4, 4
    ]
    (found,) = check_detections(
        chosen_predictions(locations, wanted), locations, 0.05, 1000, 0.6, 100
    )
    assert found.labels.tolist() == [0, 1]


def test_detect_keeps_the_locations_of_each_level_apart():
    xy = torch.tensor([[4.0, 4.0], [12.0, 4.0], [8.0, 8.0]])
    locations = Locations(
        xy, torch.tensor([8.0, 8.0, 16.0]), torch.zeros(3, 2), torch.zeros(3), [2, 1]
    )
    logits = torch.tensor([[[3.0], [2.0], [1.0]]])
    predictions = Predictions(logits, torch.full((1, 3, 4), 0.25), torch.full((1, 3), 9.0), [])
    (found,) = check_detections(predictions, locations, 0.05, 1, 0.6, 100)
    assert found.location_index.tolist() == [0, 2]
