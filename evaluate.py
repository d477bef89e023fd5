"""Box and mask AP of a checkpoint:

    python evaluate.py --checkpoint runs/shapes/last.pt
    python evaluate.py --published boxteacher_r50_1x.pth --preset coco_boxteacher_r50_1x

The teacher is evaluated where there is one, else the student. Its predictions, in COCO's format,
and the tables are written next to the checkpoint, or into the folder --out. --metric chooses whose
rules count: COCO's, VOC's or Cityscapes'. The program runs under torchrun too.

Every field of the configuration is an option (`python train.py --help` shows them). It replaces the
checkpoint's value: --val-json and --val-images evaluate on other data. A published checkpoint takes
its fields from --preset, or without it from the shapes of its weights.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from boxteacher import distributed, errors
from boxteacher.checkpoint import load_checkpoint, load_weights
from boxteacher.coco_eval import evaluate_dataset, require_void
from boxteacher.command_line import Parser
from boxteacher.config import ConfigError, of_checkpoint, validate
from boxteacher.data import Classes, make_val_set
from boxteacher.model import build_model
from boxteacher.published import import_published
from boxteacher.reporting import say_notes

USAGE = "evaluate.py (--checkpoint FILE | --published FILE) [--student] [--field value ...]"


def main() -> None:
    parser = Parser(USAGE, __doc__)
    file = parser.add_mutually_exclusive_group()
    file.add_argument("--checkpoint", type=Path, metavar="FILE", help="written by train.py")
    file.add_argument("--published", type=Path, metavar="FILE", help="of the published code")
    parser.add_argument("--preset", help="the recipe of a published checkpoint")
    parser.add_argument("--student", action="store_true", help="evaluate the student")
    options, given = parser.read(sys.argv[1:])
    path, notes = options.checkpoint or options.published, []
    if not path:
        raise ConfigError("give either --checkpoint FILE or --published FILE (see --help)")
    given = {"teacher_size": 0} | given  # the teacher's input size matters in training only

    if options.published:
        state = import_published(path, **given)
        notes = state["notes"]
    elif "preset" in given:
        raise ConfigError("preset: a checkpoint has its own; replace single fields")
    else:
        state = load_checkpoint(path)
    cfg = of_checkpoint(state["config"], str(path), given)
    if not cfg.val_json:
        raise ConfigError(f"{path} was trained without a validation set: give --val-json FILE")
    validate(dataclasses.replace(cfg, init=str(path)))  # the weights are there

    device = distributed.init_distributed(cfg.device)
    say_notes(notes, "note")
    val_set = make_val_set(cfg, Classes(state["class_names"], state["category_ids"], str(path)))
    say_notes(val_set.notes)
    if cfg.metric == "cityscapes":  # before it predicts
        require_void(val_set.coco, val_set.name)
    who = "student" if options.student or state["teacher"] is None else "teacher"
    model = build_model(cfg, len(val_set.class_names))
    load_weights(model, state[who], f"{path} ({who})")
    model.to(device)

    results = Path(given.get("out") or path.parent) / f"{path.stem}_{who}_results.json"
    _, text = evaluate_dataset(model, val_set, device, cfg, results)
    if distributed.is_main():
        print(f"{path}: {who}, step {state['step']}, {val_set.name}\n{text}\n{results}")
    distributed.shutdown()


if __name__ == "__main__":
    errors.run(main)
