"""Masks in COCO's forms, run-length codes and polygons: checked, read and written.

pycocotools trusts what it gets. So everything that reaches it has passed `mask_extents`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from reprlib import repr as short_repr
from types import NoneType

import numpy as np
from pycocotools import mask as rle_codec

# pycocotools trusts polygons: far points and long outlines take gigabytes, or end the process.
REACH = 4  # coordinates are at most so many times the image's longer side
MAX_OUTLINE = 200  # a mask's outline is at most so many times width + height of its image
NUMBERS = {int, float}  # in JSON; no booleans

# --- the one check before pycocotools or a decoder sees them --------------------------------------


def mask_extents(masks: Sequence[object], sizes: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """Check masks. None, [] and {} are none, the others are polygons [[x, y, ...], ...] or run-
    length codes {"size", "counts"}. sizes [M, 2]: width and height of their images.

    Returns [M, 4], the left, top, right and bottom of each mask, NaN where there is none, and what
    is wrong with which mask: {index: text}. That includes what breaks pycocotools: runs that do not
    fill the image, points far out, endless outlines.
    """
    extents, bad = np.full((len(masks), 4), np.nan), {}
    for kind, measure in ((list, _polygon_extents), (dict, _code_extents)):
        chosen = [i for i, mask in enumerate(masks) if isinstance(mask, kind) and mask]
        for start in range(0, len(chosen), 4_000):  # few at a time save memory
            part = chosen[start : start + 4_000]
            extents[part], faults = measure([masks[i] for i in part], sizes[part])
            bad |= {part[k]: text for k, text in faults.items()}
    for i, mask in enumerate(masks):
        if not isinstance(mask, (list, dict, NoneType)):
            bad[i] = "is neither polygons nor a run-length code"
    return extents, bad


def _polygon_extents(masks: list[list], sizes: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    bad = {}
    if not _are_polygons([*chain.from_iterable(masks)]):
        for k, mask in enumerate(masks):
            if wrong := [polygon for polygon in mask if not _are_polygons([polygon])]:
                form = "has a polygon that is not [x, y, ...] of 3 points or more"
                bad[k] = f"{form}: {short_repr(wrong[0])}"
        masks = [[[0.0] * 6] if k in bad else mask for k, mask in enumerate(masks)]

    # The ends of polygons, and the starts of masks, as numbers of points.
    polygons = [array("d", polygon) for polygon in chain.from_iterable(masks)]
    numbers = np.frombuffer(b"".join(polygons))
    ends = np.cumsum([*map(len, polygons)]) // 2
    first = np.append(0, ends)[np.cumsum([0, *map(len, masks[:-1])])]
    points = numbers[0::2], numbers[1::2]
    with np.errstate(invalid="ignore"):  # infinity
        steps = np.maximum(*(abs(np.diff(p, append=p[-1:])) for p in points))
    steps[ends - 1] = 0  # from one polygon to the next
    extents = [f.reduceat(p, first) for f in (np.minimum, np.maximum) for p in points]
    extents = np.stack(extents, axis=1)
    is_far = ~(abs(extents) <= REACH * sizes.max(1, keepdims=True)).all(1)
    is_long = np.add.reduceat(steps, first) > MAX_OUTLINE * sizes.sum(1)
    for is_wrong, text in (
        (is_far, f"has points {REACH} times the image's size away, or not finite"),
        (is_long, "has an outline without end: its points go to and fro through the image"),
    ):
        bad = dict.fromkeys(np.flatnonzero(is_wrong).tolist(), text) | bad
    return extents, bad


def _are_polygons(polygons: list) -> bool:
    if not {list, array}.issuperset(map(type, polygons)):
        return False
    lengths = set(map(len, polygons))
    are_points = min(lengths, default=6) >= 6 and not any(length % 2 for length in lengths)
    lists = [polygon for polygon in polygons if type(polygon) is list]  # arrays hold numbers
    return are_points and are_finite([*chain.from_iterable(lists)])


def _code_extents(codes: list[dict], sizes: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    blank = [
        {"size": [height, width], "counts": [width * height]} for width, height in sizes.tolist()
    ]
    bad = {k: text for k, code in enumerate(codes) if (text := _form_problem(code, blank[k]))}
    codes = [blank[k] if k in bad else code for k, code in enumerate(codes)]
    try:
        runs, lengths = _runs(codes)
    except ValueError:  # in one of them
        for k, code in enumerate(codes):
            try:
                run_lengths(code)
            except ValueError as error:
                bad[k] = f"has {error}"
        runs, lengths = _runs([blank[k] if k in bad else code for k, code in enumerate(codes)])

    # The runs that are on: of which code, from which pixel of it, to which.
    of_code, height, pixels = np.repeat(np.arange(len(codes)), lengths), sizes[:, 1], sizes.prod(1)
    is_on = (_places(lengths) % 2 == 1) & (runs > 0)
    last = (runs.cumsum() - (pixels.cumsum() - pixels)[of_code])[is_on] - 1
    of_code, first = of_code[is_on], last - runs[is_on] + 1
    extents = np.zeros((len(codes), 4))  # where nothing is on
    shown, start = np.unique(of_code, return_index=True)
    if len(shown):
        height, tall = height[of_code], height[shown]
        goes_on = np.logical_or.reduceat(first // height < last // height, start)  # to next column
        left, right = first[start] // tall, last[np.append(start[1:], len(last)) - 1] // tall
        top = np.where(goes_on, 0, np.minimum.reduceat(first % height, start))
        bottom = np.where(goes_on, tall - 1, np.maximum.reduceat(last % height, start))
        extents[shown] = np.stack([left, top, right + 1, bottom + 1], axis=1)
    return extents, bad


def _form_problem(code: dict, blank: dict) -> str:
    if not isinstance(code.get("counts"), (str, bytes, list)):
        return "is neither polygons nor a run-length code"
    size = code.get("size")
    if isinstance(size, (list, tuple)) and [*size] == blank["size"] and {*map(type, size)} == {int}:
        return ""
    return f"has size {short_repr(size)}, its image {blank['size']} (h, w)"


def are_finite(numbers: Sequence[float]) -> bool:
    """Whether all are numbers below 10^12."""
    if not NUMBERS.issuperset(map(type, numbers)):
        return False
    try:
        return bool((abs(np.array(numbers, float)) < 1e12).all())  # false for NaN
    except OverflowError:  # 10**400
        return False


# --- run-length codes and polygons ---------------------------------------------------------------


def run_lengths(code: dict) -> np.ndarray:
    """The runs of a run-length code {"size": [h, w], "counts": ...}, int64 [R].

    Runs go down the columns of the mask, off and on in turn, off first. "counts" is their list, or
    COCO's text. Each character of the text (its code less 48) has five bits of a number, low bits
    first. Its sixth bit says that the number goes on. Numbers are signed. From the fourth on, a
    number is the difference to the run before the last one. An array holds the runs themselves.

    Raises ValueError unless the runs fill the h*w pixels exactly. pycocotools does not check this:
    it leaves pixels uninitialized or never returns.
    """
    return _runs([code])[0]


def _runs(codes: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The runs of all codes, one after the other, and how many each has. ValueError if one of them
    is broken: the text is about the first."""
    counts, pixels = [code["counts"] for code in codes], [math.prod(c["size"]) for c in codes]
    if {str, bytes}.issuperset(map(type, counts)):
        runs, lengths = _runs_of_texts(counts)
    else:
        for listed, most in zip(counts, pixels, strict=True):
            if isinstance(listed, list):
                are_numbers = {int}.issuperset(map(type, listed))
                if not are_numbers or min(listed, default=0) < 0 or max(listed, default=0) > most:
                    raise ValueError("counts that are not the lengths of runs")
        parts = [
            _runs([code])[0] if type(c) in (str, bytes) else np.array(c, dtype=np.int64)
            for c, code in zip(counts, codes, strict=True)
        ]
        runs, lengths = np.concatenate(parts), np.array([*map(len, parts)])
    sums, ends = np.append(0, runs.cumsum()), lengths.cumsum()
    if (runs < 0).any() or (sums[ends] - sums[ends - lengths] != pixels).any():
        raise ValueError(f"counts that do not add up to its {pixels[0]} pixels")
    return runs, lengths


