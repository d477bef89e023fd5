"""Random damage, for as long as one likes:

    python tests/fuzz.py checkpoint --minutes 5 [--seed 0]

A child process does the work, so that a crash, a hang or a lack of memory is found, too. Every case
has a number, and `--seed N --cases 1` repeats it.

checkpoint: a file that train.py wrote, with bytes changed, cut, moved or exchanged with those of
another, or with entries of other types. It must be refused in one line or be read as it was.
"""

import argparse
import io
import itertools
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from boxteacher.checkpoint import FORMAT, load_checkpoint, read_file
from boxteacher.config import Config, from_dict
from boxteacher.errors import UserError

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


SUBJECTS: dict[str, Callable[[int, Path], str]] = {"checkpoint": fuzz_checkpoint}


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
        for patience in itertools.chain([120], itertools.repeat(SECONDS)):  # the first: imports
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
