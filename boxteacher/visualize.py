"""Instances drawn over their image, and sheets of such pictures.

Pictures are resized first and drawn on afterwards: lines and text are crisp at any image size.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FILL, RIM = 0.5, 0.9  # share of the color inside, of the pale rim, at opacity 1
MAX_CAPTIONS = 15  # with more instances than this, captions would hide them
TILE = 384  # side of a picture on a sheet
GAP = 8
MAX_WIDTH = 1600


def instance_color(index: int) -> tuple[int, int, int]:
    """RGB of instance `index`: hues a golden-ratio turn apart, so that neighbors differ much."""
    saturation = (0.85, 0.5, 0.7)[index % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.02 + index * 0.618034) % 1, saturation, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_instances(
    image: Tensor | np.ndarray,
    boxes: Tensor | np.ndarray | None,
    masks: Tensor | np.ndarray | None,
    labels: Sequence[int] | Tensor | np.ndarray,
    class_names: Sequence[str],
    scores: Sequence[float] | Tensor | np.ndarray | None = None,
    opacity: float | Sequence[float] | Tensor | np.ndarray = 1.0,
    side: int | None = None,
) -> Image.Image:
    """One color per instance: its mask with a firm rim, its box, its class (if several) and score.

    image    uint8 [3, H, W] or [H, W, 3], RGB
    boxes    [D, 4] xyxy in the image's pixels, or None: no boxes, no text
    masks    [D, h, w] bool or probabilities (drawn where > 0.5) on any grid over the image, or None
    labels   [D] in 0..C-1; class_names: C names
    opacity  of the masks, 0..1: one number or [D]
    side     resize the picture so that its long side has this many pixels (default: as it is)
    """
    picture = _to_pil(image)
    scale = side / max(picture.size) if side else 1.0
    picture = _fit(picture, side or max(picture.size))
    if masks is not None:
        picture = _tint(picture, torch.as_tensor(masks), opacity)
    if boxes is not None:
        corners = scale * torch.as_tensor(boxes).reshape(-1, 4).double().cpu()
        texts = _captions(labels, class_names, scores)
        _draw_boxes(picture, corners.tolist(), texts)
    return picture


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], column_titles: Sequence[str]
) -> Image.Image:
    """Rows of pictures under column titles, fitted into tiles of one size; at most 1600 px wide."""
    columns = len(column_titles)
    if any(len(row) != columns for row in rows):
        lengths = [len(row) for row in rows]
        raise ValueError(f"contact_sheet: {columns} titles, but rows of {lengths} pictures")
    tile = min(TILE, (MAX_WIDTH - GAP) // max(1, columns) - GAP)
    fitted = [[_fit(picture, tile) for picture in row] for row in rows]
    heights = [max((picture.height for picture in row), default=0) for row in fitted]
    font, title_height = ImageFont.load_default(size=18), 32

    sheet_height = title_height + sum(heights) + GAP * len(rows)
    sheet = Image.new("RGB", (GAP + columns * (tile + GAP), sheet_height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        center = GAP + column * (tile + GAP) + tile / 2
        draw.text((center, title_height / 2), title, fill=(30, 30, 30), font=font, anchor="mm")
    y = title_height
    for row, height in zip(fitted, heights, strict=True):
        for column, picture in enumerate(row):
            left = GAP + column * (tile + GAP) + (tile - picture.width) // 2
            sheet.paste(picture, (left, y + (height - picture.height) // 2))
        y += height + GAP
    return sheet


def _to_pil(image: Tensor | np.ndarray) -> Image.Image:
    array = image.cpu().numpy() if isinstance(image, Tensor) else image
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise ValueError(
            f"draw_instances: image must be uint8 [3, H, W] or [H, W, 3], not "
            f"{array.dtype} {list(array.shape)}"
        )
    if array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array))


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """The picture with a long side of `side` pixels (PIL's bicubic is antialiased downwards)."""
    scale = side / max(picture.size)
    if scale == 1:
        return picture
    size = [max(1, round(scale * length)) for length in picture.size]
    return picture.resize(size, Image.Resampling.BICUBIC)


def _tint(
    picture: Image.Image,
    masks: Tensor,
    opacity: float | Sequence[float] | Tensor | np.ndarray,
) -> Image.Image:
    """Blend every mask's color in, large instances first, so that small ones stay in sight.

    torchvision's draw_segmentation_masks has one alpha for all; here each instance has its own.
    """
    count = len(masks)
    opacities = torch.as_tensor(opacity, dtype=torch.float32).cpu().expand(count).tolist()
    canvas = torch.from_numpy(np.array(picture)).float()  # [H, W, 3]
    height, width = canvas.shape[:2]
    is_on_grid = masks.shape[-2:] == (height, width)
    areas = masks.flatten(1).sum(1) if count else torch.zeros(0)
    for i in areas.argsort(descending=True, stable=True).tolist():
        mask = masks[i].float().cpu()[None, None]
        if not is_on_grid:
            mask = F.interpolate(mask, size=(height, width), mode="bilinear", antialias=True)
        inside = (mask > 0.5).float()
        core = 1 - F.max_pool2d(1 - inside, 5, stride=1, padding=2)  # eroded by two pixels
        core, rim = core[0, 0, :, :, None], (inside - core)[0, 0, :, :, None]
        color = torch.tensor(instance_color(i))
        canvas += opacities[i] * FILL * core * (color - canvas)
        canvas += opacities[i] * RIM * rim * ((color + 255) / 2 - canvas)
    return Image.fromarray(canvas.round().clamp(0, 255).byte().numpy())


def _captions(
    labels: Sequence[int] | Tensor | np.ndarray,
    class_names: Sequence[str],
    scores: Sequence[float] | Tensor | np.ndarray | None,
) -> list[str]:
    """A class and a score for each instance, as far as there are several classes, and scores."""
    label_list = torch.as_tensor(labels).tolist()
    names = [class_names[label] if len(class_names) > 1 else "" for label in label_list]
    if scores is None:
        return names
    values = torch.as_tensor(scores).tolist()
    return [f"{name} {value:.2f}".strip() for name, value in zip(names, values, strict=True)]


def _draw_boxes(picture: Image.Image, boxes_xyxy: list[list[float]], captions: list[str]) -> None:
    """Boxes, then captions over all of them, at their boxes' top left corners, in the picture."""
    draw = ImageDraw.Draw(picture)
    for i, (x1, y1, x2, y2) in enumerate(boxes_xyxy):
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        draw.rectangle(corners, outline=instance_color(i), width=2)
    if len(captions) > MAX_CAPTIONS:
        return
    font = ImageFont.load_default(size=12)
    for i, (x1, y1, _, _) in enumerate(boxes_xyxy):
        if not captions[i]:
            continue
        _, _, text_width, text_height = draw.textbbox((0, 0), captions[i], font=font)
        x = max(0, min(x1, picture.width - text_width - 4))
        y = max(0, min(y1 - text_height - 2, picture.height - text_height - 2))
        draw.rectangle((x, y, x + text_width + 4, y + text_height + 2), fill=instance_color(i))
        draw.text((x + 2, y), captions[i], fill="black", font=font)
