"""Instances drawn over their image, and sheets of such pictures.

Pictures are resized first and drawn on afterwards, so lines and text are crisp at any image size.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from html import escape
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from .errors import printable
from .files import whole_file
from .masks import decode_mask, run_lengths

Color = tuple[int, int, int]  # RGB, 0..255
Box = tuple[int, int, int, int]  # left, top, right, bottom: its outermost pixels
Numbers = Sequence[float] | Tensor | np.ndarray
Points = list[tuple[float, float]]

NEUTRAL: Color = (160, 160, 160)  # for what has no counterpart: no instance_color is gray
FILL, RIM = 0.5, 0.9  # share of the color inside, of the pale rim, at opacity 1
MAX_INSTANCES, MAX_NAME = 500, 24  # in one picture; characters
MAX_CAPTIONS, SMALL = 15, 50  # instances, and a box's side: captions would hide more and smaller
TILE, GAP, TITLE, FOOTER = 384, 8, 32, 28  # longest side of a picture; space; heights of text
MAX_WIDTH, MAX_HEIGHT = 1600, 1400  # of a sheet, so that a screen shows all of it
CHART_WIDTH, CHART_HEIGHT = 400, 230
LEFT, TOP, BOTTOM = 48, 26, 22  # margins of a chart


def save_picture(picture: Image.Image, path: Path) -> None:
    """In the format that the file's ending names. Raises WriteError."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    with whole_file(path) as file:
        picture.save(file, kind, quality=85)


def instance_color(index: int) -> Color:
    """RGB of instance `index`: hues a golden-ratio turn apart, so that neighbors differ much."""
    saturation = (0.85, 0.5, 0.7)[index % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.02 + index * 0.618034) % 1, saturation, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_instances(
    image: Tensor | np.ndarray,
    boxes: Tensor | np.ndarray | None,
    masks: Tensor | np.ndarray | Sequence[dict] | None,
    labels: Numbers,
    class_names: Sequence[str],
    scores: Numbers | None = None,
    opacity: float | Numbers = 1.0,
    side: int | None = None,
    colors: Sequence[Color] | None = None,
) -> Image.Image:
    """One color per instance: its mask with a firm rim, its box, its class (if several) and score.

    The first instance's box lies on top. Of more than 500 instances the first 500 are drawn, and
    the picture says so. A caption takes a free place at its box, or it is left out. With more than
    15 instances there are no captions, and lines are thinner.

    image    uint8 RGB: a tensor [3, H, W] or an array [H, W, 3]
    boxes    [D, 4] xyxy in the image's pixels, or None: no boxes, no text
    masks    [D, h, w] bool or probabilities (drawn where > 0.5) on any grid over the image, or
             D run-length codes, or None
    labels   [D] in 0..C-1; class_names: C names
    opacity  of the masks, 0..1: one number or [D]
    side     resize the picture so that its long side has this many pixels (default: as it is)
    colors   [D] RGB (default: instance_color of 0, 1, ...)
    """
    picture = _to_pil(image)
    scale = side / max(picture.size) if side else 1.0
    picture = _fit(picture, side or max(picture.size))
    draw, total = ImageDraw.Draw(picture), len(labels)
    count, line_width = min(total, MAX_INSTANCES), 2 if total <= MAX_CAPTIONS else 1
    colors = [instance_color(i) for i in range(count)] if colors is None else colors[:count]
    if masks is not None:
        opacities = torch.as_tensor(opacity).expand(total).tolist()
        areas = [_inside(mask).sum() for mask in masks[:count]]
        # Large instances first, so that small ones stay in sight.
        for i in sorted(range(count), key=areas.__getitem__, reverse=True):
            _tint(picture, _inside(masks[i]), opacities[i], colors[i], line_width)
    if boxes is not None:
        corners = (scale * torch.as_tensor(boxes)[:count].reshape(-1, 4)).round().int().tolist()
        outlines = [(x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)) for x1, y1, x2, y2 in corners]
        for outline, color in reversed([*zip(outlines, colors, strict=True)]):
            draw.rectangle(outline, outline=color, width=line_width)
        if total <= MAX_CAPTIONS:
            _draw_captions(picture, outlines, _captions(labels, class_names, scores), colors)
    if count < total:
        draw.font, place = ImageFont.load_default(12), (4, picture.height - 17)
        draw.text(place, f"{count} of {total} drawn", stroke_width=2, stroke_fill="black")
    return picture


