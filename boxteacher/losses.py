"""The losses. The caller sums them and shows what it divides by.

    focal_loss, giou_loss                       one value an element: location and class, location
    dice_loss, projection_loss, affinity_loss   one value an instance
    color_pairwise_sums                         a sum and its weight for each instance
    centerness_targets, box_masks, inside_masks, color_similarity      helpers

Floats are float32 or float64, since sums of half precision overflow.
N images · K sampled instances · C classes · H4, W4 the stride-4 grid · 8 neighbors at dilation 2

Sources: focal loss arXiv 1708.02002, GIoU 1902.09630, FCOS 1904.01355, dice 1606.04797,
BoxInst 2012.02310, BoxTeacher 2210.05174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# (dy, dx) of the neighbors in reading order. Number k and number 7 - k are opposite. Loops over
# pairs visit each pair once, from its upper (or left) pixel, in the last four directions.
NEIGHBORS = ((-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 2), (2, -2), (2, 0), (2, 2))
FORWARD = (4, 5, 6, 7)


# --- detection ------------------------------------------------------------------------------------


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss: easy examples count little (arXiv 1708.02002, eq. 5). Equal to
    torchvision's, for whole-number labels.

        z = -logit for the labeled class, logit for the others
        L = alpha_t * sigmoid(z)^gamma * softplus(z)

    logits [..., C]; labels [...] in 0..C-1, or -1 for background. Returns [..., C].
    """
    is_class = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    z = torch.where(is_class, -logits, logits)
    alpha_t = torch.full_like(logits, 1 - alpha).masked_fill(is_class, alpha)
    return alpha_t * z.sigmoid() ** gamma * F.softplus(z)


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU of two boxes that share a location (arXiv 1902.09630), with FCOS's smoothed IoU.

        iou = (inter + 1) / (union + 1);   giou = iou - (hull - union) / hull

    predicted, target [..., 4]: distances (left, top, right, bottom) >= 0 in stride units. Returns
    [...].
    """

    def area(distances: Tensor) -> Tensor:
        return (distances[..., 0] + distances[..., 2]) * (distances[..., 1] + distances[..., 3])

    intersection = area(torch.minimum(predicted, target))
    union = area(predicted) + area(target) - intersection
    hull = area(torch.maximum(predicted, target))
    iou = (intersection + 1) / (union + 1)
    return 1 - (iou - (hull - union) / hull.clamp(min=1e-12))


def centerness_targets(distances: Tensor) -> Tensor:
    """How near a location is to its box's center (FCOS, eq. 3).

        ctr* = sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))

    distances [..., 4] > 0. Returns [...] in (0, 1].
    """
    near = torch.minimum(distances[..., :2], distances[..., 2:])
    far = torch.maximum(distances[..., :2], distances[..., 2:])
    return (near / far).prod(-1).sqrt()


# --- masks against masks and boxes ----------------------------------------------------------------


def dice_loss(probs: Tensor, targets: Tensor, dims: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """1 - 2 Σ x y / (Σ x² + Σ y² + 1e-5) over `dims` (V-Net, arXiv 1606.04797).

    probs and targets have the same shape. The result has it too, without `dims`.
    """
    overlap = (probs * targets).sum(dims)
    return 1 - 2 * overlap / (probs.square().sum(dims) + targets.square().sum(dims) + 1e-5)


def projection_loss(probs: Tensor, box_masks: Tensor) -> Tensor:
    """A mask and its box have the same projection on either axis (BoxInst, arXiv 2012.02310,
    section 3.1).

        L = dice(max_y m, max_y b) + dice(max_x m, max_x b)

    probs [..., H4, W4] in [0, 1]; box_masks [..., H4, W4] in {0, 1}. Returns [...].
    """
    return sum(dice_loss(probs.amax(axis), box_masks.amax(axis), -1) for axis in (-2, -1))


def box_masks(boxes: Tensor, height: int, width: int, stride: int = 4) -> Tensor:
    """Boxes as masks: pixel rows int(y1)..int(y2) and columns int(x1)..int(x2), ends included,
    sampled at stride//2, stride//2 + stride, ... (stride 1: every pixel).

    boxes [..., 4] xyxy in pixels. Returns bool [..., height, width], a grid of that stride.
    """
    x1, y1, x2, y2 = boxes.trunc()[..., None].unbind(-2)
    exact = dict(device=boxes.device, dtype=torch.float32)  # bfloat16 has 8 bits
    rows = torch.arange(height, **exact) * stride + stride // 2
    columns = torch.arange(width, **exact) * stride + stride // 2
    in_rows = (rows >= y1) & (rows <= y2)
    in_columns = (columns >= x1) & (columns <= x2)
    return in_rows[..., :, None] & in_columns[..., None, :]


# --- pairs of pixels ------------------------------------------------------------------------------


def _pairs(x: Tensor, direction: int) -> tuple[Tensor, Tensor]:
    """x at pixels i and their neighbors j in a forward direction, for all pairs inside the map."""
    dy, dx = NEIGHBORS[direction]
    height, width = x.shape[-2:]
    left, right = max(-dx, 0), max(dx, 0)
    return x[..., : height - dy, left : width - right], x[..., dy:, right : width - left]


def _pairwise_sums(
    mask_logits: Tensor, pair_weights: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Σ w_ij * -log P(i and j have the same label) and Σ w_ij per mask (BoxInst, section 3.2).

        -log(p_i p_j + (1-p_i)(1-p_j)) = softplus(a_i) + softplus(a_j) - softplus(a_i + a_j)

    with p = sigmoid(a), so no log of a small number is taken. A pair counts once for each of its
    two pixels that has it: its weight is 0, 1 or 2. As uint8 it takes little memory.

    mask_logits [..., H4, W4]; pair_weights(direction) broadcasts to the pairs. Returns two [...].
    """
    softplus = F.softplus(mask_logits)
    loss, weight = 0.0, 0.0
    for direction in FORWARD:
        a_i, a_j = _pairs(mask_logits, direction)
        softplus_i, softplus_j = _pairs(softplus, direction)
        weights = pair_weights(direction)
        loss = loss + (weights * (softplus_i + softplus_j - F.softplus(a_i + a_j))).sum((-2, -1))
        weight = weight + weights.sum((-2, -1), dtype=mask_logits.dtype)
    return loss, weight


