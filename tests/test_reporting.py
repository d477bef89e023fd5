"""reporting.py: the contact sheet shows what the run trained on."""

import dataclasses

import numpy as np
import pytest
import torch

from boxteacher import fcos
from boxteacher.command_line import parse
from boxteacher.data import make_val_set
from boxteacher.model import CondInst, build_model
from boxteacher.reporting import make_contact_sheet
from boxteacher.visualize import TILE

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
    """published_score replaces `label_boxes`, and the sheet calls it too."""
    model, val_set = model_and_data
    calls = []
    model.label_boxes = lambda *args: calls.append(args)
    try:
        make_contact_sheet(model, val_set, torch.device("cpu"), rows=2)
    finally:
        del model.label_boxes
    assert len(calls) == 2