def instance_map(codes: Sequence[dict], size: tuple[int, int]) -> np.ndarray:
    """uint16 [h, w]: 0, or the number of the instance, from 1. The smaller one lies on top."""
    runs = [run_lengths(code) for code in codes]  # off and on in turn, down the columns
    ids = np.zeros(size[::-1], dtype=np.uint16)
    for k in sorted(range(len(runs)), key=lambda k: -runs[k][1::2].sum()):
        ends = runs[k].cumsum().tolist()
        for start, stop in zip(ends[::2], ends[1::2], strict=False):
            ids.reshape(-1)[start:stop] = k + 1
    return ids.T


def tint(image: Tensor, side: int, layers: Sequence[tuple[Tensor, Color]]) -> Image.Image:
    """The image, uint8 [3, h, w], in gray, with a long side of `side` pixels. It is colored where
    the layers' maps, [H4, W4] in 0..1 on the stride-4 grid, are high."""
    gray = image.float().mean(0) * 0.6 + 40
    shown = gray[None].repeat(3, 1, 1)
    for share, color in layers:
        share = share.repeat_interleave(4, 0).repeat_interleave(4, 1)[: len(gray), : gray.shape[1]]
        shown = shown + share * (shown.new_tensor(color)[:, None, None] - shown)
    scale = side / max(image.shape)
    picture = Image.fromarray(shown.byte().permute(1, 2, 0).cpu().numpy())
    size = [max(1, round(length * scale)) for length in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST)


def paint_instance_map(
    image: np.ndarray, ids: np.ndarray, colors: Sequence[Color], side: int
) -> Image.Image:
    """The image, uint8 RGB [h, w, 3], with a long side of `side` pixels, and color k - 1 where the
    map `ids` [h, w] of whole numbers is k. 0 is background. Rims are firm. The cost does not depend
    on the number of instances."""
    picture = _fit(_to_pil(image), side)
    rows = (np.arange(picture.height) + 0.5) * ids.shape[0] / picture.height
    columns = (np.arange(picture.width) + 0.5) * ids.shape[1] / picture.width
    ids = np.pad(ids[rows.astype(int)[:, None], columns.astype(int)], 2, mode="edge")
    center = ids[2:-2, 2:-2]
    others = (ids[:-4, 2:-2], ids[4:, 2:-2], ids[2:-2, :-4], ids[2:-2, 4:])
    is_rim = np.any([center != other for other in others], axis=0)[..., None]
    color = np.array([(0, 0, 0), *colors], dtype=np.float32)[center]
    color, share = np.where(is_rim, (color + 255) / 2, color), np.where(is_rim, RIM, FILL)
    gray = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    painted = np.where(center[..., None] > 0, gray + share * (color - gray), np.asarray(picture))
    return Image.fromarray(painted.astype(np.uint8))