def color_pairwise_sums(
    mask_logits: Tensor, similar_pairs: Tensor, inside_box: Tensor
) -> tuple[Tensor, Tensor]:
    """Pixels of similar color have the same label (BoxInst, section 3.2): w_ij = similar_ij * b_i.

    mask_logits [N, K, H4, W4]; similar_pairs bool [N, 8, H4, W4] (similarity >= tau); inside_box
    bool [N, K, H4, W4]. Returns Σ w * term and Σ w, each [N, K]. The loss is the first, summed over
    all instances, divided by the second, summed likewise and at least 1.
    """

    def pair_weights(direction: int) -> Tensor:
        box_i, box_j = _pairs(inside_box, direction)
        similar_ij, _ = _pairs(similar_pairs[:, None, direction], direction)
        _, similar_ji = _pairs(similar_pairs[:, None, 7 - direction], direction)
        return (similar_ij & box_i).to(torch.uint8) + (similar_ji & box_j)

    return _pairwise_sums(mask_logits, pair_weights)


def affinity_loss(
    mask_logits: Tensor,
    pseudo_masks: Tensor,
    inside_box: Tensor,
    inside_image: Tensor,
    threshold: float = 0.5,
) -> Tensor:
    """Noise-reduced affinity (BoxTeacher): neighbors that are alike in a smoothed pseudo mask t~
    should have the same label.

        t~ = (t + mean3x3(t)) / 2;  g_ij = t~_i t~_j + (1-t~_i)(1-t~_j)
        v_ij = 1[g_ij >= threshold] b_i
        L = Σ v_ij * -log(p_i p_j + (1-p_i)(1-p_j)) / max(Σ v_ij, 1),  over j inside the image

    With the published threshold 0.5 smoothing changes nothing: t~ is above 1/2 exactly where t = 1,
    so g_ij >= 0.5 means t_i = t_j. It matters at other thresholds.

    mask_logits, pseudo_masks {0, 1}, inside_box bool [N, K, H4, W4]; inside_image bool [N, H4, W4].
    Returns [N, K].
    """
    t = pseudo_masks.to(mask_logits.dtype)
    mean = F.avg_pool2d(t.flatten(0, 1)[:, None], 3, stride=1, padding=1)  # padding counts as 0
    smooth = (t + mean.view_as(t)) / 2

    def pair_weights(direction: int) -> Tensor:
        t_i, t_j = _pairs(smooth, direction)
        box_i, box_j = _pairs(inside_box, direction)
        image_i, image_j = _pairs(inside_image[:, None], direction)
        is_alike = t_i * t_j + (1 - t_i) * (1 - t_j) >= threshold
        from_i, from_j = is_alike & box_i & image_j, is_alike & box_j & image_i
        return from_i.to(torch.uint8) + from_j

    loss, weight = _pairwise_sums(mask_logits, pair_weights)
    return loss / weight.clamp(min=1)


