"""Masks for boxes: a trained model turns every box of a data set into a mask.

    python -m boxteacher.tools.label --checkpoint last.pt --boxes boxes.json --images DIR
                                     --output masks.json
    python -m boxteacher.tools.label --checkpoint last.pt

The first command copies boxes.json. Every annotation keeps its place and its fields, and gets
`segmentation`, `score` (mask-aware) and `mask_source`: `detection`, or `location` for a box that no
detection claims. Crowds stay as they are. Classes do not matter. The second command labels the
checkpoint's validation set and writes a comparison with true masks next to it: given_boxes.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from boxteacher import errors
from boxteacher.checkpoint import load_model
from boxteacher.coco_eval import box_baselines, encode_masks
from boxteacher.command_line import Parser
from boxteacher.config import ConfigError
from boxteacher.data import Batch, CocoDataset, collate, make_val_set
from boxteacher.distributed import init_distributed
from boxteacher.fcos import assign_targets
from boxteacher.model import MASK_CHUNK, CondInst, Encoded, Size, scale_boxes
from boxteacher.pseudo_labels import assign_to_boxes, mask_aware_scores

Sizes = tuple[Size, Size]  # of an image: as the network sees it, and the original
BoxMask = dict[str, Any]  # segmentation (inside the box, in the original image), score, mask_source


@torch.no_grad()
def label_image(model: CondInst, batch: Batch, boxes: Tensor, original: Size) -> list[BoxMask]:
    """Masks for the boxes [G, 4] of the only image of `batch`, in pixels of the original size.

    Detections are assigned to boxes as in the teacher's step (BoxTeacher, section 3.2). A box
    without one is read at its `best_location`, and its score takes the mean inside the true box.
    A mask without pixels over the threshold keeps those from half of its maximum. None is empty.
    """
    cfg, sizes = model.cfg, (batch.sizes[0], original)
    encoded = model.encode(model.normalize(batch.images, batch.sizes))

    # 1. Detections near a box choose among the boxes.
    found = model.detect(encoded)[0]
    found_boxes, _ = scale_boxes(found.boxes, *sizes)
    ious = box_iou(found_boxes, boxes)  # [D, G]
    is_near = (ious >= cfg.iou_threshold).any(1)
    places = found.location_index[is_near]
    near = places, found_boxes[is_near], found.scores[is_near]
    _, trust = read_masks(model, encoded, sizes, *near)
    assigned = assign_to_boxes(ious[is_near], trust, cfg.iou_threshold, cfg.score_threshold)

    # 2. Every box has a location to read its mask at.
    class_probs = encoded.predictions.class_logits[0].sigmoid().amax(-1)
    quality = class_probs * encoded.predictions.centerness_logits[0].sigmoid()  # [P]
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for g, box in enumerate(scale_boxes(boxes, original, batch.sizes[0])[0]):
        has_detection = assigned[g] >= 0
        index[g] = places[assigned[g]] if has_detection else best_location(encoded, quality, box)

    # 3. Read the masks inside the boxes.
    maps, scores = read_masks(model, encoded, sizes, index, boxes, quality[index].sqrt())
    masks = []
    for probs, score, box, detection in zip(maps, scores, boxes, assigned.tolist(), strict=True):
        mask = torch.zeros(original, dtype=torch.bool)
        part = probs > cfg.mask_threshold
        mask[window(box, original)] = part if part.any() else probs >= probs.max() / 2
        score, source = (score, "location") if detection < 0 else (trust[detection], "detection")
        code = encode_masks(mask[None])[0]
        masks.append({"segmentation": code, "score": float(score), "mask_source": source})
    return masks


def best_location(encoded: Encoded, quality: Tensor, box: Tensor) -> Tensor:
    """Where to read the mask of a box [4] that no detection claims: an index into the P locations.

    It has the highest quality [P], largest class probability * centerness, of those that training
    gives to such a box: near its center, on the level for its size (FCOS, section 3). If the box is
    too small to have any, it is the location nearest to the center.
    """
    center, label = (box[:2] + box[2:]) / 2, torch.zeros_like(box[:1, None], dtype=torch.int64)
    alone = (box[None, None], label, label == 0, center[None, None])
    targets = assign_targets(encoded.locations, *alone)
    distance = (encoded.locations.xy - center).norm(dim=1)
    return torch.where(targets.is_positive[0], quality, -1 - distance).argmax()


def read_masks(
    model: CondInst, encoded: Encoded, sizes: Sizes, index: Tensor, boxes: Tensor, scores: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Mask probabilities at locations index [K], each in the window of its box (boxes [K, 4] in the
    original), and their mask-aware scores [K], from the scores [K] of the locations. The
    probabilities are those of `CondInst.mask_probs`, which computes whole images."""
    maps, trust, threshold = [], torch.zeros_like(scores), model.cfg.mask_threshold
    for places in index.split(MASK_CHUNK):
        for probs in model.mask_logits_s4(encoded, places[None])[0].sigmoid():
            k = len(maps)
            axes = zip(window(boxes[k], sizes[1]), *sizes, probs.shape, strict=True)
            rows, columns = (interpolation(*axis).to(probs) for axis in axes)
            maps.append(rows @ probs @ columns.T)
            inside = torch.ones_like(maps[k], dtype=torch.bool)
            trust[k] = mask_aware_scores(maps[k][None], scores[k], inside, threshold)
    return maps, trust


