"""Random damage, for as long as one likes:

    python tests/fuzz.py {checkpoint,data,convert} --minutes 5 [--seed 0]

A child process does the work, so that a crash, a hang or a lack of memory is found, too. Every case
has a number, and `--seed N --cases 1` repeats it.

checkpoint: a file that train.py wrote, with bytes changed, cut, moved or exchanged with those of
another, or with entries of other types. It must be refused in one line or be read as it was.

data: a COCO file or results with values changed, removed or of other types. Each is refused in one
line, or the data set loads and evaluates. What can be trained on can be measured.

convert: a data set of another format with one damaged file. It is refused in one line, or becomes a
COCO file.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import multiprocessing
import operator
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_convert import picture, save, voc_image, write
from test_faults_data import USABLE, evaluate, good_coco, good_results, load, write_images

from boxteacher.checkpoint import FORMAT, load_checkpoint, read_file
from boxteacher.config import Config, from_dict
from boxteacher.errors import UserError
from boxteacher.tools import convert

SECONDS = 20  # for one case
MEMORY = 8 << 30


def checkpoint_of(seed: int) -> dict[str, Any]:
    """The entries of a checkpoint, with two small networks."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"a.weight": torch.randn(30, 7, generator=generator), "a.bias": torch.zeros(30)}
    weights["norm.num_batches_tracked"] = torch.tensor(seed)
    return {
        "config": vars(Config(lr=0.01 + seed)),
        "class_names": ["cat", "dog"],
        "category_ids": [1, 2],
        "num_images": 40,
        "step": seed,
        "student": weights,
        "teacher": {name: weight * 2 for name, weight in weights.items()},
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"params": [0]}]},
    }


def same(found: Any, expected: Any) -> bool:
    """Whether two trees of containers, tensors and plain values are equal, types included."""
    if type(found) is not type(expected) and not isinstance(found, dict):
        return False
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list | tuple):
        pairs = zip(found, expected, strict=False)
        return len(found) == len(expected) and all(same(a, b) for a, b in pairs)
    return found == expected


