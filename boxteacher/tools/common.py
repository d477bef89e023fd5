"""What several tools share: models and their input, progress, whole files, masks as polygons."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from boxteacher.checkpoint import load_checkpoint, load_weights
from boxteacher.coco import encode_mask
from boxteacher.config import Config, from_dict, validate
from boxteacher.distributed import init_distributed
from boxteacher.model import CondInst, build_model
from boxteacher.transforms import View, resized_size

T = TypeVar("T")
SAY_EVERY = 30  # seconds between lines of progress where there is no terminal for a bar


def load_network(path: str, given: dict[str, Any]) -> tuple[CondInst, dict[str, Any]]:
    """The network of a checkpoint, the teacher where there is one, ready to predict; and the
    checkpoint. `given` replaces fields of the configuration."""
    device, state = init_distributed(given.get("device", "auto")), load_checkpoint(path)
    cfg = dataclasses.replace(from_dict(state["config"], path), **given)
    validate(dataclasses.replace(cfg, resume=False, init=path))  # the weights are there
    model = build_model(cfg, len(state["class_names"]))
    load_weights(model, state["teacher"] or state["student"], path)
    return model.to(device).eval(), state


def test_view(size: tuple[int, int], cfg: Config) -> View:
    """An image of `size` (height, width) as evaluation sees it."""
    resized = resized_size(*size, cfg.test_size, cfg.test_max_size, cfg.test_scale)
    return View(size, resized, (0, 0, *resized), flip=False)


def network_input(view: View, pixels: np.ndarray) -> Tensor:
    """An image, uint8 RGB [h, w, 3], seen through a view: uint8 [1, 3, H, W], padded with zeros to
    multiples of 32."""
    image = torch.from_numpy(view.image(pixels).copy()).permute(2, 0, 1)
    return F.pad(image, (0, -view.window[3] % 32, 0, -view.window[2] % 32))[None]


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


def write(path: Path, text: str) -> None:
    """Whoever reads the file finds the old text or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


# --- masks in COCO's forms ------------------------------------------------------------------------


def segmentation(
    mask: np.ndarray, top: int, left: int, size: tuple[int, int], as_polygons: bool = False
) -> dict[str, Any] | list[list[float]]:
    """A mask, bool [h, w] at a place in an image of `size`, as a run-length code or polygons."""
    if as_polygons:
        return polygons(mask, top, left)
    return encode_mask(mask, (top, left), size)


# The edges of a pixel, clockwise: the neighbor behind it, where it starts, and where it leads, each
# as (y, x) from the pixel or from the start.
EDGES = (
    ((-1, 0), (0, 0), (0, 1)),  # the upper one, to the right
    ((0, 1), (0, 1), (1, 0)),  # the right one, down
    ((1, 0), (1, 1), (0, -1)),  # the lower one, to the left
    ((0, -1), (1, 0), (-1, 0)),  # the left one, up
)


def polygons(mask: np.ndarray, top: int = 0, left: int = 0) -> list[list[float]]:
    """The outlines of a mask, bool [h, w], along the edges of its pixels, as COCO's polygons
    [[x, y, x, y, ...], ...]. pycocotools makes the same mask of them again.

    There is one polygon for each connected part (diagonal pixels do not connect). COCO has no
    holes. So a line leads from the part's outline to the hole's and back, with nothing between.
    `top`, `left`: the place of the mask in its image.
    """
    padded, loop_of_edge, part_of_loop = np.pad(mask, 1), {}, []
    parts: list[list[tuple[int, int]]] = []
    for edges, corners in sorted(outlines(padded)):  # from left to right
        points = [(x - 1 + left, y - 1 + top) for x, y in corners]
        x, y = edges[0]
        if padded[y, x]:  # the mask is on the right of its leftmost edge: a new part
            part_of_loop.append(len(parts))
            parts.append(points)
        else:  # a hole. On its left its part ends at an outline that is known already
            start = int(np.flatnonzero(~padded[y, :x])[-1]) + 1
            part_of_loop.append(part_of_loop[loop_of_edge[start, y]])
            outer = parts[part_of_loop[-1]]
            outer += [outer[0], *points, points[0]]
        loop_of_edge |= dict.fromkeys(edges, len(part_of_loop) - 1)
    return [[float(value) for point in points for value in point] for points in parts]


def outlines(padded: np.ndarray) -> Iterator[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """The loops of edges between pixels on and off, the former on the right hand. Yields for each
    loop its vertical edges, from left to right, as (x, y of the pixel on their right), and its
    corners (x, y). The outermost pixels are off."""
    edges = set()  # (y, x) of the start, and which of EDGES
    for side, (neighbor, (y_start, x_start), _) in enumerate(EDGES):
        is_edge = padded & ~np.roll(padded, [-step for step in neighbor], (0, 1))
        edges |= {(y + y_start, x + x_start, side) for y, x in np.argwhere(is_edge).tolist()}
    free = edges.copy()
    while free:
        edge = first = min(free)
        vertical, corners = [], []
        while not corners or edge != first:
            free.discard(edge)
            y, x, side = edge
            if side in (1, 3):
                vertical.append((x, y - (side == 3)))
            y, x = y + EDGES[side][2][0], x + EDGES[side][2][1]
            turns = ((y, x, (side + turn) % 4) for turn in (1, 0, 3))  # to the right, if possible
            edge = next(turn for turn in turns if turn in edges)
            if edge[2] != side:
                corners.append((x, y))
        yield sorted(vertical), corners