def window(box: Tensor, size: Size) -> tuple[slice, ...]:
    """The rows and columns of pixels that a box [4] touches, at least one each."""
    spans = []
    for low, high, side in zip(box.tolist()[1::-1], box.tolist()[:1:-1], size, strict=True):
        first = min(int(low + 1e-3), side - 1)  # sums such as x + width are not exact
        spans.append(slice(first, max(math.ceil(high - 1e-3), first + 1)))
    return tuple(spans)


def interpolation(pixels: slice, side: int, original_side: int, cells: int) -> Tensor:
    """[pixels, cells]: bilinear weights of a row or column of the stride-4 map, whose cell i is at
    pixel 4 i + 2 of the network's input, in pixels of the original."""
    position = (torch.arange(pixels.start, pixels.stop) + 0.5) * (side / original_side) - 0.5
    cell = ((position.clamp(0, side - 1) - 2) / 4).clamp(0, cells - 1)
    return (1 - (cell[:, None] - torch.arange(cells)).abs()).clamp(min=0)


def label_dataset(model: CondInst, dataset: CocoDataset) -> dict[int, BoxMask]:
    """Masks by annotation id, for a data set at test size (`make_val_set`). Crowds get none."""
    masks, device = {}, model.pixel_mean.device
    for index in tqdm(range(len(dataset)), desc="label", leave=False, disable=None):
        if ids := dataset.annotation_ids[index].tolist():
            boxes = torch.from_numpy(dataset.boxes[index]).float().to(device)
            batch = collate([dataset[index, 0, False]]).to(device)
            original = tuple(dataset.sizes[index].tolist())
            masks |= zip(ids, label_image(model.eval(), batch, boxes, original), strict=True)
    return masks


def compare(coco: dict[str, Any], masks: dict[int, BoxMask]) -> dict[str, dict[str, float]]:
    """IoU with the true masks of `coco`: of these masks, of the ellipses inscribed in their boxes
    and of filled boxes. The mean, and the shares over 0.5 and 0.75. Empty without true masks."""
    known = [a for a in coco["annotations"] if a["id"] in masks and a.get("segmentation")]
    api, table, guesses = COCO(), {}, {"masks": [masks[annotation["id"]] for annotation in known]}
    api.imgs = {image["id"]: image for image in coco["images"]}
    for kind in ("ellipse", "box"):
        guesses[kind] = box_baselines(coco | {"annotations": known}, kind)
    for name in guesses if known else ():
        ious = []
        for annotation, guess in zip(known, guesses[name], strict=True):
            true = api.annToRLE(annotation)
            ious.append(float(rle_tools.iou([guess["segmentation"]], [true], [0])[0, 0]))
        table[name] = {"mean_iou": sum(ious) / len(ious)}
        table[name] |= {f"over_{t}": sum(x > t / 100 for x in ious) / len(ious) for t in (50, 75)}
    return table


def main() -> None:
    parser = Parser("python -m boxteacher.tools.label --checkpoint FILE [...]", __doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", required=True, help="written by train.py")
    add("--boxes", metavar="FILE", help="JSON in COCO's format (default: the validation set)")
    add("--images", metavar="DIR", help="the folder of its images")
    add("--output", metavar="FILE", help="the file to write")
    args, given = parser.read(sys.argv[1:])
    files = [path for path in (args.boxes, args.images, args.output) if path]
    if len(files) not in (0, 3):
        raise ConfigError("give --boxes, --images and --output, or none of them")

    device = init_distributed(given.get("device", "auto"))
    model, _ = load_model(args.checkpoint, device)
    cfg = dataclasses.replace(model.cfg, **given)
    if files:
        paths = dict(val_json=args.boxes, val_images=args.images)
        cfg = dataclasses.replace(cfg, dataset="coco", **paths)
    dataset = make_val_set(cfg)

    coco, masks = dataset.coco, label_dataset(model, dataset)
    unclaimed = {i: mask for i, mask in masks.items() if mask["mask_source"] == "location"}
    content: dict[str, Any] = {"num_boxes": len(masks), "num_unclaimed": len(unclaimed)}
    content |= {"all": compare(coco, masks), "unclaimed": compare(coco, unclaimed)}
    print(json.dumps(content, indent=2))
    if files:
        content = coco | {"annotations": [a | masks.get(a["id"], {}) for a in coco["annotations"]]}
    output = Path(args.output or Path(args.checkpoint).with_name("given_boxes.json"))
    unfinished = output.with_name(f".{output.name}.unfinished")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(output)
    print(output)


if __name__ == "__main__":
    errors.run(main)