def saved(entries: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({**entries, "format": FORMAT}, buffer)
    return buffer.getvalue()


ODD = [None, True, -1, 2**70, 1.5, float("nan"), "", "x" * 1000, b"x", [], [[]], {}, (), {1: 2}]


def fuzz_checkpoint(seed: int, folder: Path) -> str:
    """One case. Returns what became of it. Raises if the program breaks its promise."""
    rng = random.Random(seed)
    path = folder / rng.choice(["a.pt", "a.pt", "a.pth"])
    entries = checkpoint_of(seed % 50)
    content, is_ours = bytearray(saved(entries)), True
    kind = rng.randrange(6)
    if kind == 0:  # bits
        for _ in range(rng.choice([1, 1, 1, 5, 100])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # a cut, or something behind
        place = rng.randrange(len(content))
        content = content[:place] if rng.random() < 0.7 else content + content[place:]
    elif kind == 2:  # a block from elsewhere, or of zeros
        size, source = rng.randrange(1, 600), rng.randrange(len(content))
        place = rng.randrange(len(content))
        block = bytes(size) if rng.random() < 0.5 else content[source : source + size]
        content[place : place + len(block)] = block
    elif kind == 3:  # a block of another file
        other = saved(checkpoint_of(seed % 50 + 1))
        start, size = rng.randrange(len(content)), rng.randrange(1, 3000)
        content[start : start + size] = other[start : start + size]
    elif kind == 4:  # an entry of another type
        is_ours = False
        entries[rng.choice(list(entries))] = rng.choice(ODD)
        content = bytearray(saved(entries))
    else:  # a value deep inside
        is_ours = False
        inside = rng.choice([entries["config"], entries["student"], entries["optimizer"]])
        inside[rng.choice([*inside, "other", 5])] = rng.choice(ODD)
        content = bytearray(saved(entries))
    path.write_bytes(content)
    try:
        found = load_checkpoint(path)
        from_dict(found["config"], str(path))
        read_file(path)
    except UserError as error:
        message = str(error)
        assert "\n" not in message, message
        assert len(message) < 2000, message
        return "refused"
    if is_ours:
        assert same(found, entries), "it was read, but is another"
    return "read"


VALUES = [None, True, -1, 0, 7, 2**70, 1.5, float("nan"), 1e7, 1e11, -1e300, "", "0", "\ud800\n"]
VALUES += ["x" * 1000, [], [[]], {}, [1, 2, 3], [[1, 2, 3]], {"size": []}]


def inner_places(tree: Any, place: tuple = ()) -> list[tuple]:
    """Where all values of a tree of lists and dicts are."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place] * bool(place) + [
        p for key in keys for p in inner_places(tree[key], (*place, key))
    ]


def damage(tree: Any, rng: random.Random) -> None:
    """Exchange, remove, double or shift some values of a tree."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 10])):
        if not (places := inner_places(tree)):
            break
        *parents, last = rng.choice(places)
        inner = functools.reduce(operator.getitem, parents, tree)
        value, kind = inner[last], rng.randrange(5)
        if kind == 0:
            del inner[last]
        elif kind == 1 and isinstance(value, list):
            value.append(copy.deepcopy(rng.choice([*value, 1.5])))
        elif kind == 2 and isinstance(value, str) and value:
            place = rng.randrange(len(value))
            inner[last] = value[:place] + chr(rng.randrange(40, 120)) + value[place + 1 :]
        elif kind == 3 and isinstance(value, int | float):
            inner[last] = value + rng.choice([-1, 1, 0.5, 64, -200, 1e4])
        else:
            inner[last] = copy.deepcopy(rng.choice(VALUES))


def outcome(answers: list[str]) -> str:
    for answer in answers:
        assert answer.isprintable(), answer
        assert len(answer) <= 2000, answer
    return "read" if set(answers) == {USABLE} else "refused"


def fuzz_data(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    write_images(folder)
    coco, results = good_coco(), good_results()
    if rng.random() < 0.3:
        damage(results, rng)
        return outcome([evaluate(coco, results)])
    if rng.random() < 0.2:
        text = bytearray(json.dumps(coco).encode())
        for _ in range(rng.choice([1, 2, 9])):
            text[rng.randrange(len(text))] = rng.randrange(256)
        return outcome([load(bytes(text), folder)])
    damage(coco, rng)
    loaded, evaluated = load(json.dumps(coco), folder), evaluate(coco, results)
    if loaded == USABLE:  # what can be trained on can be measured
        assert re.match(f"{USABLE}$|evaluation needs true masks|results for", evaluated), evaluated
    return outcome([loaded, evaluated])


def write_formats(root: Path) -> None:
    """A small data set in each format that tools.convert reads."""
    numbers = np.zeros((48, 64), np.uint16)
    numbers[5:20, 5:30], numbers[25:40, 20:60], numbers[42:, :9] = 26000, 24001, 26
    for name in ("train", "val"):
        save(root / f"cityscapes/leftImg8bit/{name}/bonn/0_leftImg8bit.png", picture(48, 64))
        save(root / f"cityscapes/gtFine/{name}/bonn/0_gtFine_instanceIds.png", numbers)
    save(root / "yolo/images/train/0.jpg", picture(48, 64))
    lines = "0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.4 0.1 0.3 0.6\n"
    write(root / "yolo/labels/train/0.txt", lines)
    write(root / "yolo/data.yaml", "path: .\nnames:\n  0: cat\n  1: dog\n")
    save(root / "dsb/stage1_train/a/images/a.png", picture(48, 64))
    for n in (1, 2):
        mask = (numbers == (26000, 24001)[n - 1]).astype(np.uint8) * 255
        save(root / f"dsb/stage1_train/a/masks/{n}.png", mask)
    voc_image(
        root / "voc",
        "0",
        [("dog", 0, 6, 6, 30, 20), ("cat", 1, 21, 26, 60, 40)],
        np.where(numbers == 26000, 1, np.where(numbers == 24001, 2, 0))[:40, :60],
    )
    for name in ("train", "val"):
        write(root / f"voc/ImageSets/Segmentation/{name}.txt", "0\n")


def fuzz_convert(seed: int, folder: Path) -> str:
    """A data set of another format, of which one file is changed, cut, empty, a folder or gone."""
    rng, np_rng = random.Random(seed), np.random.default_rng(seed)
    if not (folder / "intact").exists():
        write_formats(folder / "intact")
    root = folder / "damaged"
    shutil.rmtree(root, ignore_errors=True)
    kind = rng.choice(list(convert.FORMATS))
    shutil.copytree(folder / "intact" / kind, root)
    path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file()))
    content, how = bytearray(path.read_bytes()), rng.randrange(8)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.unlink()
        path.mkdir()
    elif how == 2 and path.suffix == ".png":
        save(
            path,
            np_rng.integers(0, 65536, rng.choice([(48, 64), (40, 60), (9, 9)])).astype(np.uint16),
        )
    elif how == 3:
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        for _ in range(rng.choice([1, 2, 9, 50])):
            place = rng.randrange(len(content))
            if rng.random() < 0.3:  # another word or number
                content[place:place] = rng.choice(
                    [b" nan ", b" 1e9 ", b"-", b"9", b"\n", b"<", b" 0.5", b"\xff", b":"]
                )
            else:
                content[place] = (
                    rng.randrange(256)
                    if path.suffix in (".png", ".jpg")
                    else rng.randrange(32, 127)
                )
        path.write_bytes(content)
    sys.argv = ["convert", kind, str(root), str(root / "out")]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            convert.main()
    except UserError as error:
        return outcome([str(error)])
    return "read"


SUBJECTS: dict[str, Callable[[int, Path], str]] = {
    "checkpoint": fuzz_checkpoint,
    "data": fuzz_data,
    "convert": fuzz_convert,
}


def work(subject: str, first: int, last: int, until: float, pipe: Any) -> None:
    """The child: sends (case, what became of it)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        for case in range(first, last):
            if time.monotonic() > until:
                break
            pipe.send((case, "started"))
            try:
                outcome = SUBJECTS[subject](case, Path(folder))
            except Exception as error:
                outcome = f"BROKEN {type(error).__name__}: {error}"
            pipe.send((case, outcome))
    pipe.send((None, "done"))


def fuzz(subject: str, first: int, cases: int, minutes: float) -> dict[str, int]:
    """Run the cases. A child that dies or hangs is a broken case, and another child goes on."""
    until, case, counts = time.monotonic() + 60 * minutes, first, {"read": 0, "refused": 0}
    context = multiprocessing.get_context("spawn")
    while case < first + cases and time.monotonic() < until:
        ours, theirs = context.Pipe()
        arguments = (subject, case, first + cases, until, theirs)
        child = context.Process(target=work, args=arguments, daemon=True)
        child.start()
        theirs.close()
        for patience in itertools.chain([300], itertools.repeat(SECONDS)):  # the first: imports
            try:
                number, outcome = ours.recv() if ours.poll(patience) else (case, "BROKEN hangs")
            except EOFError:
                number, outcome = case, "BROKEN died"
            if number is None:
                break
            case = number
            if outcome == "started":
                continue
            kind = outcome.split()[0]
            counts[kind] = counts.get(kind, 0) + 1
            if kind == "BROKEN":
                print(f"{subject}, --seed {case}: {outcome}", flush=True)
            if outcome in ("BROKEN hangs", "BROKEN died"):
                break
        child.kill()
        case += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, default=10**9, help="at most")
    options = parser.parse_args()
    counts = fuzz(options.subject, options.seed, options.cases, options.minutes)
    print(f"{options.subject}: {sum(counts.values())} cases: {counts}")
    sys.exit("BROKEN" in counts)


if __name__ == "__main__":
    main()