def _runs_of_texts(counts: list[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
    texts = [c.encode(errors="xmlcharrefreplace") if isinstance(c, str) else c for c in counts]
    bits = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.int64) - 48
    # Where each number ends and starts, and how many characters it has (at most 6).
    last = np.flatnonzero(bits < 32)
    first = np.append(0, last + 1)
    length, ends = np.diff(first), np.cumsum([*map(len, texts)])  # of texts
    is_whole = (bits[ends[ends > 0] - 1] < 32).all() and length.max(initial=0) <= 6
    if not is_whole or (bits < 0).any() or (bits > 63).any():
        raise ValueError("counts that are not a run-length code")
    # The sum of a number's bits, each in its place. The highest bit is the sign.
    runs = np.zeros(0, dtype=np.int64)
    if len(last):
        runs = np.add.reduceat((bits & 31) << 5 * _places(length), first[:-1])
        runs -= (bits[last] & 16) << (5 * length - 4)
    # From differences to runs: sums over every second one of a text, without those before it.
    lengths = np.diff(np.searchsorted(first, ends), prepend=0)
    place = _places(lengths)
    for start in (1, 2):
        chosen = (place >= start) & (place % 2 == start % 2)
        sums, is_start = runs[chosen].cumsum(), place[chosen] == start
        before = (sums - runs[chosen])[is_start]
        runs[chosen] = sums - before[is_start.cumsum() - 1]
    return runs, lengths


def _places(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... of each of several sequences, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)


def decode_mask(code: dict) -> np.ndarray:
    """The mask of a run-length code: bool [h, w]. ValueError if the code is broken."""
    height, width = code["size"]
    runs = run_lengths(code)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def encode_mask(
    mask: np.ndarray, corner: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None
) -> dict:
    """The run-length code, with COCO's text, of a mask that is known in a window: `mask`, bool
    [r, c], starts at `corner` (row, column) of an image of `size` (h, w), which is off elsewhere.
    Without corner and size it is the whole image.
    """
    (top, left), (height, width) = corner, size or mask.shape
    columns = mask.T
    if len(mask) == height:  # runs go on from the end of a column to the start of the next one
        columns = columns.reshape(1, -1)
    # Where each column turns on or off, as numbers of the image's pixels, counted down its columns.
    padded = np.zeros((columns.shape[0], columns.shape[1] + 2), dtype=bool)
    padded[:, 1:-1] = columns
    column, row = np.nonzero(padded[:, 1:] != padded[:, :-1])
    runs = np.diff((left + column) * height + top + row, prepend=0, append=height * width)
    runs = runs if runs[-1] else runs[:-1]
    code = rle_codec.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode()}


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
    padded, loop_of_edge, part_of_loop = np.pad(mask, 1).astype(bool), {}, []
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
    seen = set()
    for first in sorted(edges):
        if first in seen:
            continue
        edge, vertical, corners = first, [], []
        while not corners or edge != first:
            seen.add(edge)
            y, x, side = edge
            if side in (1, 3):
                vertical.append((x, y - (side == 3)))
            y, x = y + EDGES[side][2][0], x + EDGES[side][2][1]
            turns = ((y, x, (side + turn) % 4) for turn in (1, 0, 3))  # to the right, if possible
            edge = next(turn for turn in turns if turn in edges)
            if edge[2] != side:
                corners.append((x, y))
        yield sorted(vertical), corners
