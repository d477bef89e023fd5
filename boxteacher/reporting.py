"""What a run says of itself: progress bar, metrics.jsonl, and the contact sheet at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import distributed
from .data import Batch, CocoDataset, collate
from .model import CondInst, PseudoMasks
from .visualize import contact_sheet, draw_instances


@torch.no_grad()
def pseudo_mask_figures(pseudo: PseudoMasks, batch: Batch) -> dict[str, Tensor]:
    """The flywheel in numbers: how many boxes have a pseudo mask, how far they are trusted, and,
    where true masks exist, how right they are (mean IoU on the stride-4 grid). Each figure is a
    fraction [2], so that it can be summed over ranks.
    """
    has_pseudo = (pseudo.weights > 0) & batch.valid
    count = has_pseudo.sum()
    number = torch.full_like(count, len(batch.sizes))
    fractions = {
        "pseudo_masks_per_image": (count, number),
        "pseudo_masks_share": (count, batch.valid.sum()),
        "mask_aware_score": (pseudo.weights.sum(), count),
    }
    if batch.masks is not None:
        both = (pseudo.masks & batch.masks).sum((2, 3))
        either = (pseudo.masks | batch.masks).sum((2, 3)).clamp(min=1)
        is_known = has_pseudo & batch.has_mask
        iou = torch.where(is_known, both / either, 0.0).sum()
        fractions["pseudo_mask_iou"] = (iou, is_known.sum())
    return {name: torch.stack([a.float(), b.float()]) for name, (a, b) in fractions.items()}


class RunLog:
    """Progress on the terminal and in metrics.jsonl, by rank 0: one line every `every` steps, one
    per evaluation.
    """

    def __init__(self, path: Path, start: int, steps: int, every: int, batch_size: int) -> None:
        self.every, self.batch_size = every, batch_size
        self.path = path if distributed.is_main() else None
        if self.path and path.exists():  # what an interrupted run wrote after its checkpoint
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(x for x in lines if start and json.loads(x)["step"] <= start))
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=None if distributed.is_main() else True,
        )
        self.started, self.since = time.perf_counter(), start

    def wants(self, step: int) -> bool:
        return (step + 1) % self.every == 0 or step + 1 == self.bar.total

    def step(
        self, step: int, lr: float, losses: Mapping[str, Tensor], figures: Mapping[str, Tensor]
    ) -> None:
        """Write one line. Losses are means over ranks, figures fractions [2] of sums over ranks."""
        means = distributed.reduce_mean(torch.stack(list(losses.values())).float()).tolist()
        values = dict(zip(losses, means, strict=True))
        if figures:
            sums = distributed.reduce_mean(torch.stack(list(figures.values())).float()).tolist()
            for name, (above, below) in zip(figures, sums, strict=True):
                values[name] = above / below if below else math.nan
        seconds = time.perf_counter() - self.started
        images_per_s = (step + 1 - self.since) * self.batch_size / seconds
        total = sum(values[name] for name in losses)
        self.bar.n = step + 1
        shown = {"loss": f"{total:.3f}", "lr": f"{lr:.2g}", "images/s": f"{images_per_s:.1f}"}
        shown |= {name: f"{values[name]:.2f}" for name in losses}
        self.bar.set_postfix(shown)
        self._write(
            {"step": step + 1, "lr": lr, "images_per_s": images_per_s, "loss": total} | values
        )
        self.started, self.since = time.perf_counter(), step + 1

    def evaluation(self, step: int, tables: Mapping[str, Any], seconds: float) -> None:
        self._write({"step": step, "evaluation": tables, "evaluation_s": seconds})
        self.started, self.since = time.perf_counter(), step

    def say(self, text: str) -> None:
        if distributed.is_main():
            tqdm.write(text)

    def close(self) -> None:
        self.bar.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps({k: _json_value(v) for k, v in line.items()}) + "\n")


def _json_value(value: Any) -> Any:
    """Six digits are enough; JSON has no NaN: null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value else None
    return value


@torch.no_grad()
def make_contact_sheet(
    model: CondInst, dataset: CocoDataset, device: torch.device, rows: int = 6
) -> Image.Image:
    """The first images with objects in four columns: boxes; the pseudo masks that the model makes
    of these boxes (opacity = mask-aware score); its sure predictions; the true masks, where
    there are any.
    """
    titles = ["image and boxes", "pseudo masks", "predictions", "truth"]
    sure_score = 0.65 if model.mode == "boxteacher" else 0.5  # rescored by masks, scores are higher
    was_training = model.training
    model.eval()
    pictures = []
    for index in range(len(dataset)):
        if len(pictures) == rows:
            break
        batch = collate([dataset[index]]).to(device)
        image, (height, width) = (
            batch.images[0, :, : batch.sizes[0][0], : batch.sizes[0][1]],
            batch.sizes[0],
        )
        valid = batch.valid[0]
        boxes, labels = batch.boxes[0, valid], batch.labels[0, valid]
        if not len(boxes):
            continue
        pseudo = model.make_pseudo_masks(batch, short_side=0)
        found = model.predict(batch.images, batch.sizes, batch.sizes)[0]
        sure = found.scores > sure_score
        crop = (slice(None), slice(0, -(-height // 4)), slice(0, -(-width // 4)))
        truth = batch.masks[0, valid][crop] if batch.masks is not None else None

        draw = partial(draw_instances, image, class_names=dataset.class_names, side=384)
        pictures.append(
            [
                draw(boxes, None, labels),
                draw(None, pseudo.masks[0, valid][crop], labels, opacity=pseudo.weights[0, valid]),
                draw(
                    found.boxes[sure],
                    found.masks[sure],
                    found.labels[sure],
                    scores=found.scores[sure],
                ),
                draw(None, truth, labels),
            ]
        )
    model.train(was_training)
    return contact_sheet(pictures, titles)
