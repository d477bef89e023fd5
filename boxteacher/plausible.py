"""What a data set says, but can hardly mean: boxes, masks and areas that do not go together.

Exports mix up conventions: the order of numbers, corners and sizes, pixels and fractions, scales,
the first pixel's number. Each field is compared with the others. If many boxes fit no mask or no
image, they are read in other forms, to name the likely cause.

A annotations · boxes [A, 4] the numbers of "bbox" · extents [A, 4] of the masks: left, top, right,
bottom, NaN without a mask · sizes [A, 2] width and height of the images
"""

from __future__ import annotations

import numpy as np

CORNERS = "[x1, y1, x2, y2]"
AS_IS = "[x, y, width, height]"
CENTERS = "[center x, center y, width, height]"
FRACTIONS = (" as fractions of the image", 1.0), (" in percent of the image", 0.01)
SAMPLE = 10_000  # annotations that are read in other forms


def forms(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The corners [A, 4] that each form gives. Any of them may be what an export wrote."""
    a, b, c, d = boxes.T
    corners = {
        AS_IS: (a, b, a + c, b + d),
        CORNERS: (a, b, c, d),
        CENTERS: (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        "[y, x, height, width]": (b, a, b + d, a + c),
        "[y1, x1, y2, x2]": (b, a, d, c),
        "[x, y, height, width]": (a, b, a + d, b + c),
        f"{AS_IS}, y upwards": (a, sizes[:, 1] - b - d, a + c, sizes[:, 1] - b),
    }
    found = {form: np.stack(values, axis=1) for form, values in corners.items()}
    scale = np.tile(sizes, 2)
    for unit, share in FRACTIONS:
        found |= {form + unit: found[form] * scale * share for form in (AS_IS, CORNERS, CENTERS)}
    return found


def fits(corners: np.ndarray, extents: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """bool [A]: corners of a box that agrees with its mask, or without one lies in its image."""
    is_box = (corners[:, 2:] > corners[:, :2]).all(1)
    margin = 2 + 0.01 * sizes
    is_inside = ((corners[:, :2] >= -margin) & (corners[:, 2:] <= sizes + margin)).all(1)
    with np.errstate(invalid="ignore"):
        is_near = abs(corners - extents).max(1) <= 2  # pixels: small objects
        low, high = np.maximum(corners, extents)[:, :2], np.minimum(corners, extents)[:, 2:]
        overlap = (high - low).clip(0).prod(1)
        areas = [(x[:, 2:] - x[:, :2]).clip(0).prod(1) for x in (corners, extents)]
        agrees = is_near | (overlap >= 0.5 * (areas[0] + areas[1] - overlap))  # IoU
    return is_box & np.where(np.isnan(extents[:, 0]), is_inside, agrees)


def likely_form(boxes: np.ndarray, extents: np.ndarray | None, sizes: np.ndarray) -> str:
    """The form in which over 90 % of the boxes fit their masks, or their images if `extents` is
    None. A remark, which is empty if as many fit as they are, or if no form fits."""
    has_masks = extents is not None
    extents = extents if has_masks else np.full_like(boxes, np.nan)
    every = slice(None, None, 1 + len(boxes) // SAMPLE)
    boxes, extents, sizes = boxes[every], extents[every], sizes[every]
    read = forms(boxes, sizes)
    if has_masks:  # perhaps of another scale than the boxes
        factor = np.median((extents[:, 2:] - extents[:, :2]) / boxes[:, 2:].clip(1e-6))
        read[f"{factor:.3g} times as large"] = factor * read[AS_IS]
    shares = {form: fits(corners, extents, sizes).mean() for form, corners in read.items()}
    best = max(shares, key=shares.__getitem__)
    is_other = shares[best] > 0.9 >= shares[AS_IS]
    return f"; nearly all would if 'bbox' was {best}" if is_other else ""


def doubts(
    ids: list[int], boxes: np.ndarray, extents: np.ndarray, sizes: np.ndarray, areas: np.ndarray
) -> list[str]:
    """A line for each kind of what can hardly be meant. areas [A]: "area", NaN where absent."""
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    has_mask = ~np.isnan(extents[:, 0])
    is_fit = fits(corners, extents, sizes)
    notes = []

    def tell(is_doubtful: np.ndarray, at_least: float, what: str, remark: str = "") -> None:
        count = int(is_doubtful.sum())
        if count > at_least * len(ids):
            first = ", ".join(str(ids[i]) for i in np.flatnonzero(is_doubtful)[:4])
            first += ", ..." * (count > 4)
            notes.append(f"{count} of {len(ids)} {what} (annotation ids {first}){remark}")

    bad, chosen = has_mask & ~is_fit, has_mask
    if bad.any():
        form = likely_form(boxes[chosen], extents[chosen], sizes[chosen])
        tell(bad, 0, "boxes do not agree with their masks", form)
    bad, chosen = ~has_mask & ~is_fit, ~has_mask
    if bad.any():
        form = likely_form(boxes[chosen], None, sizes[chosen])
        tell(bad, 0.05, "boxes reach out of their images", form)

    is_fit &= has_mask
    shift = corners[is_fit, :2] - extents[is_fit, :2]
    if len(shift) and abs(middle := np.median(shift, axis=0)).min() > 0.9:
        is_shifted = np.zeros_like(is_fit)
        is_shifted[is_fit] = abs(shift - middle).max(1) < 0.3
        where = f"boxes lie ({middle[0]:+.1f}, {middle[1]:+.1f}) pixels from their masks"
        tell(is_shifted, 0.8, where, "; does one of them count pixels from 1, the other from 0?")

    share = areas / boxes[:, 2:].clip(1e-6).prod(1)
    tell((share > 1.5) | (share < 0.003), 0.05, "areas do not go with their boxes")

    reach = (corners[:, 2:] / sizes).max()
    if len(ids) >= 20 and reach < 2 / 3:
        notes.append(
            f"no box reaches beyond {reach:.0%} of the width or height of its image: were they made"
            " for smaller images, or are they in percent?"
        )
    return notes
