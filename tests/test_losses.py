"""losses.py against slow references: Python loops in float64, written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from boxteacher import losses

OFFSETS = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2) if (dy, dx) != (0, 0)]
few = settings(max_examples=25)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def coin(*shape, p=0.5):
    return torch.rand(*shape) < p


# --- detection ------------------------------------------------------------------------------------


def slow_focal(logits, labels, alpha, gamma):
    loss = torch.zeros_like(logits)
    for row, label in enumerate(labels.tolist()):
        for c, x in enumerate(logits[row].tolist()):
            p = sigmoid(x)
            if c == label:
                loss[row, c] = -alpha * (1 - p) ** gamma * math.log(p)
            else:
                loss[row, c] = -(1 - alpha) * p**gamma * math.log(1 - p)
    return loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5)])
def test_focal_loss(alpha, gamma):
    logits, labels = 3 * random(6, 4), torch.tensor([0, 3, -1, 2, -1, 1])
    expected = slow_focal(logits, labels, alpha, gamma)
    torch.testing.assert_close(
        losses.focal_loss(logits, labels, alpha, gamma), expected, atol=1e-7, rtol=1e-7
    )


def test_focal_loss_gradient_and_extremes():
    labels = torch.tensor([[0, -1], [2, 1]])
    assert gradcheck(lambda x: losses.focal_loss(x, labels), random(2, 2, 3).requires_grad_())
    logits = torch.tensor([[1e3, -1e3, 1e3], [-1e3, 1e3, -1e3]], requires_grad=True)
    loss = losses.focal_loss(logits, torch.tensor([0, 0]))
    loss.sum().backward()
    expected = torch.tensor([[0.0, 0.0, 750.0], [250.0, 750.0, 0.0]])
    torch.testing.assert_close(loss.detach(), expected)
    assert logits.grad.isfinite().all()
    assert losses.focal_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


def slow_giou(a, b):
    """Boxes round the origin, in corners: x from -left to right, y from -top to bottom."""
    (l, t, r, b_), (l2, t2, r2, b2) = a, b
    width, height = min(r, r2) - max(-l, -l2), min(b_, b2) - max(-t, -t2)
    inter = max(width, 0) * max(height, 0)
    union = (l + r) * (t + b_) + (l2 + r2) * (t2 + b2) - inter
    hull = (max(r, r2) - min(-l, -l2)) * (max(b_, b2) - min(-t, -t2))
    return (inter + 1) / (union + 1) - (hull - union) / hull


def test_giou_loss():
    predicted, target = random(2, 5, 4).abs(), random(2, 5, 4).abs() + 0.1
    predicted[0, 0] = 0  # a prediction of no size
    loss = losses.giou_loss(predicted, target)
    for n in range(2):
        for p in range(5):
            giou = slow_giou(predicted[n, p].tolist(), target[n, p].tolist())
            assert loss[n, p].item() == pytest.approx(1 - giou, abs=1e-12)
    assert gradcheck(losses.giou_loss, (random(4, 4).abs().requires_grad_(), target[0, :4]))
    torch.testing.assert_close(losses.giou_loss(target, target), torch.zeros(2, 5).double())
    nothing = torch.zeros(1, 4, requires_grad=True)
    losses.giou_loss(nothing, torch.zeros(1, 4)).sum().backward()
    assert nothing.grad.isfinite().all()


def test_centerness_targets():
    distances = random(7, 4).abs() + 0.05
    values = losses.centerness_targets(distances)
    for (l, t, r, b), value in zip(distances.tolist(), values.tolist(), strict=True):
        expected = math.sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))
        assert value == pytest.approx(expected, abs=1e-12)
    assert losses.centerness_targets(torch.tensor([3.0, 2.0, 3.0, 2.0])) == 1


# --- masks against masks and boxes ----------------------------------------------------------------


def slow_dice(x, y):
    pairs = list(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
    overlap = sum(a * b for a, b in pairs)
    return 1 - 2 * overlap / (sum(a * a + b * b for a, b in pairs) + 1e-5)


def test_dice_loss():
    probs, targets = random(2, 3, 4, 5).sigmoid(), coin(2, 3, 4, 5).double()
    loss = losses.dice_loss(probs, targets)
    assert loss.shape == (2, 3)
    for n in range(2):
        for k in range(3):
            expected = slow_dice(probs[n, k], targets[n, k])
            assert loss[n, k].item() == pytest.approx(expected, abs=1e-12)
    probs = random(2, 3, 3).sigmoid().requires_grad_()
    assert gradcheck(lambda x: losses.dice_loss(x, targets[0, :2, :3, :3]), probs)
    empty = torch.zeros(1, 4, 4)
    assert losses.dice_loss(empty, empty) == 1
    assert losses.dice_loss(torch.rand(1, 4, 4), empty) == 1


def test_projection_loss():
    probs, boxes = random(2, 3, 5, 6).sigmoid(), torch.zeros(2, 3, 5, 6).double()
    boxes[:, :, 1:4, 2:5] = 1
    loss = losses.projection_loss(probs, boxes)
    for n in range(2):
        for k in range(3):
            m, b = probs[n, k].tolist(), boxes[n, k].tolist()
            expected = 0.0
            for over in (lambda x: x, lambda x: list(zip(*x, strict=True))):
                shadows = [torch.tensor([max(line) for line in over(x)]).double() for x in (m, b)]
                expected += slow_dice(*shadows)
            assert loss[n, k].item() == pytest.approx(expected, abs=1e-7)
    assert gradcheck(
        lambda x: losses.projection_loss(x, boxes[0]), random(3, 5, 6).sigmoid().requires_grad_()
    )


@given(
    st.tuples(st.integers(0, 7), st.integers(0, 7)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.randoms(use_true_random=False),
)
@few
def test_projection_loss_is_zero_for_masks_that_fill_or_touch_the_box(rows, columns, rng):
    (y1, y2), (x1, x2) = sorted(rows), sorted(columns)
    box = torch.zeros(8, 10)
    box[y1 : y2 + 1, x1 : x2 + 1] = 1
    assert losses.projection_loss(box, box) < 2e-5
    touching = torch.zeros(8, 10)  # one pixel in each row and in each column of the box
    for y in range(y1, y2 + 1):
        touching[y, rng.randint(x1, x2)] = 1
    for x in range(x1, x2 + 1):
        touching[rng.randint(y1, y2), x] = 1
    assert losses.projection_loss(touching, box) < 2e-5
    assert losses.projection_loss(torch.zeros(8, 10), box) == 2
    if (y1, x1) != (0, 0):  # anything outside costs
        assert losses.projection_loss(torch.ones(8, 10), box) > 0.01


coordinates = st.one_of(
    st.integers(0, 47).map(float),
    *(
        st.floats(low, high, width=32, allow_subnormal=False)
        for low, high in ((0, 47.9375), (-0.875, 0))
    ),
)


@given(st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=4), st.sampled_from([1, 4, 8]))
@settings(max_examples=60)
def test_box_masks(corners, stride):
    corners = [(*sorted(c[::2]), *sorted(c[1::2])) for c in corners]
    boxes = torch.tensor([[x1, y1, x2, y2] for x1, x2, y1, y2 in corners])
    height, width = 40, 48
    masks = losses.box_masks(boxes, height // stride, width // stride, stride)
    assert masks.dtype == torch.bool
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        raster = torch.zeros(height, width, dtype=torch.bool)
        for y in range(height):
            for x in range(width):
                raster[y, x] = int(y1) <= y <= int(y2) and int(x1) <= x <= int(x2)
        assert torch.equal(mask, raster[stride // 2 :: stride, stride // 2 :: stride])


def test_box_masks_of_bfloat16_boxes_are_exact():
    boxes = torch.tensor([[300.0, 300.0, 512.0, 512.0]])  # bfloat16 holds these, but not 510
    expected = losses.box_masks(boxes, 200, 200)
    assert torch.equal(losses.box_masks(boxes.bfloat16(), 200, 200), expected)


# --- pairs of pixels ------------------------------------------------------------------------------


def slow_pair_term(a, b):
    p, q = sigmoid(a), sigmoid(b)
    return -math.log(p * q + (1 - p) * (1 - q))


def slow_pairwise(logits, weight):
    """Σ w * term and Σ w over pixels i and neighbors j inside the map; weight(k, i, j)."""
    height, width = len(logits), len(logits[0])
    loss = total = 0.0
    for y in range(height):
        for x in range(width):
            for k, (dy, dx) in enumerate(OFFSETS):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    w = float(weight(k, (y, x), (y + dy, x + dx)))
                    loss += w * slow_pair_term(logits[y][x], logits[y + dy][x + dx])
                    total += w
    return loss, total


@pytest.mark.parametrize(("height", "width"), [(7, 6), (1, 5), (2, 2), (3, 1), (4, 3)])
def test_color_pairwise_sums(height, width):
    logits = 3 * random(2, 3, height, width)
    edges, boxes = coin(2, 8, height, width), coin(2, 3, height, width, p=0.7)
    boxes[1, 1] = False
    sums, weights = losses.color_pairwise_sums(logits, edges, boxes)
    assert sums.shape == weights.shape == (2, 3)
    for n in range(2):
        for k in range(3):
            loss, weight = slow_pairwise(
                logits[n, k].tolist(),
                lambda d, i, j, n=n, k=k: edges[(n, d, *i)] and boxes[(n, k, *i)],
            )
            assert sums[n, k].item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
            assert weights[n, k].item() == weight


def test_neighbors_in_reading_order():
    assert list(losses.NEIGHBORS) == OFFSETS
    for k, (dy, dx) in enumerate(losses.NEIGHBORS):
        assert losses.NEIGHBORS[7 - k] == (-dy, -dx)


def test_pairwise_gradients():
    edges, boxes = coin(1, 8, 4, 5), coin(1, 2, 4, 5)
    pseudo, image = coin(1, 2, 4, 5).double(), coin(1, 4, 5, p=0.8)
    logits = random(1, 2, 4, 5).requires_grad_()
    assert gradcheck(lambda x: losses.color_pairwise_sums(x, edges, boxes)[0], logits)
    assert gradcheck(lambda x: losses.affinity_loss(x, pseudo, boxes, image), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairwise_of_huge_logits(dtype):
    """Sure neighbors cost nothing if they agree, |logit| if not; nothing overflows."""
    everything = torch.ones(1, 8, 6, 6, dtype=torch.bool), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    signs = torch.ones(6, 6)
    signs[:, ::4] = signs[:, 1::4] = -1  # columns - - + + - -: left and right neighbors differ
    for logits, expected in ((torch.full((6, 6), 1e3), 0.0), (1e3 * signs, None)):
        for logits_ in (logits, -logits):
            x = logits_.to(dtype).expand(1, 1, 6, 6).clone().requires_grad_()
            loss, weight = losses.color_pairwise_sums(x, *everything)
            affinity = losses.affinity_loss(x, (x > 0).to(dtype), everything[1], everything[1][0])
            (gradient,) = torch.autograd.grad((loss + affinity).sum(), x)
            assert gradient.isfinite().all()
            if expected is None:
                number = 2 * (
                    4 * 6 + 2 * 4 * 4
                )  # unlike pairs, from both sides: straight, diagonal
                assert loss.item() == pytest.approx(number * (1e3 - math.log(2)), rel=1e-6)
            else:
                assert loss.item() == expected
            assert affinity.item() == pytest.approx(0, abs=1e-4)
            assert weight.item() == 2 * (2 * 4 * 6 + 2 * 4 * 4)


def test_pairwise_does_not_care_which_side_is_foreground():
    logits, edges, boxes = random(1, 2, 6, 7), coin(1, 8, 6, 7), coin(1, 2, 6, 7)
    loss, _ = losses.color_pairwise_sums(logits, edges, boxes)
    torch.testing.assert_close(losses.color_pairwise_sums(-logits, edges, boxes)[0], loss)


def slow_smooth(mask):
    height, width = mask.shape
    smooth = torch.zeros(height, width).double()
    for y in range(height):
        for x in range(width):
            near = [
                mask[v, u].item()
                for v in range(max(y - 1, 0), min(y + 2, height))
                for u in range(max(x - 1, 0), min(x + 2, width))
            ]
            smooth[y, x] = (mask[y, x].item() + sum(near) / 9) / 2
    return smooth.tolist()


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.7, 1.0])
def test_affinity_loss(threshold):
    logits, boxes = 3 * random(2, 3, 6, 7), coin(2, 3, 6, 7, p=0.8)
    masks, inside_image = coin(2, 3, 6, 7).double(), coin(2, 6, 7, p=0.7)
    boxes[0, 1] = False
    masks[0, 2] = 1
    masks[1, 2] = 0
    loss = losses.affinity_loss(logits, masks, boxes, inside_image, threshold)
    for n in range(2):
        for k in range(3):
            t = slow_smooth(masks[n, k])

            def weight(_, i, j, n=n, k=k, t=t):
                a, b = t[i[0]][i[1]], t[j[0]][j[1]]
                affinity = a * b + (1 - a) * (1 - b) if inside_image[(n, *j)] else 0.0
                return affinity >= threshold and boxes[(n, k, *i)]

            total, weights = slow_pairwise(logits[n, k].tolist(), weight)
            assert loss[n, k].item() == pytest.approx(total / max(weights, 1), abs=1e-10)
    assert loss[0, 1] == 0
    torch.testing.assert_close(
        losses.affinity_loss(logits, masks.bool(), boxes, inside_image, threshold), loss
    )


def test_smoothing_changes_nothing_at_the_published_threshold():
    """A smoothed mask is above 1/2 exactly where the mask is 1."""
    patterns = torch.arange(512)[:, None].bitwise_right_shift(torch.arange(9)) % 2
    for pattern in patterns.view(-1, 3, 3):
        assert [s > 0.5 for s in slow_smooth(pattern)[1]] == pattern[1].bool().tolist()


# --- colors --------------------------------------------------------------------------------------


def slow_lab(red, green, blue):
    """CIE 15:2004, with its exact fractions."""
    r, g, b = (
        ((c / 255 + 0.055) / 1.055) ** 2.4 if c / 255 > 0.04045 else c / 255 / 12.92
        for c in (red, green, blue)
    )
    x = (0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047
    y = 0.212671 * r + 0.715160 * g + 0.072169 * b
    z = (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883

    def f(t):
        return t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29

    return 116 * f(y) - 16, 500 * (f(x) - f(y)), 200 * (f(y) - f(z))


def test_rgb_to_lab():
    known = {
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (128, 128, 128): (53.59, 0, 0),
    }
    rgb = torch.tensor(list(known)).T[None, :, None].float()
    expected = torch.tensor(list(known.values())).T[None, :, None].float()
    torch.testing.assert_close(losses.rgb_to_lab(rgb), expected, atol=0.02, rtol=0)
    rgb = torch.randint(0, 256, (2, 3, 4, 5)).double()
    rgb[0, :, :2] //= 30  # dark: the linear parts of the curves
    lab = losses.rgb_to_lab(rgb)
    for n in range(2):
        for y in range(4):
            for x in range(5):
                expected = torch.tensor(slow_lab(*rgb[n, :, y, x].tolist())).double()
                torch.testing.assert_close(lab[n, :, y, x], expected, atol=1e-3, rtol=0)


@pytest.fixture
def picture():
    """Images of close colors, so that similarities are neither 0 nor 1; [2, 3, 24, 28]."""
    base = torch.tensor([120, 90, 60])[:, None, None]
    return (base + torch.randint(-25, 26, (2, 3, 24, 28))).to(torch.uint8)


def test_color_similarity(picture):
    inside = coin(2, 6, 7, p=0.8)
    similarity = losses.color_similarity(picture, inside)
    assert similarity.shape == (2, 8, 6, 7)
    for n in range(2):
        lab = {}
        for y in range(6):
            for x in range(7):
                block = picture[n, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].tolist()
                lab[y, x] = slow_lab(*(sum(map(sum, channel)) // 16 for channel in block))
        for (y, x), here in lab.items():
            for k, (dy, dx) in enumerate(OFFSETS):
                there = lab.get((y + dy, x + dx))
                expected = 0.0
                if there is not None and inside[n, y + dy, x + dx]:
                    expected = math.exp(-math.dist(here, there) / 2)
                assert similarity[n, k, y, x].item() == pytest.approx(expected, abs=1e-4)
    assert ((similarity > 0.05) & (similarity < 0.95)).float().mean() > 0.2


def test_autocast_does_not_touch_colors_and_losses(picture):
    inside, boxes = torch.ones(2, 6, 7, dtype=torch.bool), coin(2, 3, 6, 7)
    logits, masks = torch.randn(2, 3, 6, 7), coin(2, 3, 6, 7).float()

    def everything():
        similarity = losses.color_similarity(picture, inside)
        return (
            *losses.color_pairwise_sums(logits, similarity >= 0.3, boxes),
            losses.affinity_loss(logits, masks, boxes, inside),
            losses.projection_loss(logits.sigmoid(), boxes.float()),
            losses.dice_loss(logits.sigmoid(), masks),
            similarity,
        )

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = everything()
    for value, want in zip(under_autocast, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want, atol=1e-6, rtol=1e-6)


def test_inside_masks():
    sides = [(-3, 5), (0, 0), (1, 2), (2, 3), (3, 6), (5, 7), (6, 30), (17, 18), (20, 19), (40, 50)]
    masks = losses.inside_masks(sides, 5, 6)
    for mask, (height, width) in zip(masks, sides, strict=True):
        for i in range(5):
            for j in range(6):
                assert mask[i, j].item() == (4 * i + 2 < height and 4 * j + 2 < width)


def test_losses_of_nothing_are_empty_with_a_graph():
    logits = torch.zeros(2, 0, 4, 4, requires_grad=True)
    nothing = torch.zeros(2, 0, 4, 4, dtype=torch.bool)
    sums, _ = losses.color_pairwise_sums(logits, torch.ones(2, 8, 4, 4) > 0, nothing)
    image = torch.ones(2, 4, 4, dtype=torch.bool)
    parts = (
        sums,
        losses.affinity_loss(logits, nothing.float(), nothing, image),
        losses.projection_loss(logits.sigmoid(), nothing.float()),
        losses.dice_loss(logits.sigmoid(), nothing.float()),
    )
    assert all(part.shape == (2, 0) for part in parts)
    sum(part.sum() for part in parts).backward()
