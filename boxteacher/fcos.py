"""The FCOS detector (arXiv 1904.01355), with CondInst's controller (2003.05664) on its box tower.

N images · G boxes · K mask locations · C classes · P locations over all levels · D detections
h, w cells of one level

Every location of strides 8, 16, 32, 64, 128 predicts C class logits, a box and a centerness. Its
box is four distances (left, top, right, bottom) in units of the stride. Other boxes are xyxy, in
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

STRIDES = (8, 16, 32, 64, 128)
SIZE_RANGES = ((-1, 1), (1, 2), (2, 4), (4, 8), (8, math.inf))  # in size units, by level


class Locations(NamedTuple):
    """The P locations of a feature pyramid, level by level, row by row.

    A location predicts boxes whose longest distance from it is in its level's range.
    """

    xy: Tensor  # [P, 2] pixels
    strides: Tensor  # [P] pixels
    size_ranges: Tensor  # [P, 2] pixels: range of max(l, t, r, b)
    sizes_of_interest: Tensor  # [P] pixels: the scale of relative coordinates in the mask head
    level_sizes: list[int]  # number of locations of each level


class Predictions(NamedTuple):
    """The head's output at every location, and the box tower's maps for the controller."""

    class_logits: Tensor  # [N, P, C]
    distances: Tensor  # [N, P, 4] >= 0, stride units
    centerness_logits: Tensor  # [N, P]
    box_features: list[Tensor]  # per level [N, channels, h, w]


class Targets(NamedTuple):
    """What every location should predict."""

    labels: Tensor  # [N, P] 0..C-1, or -1 for background
    distances: Tensor  # [N, P, 4] stride units; 1 in the background
    box_index: Tensor  # [N, P] which of the image's G boxes; meaningless in the background
    is_positive: Tensor  # [N, P] bool


class Detections(NamedTuple):
    """One image's detections in descending score."""

    boxes: Tensor  # [D, 4] xyxy pixels of the network's input, not clipped
    scores: Tensor  # [D]: sqrt(class probability * centerness)
    labels: Tensor  # [D]
    location_index: Tensor  # [D] into the P locations


