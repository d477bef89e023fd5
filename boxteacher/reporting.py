"""What a run says of itself: progress bar, metrics.jsonl, and the contact sheet at the end."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from . import distributed
from .config import Config
from .data import CocoDataset, collate, whole_geometry
from .errors import printable
from .files import append_line, write_text
from .model import CondInst, Instances, scale_boxes
from .pseudo_labels import assign_to_boxes
from .traps import Traps
from .visualize import (
    MAX_INSTANCES,
    NEUTRAL,
    contact_sheet,
    draw_instances,
    instance_color,
    save_picture,
    sheet_side,
)

T = TypeVar("T")
# Fields of the configuration. They are in the line of an evaluation.
WHAT_AP_DEPENDS_ON = """metric val_json val_images shapes_val test_size test_max_size test_scale
    contrast max_detections""".split()
SAY_EVERY = 30  # seconds between lines of progress where there is no terminal for a bar


class RunLog:
    """Progress on the terminal and in metrics.jsonl, by rank 0: one line for each step that is
    logged and for each evaluation.
    """

    def __init__(self, path: Path, cfg: Config, start: int) -> None:
        self.batch_size = cfg.batch_size
        self.settings = {name: getattr(cfg, name) for name in WHAT_AP_DEPENDS_ON}
        self.path = path if distributed.is_main() else None
        self.evaluated = -1  # the step of the last evaluation
        self.tables: dict[str, Any] = {}  # of this evaluation
        self.best_ap = -1.0  # of those that best.pt was chosen from
        if self.path:  # drop what an interrupted run wrote after its checkpoint
            lines = [line for line in read_lines(path) if 0 < line["step"] <= start]
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            for line in lines:  # what was measured otherwise is measured anew
                is_known = all(line.get(f, v) == v for f, v in self.settings.items())
                if is_known and isinstance(tables := line.get("evaluation"), dict):
                    self._remember(line["step"], tables)
            if not path.with_name("best.pt").exists():
                self.best_ap = -1.0
        self.evaluated = distributed.from_main(self.evaluated)
        self.bar = tqdm(
            total=cfg.steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=None if distributed.is_main() else True,
        )
        self.traps = Traps(cfg, start)
        self.started, self.since = time.perf_counter(), start
        self.run_started, self.run_start, self.last_said = self.started, start, self.started

    def step(
        self, step: int, lr: float, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor]
    ) -> None:
        """Write the line of the `step`th step. Losses become means over ranks; metrics are
        fractions [2], summed over ranks before they are divided."""
        means = distributed.reduce_mean(torch.stack(list(losses.values())).float()).tolist()
        values = dict(zip(losses, means, strict=True))
        total = sum(means)
        if metrics:
            sums = distributed.reduce_mean(torch.stack(list(metrics.values())).float()).tolist()
            for name, (above, below) in zip(metrics, sums, strict=True):
                values[name] = above / below if below else math.nan
        seconds = time.perf_counter() - self.started
        images_per_s = (step - self.since) * self.batch_size / seconds
        self.bar.n = step
        shown = {"loss": f"{total:.3f}", "lr": f"{lr:.2g}", "images/s": f"{images_per_s:.1f}"}
        self.bar.set_postfix(shown | {name: f"{values[name]:.2f}" for name in losses})
        self._write({"step": step, "lr": lr, "images_per_s": images_per_s, "loss": total} | values)
        for warning in self.traps.warnings(step, values):
            self.say(f"warning: {warning}")
        self.started, self.since = time.perf_counter(), step
        if self.bar.disable and self.started - self.last_said > SAY_EVERY:  # there is no terminal
            pace = (self.started - self.run_started) / (step - self.run_start)
            left = pace * (self.bar.total - step) / 60
            parts = ", ".join(f"{name} {values[name]:.2f}" for name in losses)
            self.say(
                f"step {step} of {self.bar.total}, {left:.0f} min left,"
                f" {images_per_s:.1f} images/s, loss {total:.3f} ({parts})"
            )
            self.last_said = self.started

    def evaluation(self, step: int, tables: dict[str, Any], seconds: float) -> None:
        self._write({"step": step, **self.settings, "evaluation": tables, "evaluation_s": seconds})
        self._remember(step, tables)
        self.started, self.since = time.perf_counter(), step

    def _remember(self, step: int, tables: dict[str, Any]) -> None:
        self.evaluated, self.tables = step, tables
        self.best_ap = max(self.best_ap, headline_ap(tables))

    def say(self, text: str) -> None:
        if distributed.is_main():
            with contextlib.suppress(OSError):  # a full disk or a reader that went away end no run
                tqdm.write(text)
                sys.stdout.flush()  # a file or a pipe would wait for more

    def close(self) -> None:
        self.bar.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self.path:
            append_line(self.path, {k: _json_value(v) for k, v in line.items()})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. What is no such line is left out: a crash or a full disk may
    leave an unfinished one."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and type(line.get("step")) is int:
                    lines.append(line)
    return lines


def headline_ap(tables: Mapping[str, Any]) -> float:
    """Mask AP if it was measured, else box AP. -1 if there was nothing to find."""
    ap = tables.get("segm", tables.get("bbox", {})).get("AP")
    return -1.0 if ap is None else ap


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items, with a bar on a terminal. Without one (nohup, Slurm, CI) there is a line of text
    now and then."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said > SAY_EVERY:
            left = (now - started) / done * (total - done) / 60
            print(f"{what}: {done} of {total}, {left:.0f} min left", file=sys.stderr, flush=True)
            said = now


def _json_value(value: Any) -> Any:
    """Six digits are enough. JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def say_notes(notes: Iterable[str], kind: str = "warning") -> None:
    if distributed.is_main():
        for note in notes:
            print(f"{kind}: {printable(note)}", file=sys.stderr)


