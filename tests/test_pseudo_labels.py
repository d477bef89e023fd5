"""pseudo_labels.py against loops, and the properties that make an assignment what it is."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boxteacher.pseudo_labels import assign_to_boxes, mask_aware_scores


def test_mask_aware_scores():
    torch.manual_seed(0)
    for threshold in (0.5, 0.3):
        probs, inside = torch.rand(5, 6, 7).double(), torch.rand(5, 6, 7) < 0.6
        scores = torch.rand(5).double()
        probs[3] *= threshold  # no foreground
        inside[4] = False  # no box
        result = mask_aware_scores(probs, scores, inside, threshold)
        for d in range(5):
            total = count = 0.0
            for y in range(6):
                for x in range(7):
                    m = probs[d, y, x].item()
                    if m > threshold and inside[d, y, x]:
                        total, count = total + m, count + 1
            expected = math.sqrt(scores[d].item() * total / (count + 1e-6))
            assert math.isclose(result[d].item(), expected, abs_tol=1e-6)
        assert result[3] == result[4] == 0


def test_mask_aware_score_counts_only_what_is_over_the_threshold_and_in_the_box():
    probs = torch.tensor([[[0.5, 0.9, 0.7, 1.0]]])
    inside = torch.tensor([[[True, True, True, False]]])
    expected = torch.tensor([math.sqrt(0.5 * 0.8)])
    torch.testing.assert_close(mask_aware_scores(probs, torch.tensor([0.5]), inside), expected)
    nothing = mask_aware_scores(torch.zeros(0, 2, 2), torch.zeros(0), torch.zeros(0, 2, 2) > 0)
    assert nothing.shape == (0,)


def slow_assign(ious, scores, iou_threshold, score_threshold):
    num_boxes = ious.shape[1]
    owner = {}
    remaining = list(range(len(scores)))
    while remaining:
        best = remaining[0]
        for d in remaining:
            if scores[d] > scores[best]:
                best = d
        remaining.remove(best)
        if scores[best] < score_threshold:
            continue
        favourite = None
        for g in range(num_boxes):
            if g not in owner and (favourite is None or ious[best, g] > ious[best, favourite]):
                favourite = g
        if favourite is not None and ious[best, favourite] >= iou_threshold:
            owner[favourite] = best
    return [owner.get(g, -1) for g in range(num_boxes)]


@st.composite
def problems(draw):
    """IoUs and scores from few values, so that there are ties, and values at the thresholds."""
    num_detections, num_boxes = draw(st.integers(0, 8)), draw(st.integers(0, 5))
    iou = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.5, 0.625, 0.75, 0.875, 1.0])
    rows = [[draw(iou) for _ in range(num_boxes)] for _ in range(num_detections)]
    scores = [draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])) for _ in range(num_detections)]
    ious = torch.tensor(rows).reshape(num_detections, num_boxes)
    threshold = draw(st.sampled_from([0.5, 0.7]))
    return ious, torch.tensor(scores), threshold, draw(st.sampled_from([0.0, 0.5]))


@given(problems())
@settings(max_examples=300)
def test_assign_to_boxes(problem):
    ious, scores, iou_threshold, score_threshold = problem
    result = assign_to_boxes(*problem)
    assert result.dtype == torch.int64
    assert result.shape == (ious.shape[1],)
    assigned = result.tolist()
    assert assigned == slow_assign(*problem)

    owners = {d: g for g, d in enumerate(assigned) if d >= 0}
    assert len(owners) == sum(d >= 0 for d in assigned)  # no detection twice
    rank = {d: r for r, d in enumerate(scores.sort(descending=True, stable=True).indices.tolist())}
    for d, g in owners.items():
        assert ious[d, g] >= iou_threshold
        assert scores[d] >= score_threshold
    for d in rank:  # what a detection would rather have belongs to one of a higher score
        if scores[d] >= score_threshold:
            has = ious[d, owners[d]] if d in owners else -math.inf
            for g, owner in enumerate(assigned):
                if ious[d, g] >= iou_threshold and ious[d, g] > has:
                    assert owner >= 0
                    assert rank[owner] < rank[d]


def test_assign_to_boxes_by_hand():
    ious = torch.tensor([[0.9, 0.6], [0.8, 0.7], [0.55, 0.2]])
    # the best detection takes box 0, the next one has to be content with box 1
    assert assign_to_boxes(ious, torch.tensor([0.9, 0.8, 0.7])).tolist() == [0, 1]
    assert assign_to_boxes(ious, torch.tensor([0.7, 0.8, 0.9])).tolist() == [2, 1]
    assert assign_to_boxes(ious, torch.tensor([0.7, 0.8, 0.9]), 0.8).tolist() == [1, -1]
    assert assign_to_boxes(ious, torch.tensor([0.7, 0.4, 0.9]), 0.5, 0.8).tolist() == [2, -1]
    # the first of equal boxes; a box taken by detection 0 is taken
    equal = torch.full((2, 3), 0.6)
    assert assign_to_boxes(equal, torch.tensor([0.9, 0.8])).tolist() == [0, 1, -1]
    # an IoU at the threshold, in float32, reaches it; one that is not a number hides no box
    assert assign_to_boxes(torch.tensor([[0.7]]), torch.tensor([0.9]), 0.7).tolist() == [0]
    ious = torch.tensor([[math.nan, 0.9]])
    assert assign_to_boxes(ious, torch.tensor([0.9])).tolist() == [-1, 0]
    assert assign_to_boxes(torch.zeros(0, 3), torch.zeros(0)).tolist() == [-1, -1, -1]
    assert assign_to_boxes(torch.zeros(3, 0), torch.zeros(3)).tolist() == []
