"""The built-in data: painted objects. Colors are alike across their outlines as often as on
photographs. Everything follows from (seed, index), there are no files.

Shapes: a filled box, or the ellipse inscribed in it, is a poor mask for a rotated star, a ring, a
crescent, a cross, a triangle or a lobed blob (tests measure both baselines).

Colors: BoxInst (arXiv 2012.02310, section 3.2) pulls neighbors of similar color into one mask. The
table says how often that is right, for 300 training images at their 192 pixels and for COCO's val
photographs at 800 (`python -m boxteacher.tools.inspect shapes --statistics`):

    of the pairs inside a box, in percent                  here     COCO
    across the mask's outline, look alike (leaks)           8.2      9.0
    inside the object, look alike                          32.1       30
    of the background, look alike                          34.9       32
    of all that look alike, cross the outline               6.2      1.8
    objects with over 25 % leaks                            6.5      3.4

The fourth row follows from the first three and from the share of pairs that cross an outline: 21 %
here, 6 % on COCO, where objects are larger on the stride-4 grid.

How: `_layout` draws outlines from one random stream, `make_shapes_image` paints them from another,
so annotations (`make_shapes_coco`) cost no painting. Colors are CIE Lab (D65), as in BoxInst.

S side of the square image · G objects in painting order (later ones cover earlier ones)
h, w an object's patch · K points or colors · O octaves of noise, from coarse to fine
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASS_NAMES = ("star", "ring", "crescent", "cross", "triangle", "blob")

SIDES = (0.17, 0.9)  # longer side of an object's box as a share of S, log-uniform: a 1:5 range
OBJECTS = (2, 6)  # objects tried per image; one that finds no room is left out
MIN_VISIBLE = 0.8  # share of every object that stays visible in the end
MIN_INSIDE = 0.9  # share of every object that lies inside the image
MIN_CONTRAST = 36.0  # Lab distance that an object's color should keep from what surrounds it
CELLS = np.array([3, 6, 12, 24, 48])  # of each octave of noise, along a side of the image
STRENGTHS = np.array([1.0, 1.0, 0.8, 0.6, 0.4])  # of the octaves
ROUGHNESS = (0.6, 5.0)  # of an image's noise, in Lab distances, log-uniform
PATTERNED = 0.45  # share of surfaces with stripes, dots or checks
COARSE = (4.0, 24.0)  # their period in pixels, log-uniform
FINE = (3.0, 4.0)  # another: nearly invisible to means over the stride-4 grid's cells
CAMOUFLAGED = 0.6  # share of objects that take the color of their surroundings in part
SUPERSAMPLING = 4  # edges are antialiased by drawing this much larger

Rng = np.random.Generator
Range = tuple[float, float]
Patch = tuple[tuple[slice, slice], np.ndarray]  # where in the image, opacity [h, w] in [0, 1]


# --- geometry -------------------------------------------------------------------------------------


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    """Points [K, 2] (x, y) from polar coordinates."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _outlines(name: str, rng: Rng) -> list[np.ndarray]:
    """A random specimen of a class, any scale: a polygon [K, 2], maybe another to cut out of it."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    if name == "star":
        spikes = int(rng.integers(5, 7))
        radius = np.where(np.arange(2 * spikes) % 2, rng.uniform(0.48, 0.58), 1.0)
        return [_polar(radius, np.arange(2 * spikes) * np.pi / spikes)]
    if name == "ring":
        return [_polar(1.0, turn), _polar(rng.uniform(0.42, 0.54), turn)]
    if name == "crescent":
        # The unit disc minus a disc of radius r at (d, 0). The circles meet at the tips.
        r, d = rng.uniform(0.6, 0.74), rng.uniform(0.6, 0.7)
        tip = np.arccos((1 + d * d - r * r) / (2 * d))
        inner_tip = np.pi - np.arccos(np.clip((r * r + d * d - 1) / (2 * r * d), -1, 1))
        outer = _polar(1.0, np.linspace(tip, 2 * np.pi - tip, 48))
        inner = _polar(r, np.linspace(2 * np.pi - inner_tip, inner_tip, 48)) + np.array([d, 0])
        return [np.concatenate([outer, inner])]
    if name == "cross":
        w = rng.uniform(0.35, 0.44)
        arm = np.array([(1, -w), (1, w), (w, w)])
        quarter_turn = np.array([(0, 1), (-1, 0)])
        turns = (np.linalg.matrix_power(quarter_turn, k) for k in range(4))
        return [np.concatenate([arm @ turn for turn in turns])]
    if name == "triangle":
        return [_polar(1.0, np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.2, 0.2, 3))]
    if name == "blob":
        radius = np.ones_like(turn)
        for lobes, strength in ((2, 0.35), (3, 0.15), (5, 0.2)):
            wave = np.cos(lobes * turn + rng.uniform(0, 2 * np.pi))
            radius += strength * rng.uniform(0.5, 1) * wave
        return [_polar(radius, turn)]
    raise ValueError(f"shapes: no class named {name!r}; there are {', '.join(CLASS_NAMES)}")


def _draw_object(name: str, side: float, rng: Rng) -> np.ndarray:
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
    one. After twelve tries the new object is left out.
    """
    rng = np.random.default_rng([seed, index, 0])
    count = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
    sides = size * np.exp(rng.uniform(*np.log(SIDES), count))
    sides = sides[np.argsort(-sides * np.exp(rng.normal(0, 0.4, count)))]
    top_object = np.full((size, size), -1, np.int64)
    patches: list[Patch] = []
    labels: list[int] = []
    areas, visible = np.zeros(0), np.zeros(0)  # of each object, in pixels
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
            covered = top_object[where][solid]
            left_over = visible - np.bincount(covered + 1, minlength=len(labels) + 1)[1:]
            if np.all(left_over >= MIN_VISIBLE * areas):
                top_object[where][solid] = len(labels)
                patches.append((where, inside))
                labels.append(label)
                areas = np.append(areas, area)
                visible = np.append(left_over, len(covered))
                break
    masks = top_object == np.arange(len(labels))[:, None, None]
    return patches, masks, np.array(labels, np.int64)