def final_summary(cfg: Config, out: Path, tables: dict[str, Any], minutes: float) -> str:
    """What a finished run prints last: its result, what the numbers mean, where the files are."""
    source = "boxes and masks" if cfg.mode == "condinst" or cfg.use_masks else "boxes alone"
    who = "teacher" if cfg.mode == "boxteacher" else "model"
    since = " since it was resumed" * cfg.resume
    lines = ["", f"{cfg.mode} learned from {source} in {minutes:.1f} min{since}."]
    if tables:
        kind, table = ("mask", tables["segm"]) if "segm" in tables else ("box", tables["bbox"])
        ap, ap50 = (f"{table[k]:.1f}" if table[k] is not None else "-" for k in ("AP", "AP50"))
        lines += [
            f"Images that it has not seen: {kind} AP {ap}, AP50 {ap50}. AP, 0 to 100, is the mean",
            f"precision over recalls, classes and {kind} IoU thresholds from 0.50 to 0.95.",
            "AP50 is the AP of the IoU threshold 0.50 alone.",
        ]
    lines += [
        f"  {out / 'contact_sheet.png'}: boxes, pseudo masks, predictions, truth",
        f"  {out / 'last.pt'}: weights",
        *([f"  {out / 'best.pt'}: weights of the best AP"] if (out / "best.pt").exists() else []),
        f"  {out / 'metrics.jsonl'}: losses and metrics over time",
        f"  {out / 'config.json'}: the whole configuration",
    ]
    if tables:
        lines += [
            f"  {out / 'results.json'}: the {who}'s predictions in COCO's format",
            f"  {out / 'tables.json'}: their AP, also of each class",
            f"The tables again: python evaluate.py --checkpoint {out / 'last.pt'}",
        ]
    return "\n".join(lines)


