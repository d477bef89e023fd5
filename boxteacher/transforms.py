"""What happens to an image on its way to the network: its geometry (resize, crop, flip), which
boxes and masks follow, and the colors of the student's copy.

N images · G boxes of an image · h, w pixels of an image · H, W pixels of the padded images
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from pycocotools import mask as rle_codec
from torch import Tensor

from .masks import decode_mask

# --- geometry -------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """What may happen to an image: resize, then crop, then flip."""

    sizes: tuple[int, ...] = ()  # short sides, one drawn per image
    max_size: int = 0  # long side at most; 0: no limit
    scales: tuple[float, ...] = ()  # if given: factors, one drawn per image; sizes do not count
    crop: int = 0  # side of a square at a random place; 0: no crop
    flip: bool = False  # half of the images


class View(NamedTuple):
    """What does happen to one image: maps the original's pixels, boxes and masks to [h, w]."""

    original: tuple[int, int]  # height, width
    resized: tuple[int, int]
    window: tuple[int, int, int, int]  # top, left, h, w in the resized image
    flip: bool

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] -> [h, w, 3]: PIL's bilinear filter, in the window only."""
        (height, width), (y_scale, x_scale) = self.original, self._scale()
        top, left, h, w = self.window
        right, bottom = min((left + w) / x_scale, width), min((top + h) / y_scale, height)
        source = (left / x_scale, top / y_scale, right, bottom)
        view = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR, source))
        return view[:, ::-1] if self.flip else view

    def padded(self, pixels: np.ndarray) -> Tensor:
        """What `image` gives, as the network takes it: uint8 [1, 3, H, W], with zeros up to
        multiples of 32."""
        image = torch.from_numpy(self.image(pixels).copy()).permute(2, 0, 1)
        return F.pad(image, (0, -self.window[3] % 32, 0, -self.window[2] % 32))[None]

    def boxes(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[G, 4] -> [G, 4] clipped to the view, and bool [G]: which to keep.

        A box is kept if its center is in view, or if 30 % of its area is, and 4 pixels (or all of
        a smaller side) both ways.
        """
        (y_scale, x_scale), (top, left, h, w) = self._scale(), self.window
        full = boxes * ([x_scale, y_scale] * 2) - ([left, top] * 2)
        seen = full.clip(0, [w, h] * 2)
        # Which are seen well enough, before the flip changes sides.
        center = (full[:, :2] + full[:, 2:]) / 2
        full_sides, seen_sides = full[:, 2:] - full[:, :2], seen[:, 2:] - seen[:, :2]
        is_large = (seen_sides >= full_sides.clip(max=4)).all(1)
        is_large &= seen_sides.prod(1) >= 0.3 * full_sides.prod(1)
        kept = is_large | ((center >= 0) & (center <= [w, h])).all(1)
        if self.flip:
            seen[:, [0, 2]] = w - seen[:, [2, 0]]
        return seen, kept

    def mask(self, segmentation: list | dict) -> np.ndarray:
        """-> bool [h, w]. Polygons are scaled, then rasterized. Run-length codes are resized."""
        y_scale, x_scale = self._scale()
        top, left, h, w = self.window
        if isinstance(segmentation, list):
            points = [np.reshape(polygon, (-1, 2)) * (x_scale, y_scale) for polygon in segmentation]
            codes = rle_codec.frPyObjects([p.ravel().tolist() for p in points], *self.resized)
            mask = decode_mask(rle_codec.merge(codes))[top : top + h, left : left + w]
        else:  # the original pixel nearest to each pixel's center
            rows = ((np.arange(top, top + h) + 0.5) / y_scale).astype(int)
            columns = ((np.arange(left, left + w) + 0.5) / x_scale).astype(int)
            mask = decode_mask(segmentation)[rows][:, columns]
        return mask[:, ::-1] if self.flip else mask

    def _scale(self) -> tuple[float, float]:
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]


def resized_size(
    height: int, width: int, short_side: int, max_size: int = 0, factor: float = 0
) -> tuple[int, int]:
    """New (height, width). The short side becomes `short_side`, or both grow by `factor` if given.
    Then both shrink until the long one is at most max_size (0: no limit)."""
    if factor:
        new_height, new_width = factor * height, factor * width
    elif height < width:
        new_height, new_width = short_side, short_side / height * width
    else:
        new_height, new_width = short_side / width * height, short_side
    shrink = max_size / max(new_height, new_width) if max_size else 1
    if shrink < 1:
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def draw_view(
    geometry: Geometry, original: tuple[int, int], boxes: np.ndarray, rng: np.random.Generator
) -> View:
    """Draw from the geometry. A crop shows the center of one of the boxes [G, 4], at random,
    and needs one at least. Boxes lie in the image."""
    # Flip and size.
    flip = geometry.flip and rng.random() < 0.5
    short_side = 0 if geometry.scales else int(rng.choice(geometry.sizes))
    factor = float(rng.choice(geometry.scales)) if geometry.scales else 0
    resized = resized_size(*original, short_side, geometry.max_size, factor)
    if not geometry.crop:
        return View(original, resized, (0, 0, *resized), flip)

    # A box, and a place for the crop such that it shows the box's center.
    sides = [min(geometry.crop, side) for side in resized]
    box = boxes[rng.integers(len(boxes))]
    start = []
    for axis, side in enumerate(sides):  # y, then x
        center = (box[1 - axis] + box[3 - axis]) / 2 * resized[axis] / original[axis]
        low = max(0, math.ceil(center - side))
        high = min(resized[axis] - side, math.floor(center))
        start.append(int(rng.integers(low, high + 1)))
    return View(original, resized, (*start, *sides), flip)


# --- color augmentation ---------------------------------------------------------------------------


class Strength(NamedTuple):
    jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    jitter_probability: float
    gray_probability: float
    blur_probability: float


STRENGTHS = {
    "none": Strength((0, 0, 0, 0), 0, 0, 0),
    "weak": Strength((0.2, 0.2, 0.2, 0.1), 0.2, 0, 0),
    "strong": Strength((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0),
    "strong_blur": Strength((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5),
}
DRAWS_PER_IMAGE = 12


def augment(
    images: Tensor,
    sizes: list[tuple[int, int]],
    strength: str,
    generator: torch.Generator,
    skip: int = 0,
) -> Tensor:
    """Other colors: jitter in random order, grayscale, blur of kernel 3 (BoxTeacher).

    uint8 [N, 3, H, W] -> the same. Each image is treated without its padding, which stays 0.
    `strength` is one of STRENGTHS. Every image uses DRAWS_PER_IMAGE random numbers, made on the CPU
    so that nothing waits for a GPU. `skip` images come before these: rank r skips the images of the
    ranks before it, so N ranks draw what one process would draw.
    """
    draws = torch.rand(skip + len(images), DRAWS_PER_IMAGE, generator=generator)[skip:].tolist()
    augmented = images.clone()
    for image, (h, w), numbers in zip(augmented, sizes, draws, strict=True):
        image[:, :h, :w] = _augment_image(image[:, :h, :w], STRENGTHS[strength], numbers)
    return augmented


def _augment_image(image: Tensor, strength: Strength, draws: list[float]) -> Tensor:
    """uint8 [3, h, w] -> the same. Each of the DRAWS_PER_IMAGE `draws` is in 0..1."""
    amounts, order, (do_jitter, do_gray, do_blur, sigma) = draws[:4], draws[4:8], draws[8:]
    if do_jitter < strength.jitter_probability:
        adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
        for k in sorted(range(4), key=order.__getitem__):
            change = (2 * amounts[k] - 1) * strength.jitter[k]
            image = adjust[k](image, change if adjust[k] is tvf.adjust_hue else 1 + change)
    if do_gray < strength.gray_probability:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    if do_blur < strength.blur_probability and min(image.shape[1:]) > 1:  # it reflects one pixel
        image = tvf.gaussian_blur(image, [3, 3], [0.1 + 1.9 * sigma] * 2)
    return image
