"""The built-in data: textured shapes that a box does not give away, from (seed, index), no files.

Why these shapes: a filled box, or the ellipse inscribed in it, is a poor mask for a rotated star, a
ring, a crescent, a cross, a triangle or a lobed blob, so a mask AP on this set says something about
learning masks from boxes (tests measure both baselines).

How: `_layout` draws the objects' outlines from one random stream, `make_shapes_image` paints them
from another, so that annotations (`make_shapes_coco`) cost no painting. Painting happens in CIE Lab
(D65), the space in which BoxInst (arXiv 2012.02310, section 3.2) compares colors: "visibly
different" is then a distance, see `_object_color`.

# S side of the square image · G objects in painting order (later ones cover earlier ones)
# h, w an object's patch · K points or colors
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

CLASS_NAMES = ("star", "ring", "crescent", "cross", "triangle", "blob")

SIDES = (0.16, 0.96)  # longer side of an object's box as a share of S, log-uniform: a 1:6 range
OBJECTS = (2, 6)  # objects tried per image; one that finds no room is left out
MIN_VISIBLE = 0.6  # share of every object that stays visible in the end
MIN_INSIDE = 0.85  # share of every object that lies inside the image
MIN_CONTRAST = 30.0  # Lab distance that an object's color should keep from what surrounds it
SUPERSAMPLING = 4  # edges are antialiased by drawing this much larger

Patch = tuple[tuple[slice, slice], np.ndarray]  # where in the image, opacity [h, w] in [0, 1]


# --------------------------------------------------------------------------------------------------
# Geometry
# --------------------------------------------------------------------------------------------------


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    """Points [K, 2] (x, y) from polar coordinates."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _outlines(name: str, rng: np.random.Generator) -> list[np.ndarray]:
    """A random specimen of a class, any scale: a polygon [K, 2], maybe another to cut out of it."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    if name == "star":
        spikes = int(rng.integers(5, 7))
        radius = np.where(np.arange(2 * spikes) % 2, rng.uniform(0.58, 0.68), 1.0)
        return [_polar(radius, np.arange(2 * spikes) * np.pi / spikes)]
    if name == "ring":
        return [_polar(1.0, turn), _polar(rng.uniform(0.36, 0.5), turn)]
    if name == "crescent":
        # The unit disc minus a disc of radius r at (d, 0); the circles meet at the tips.
        r, d = rng.uniform(0.6, 0.74), rng.uniform(0.6, 0.7)
        tip = np.arccos((1 + d * d - r * r) / (2 * d))
        inner_tip = np.pi - np.arccos(np.clip((r * r + d * d - 1) / (2 * r * d), -1, 1))
        outer = _polar(1.0, np.linspace(tip, 2 * np.pi - tip, 48))
        inner = _polar(r, np.linspace(2 * np.pi - inner_tip, inner_tip, 48)) + np.array([d, 0])
        return [np.concatenate([outer, inner])]
    if name == "cross":
        w = rng.uniform(0.38, 0.48)
        arm = np.array([(1, -w), (1, w), (w, w)])
        quarter_turn = np.array([(0, 1), (-1, 0)])
        turns = (np.linalg.matrix_power(quarter_turn, k) for k in range(4))
        return [np.concatenate([arm @ turn for turn in turns])]
    if name == "triangle":
        return [_polar(1.0, np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.3, 0.3, 3))]
    if name == "blob":
        radius = np.ones_like(turn)
        for lobes, strength in ((2, 0.25), (3, 0.3), (4, 0.12), (5, 0.08)):
            wave = np.cos(lobes * turn + rng.uniform(0, 2 * np.pi))
            radius += strength * rng.uniform(0.5, 1) * wave
        return [_polar(radius, turn)]
    raise ValueError(f"shapes: no class named {name!r}; there are {', '.join(CLASS_NAMES)}")


def _draw_object(name: str, side: float, rng: np.random.Generator) -> np.ndarray:
    """A specimen, stretched and rotated: opacity [h, w] in [0, 1] with max(h, w) = ceil(side)."""
    stretch, angle = rng.uniform(0.7, 1.0), rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    transform = np.array([[cos, sin], [-sin, cos]]) * [[1.0], [stretch]]
    outlines = [points @ transform for points in _outlines(name, rng)]
    low, high = outlines[0].min(0), outlines[0].max(0)
    scale = side / (high - low).max()
    w, h = np.ceil((high - low) * scale).astype(int)
    canvas = Image.new("L", (int(w) * SUPERSAMPLING, int(h) * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for points, fill in zip(outlines, (255, 0), strict=False):
        draw.polygon(((points - low) * scale * SUPERSAMPLING).ravel().tolist(), fill=fill)
    return np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255


def _layout(seed: int, index: int, size: int) -> tuple[list[Patch], np.ndarray, np.ndarray]:
    """Where everything is: a patch per object, visible masks bool [G, S, S], labels int64 [G].

    Objects are placed in painting order, roughly large to small. A place is refused if too much of
    the new object lies outside the image or if it would leave less than MIN_VISIBLE of an earlier
    one; after twelve tries the new object is left out.
    """
    rng = np.random.default_rng([seed, index, 0])
    count = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
    sides = size * np.exp(rng.uniform(*np.log(SIDES), count))
    sides = sides[np.argsort(-sides * np.exp(rng.normal(0, 0.4, count)))]
    top_object = np.full((size, size), -1, np.int64)
    patches: list[Patch] = []
    labels: list[int] = []
    areas: list[int] = []
    for side in sides:
        label = int(rng.integers(len(CLASS_NAMES)))
        opacity = _draw_object(CLASS_NAMES[label], side, rng)
        area = np.count_nonzero(opacity >= 0.5)
        h, w = opacity.shape
        for _ in range(12):
            top = int(rng.integers(-(h // 6), size - h + h // 6 + 1))
            left = int(rng.integers(-(w // 6), size - w + w // 6 + 1))
            y, x = max(top, 0), max(left, 0)
            inside = opacity[y - top : size - top, x - left : size - left]
            where = (slice(y, y + inside.shape[0]), slice(x, x + inside.shape[1]))
            solid = inside >= 0.5
            if np.count_nonzero(solid) < MIN_INSIDE * area:
                continue
            after = top_object.copy()
            after[where][solid] = len(labels)
            visible = np.bincount(after.ravel() + 1, minlength=len(labels) + 2)[1:]
            if np.all(visible >= MIN_VISIBLE * np.array([*areas, area])):
                top_object = after
                patches.append((where, inside))
                labels.append(label)
                areas.append(area)
                break
    masks = top_object == np.arange(len(labels))[:, None, None]
    return patches, masks, np.array(labels, np.int64)


# --------------------------------------------------------------------------------------------------
# Painting
# --------------------------------------------------------------------------------------------------


def _lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) -> sRGB (IEC 61966-2-1) uint8, both [..., 3]; clipped to what sRGB can show."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f * f * f, (f - 4 / 29) * (3 * (6 / 29) ** 2))
    linear = (xyz * _D65_WHITE).astype(np.float32) @ _XYZ_TO_RGB
    return _GAMMA[(np.clip(linear, 0, 1) * (len(_GAMMA) - 1) + 0.5).astype(np.int32)]


_D65_WHITE = np.array([0.95047, 1.0, 1.08883], np.float32)
_XYZ_TO_RGB = np.array(
    [
        [3.2404542, -0.9692660, 0.0556434],
        [-1.5371385, 1.8760108, -0.2040259],
        [-0.4985314, 0.0415560, 1.0572252],
    ],
    np.float32,
)
_LINEAR = np.linspace(0, 1, 4096)
_GAMMA = np.where(_LINEAR <= 0.0031308, 12.92 * _LINEAR, 1.055 * _LINEAR ** (1 / 2.4) - 0.055)
_GAMMA = (_GAMMA * 255 + 0.5).astype(np.uint8)  # a table: powers are slow


def _random_color(
    rng: np.random.Generator, chroma: tuple[float, float], label: int | None = None
) -> np.ndarray:
    """A Lab color [3] of medium lightness, chroma in the given range, and any hue, or one of the
    class's: a fifth of the circle, which overlaps those of other classes by a third.
    """
    hue = rng.uniform(0, 2 * np.pi)
    if label is not None:
        hue = 2 * np.pi * (label + rng.uniform(-0.6, 0.6)) / len(CLASS_NAMES)
    strength = rng.uniform(*chroma)
    return np.array(
        [rng.uniform(30, 85), strength * np.cos(hue), strength * np.sin(hue)], np.float32
    )


def _object_color(
    label: int, around: np.ndarray, used: list[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """A Lab color for an object whose surroundings have the colors `around` [K, 3].

    Usually it is one of its class's hues and keeps MIN_CONTRAST from nine tenths of its
    surroundings, sometimes it has the color of another object; now and then it is any color. As
    with fruit and cars, color hints at the class, and its edges at the mask; neither decides.
    """
    luck = rng.uniform()
    if luck < 0.08:
        return _random_color(rng, (20, 65))
    candidates = []
    if luck < 0.25 and used:
        candidates.append(used[rng.integers(len(used))])
    candidates += [_random_color(rng, (20, 65), label) for _ in range(6)]
    if len(around) == 0:  # the visible patch is covered entirely
        return candidates[0]
    distances = np.linalg.norm(around[None] - np.stack(candidates)[:, None], axis=-1)
    contrast = np.sort(distances, axis=1)[:, len(around) // 10]
    good = np.flatnonzero(contrast >= MIN_CONTRAST)
    return candidates[good[0] if len(good) else int(np.argmax(contrast))]


def _smooth_noise(rng: np.random.Generator, h: int, w: int, cell: float) -> np.ndarray:
    """Noise [h, w] of about unit size that varies over `cell` pixels."""
    coarse = rng.standard_normal((int(h / cell) + 2, int(w / cell) + 2), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC))


def _fill(color: np.ndarray, h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """A shaded, textured surface around `color` [3], Lab [h, w, 3]. Textures are of a few pixels:
    finer than the grid on which colors are compared, by their means over 4 x 4 pixels.
    """
    y = (np.arange(h, dtype=np.float32) - h / 2)[:, None]
    x = (np.arange(w, dtype=np.float32) - w / 2)[None, :]
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = x * cos + y * sin, y * cos - x * sin
    k = np.float32(2 * np.pi / rng.uniform(3, 6))
    kind = rng.choice(["plain", "stripes", "dots", "checks", "noise"])
    if kind == "stripes":
        pattern = np.tanh(2.5 * np.sin(k * u))
    elif kind == "dots":
        pattern = np.tanh(3 * (np.cos(k * u) + np.cos(k * v) - 0.8))
    elif kind == "checks":
        pattern = np.tanh(3 * np.sin(k * u) * np.sin(k * v))
    elif kind == "noise":
        pattern = _smooth_noise(rng, h, w, rng.uniform(1, 2.5))
    else:
        pattern = np.zeros((h, w), np.float32)
    contrast = rng.uniform(2, 6)
    tone = contrast * np.array([1, *rng.uniform(-0.6, 0.6, 2)], np.float32)
    shade = v * np.float32(2 * rng.uniform(1, 9) / max(h, w))
    surface = color + pattern[..., None] * tone
    surface[..., 0] += shade
    return surface


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A textured surface with drifting color and unlabeled lines and specks; Lab [S, S, 3]."""
    unit = size / 128
    lab = _fill(_random_color(rng, (0, 30)), size, size, rng)
    drift = rng.normal(0, 3, 3).astype(np.float32)
    lab += _smooth_noise(rng, size, size, size / 3)[..., None] * drift
    for _ in range(rng.integers(1, 3)):  # each round: one color
        canvas = Image.new("L", (2 * size, 2 * size))
        draw = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(0, 3)):
            ends = rng.uniform(0, 2 * size, 4).tolist()
            draw.line(ends, fill=255, width=max(1, round(unit * rng.uniform(1, 4))))
        for _ in range(rng.integers(0, 7)):
            x, y = rng.uniform(0, 2 * size, 2)
            r = unit * rng.uniform(1, 4)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        opacity = np.asarray(canvas.reduce(2), np.float32)[..., None] / 255
        lab += opacity * (_random_color(rng, (0, 35)) - lab)
    return lab


