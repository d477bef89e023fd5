"""Inference of the published models on synthetic weights: features, boxes, scores, masks.

Tolerances are those of float32 itself, after 50 to 100 layers: features 1e-5 of the largest (mask
features 5e-5: the kernels before them nearly cancel; either side is 1e-5 from float64), boxes
1e-3 px of 400, scores 2e-5, and 1e-5 of the masks' pixels, which stand on the threshold.
"""

import numpy as np
import pytest
import torch
from golden.compare import SOURCES, assert_summary, load, match, unpack
from golden.synthetic import inference_image, synthetic_model

from boxteacher.masks import decode_mask
from boxteacher.model import CondInst

# One network each, except for R-50: the other differs in numbers only, and costs 10 s.
CASES = [("r50", "teacher"), ("r50", "student"), ("r101_dcn", "student"), ("swin", "teacher")]


def run(model: CondInst, image) -> dict:
    """The outputs of the model's parts, by their published names, and its predictions."""
    height, width = image.shape[:2]
    padded = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32, dtype=torch.uint8)
    padded[0, :, :height, :width] = torch.from_numpy(image).permute(2, 0, 1)
    found = {}

    def keep(name):
        return lambda module, inputs, output: found.__setitem__(name, output)

    model.backbone.body.register_forward_hook(keep("body"))
    model.backbone.register_forward_hook(keep("pyramid"))
    model.mask_branch.register_forward_hook(keep("mask_feats"))
    model.head.register_forward_hook(keep("head"))
    size = (height, width)
    found["instances"] = model.eval().predict(padded, [size], [size])[0]
    return found


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def outputs(request):
    backbone, network = request.param
    found = run(synthetic_model("boxteacher", backbone, network), inference_image())
    return backbone, network, found


@SOURCES
def test_features(outputs, source):
    backbone, network, found = outputs
    golden = load(f"infer_{backbone}", source)
    stage = "stage" if backbone == "swin" else "res"
    for level, features in zip((3, 4, 5), found["body"].values(), strict=True):
        assert_summary(features, golden, f"{network}/bottom_up/{stage}{level}", 1e-5)
    for level, features in zip((3, 4, 5, 6, 7), found["pyramid"], strict=True):
        assert_summary(features, golden, f"{network}/fpn/p{level}", 1e-5)
    assert_summary(found["mask_feats"], golden, f"{network}/mask_feats", 5e-5)
    sizes = [p.shape[-2:] for p in found["pyramid"]]
    logits = found["head"].class_logits.split([h * w for h, w in sizes], dim=1)
    for level, ((h, w), part) in enumerate(zip(sizes, logits, strict=True)):
        dense = part.transpose(1, 2).reshape(1, -1, h, w)
        assert_summary(dense, golden, f"{network}/logits/{level}", 1e-5)


@SOURCES
def test_predictions(outputs, source):
    backbone, network, found = outputs
    golden = load(f"infer_{backbone}", source)
    wanted = {key.split("/")[1]: golden[key] for key in golden if key.startswith(f"{network}/")}
    boxes, scores, labels, codes = found["instances"]
    masks = torch.from_numpy(np.stack([decode_mask(code) for code in codes]))
    index = match(boxes, labels, wanted["boxes"], wanted["classes"])
    expected = torch.from_numpy(wanted["boxes"])
    torch.testing.assert_close(boxes[index], expected, atol=1e-3, rtol=0)
    expected = torch.from_numpy(wanted["scores"])
    torch.testing.assert_close(scores[index], expected, atol=2e-5, rtol=0)
    if "masks_packed" in wanted:
        differs = masks[index] ^ unpack(wanted["masks_packed"], wanted["masks_shape"])
        assert differs.float().mean() < 1e-5
    area = torch.from_numpy(wanted["mask_area"])
    assert (masks[index].sum((1, 2)) - area).abs().max() <= 20