def write_contact_sheet(
    path: Path, model: CondInst, train_set: CocoDataset, val_set: CocoDataset | None
) -> None:
    """The sheet of validation images, or without these of training images, whole, not flipped."""
    if val_set is None:
        val_set = train_set.whole(whole_geometry(model.cfg))
    sheet = make_contact_sheet(model, val_set, next(model.parameters()).device)
    save_picture(sheet, path)


@torch.no_grad()
def make_contact_sheet(
    model: CondInst, dataset: CocoDataset, device: torch.device, rows: int = 4
) -> Image.Image:
    """The first images with objects in four columns: their boxes, the pseudo masks that the model
    makes of these boxes (opacity = mask-aware score), its sure predictions, and the true masks,
    where there are any. Pseudo masks obey the run's thresholds, but are made in eval mode and at
    the size of the test images.
    """
    # Scores that masks have rescored are higher.
    sure_score = 0.65 if model.cfg.mode == "boxteacher" else 0.5
    titles = ["image and boxes", "pseudo masks", f"predictions (score > {sure_score})", "truth"]
    footer = (
        "One color per object. Gray: a prediction that fits no true box (IoU under 0.5) or repeats"
        " another. Paler pseudo masks: less trusted. Captions without a free place are left out."
    )
    chosen = [index for index, boxes in enumerate(dataset.boxes) if len(boxes)][:rows]
    sizes = dataset.sizes[chosen].tolist()
    side = sheet_side([height / max(height, width) for height, width in sizes], len(titles))
    was_training = model.training
    model.eval()
    pictures = [_pictures_of(i, model, dataset, device, side, sure_score) for i in chosen]
    model.train(was_training)
    return contact_sheet(pictures, titles, footer, side)


def _pictures_of(
    index: int,
    model: CondInst,
    dataset: CocoDataset,
    device: torch.device,
    side: int,
    sure_score: float,
) -> list[Image.Image]:
    """The four pictures of an image. Predictions and true masks come in up to twice the size in
    which they are shown, for smooth edges. Pseudo masks are known on the stride-4 grid only."""
    batch = collate([dataset[index, 0, False]]).to(device)
    valid, (height, width) = batch.valid[0], batch.sizes[0]
    boxes, labels = batch.boxes[0, valid], batch.labels[0, valid]
    image, names = batch.images[0, :, :height, :width], dataset.class_names
    draw = partial(draw_instances, image, class_names=names, side=side)
    boxed = draw(boxes, None, labels)

    pseudo = model.make_pseudo_masks(batch, resize=False)
    masks = pseudo.masks[0, valid, : -(-height // 4), : -(-width // 4)]
    taught = draw(None, masks, labels, opacity=pseudo.weights[0, valid])

    fine = (2 * boxed.height, 2 * boxed.width)
    found = model.predict(batch.images, batch.sizes, [fine])[0]
    keep = (found.scores > sure_score).nonzero().flatten()
    masks = [found.masks[detection] for detection in keep.tolist()]
    sure = Instances(found.boxes[keep], found.scores[keep], found.labels[keep], masks)
    sure_boxes, _ = scale_boxes(sure.boxes, fine, batch.sizes[0])
    # A prediction has the color of the true box that it fits. The others are gray and faint.
    colors, opacity = [NEUTRAL] * len(sure.boxes), [0.2] * len(sure.boxes)
    assigned = assign_to_boxes(box_iou(sure_boxes, boxes), sure.scores)
    for box, detection in enumerate(assigned.tolist()):
        if detection >= 0:
            colors[detection], opacity[detection] = instance_color(box), 1.0
    look = {"scores": sure.scores, "opacity": opacity, "colors": colors}
    predicted = draw(sure_boxes, sure.masks, sure.labels, **look)

    original = tuple(dataset.sizes[index].tolist())
    true_masks = islice(dataset.true_masks(index, min(fine, original)), MAX_INSTANCES)
    truth = draw(None, torch.stack([*true_masks]), labels)
    return [boxed, taught, predicted, truth]