# --------------------------------------------------------------------------------------------------
# The data set
# --------------------------------------------------------------------------------------------------


def _check(seed: int, index: int, size: int) -> None:
    if seed < 0 or index < 0:
        raise ValueError(
            f"shapes: seed and index must not be negative, got seed={seed}, index={index}"
        )
    if size < 64:  # the smallest objects would be a few pixels
        raise ValueError(f"shapes: size must be at least 64 pixels, got {size}")


def make_shapes_image(
    seed: int, index: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image `index` of set `seed`: uint8 [S, S, 3] RGB, visible masks bool [G, S, S], labels [G].

    Labels (int64) index CLASS_NAMES; masks do not overlap. Raises ValueError for a negative seed or
    index, or a size under 64.
    """
    _check(seed, index, size)
    patches, masks, labels = _layout(seed, index, size)
    rng = np.random.default_rng([seed, index, 1])
    lab = _background(size, rng)
    used: list[np.ndarray] = []
    for label, ((rows, columns), opacity) in zip(labels.tolist(), patches, strict=True):
        below = lab[rows, columns]
        around = below[opacity < 0.5][::7]
        color = _object_color(label, around, used, rng)
        used.append(color)
        below += opacity[..., None] * (_fill(color, *opacity.shape, rng) - below)
    lab[..., 0] += rng.standard_normal((size, size), np.float32) * 1.5  # camera noise
    return _lab_to_rgb(lab), masks, labels


def _file_name(seed: int, index: int) -> str:
    return f"shapes-{seed}-{index}"


def make_shapes_coco(seed: int, count: int, size: int) -> dict:
    """Annotations of images 0..count-1 in COCO's format: the visible masks and their tight boxes.

    Masks are uncompressed RLE, boxes xywh in pixels, image ids index + 1, category ids label + 1.
    Nothing is painted; `load_shapes_image` does that when asked.
    """
    _check(seed, 0, size)
    images, annotations = [], []
    for index in range(count):
        images.append(
            {"id": index + 1, "file_name": _file_name(seed, index), "width": size, "height": size}
        )
        _, masks, labels = _layout(seed, index, size)
        for mask, label in zip(masks, labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": _tight_box_xywh(mask),
                    "area": int(np.count_nonzero(mask)),
                    "iscrowd": 0,
                    "segmentation": _uncompressed_rle(mask),
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _tight_box_xywh(mask: np.ndarray) -> list[float]:
    """[x, y, width, height] around a non-empty mask [H, W]; a single pixel has width, height 1."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    x, y = columns[0], rows[0]
    return [float(x), float(y), float(columns[-1] + 1 - x), float(rows[-1] + 1 - y)]


def _uncompressed_rle(mask: np.ndarray) -> dict:
    """COCO's run lengths of a mask [H, W]: down the columns, off and on in turn, off first."""
    pixels = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def load_shapes_image(seed: int, size: int) -> Callable[[dict], np.ndarray]:
    """A function from an image entry of `make_shapes_coco(seed, ., size)` to uint8 [S, S, 3] RGB.

    It can be pickled (for data loading processes) and raises ValueError for an entry of another set
    or size.
    """
    return functools.partial(_load_entry, seed, size)


def _load_entry(seed: int, size: int, entry: dict) -> np.ndarray:
    index = entry["id"] - 1
    made_for = (entry["file_name"], entry["width"], entry["height"])
    if made_for != (_file_name(seed, index), size, size):
        raise ValueError(
            f"shapes: image entry {made_for} is not from the set seed={seed}, size={size}"
        )
    return make_shapes_image(seed, index, size)[0]
