"""reporting.py: the contact sheet shows what the run trained on, each object in its color."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from boxteacher import fcos
from boxteacher.command_line import parse
from boxteacher.data import CocoDataset, make_val_set
from boxteacher.model import CondInst, build_model
from boxteacher.reporting import make_contact_sheet
from boxteacher.visualize import GAP, MAX_HEIGHT, MAX_WIDTH, NEUTRAL, TILE, TITLE, instance_color

torch.set_num_threads(1)

TINY = """shapes --norm gn --mask-norm gn --tower-convs 1 --mask-branch-channels 16
    --mask-branch-convs 1 --shapes-size 64 --shapes-val 3 --test-size 64 --test-max-size 64
    --teacher-size 0 --device cpu""".split()


@pytest.fixture(scope="module")
def model_and_data() -> tuple[CondInst, object]:
    """A network that detects the first box of the first image, with a mask of all ones."""
    cfg = parse(TINY)
    torch.manual_seed(0)
    model, val_set = build_model(cfg, 6), make_val_set(cfg)
    with torch.no_grad():
        model.head.controller.weight.zero_()
        model.head.controller.bias.zero_()
        model.head.controller.bias[-1] = 3.0
    box = val_set[0].boxes[:1]
    number = torch.zeros(1, dtype=torch.int64)
    model.detect = lambda encoded: [fcos.Detections(box, torch.ones(1) * 0.5, number, number)]
    return model, val_set


def pseudo_mask_column(model: CondInst, val_set: object, **thresholds: float) -> np.ndarray:
    model.cfg = dataclasses.replace(model.cfg, **thresholds)
    sheet = make_contact_sheet(model, val_set, torch.device("cpu"), rows=1)
    columns = np.array_split(np.asarray(sheet.convert("RGB")), 4, axis=1)
    assert columns[1].shape[1] >= TILE
    return columns[1]


def test_the_sheets_pseudo_masks_obey_the_thresholds_of_the_run(model_and_data):
    shown = pseudo_mask_column(*model_and_data, score_threshold=0.0)
    refused = pseudo_mask_column(*model_and_data, score_threshold=0.99)
    assert (shown != refused).any(axis=-1).mean() > 0.01  # a colored mask, or none


def test_the_sheets_pseudo_masks_are_those_of_the_runs_own_scores(model_and_data):
    """pseudo_score="published" replaces `masks_for_boxes`, and the sheet calls it too."""
    model, val_set = model_and_data
    calls = []
    model.masks_for_boxes = lambda *args: calls.append(args)
    try:
        make_contact_sheet(model, val_set, torch.device("cpu"), rows=2)
    finally:
        del model.masks_for_boxes
    assert len(calls) == 2


# --- one color per object -------------------------------------------------------------------------


def pictures_with(model: CondInst, val_set: object, found: torch.Tensor) -> list[np.ndarray]:
    """The four pictures of the first image, if the model detects the boxes `found`."""
    count, before = len(found), model.detect
    scores, numbers = torch.linspace(0.9, 0.8, count), torch.zeros(count, dtype=torch.int64)
    model.detect = lambda encoded: [fcos.Detections(found, scores, numbers, numbers)]
    try:
        sheet = make_contact_sheet(model, val_set, torch.device("cpu"), rows=1)
    finally:
        model.detect = before
    assert sheet.width <= MAX_WIDTH
    assert sheet.height <= MAX_HEIGHT
    pictures = np.asarray(sheet)[TITLE : TITLE + TILE]  # square images fill their tiles
    return [pictures[:, GAP + c * (TILE + GAP) :][:, :TILE] for c in range(4)]


def where(column: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (column == color).all(axis=-1)


def test_a_prediction_has_the_color_of_the_true_box_that_it_fits(model_and_data):
    model, val_set = model_and_data
    true_boxes = val_set[0].boxes
    assert len(true_boxes) > 1
    order = [1, 0]  # the best prediction is of the second box
    boxed, _, predicted, _ = pictures_with(model, val_set, true_boxes[order])
    for box in range(len(true_boxes)):
        outline = where(boxed, instance_color(box))
        assert outline.sum() > 50
        shown = (outline & where(predicted, instance_color(box))).sum() / outline.sum()
        assert shown > 0.5 if box in order else shown == 0  # captions and masks hide a part
    assert not where(predicted, NEUTRAL).any()


def test_false_alarms_and_repetitions_are_gray(model_and_data):
    model, val_set = model_and_data
    box = val_set[0].boxes[:1]
    twice = torch.cat([box, box * 0.95])
    _, _, predicted, _ = pictures_with(model, val_set, twice)
    assert where(predicted, instance_color(0)).any()
    assert where(predicted, NEUTRAL).any()
    elsewhere = torch.tensor([[0.0, 0.0, 3.0, 64.0]])
    _, _, predicted, _ = pictures_with(model, val_set, elsewhere)
    assert where(predicted, NEUTRAL).any()
    assert not any(where(predicted, instance_color(i)).any() for i in range(len(val_set[0].boxes)))


def test_without_sure_predictions_the_column_is_the_image(model_and_data):
    _, _, predicted, _ = pictures_with(*model_and_data, torch.zeros(0, 4))
    assert not where(predicted, NEUTRAL).any()
    assert predicted.std() > 20  # the image is there


# --- true masks at any size -----------------------------------------------------------------------


def test_true_masks_have_full_resolution(model_and_data):
    _, val_set = model_and_data
    masks = torch.stack([*val_set.true_masks(0, (64, 64))])
    assert masks.dtype == torch.bool
    assert torch.equal(masks[:, 2::4, 2::4], val_set[0].masks)
    for mask, (x1, y1, x2, y2) in zip(masks, val_set[0].boxes.int().tolist(), strict=True):
        assert mask[y1:y2, x1:x2].any(0).all()  # the box is tight
        assert mask.sum() == mask[y1:y2, x1:x2].sum()
    doubled = torch.stack([*val_set.true_masks(0, (128, 128))])
    assert torch.equal(doubled[:, ::2, ::2], masks)


def test_a_mask_that_is_not_annotated_is_empty(model_and_data):
    model, val_set = model_and_data
    coco = copy.deepcopy(val_set.coco)
    assert coco["annotations"][0]["image_id"] == val_set[0].image_id
    del coco["annotations"][0]["segmentation"]
    lacking = CocoDataset(coco, val_set.load_image, val_set.geometry, train=False)
    first, second, *_ = lacking.true_masks(0, (64, 64))
    assert not first.any()
    assert second.any()
    sheet = make_contact_sheet(model, lacking, torch.device("cpu"), rows=1)
    assert sheet.size == make_contact_sheet(*model_and_data, torch.device("cpu"), rows=1).size