class FCOSHead(nn.Module):
    """Two towers of [conv, GroupNorm, ReLU], shared over levels. One gives the class logits. The
    other gives box distances, centerness and the controller's output: the parameters of CondInst's
    dynamic mask head.
    """

    def __init__(
        self, num_classes: int, channels: int = 256, num_convs: int = 4, num_dynamic: int = 233
    ) -> None:
        super().__init__()

        def tower() -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(num_convs):
                conv = nn.Conv2d(channels, channels, 3, padding=1)
                layers += [conv, nn.GroupNorm(32, channels), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.class_tower, self.box_tower = tower(), tower()
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.controller = nn.Conv2d(channels, num_dynamic, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.class_logits.bias, -math.log(99))  # prior probability 0.01

    def forward(self, features: Sequence[Tensor]) -> Predictions:
        """features P3..P7 [N, channels, h, w]."""
        logits, distances, centerness, box_features = [], [], [], []
        for feature, scale in zip(features, self.scales, strict=True):
            box_feature = self.box_tower(feature)
            logits.append(self.class_logits(self.class_tower(feature)))
            distances.append((scale * self.distances(box_feature)).relu())
            centerness.append(self.centerness(box_feature))
            box_features.append(box_feature)
        class_logits, distances, centerness = (
            at_least_float32(flatten_levels(maps)) for maps in (logits, distances, centerness)
        )
        return Predictions(class_logits, distances, centerness.squeeze(-1), box_features)

    def dynamic_params(self, box_features: Sequence[Tensor], index: Tensor) -> Tensor:
        """The parameters of the dynamic mask head at chosen locations. Equal to the dense
        controller convolution, but computed at K of the P locations only.

        box_features per level [N, channels, h, w]; index [N, K] into P. Returns [N, K,
        num_dynamic].
        """
        patches = gather_patches(box_features, index)
        kernel = self.controller.weight.permute(0, 2, 3, 1).flatten(1)  # [num_dynamic, 9 channels]
        return nn.functional.linear(patches, kernel, self.controller.bias)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Maps [N, channels, h, w] of all levels as one [N, P, channels]."""
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)


def gather_patches(maps: Sequence[Tensor], index: Tensor) -> Tensor:
    """The 3x3 patches around chosen locations, as a convolution with padding 1 would see them.

    maps per level [N, channels, h, w]; index [N, K] into P. Returns [N, K, 9 channels], pixel by
    pixel, row by row.
    """
    # In a padded map of width w + 2, the patch of cell (i, j) begins at i (w + 2) + j.
    corners, widths, start = [], [], 0
    for level in maps:
        height, width = level.shape[-2:]
        rows = torch.arange(height, device=index.device) * (width + 2)
        corners.append((start + rows[:, None] + torch.arange(width, device=index.device)).flatten())
        widths.append(torch.full_like(corners[-1], width + 2))
        start += (height + 2) * (width + 2)
    padded = flatten_levels([nn.functional.pad(level, (1, 1, 1, 1)) for level in maps])

    corner, width = torch.cat(corners)[index], torch.cat(widths)[index]  # [N, K]
    patch = [corner + dy * width + dx for dy in range(3) for dx in range(3)]
    pixels = torch.stack(patch, dim=-1).flatten(1)  # [N, 9K]
    images = torch.arange(len(index), device=index.device)[:, None]
    return padded[images, pixels].unflatten(1, (-1, 9)).flatten(2)


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 to float32, for losses and scores. float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_locations(features: Sequence[Tensor], size_unit: float = 64) -> Locations:
    """Cell (i, j) of stride s is at x = s*j + s//2, y = s*i + s//2.

    size_unit, pixels: P3 is for distances up to one unit, P4 for one to two, P5 for two to four,
    and so on. 64 suits photographs of 800 pixels. Small images need less, or P3 gets every object.
    """
    device = features[0].device
    xy, strides, ranges, sizes = [], [], [], []
    for feature, stride, (low, high) in zip(features, STRIDES, SIZE_RANGES, strict=True):
        height, width = feature.shape[-2:]
        y = torch.arange(height, device=device, dtype=torch.float32) * stride + stride // 2
        x = torch.arange(width, device=device, dtype=torch.float32) * stride + stride // 2
        cells = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=-1)
        count = height * width
        xy.append(cells.flatten(0, 1))
        strides.append(torch.full((count,), float(stride), device=device))
        least = torch.full((count,), max(low * size_unit, -1.0), device=device)
        greatest = torch.full((count,), high * size_unit, device=device)
        ranges.append(torch.stack((least, greatest), dim=-1))
        sizes.append(count)
    stride = torch.cat(strides)
    sizes_of_interest = stride * (size_unit / STRIDES[0])
    return Locations(torch.cat(xy), stride, torch.cat(ranges), sizes_of_interest, sizes)


# --- training: targets and mask locations ---------------------------------------------------------


def assign_targets(
    locations: Locations, boxes: Tensor, labels: Tensor, valid: Tensor, centers: Tensor
) -> Targets:
    """Which box each location has to predict (FCOS, sections 3.1 and 3.2, with center sampling).

    A location is a candidate for a box under two conditions. It lies strictly inside the box and
    center ± 1.5 strides. And max(l, t, r, b) is in its level's range, both ends included. Of
    several boxes the smallest wins, and of equal ones the first.

    boxes [N, G, 4], G at least 1; labels, valid (false: padding) [N, G]; centers [N, G, 2],
    the boxes' own. BoxInst's code takes the centroids of the rasterized boxes.
    """
    x, y = locations.xy[:, :1], locations.xy[:, 1:]  # [P, 1]
    x1, y1, x2, y2 = boxes[:, None].unbind(-1)  # [N, 1, G]
    reach = 1.5 * locations.strides[:, None]  # [P, 1]
    center_x, center_y = centers[:, None].unbind(-1)
    in_center = (
        (x > torch.maximum(center_x - reach, x1))
        & (x < torch.minimum(center_x + reach, x2))
        & (y > torch.maximum(center_y - reach, y1))
        & (y < torch.minimum(center_y + reach, y2))
    )
    longest = torch.maximum(torch.maximum(x - x1, x2 - x), torch.maximum(y - y1, y2 - y))
    low, high = locations.size_ranges[:, None].unbind(-1)  # [P, 1]
    is_candidate = in_center & (longest >= low) & (longest <= high) & valid[:, None]

    areas = (x2 - x1) * (y2 - y1)
    area, box_index = torch.where(is_candidate, areas, math.inf).min(dim=-1)  # [N, P]
    is_positive = area < math.inf

    box = boxes.gather(1, box_index[..., None].expand(-1, -1, 4))
    distances = torch.cat((locations.xy - box[..., :2], box[..., 2:] - locations.xy), dim=-1)
    distances = torch.where(is_positive[..., None], distances / locations.strides[:, None], 1.0)
    label = torch.where(is_positive, labels.gather(1, box_index), -1)
    return Targets(label, distances, box_index, is_positive)


@torch.no_grad()
def sample_best_locations(
    targets: Targets, quality: Tensor, num_boxes: int, limit: int = 64
) -> tuple[Tensor, Tensor]:
    """Positive locations that get a mask loss (BoxInst): with u boxes that have a positive, each
    keeps its max(limit // u, 1) positives of highest quality.

    quality [N, P]: max class probability * centerness. Returns index [N, K] into P and is_real [N,
    K], the real ones first. K = min(max(limit, num_boxes), P) does not depend on the data, so no
    step waits for the device.
    """
    # An example with limit = 4 and two boxes:
    #   location   0  1  2  3  4  5       quality  .9 .1 .5 .8 .7 .6
    #   group      0  1  0  0  -  1       (the box, or num_boxes for the background)
    num_images, num_locations = quality.shape
    group = torch.where(targets.is_positive, targets.box_index, num_boxes)
    count = torch.zeros(num_images, num_boxes + 1, dtype=torch.int64, device=quality.device)
    count.scatter_add_(1, group, torch.ones_like(group))  # 3 2 1
    boxes_with_positives = (count[:, :num_boxes] > 0).sum(1, keepdim=True)
    quota = (limit // boxes_with_positives.clamp(min=1)).clamp(min=1)  # [N, 1]: 2

    # Sort by quality, then by box. A stable sort keeps the quality's order within each box.
    by_quality = quality.argsort(dim=1, descending=True, stable=True)  # 0 3 4 5 2 1
    by_group = group.gather(1, by_quality).argsort(dim=1, stable=True)
    order = by_quality.gather(1, by_group)  # 0 3 2  5 1  4
    sorted_group = group.gather(1, order)  # 0 0 0  1 1  2

    # A location's rank within its box decides.
    start = count.cumsum(1) - count
    rank = torch.arange(num_locations, device=quality.device) - start.gather(1, sorted_group)
    is_kept = (sorted_group < num_boxes) & (rank < quota)  # 1 1 0  1 1  0

    # The kept ones come first: 0 3 5 1.
    slots = min(max(limit, num_boxes), num_locations)
    is_real, position = is_kept.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    return order.gather(1, position[:, :slots]), is_real[:, :slots].bool()


@torch.compiler.disable  # it reads a number from the device
@torch.no_grad()
def sample_random_locations(is_positive: Tensor, limit: int = 500) -> tuple[Tensor, Tensor]:
    """At most `limit` random positives of all images together (CondInst). is_positive [N, P].
    Returns index and is_real [N, K], K the largest number of an image (read from the device)."""
    key = torch.where(is_positive, torch.rand(is_positive.shape, device=is_positive.device), -1.0)
    chosen = torch.zeros_like(is_positive).flatten()
    chosen[key.flatten().topk(min(limit, key.numel())).indices] = True
    chosen = chosen.view_as(is_positive) & is_positive
    slots = max(int(chosen.sum(1).max()), 1)
    is_real, index = chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    return index[:, :slots], is_real[:, :slots].bool()


# --- inference ------------------------------------------------------------------------------------


@torch.no_grad()
def detect(
    predictions: Predictions,
    locations: Locations,
    pre_nms_threshold: float = 0.05,
    pre_nms_top: int = 1000,
    nms_threshold: float = 0.6,
    max_detections: int = 100,
) -> list[Detections]:
    """Decode (FCOS, section 3). p is class probability * centerness.

    Each level keeps its `pre_nms_top` best pairs (location, class) with p over the threshold. Then
    NMS runs for each class over all levels. The `max_detections` best stay, and those that are tied
    with the last.
    """
    probs = predictions.class_logits.sigmoid() * predictions.centerness_logits.sigmoid()[..., None]
    num_classes = probs.shape[-1]
    pairs, start = [], 0  # per level [N, <= pre_nms_top]: p, and a number for (location, class)
    for level in probs.split(locations.level_sizes, dim=1):
        p, pair = level.flatten(1).topk(min(pre_nms_top, level[0].numel()), dim=1)
        pairs.append((p, pair + start))
        start += level[0].numel()
    best_p, best_pair = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))

    results = []
    for p, pair, distances in zip(best_p, best_pair, predictions.distances, strict=True):
        is_kept = p > pre_nms_threshold
        scores, pair = p[is_kept].sqrt(), pair[is_kept]
        index, labels = pair // num_classes, pair % num_classes
        reach = distances[index] * locations.strides[index, None]
        xy = locations.xy[index]
        boxes = torch.cat((xy - reach[:, :2], xy + reach[:, 2:]), dim=1)
        # batched_nms moves classes apart by the largest coordinate and needs coordinates >= 0
        lowest = torch.cat((boxes.flatten(), boxes.new_zeros(1))).min()
        keep = batched_nms(boxes - lowest, scores, labels, nms_threshold)
        if len(keep) > max_detections:
            keep = keep[scores[keep] >= scores[keep[max_detections - 1]]]
        results.append(Detections(boxes[keep], scores[keep], labels[keep], index[keep]))
    return results