# --- colors --------------------------------------------------------------------------------------


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB (0..255) to CIE L*a*b*, D65 white, 2 degree observer: float [N, 3, H4, W4] both."""
    rgb = rgb / 255
    r, g, b = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92).unbind(1)
    # Not a matrix product: autocast would round that to bfloat16, and TF32 to 10 bits. And its
    # matrix would have to be copied to the GPU, for which the CPU would wait.
    x = (0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047
    y = 0.212671 * r + 0.715160 * g + 0.072169 * b
    z = (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883
    xyz = torch.stack((x, y, z), dim=1)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def inside_masks(
    sizes: Sequence[tuple[int, int]], rows: int, columns: int, device: torch.device | None = None
) -> Tensor:
    """Which points (4j + 2, 4i + 2) of the stride-4 grid lie on the image proper, not in its
    padding. sizes: (height, width) of each image in pixels. Returns bool [N, rows, columns].
    """
    inside = torch.zeros(len(sizes), rows, columns, dtype=torch.bool, device=device)
    for mask, (height, width) in zip(inside, sizes, strict=True):
        mask[: (max(height, 0) + 1) // 4, : (max(width, 0) + 1) // 4] = True
    return inside


def color_similarity(images: Tensor, inside_image: Tensor) -> Tensor:
    """How alike a pixel and its 8 neighbors are in color (BoxInst, section 3.2).

        S_ij = exp(-‖Lab_i - Lab_j‖ / 2), and 0 for a neighbor j outside the image

    images [N, 3, 4 H4, 4 W4] RGB 0..255, before any color augmentation; inside_image bool [N, H4,
    W4]. Returns [N, 8, H4, W4], computed once an image for all its boxes.
    """
    lab = rgb_to_lab(F.avg_pool2d(images.float(), 4).floor())  # of whole numbers, as in BoxInst
    inside = inside_image[:, None].to(lab.dtype)
    similarity = []
    for dy, dx in NEIGHBORS:
        distance = (lab - shifted(lab, dy, dx)).square().sum(dim=1).sqrt()  # norm is slow on CPUs
        similarity.append((-distance / 2).exp() * shifted(inside, dy, dx)[:, 0])
    return torch.stack(similarity, dim=1)


def shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """x [N, channels, H4, W4] at every neighbor (dy, dx) of NEIGHBORS, 0 outside the map."""
    height, width = x.shape[-2:]
    padded = F.pad(x, [2, 2, 2, 2])
    return padded[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