# --- painting -------------------------------------------------------------------------------------


def _lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) -> sRGB (IEC 61966-2-1) uint8, both [..., 3], clipped to what sRGB can show."""
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


def _random_color(rng: Rng, chroma: Range, turn: Range = (0, 1)) -> np.ndarray:
    """A Lab color [3] of medium lightness, chroma and hue (in turns) in the given ranges."""
    hue, strength = 2 * np.pi * rng.uniform(*turn), rng.uniform(*chroma)
    a, b = strength * np.cos(hue), strength * np.sin(hue)
    return np.array([rng.uniform(30, 85), a, b], np.float32)


def _object_color(label: int, around: np.ndarray, rng: Rng) -> np.ndarray:
    """A color in its class's sector of hues: the first of six that keeps MIN_CONTRAST from nine
    tenths of `around` [K, 3], or the one that comes closest to that.
    """
    turn = (label - 0.25) / len(CLASS_NAMES), (label + 0.25) / len(CLASS_NAMES)
    colors = np.stack([_random_color(rng, (35, 70), turn) for _ in range(6)])
    distances = np.linalg.norm(around[:, None] - colors, axis=-1)
    contrast = np.sort(distances, axis=0)[len(around) // 10]
    return colors[np.minimum(contrast, MIN_CONTRAST).argmax()]


def _octaves(size: int, rng: Rng) -> np.ndarray:
    """Smooth noise [O, S, S] of about unit size, each plane twice as fine as the one before."""
    planes = []
    for cells in CELLS:
        coarse = Image.fromarray(rng.standard_normal((cells + 2, cells + 2), np.float32))
        planes.append(np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(planes)


def _cut(octaves: np.ndarray, h: int, w: int, rng: Rng) -> np.ndarray:
    """A random piece [O, h, w] of the noise, mirrored at random."""
    y, x = rng.integers(octaves.shape[1] - h + 1), rng.integers(octaves.shape[2] - w + 1)
    flip_y, flip_x = rng.choice([-1, 1], 2)
    return octaves[:, y : y + h, x : x + w][:, ::flip_y, ::flip_x]


def _ramp(h: int, w: int, rng: Rng) -> np.ndarray:
    """A plane [h, w] that rises by 1 over the longer side, in a random direction, with mean 0."""
    angle = rng.uniform(0, 2 * np.pi)
    y = (np.arange(h, dtype=np.float32) - h / 2)[:, None] * np.float32(np.sin(angle) / max(h, w))
    x = (np.arange(w, dtype=np.float32) - w / 2)[None, :] * np.float32(np.cos(angle) / max(h, w))
    return y + x


def _surface(color: np.ndarray, noise: np.ndarray, roughness: float, rng: Rng) -> np.ndarray:
    """A shaded, textured surface around `color` [3], of noise [O, h, w], as Lab [h, w, 3]."""
    h, w = noise.shape[1:]
    tones = rng.normal(0, roughness, (len(noise), 3)) * STRENGTHS[:, None] * (1, 0.4, 0.4)
    surface = np.tensordot(noise, tones.astype(np.float32), (0, 0)) + color
    surface[..., 0] += _ramp(h, w, rng) * np.float32(rng.uniform(2, 20))
    if rng.uniform() < PATTERNED:
        surface += _pattern(h, w, COARSE, rng.uniform(2, 6), rng)
    return surface


def _pattern(h: int, w: int, periods: Range, contrast: float, rng: Rng) -> np.ndarray:
    """Stripes, dots or checks to add to a surface: Lab [h, w, 3] with a mean of about 0."""
    waves = np.float32(2 * np.pi * max(h, w) / np.exp(rng.uniform(*np.log(periods))))
    u, v = waves * _ramp(h, w, rng), waves * _ramp(h, w, rng)
    kind = rng.choice(["stripes", "dots", "checks"])
    if kind == "stripes":
        pattern = np.tanh(2.5 * np.sin(u))
    elif kind == "dots":
        pattern = np.tanh(3 * (np.cos(u) + np.cos(v) - 0.8)) + 0.45
    else:
        pattern = np.tanh(3 * np.sin(u) * np.sin(v))
    return pattern[..., None] * (contrast * np.array([1, *rng.uniform(-0.6, 0.6, 2)], np.float32))


def _camouflage(surface: np.ndarray, below: np.ndarray, front: np.ndarray, rng: Rng) -> None:
    """One side of a `surface` [h, w, 3] takes the colors of what lies `below` it [h, w, 3], without
    their detail. front [h, w] grows towards that side. Outlines stay visible there by their light
    and by a fine pattern: the eye can follow them, while means over 4 x 4 pixels are alike.
    """
    h, w = front.shape
    weight = (front - rng.uniform(-0.15, 0.1)) / rng.uniform(0.03, 0.25)  # a sharp or soft change
    weight = np.clip(weight + 0.5, 0, 1) * np.float32(rng.uniform(0.96, 1))
    channels = [Image.fromarray(np.ascontiguousarray(below[..., k])) for k in range(3)]
    coarse = [c.reduce(8).resize((w, h), Image.Resampling.BICUBIC) for c in channels]
    surface += weight[..., None] * (np.stack(coarse, -1) - surface)
    surface += _pattern(h, w, FINE, rng.uniform(5, 10), rng)


def _cast_shadow(lab: np.ndarray, patch: Patch, light: np.ndarray, depth: float) -> None:
    """Darken `lab` [S, S, 3] softly by an object's shadow. `light` (y, x) points to the light."""
    (rows, columns), opacity = patch
    quarter = -(-len(lab) // 4)
    canvas = Image.new("L", (quarter, quarter))
    y, x = np.rint((np.array([rows.start, columns.start]) - light * len(lab) / 40) / 4).astype(int)
    canvas.paste(Image.fromarray((opacity * 255).astype(np.uint8)).reduce(4), (int(x), int(y)))
    canvas = canvas.filter(ImageFilter.GaussianBlur(len(lab) / 160))
    soft = np.asarray(canvas.resize(lab.shape[:2], Image.Resampling.BILINEAR), np.float32)
    lab[..., 0] -= soft * np.float32(depth / 255)


def _rim(opacity: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Up to 1 along an object's edges towards the light, -1 along those away from it: [h, w]."""
    down, right = np.gradient(np.pad(opacity, 1))
    return -2 * (down * light[0] + right * light[1])[1:-1, 1:-1]


def _background(octaves: np.ndarray, roughness: float, rng: Rng) -> np.ndarray:
    """A textured surface with unlabeled lines and specks: Lab [S, S, 3]."""
    size = octaves.shape[1]
    lab = _surface(_random_color(rng, (0, 20)), octaves, roughness, rng)
    draw = ImageDraw.Draw(canvas := Image.new("L", (2 * size, 2 * size)))
    for _ in range(rng.integers(0, 3)):
        ends = rng.uniform(0, 2 * size, 4).tolist()
        draw.line(ends, fill=255, width=max(1, round(size * rng.uniform(0.008, 0.03))))
    for _ in range(rng.integers(0, 7)):
        x, y = rng.uniform(0, 2 * size, 2)
        r = size * rng.uniform(0.008, 0.03)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    opacity = np.asarray(canvas.reduce(2), np.float32)[..., None] / 255
    lab += opacity * (_random_color(rng, (0, 20)) - lab)
    return lab


# --- the data set ---------------------------------------------------------------------------------


def _check(seed: int, index: int, size: int) -> None:
    if seed < 0 or index < 0:
        raise ValueError(f"shapes: seed and index must not be negative, got {seed=}, {index=}")
    if size < 64:  # the smallest objects would be a few pixels
        raise ValueError(f"shapes: size must be at least 64 pixels, got {size}")


def make_shapes_image(seed: int, index: int, size: int) -> tuple[np.ndarray, ...]:
    """Image `index` of set `seed`: uint8 [S, S, 3] RGB, visible masks bool [G, S, S], labels [G].

    Labels (int64) index CLASS_NAMES. Masks do not overlap. Raises ValueError for a negative seed or
    index, or a size under 64.
    """
    _check(seed, index, size)
    patches, masks, labels = _layout(seed, index, size)
    rng = np.random.default_rng([seed, index, 1])
    octaves = _octaves(size, rng)
    roughness = np.exp(rng.uniform(*np.log(ROUGHNESS)))
    lab = _background(octaves, roughness, rng)
    light = _polar(1.0, rng.uniform(0, 2 * np.pi, 1)).astype(np.float32)[0, ::-1]  # y, x
    for label, patch in zip(labels.tolist(), patches, strict=True):
        (rows, columns), opacity = patch
        is_camouflaged = rng.uniform() < CAMOUFLAGED
        _cast_shadow(lab, patch, light, rng.uniform(0, 4 if is_camouflaged else 18))
        below = lab[rows, columns]
        color = _object_color(label, below[::4, ::4].reshape(-1, 3), rng)
        noise = _cut(octaves, *opacity.shape, rng)
        surface = _surface(color, noise, roughness * rng.uniform(0.7, 2), rng)
        if is_camouflaged:
            _camouflage(surface, below, _ramp(*opacity.shape, rng) + 0.15 * noise[1], rng)
        surface[..., 0] += _rim(opacity, light) * np.float32(rng.uniform(4, 10))
        below += opacity[..., None] * (surface - below)
    lab[..., 0] += rng.standard_normal((size, size), np.float32) * 1.5  # camera noise
    return _lab_to_rgb(lab), masks, labels


def _file_name(seed: int, index: int) -> str:
    return f"shapes-{seed}-{index}"


def make_shapes_coco(seed: int, count: int, size: int) -> dict:
    """Annotations of images 0..count-1 in COCO's format: the visible masks and their tight boxes.

    Masks are uncompressed RLE, boxes xywh in pixels, image ids index + 1, category ids label + 1.
    Nothing is painted. `load_shapes_image` does that.
    """
    _check(seed, 0, size)
    images, annotations = [], []
    for index in range(count):
        name = _file_name(seed, index)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
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
    """[x, y, width, height] around a non-empty mask [S, S]. A single pixel has sides of 1."""
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
        raise ValueError(f"shapes: image entry {made_for} is not from the set {seed=}, {size=}")
    return make_shapes_image(seed, index, size)[0]