def with_legend(picture: Image.Image, entries: Sequence[tuple[str, Color | None]]) -> Image.Image:
    """The picture above a strip with texts, each after a patch of its color (None: no patch)."""
    font, line, places, x, y = ImageFont.load_default(14), 22, [], GAP, GAP
    draw = ImageDraw.Draw(picture)
    for text, color in entries:
        text, patch = printable(text, MAX_NAME) or "?", 20 if color else 0
        width = patch + round(draw.textlength(text, font)) + 2 * GAP
        if x > GAP and x + width > picture.width:
            x, y = GAP, y + line
        places.append((x, y, patch, text, color))
        x += width
    whole = Image.new("RGB", (picture.width, picture.height + y + line), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for x, y, patch, text, color in places:
        y += picture.height
        if color:
            draw.rectangle((x, y, x + 14, y + 14), color)
        draw.text((x + patch, y + 7), text, "black", font, "lm")
    return whole


def sheet_side(row_heights: Sequence[float], columns: int) -> int:
    """Long side of each picture on a sheet that fits a screen. row_heights: of each row's pictures,
    as a share of their long side."""
    room = MAX_HEIGHT - TITLE - FOOTER - GAP * len(row_heights)
    width = (MAX_WIDTH - GAP) // max(1, columns) - GAP
    return max(32, int(min(TILE, width, room / max(1, sum(row_heights)))))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str],
    footer: str = "",
    side: int | None = None,
) -> Image.Image:
    """Rows of pictures under column titles, all with one long side (default: their sheet_side)."""
    columns = len(column_titles)
    if any(len(row) != columns for row in rows):
        raise ValueError(f"contact_sheet: {columns} titles, but a row of fewer or more pictures")
    tile = side or sheet_side([max(p.height / max(p.size) for p in row) for row in rows], columns)
    fitted = [[_fit(picture, tile) for picture in row] for row in rows]
    heights = [max(picture.height for picture in row) for row in fitted]

    sheet_height = TITLE + sum(heights) + GAP * len(rows) + (FOOTER if footer else 0)
    sheet = Image.new("RGB", (GAP + columns * (tile + GAP), sheet_height), "white")
    draw, y = ImageDraw.Draw(sheet), TITLE
    for column, title in enumerate(column_titles):
        center = (GAP + column * (tile + GAP) + tile / 2, TITLE / 2)
        draw.text(center, title, "black", ImageFont.load_default(17), "mm")
    for row, height in zip(fitted, heights, strict=True):
        for column, picture in enumerate(row):
            left = GAP + column * (tile + GAP) + (tile - picture.width) // 2
            sheet.paste(picture, (left, y + (height - picture.height) // 2))
        y += height + GAP
    draw.text((GAP, y), footer, "black", ImageFont.load_default(13))
    return sheet


def _to_pil(image: Tensor | np.ndarray) -> Image.Image:
    array = image.movedim(0, -1).cpu().numpy() if isinstance(image, Tensor) else image
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"draw_instances: {image.dtype} {list(image.shape)} is no uint8 RGB image")
    return Image.fromarray(np.ascontiguousarray(array))


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """The picture with a long side of `side` pixels (PIL's bicubic is antialiased downwards)."""
    scale = side / max(picture.size)
    size = [max(1, round(scale * length)) for length in picture.size]
    return picture.resize(size, Image.Resampling.BICUBIC)


def _inside(mask: Tensor | np.ndarray | dict) -> np.ndarray:
    """Where a mask is drawn, bool [h, w]."""
    if isinstance(mask, dict):
        return decode_mask(mask)
    return (torch.as_tensor(mask) > 0.5).cpu().numpy()


def _tint(
    picture: Image.Image, is_inside: np.ndarray, opacity: float, color: Color, rim_width: int
) -> None:
    """Blend the color in where the mask is. The image turns gray there, or its own colors would mix
    in. (torchvision's draw_segmentation_masks has neither rims nor an opacity of each mask.)"""
    mask = _resize_mask(Image.fromarray(255 * is_inside.astype(np.uint8)), picture.size)
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    window = (left - rim_width, top - rim_width, right + rim_width, bottom + rim_width)
    mask, gray = mask.crop(window), picture.crop(window).convert("L").convert("RGB")
    core = mask.filter(ImageFilter.MinFilter(2 * rim_width + 1))  # eroded
    rim, pale = ImageChops.subtract(mask, core), tuple((value + 255) // 2 for value in color)
    for part, part_color, share in ((core, color, FILL), (rim, pale, RIM)):
        tinted = Image.blend(gray, Image.new("RGB", gray.size, part_color), share)
        picture.paste(tinted, window, part.point([round(opacity * n) for n in range(256)]))


def _resize_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask of 0 and 255 at the picture's size. The steps of a coarser grid become smooth lines.
    Edges rise from 0 to 255 within about a pixel."""
    if mask.size == size:
        return mask
    scale = max(size) / max(mask.size)
    if scale > 1:
        mask = mask.filter(ImageFilter.GaussianBlur(0.7))
    mask = mask.resize(size, Image.Resampling.BICUBIC)
    highest = max(1, mask.getextrema()[1])  # under 255 for what is smaller than the blur
    slope = 1.5 * max(1.0, scale)
    curve = (127.5 + 255 * slope * (value / highest - 0.5) for value in range(256))
    return mask.point([round(min(max(value, 0), 255)) for value in curve])


def _captions(labels: Numbers, class_names: Sequence[str], scores: Numbers | None) -> list[str]:
    """Class and score of each instance, as far as there are several classes, and scores."""
    captions = []
    for i, label in enumerate(torch.as_tensor(labels).tolist()):
        name = printable(class_names[label], MAX_NAME) or "?"
        score = [f"{float(scores[i]):.2f}"] if scores is not None else []
        captions.append(" ".join([name] * (len(class_names) > 1) + score))
    return captions


def _draw_captions(
    picture: Image.Image, boxes: Sequence[Box], captions: Sequence[str], colors: Sequence[Color]
) -> None:
    """Captions above, below or inside their boxes, where they hide no other caption and no small
    box. A caption without such a place is left out."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    free = Image.new("L", picture.size, 1)
    for x1, y1, x2, y2 in boxes:
        if min(x2 - x1, y2 - y1) < SMALL:
            free.paste(0, (x1, y1, x2 + 1, y2 + 1))
    for (x1, y1, x2, y2), caption, color in zip(boxes, captions, colors, strict=True):
        width, height = round(draw.textlength(caption, font)) + 4, 15
        for y, x in product((y1 - height, y2 + 1, y1, y2 + 1 - height), (x1, x2 + 1 - width)):
            spot = (x, y, x + width, y + height)
            if caption and free.crop(spot).getextrema()[0]:  # 0 outside of the picture, too
                free.paste(0, spot)
                picture.paste(color, spot)
                draw.text((x + 2, y), caption, "black", font)
                break


# --- curves, as SVG -----------------------------------------------------------------------------


def ticks(low: float, high: float) -> list[float]:
    """Four round numbers or so from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (1, 2, 5) if (high - low) / (m * step) <= 5), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def smooth(points: Points) -> Points:
    """Means of neighboring points, about 40 in all if there are many."""
    size = max(len(points) // 40, 1)
    parts = [points[k : k + size] for k in range(0, len(points), size)]
    return [tuple(sum(v) / len(v) for v in zip(*part, strict=True)) for part in parts]


def chart(title: str, curves: dict[str, tuple[str, Points]]) -> str:
    """Curves by name, each with its color, from x = 0 on, as SVG. Pale: all points. Firm: means of
    neighbors. An empty text if there are no points."""
    points = [point for _, line in curves.values() for point in line]
    if not points:
        return ""
    values = sorted(y for _, y in points)
    cut = len(values) // 100  # a few outliers may leave the picture
    low, high = min(0.0, values[cut]), values[len(values) - 1 - cut]
    right, high = max(*(x for x, _ in points), 1), high if high > low else low + 1
    width, height = CHART_WIDTH - LEFT - 10, CHART_HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        up = min(max((y - low) / (high - low), 0), 1)
        return f"{LEFT + x / right * width:.1f},{TOP + (1 - up) * height:.1f}"

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    for y in ticks(low, high):
        at = place(0, y).split(",")[1]
        parts.append(f'<path d="M{LEFT} {at}h{width}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{y:.4g}</text>')
    for x in ticks(0, right):
        at = place(x, low).split(",")[0]
        parts.append(f'<text x="{at}" y="{CHART_HEIGHT - 6}" text-anchor="middle">{x:g}</text>')
    for name, (color, line) in curves.items():
        for some, look in ((line, 'opacity="0.25"'), (smooth(line), 'stroke-width="2"')):
            path = " ".join(place(x, y) for x, y in some)
            note = f"<title>{escape(name)}</title>"
            if len(some) == 1:
                x, y = path.split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}">{note}</circle>')
            else:
                line_look = f'fill="none" stroke="{color}" {look}'
                parts.append(f'<polyline points="{path}" {line_look}>{note}</polyline>')
    size = f'width="{CHART_WIDTH}" height="{CHART_HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
