"""A step taken in parts is the step taken at once."""

import itertools
import json

import pytest
import torch
from torch.testing import assert_close

import train
from boxteacher import run_folder
from boxteacher.checkpoint import load_checkpoint
from boxteacher.command_line import parse
from boxteacher.config import Config, ConfigError
from boxteacher.data import make_train_set, make_val_set, train_order

torch.set_num_threads(1)

# One image, never flipped: all parts have the same normalizers, so their losses' mean is the
# whole's. Group norm, since batch norm's statistics are each part's own.
SAME = """shapes --shapes-train 1 --no-flip --norm gn --mask-norm gn --shapes-size 64
    --train-sizes 64 --train-max-size 64 --test-size 64 --test-max-size 64 --shapes-val 1
    --fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1 --device cpu
    --workers 0 --batch-size 4 --steps 3 --log-every 1 --checkpoint-every 2 --optimizer sgd
    --teacher-size 0 --clip-grad 0 --lr 0.08 --warmup-steps 0 --pseudo-start 0""".split()


def run(folder, *words) -> tuple[list[dict], dict]:
    """(metrics of the steps, checkpoint) of a run."""
    folder.mkdir(exist_ok=True)
    cfg = parse([*SAME, "--out", str(folder), *map(str, words)])
    train_set = make_train_set(cfg)
    checkpoint, _ = run_folder.load_last(cfg) if cfg.resume else (None, None)
    state = train.make_state(cfg, len(train_set.class_names), torch.device("cpu"))
    if checkpoint:
        train.restore(state, checkpoint)
    train.train(state, folder, train_set, make_val_set(cfg))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [m for m in lines if "loss" in m]
    lines = [{k: v for k, v in m.items() if k != "images_per_s" and v is not None} for m in lines]
    return lines, load_checkpoint(folder / "last.pt")


def test_a_step_in_parts_is_the_step_at_once(tmp_path):
    (expected, whole), (found, parts) = run(tmp_path / "1"), run(tmp_path / "2", "--accumulate", 2)
    assert len(found) == 3
    for line, other in zip(expected, found, strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
    for who in ("student", "teacher"):
        assert_close(parts[who], whole[who], rtol=1e-4, atol=1e-6)


def test_a_run_in_parts_goes_on_as_if_it_had_not_stopped(tmp_path):
    words = ["--accumulate", 2, "--shapes-train", 7, "--lr-schedule", "step", "--lr-drops", "9"]
    words += ["--weak-warmup-steps", 5]
    expected, whole = run(tmp_path / "whole", *words)
    run(tmp_path / "stopped", *words, "--steps", 2)
    found, resumed = run(tmp_path / "stopped", *words, "--resume")
    for line, other in zip(expected, found, strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
    assert_close(resumed["student"], whole["student"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("world_size", "parts"), [(1, 2), (2, 2), (1, 4), (2, 1)])
def test_the_parts_of_all_ranks_are_the_images_of_the_step(world_size, parts):
    def batches(world_size: int, parts: int, rank: int) -> list[list[tuple[int, int]]]:
        cfg = Config(batch_size=8, steps=5, accumulate=parts)
        return list(train_order([True] * 10, [1] * 10, cfg, 2, rank, world_size))

    of_rank = []
    for rank in range(world_size):
        of_parts = batches(world_size, parts, rank)
        assert len(of_parts) == 3 * parts
        assert {len(part) for part in of_parts} == {8 // world_size // parts}
        steps = [of_parts[i : i + parts] for i in range(0, len(of_parts), parts)]
        of_rank.append([list(itertools.chain(*step)) for step in steps])
    together = [list(itertools.chain(*step)) for step in zip(*of_rank, strict=True)]
    assert together == batches(1, 1, 0)


def test_parts_must_be_equal():
    with pytest.raises(ConfigError, match="accumulate=3"):
        parse(["shapes", "--batch-size", "8", "--accumulate", "3"])
