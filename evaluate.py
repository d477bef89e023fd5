"""Box and mask AP of a checkpoint:

    python evaluate.py --checkpoint runs/shapes/last.pt [--student] [--field value ...]
    python evaluate.py --published boxteacher_r50_1x.pth --preset coco_boxteacher_r50_1x

The teacher is judged where there is one; --student judges the student. Any field of the
configuration can be replaced, such as --val-json and --val-images. The predictions are written in
COCO's format beside the checkpoint, or into the folder of --out. Runs under torchrun too. Without
--preset the weights of a published checkpoint say what they are.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from boxteacher import distributed, errors
from boxteacher.checkpoint import load_checkpoint, load_weights
from boxteacher.coco import DataError
from boxteacher.coco_eval import evaluate_dataset
from boxteacher.command_line import read_options
from boxteacher.config import ConfigError, from_dict, validate
from boxteacher.data import make_val_set
from boxteacher.model import build_model
from boxteacher.published import import_published


def read_arguments(argv: list[str]) -> tuple[Path, bool, bool, dict[str, Any]]:
    """The file, whether it is a published one, whether the student is meant, and fields."""
    words = list(argv)
    if not words or "--help" in words or "-h" in words:
        print(__doc__)
        raise SystemExit(0)
    is_student = "--student" in words
    words = [word for word in words if word != "--student"]
    files = {}
    for option in ("--checkpoint", "--published"):
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name == option:
                value = [value] if equals else words[i + 1 : i + 2]
                files[option] = value[0] if value else ""
                del words[i : i + (1 if equals else 2)]
                break
    if len(files) != 1 or not all(files.values()):
        raise ConfigError("give either --checkpoint FILE or --published FILE (see --help)")
    (option, file), *_ = files.items()
    return Path(file), option == "--published", is_student, read_options(words)


def main() -> None:
    path, is_published, is_student, given = read_arguments(sys.argv[1:])
    if is_published:
        state = import_published(path, **given)
        notes = state["notes"]
    else:
        if "preset" in given:
            raise ConfigError("preset: a checkpoint has its own; replace single fields")
        state, notes = load_checkpoint(path), []
    cfg = dataclasses.replace(from_dict(state["config"], str(path)), **given)
    if cfg.dataset == "shapes" and given.keys() & {"val_json", "val_images"}:
        raise ConfigError(f"{path} is about generated images; to read files, add --dataset coco")
    validate(dataclasses.replace(cfg, resume=False, init=str(path)))

    device = distributed.init_distributed(cfg.device)
    if distributed.is_main():
        for note in notes:
            print(note, file=sys.stderr)
    val_set = make_val_set(cfg)
    if val_set.category_ids != state["category_ids"]:
        theirs = ", ".join(map(str, state["class_names"]))
        raise DataError(f"{val_set.name} has other classes than {path}, which knows {theirs}")
    who = "student" if is_student or state["teacher"] is None else "teacher"
    model = build_model(cfg, len(val_set.class_names))
    load_weights(model, state[who], f"{path} ({who})")
    model.to(device)

    out = Path(given.get("out") or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    results = out / f"{path.stem}_{who}_results.json"
    _, text = evaluate_dataset(model, val_set, device, cfg.workers, cfg.max_detections, results)
    if distributed.is_main():
        print(f"{path}: {who}, step {state['step']}, {val_set.name}\n{text}\n{results}")
    distributed.shutdown()


if __name__ == "__main__":
    errors.run(main)
