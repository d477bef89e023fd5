"""README's recipes and --use-masks, in miniature."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from boxteacher.checkpoint import load_checkpoint
from boxteacher.command_line import parse
from boxteacher.config import ConfigError
from boxteacher.tools import study

ROOT = Path(__file__).parents[1]
SMALL = """--fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1
    --norm gn --mask-norm gn --device cpu --workers 0 --batch-size 2 --steps 2 --crop 0
    --teacher-size 0 --train-scales= --train-sizes 64 --test-scale 1 --contrast none""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/ with boxes.json (masks for the first of each image's objects: some.json)."""
    folder = tmp_path_factory.mktemp("recipes")
    words = "shapes --shapes-size 64 --shapes-train 4 --shapes-val 2 --train-sizes 64".split()
    study.write_shapes(str(folder), words)
    (folder / "train").rename(folder / "images")
    coco = json.loads((folder / "train.json").read_text())
    seen = set()
    for annotation in coco["annotations"]:
        if annotation["image_id"] in seen:
            del annotation["segmentation"]
        seen.add(annotation["image_id"])
    (folder / "some.json").write_text(json.dumps(coco))
    for annotation in coco["annotations"]:
        annotation.pop("segmentation", None)
    (folder / "boxes.json").write_text(json.dumps(coco))
    return folder


def run(folder, *words):
    """A command in the folder, as README has it, in this process, which spares the imports."""
    argv, before, out = sys.argv, os.getcwd(), io.StringIO()
    is_train = words[0] == "train.py"
    sys.argv = [words[0], *words[1:], *SMALL] if is_train else list(words[1:])
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(out):
            if is_train:
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            else:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    finally:
        sys.argv = argv
        os.chdir(before)
    return out.getvalue()


def readme_commands(start: str) -> list[list[str]]:
    """The words of the commands in the block after a text, without `python`."""
    text = (ROOT / "README.md").read_text()
    block = re.search(start + r".*?```bash\n(.*?)```", text, re.S)[1].replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(.*)"$', block, re.M):
        block = block.replace(f"${name}", value)
    lines = [line.split() for line in block.splitlines()]
    return [words[1:] for words in lines if words[0] == "python"]


def test_from_boxes_to_masks_as_readme_has_it(folder):
    train, label, predict = readme_commands("Three commands: ")
    assert train[0] == "train.py"
    assert "boxteacher learned from boxes alone" in run(folder, *train)
    config = load_checkpoint(folder / "runs/mine/last.pt")["config"]
    assert 0 < config["pseudo_start"] < config["steps"]
    run(folder, *label, "--device", "cpu")
    masks = json.loads((folder / "masks.json").read_text())["annotations"]
    assert all(a["segmentation"] for a in masks)
    (folder / "masks.json").unlink()
    shutil.copytree(folder / "images", folder / "new_images")
    run(folder, *predict, "--device", "cpu")
    assert isinstance(json.loads((folder / "found/results.json").read_text()), list)


def test_self_training_as_readme_has_it(folder):
    commands = readme_commands("Naive self-training, to compare with,")
    assert [words[0] for words in commands] == ["train.py", "-m", "train.py"]
    outs = [run(folder, *words) for words in commands]
    assert "boxinst learned from boxes alone" in outs[0]
    assert "condinst learned from boxes and masks" in outs[2]
    masks = json.loads((folder / "masks.json").read_text())["annotations"]
    assert all(a["segmentation"] for a in masks)
    assert load_checkpoint(folder / "runs/stage2/last.pt")["config"]["mode"] == "condinst"


def weights(folder, name, file, *words):
    files = [f"--train-json={file}", "--train-images=images", "--val-json=", f"--out={name}"]
    out = run(folder, "train.py", "nuclei", *files, "--weak-warmup-steps", "1", *words)
    return load_checkpoint(folder / name / "last.pt")["student"], out


def test_use_masks_learns_from_masks_and_without_any_it_is_boxteacher_to_the_bit(folder):
    plain, _ = weights(folder, "plain", "boxes.json")
    unused, _ = weights(folder, "unused", "some.json")
    none, told_none = weights(folder, "none", "boxes.json", "--use-masks")
    some, told_some = weights(folder, "some", "some.json", "--use-masks")
    assert all(torch.equal(plain[name], none[name]) for name in plain)
    assert all(torch.equal(plain[name], unused[name]) for name in plain)
    assert not all(torch.equal(plain[name], some[name]) for name in plain)
    # before pseudo_start too
    plain, _ = weights(folder, "late_plain", "some.json", "--pseudo-start", "2")
    some, _ = weights(folder, "late_some", "some.json", "--pseudo-start", "2", "--use-masks")
    assert not all(torch.equal(plain[name], some[name]) for name in plain)
    assert "learned from boxes and masks" in told_some
    total = len(json.loads((folder / "some.json").read_text())["annotations"])
    assert f"0 of {total} boxes have masks" in told_none
    assert f"4 of {total} boxes have masks" in told_some


def test_use_masks_is_for_boxteacher():
    with pytest.raises(ConfigError, match="use_masks is for mode boxteacher, not boxinst"):
        parse(["shapes", "--mode", "boxinst", "--use-masks"])
