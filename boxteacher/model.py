"""CondInst with the losses of CondInst, BoxInst and BoxTeacher, and the teacher's step.

N images · G boxes · K sampled instances · C classes · P locations · D detections
h, w pixels of an image without padding · H, W of the padded images · H4, W4 and H8, W8 their grids
of stride 4 and 8

Masks are predicted at stride 8 and learned at stride 4: `mask_logits_s4` is [N, K, H4, W4].
A loss is a pair (sum, count) of scalars until `CondInst.forward` divides them: `LossSums`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image

from . import fcos, losses, mask_head
from .backbone import NORMS, SWINS, Backbone, MobileNetV2, ResNet, Swin, without_drop_path
from .coco import stretch_contrast
from .config import Config
from .data import Batch
from .distributed import reduce_mean
from .mask_head import MaskBranch
from .masks import encode_mask
from .metrics import lost_box_metrics, pseudo_mask_metrics
from .pseudo_labels import assign_to_boxes, mask_aware_scores, take_assigned
from .transforms import View, resized_size

PIXELS = {  # means (0..255) and deviations of the channels that a backbone's weights expect
    "rgb": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "bgr": ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
}
MASK_CELLS = {"cpu": 1 << 17, "cuda": 1 << 22}  # of masks made at a time; a CPU's cache is small

Size = tuple[int, int]  # height, width
LossSums = dict[str, tuple[Tensor, Tensor]]  # name: (sum over instances, what to divide it by)


class PseudoMasks(NamedTuple):
    """The teacher's masks for the ground-truth boxes. A box without a detection has weight 0."""

    masks: Tensor  # bool [N, G, H4, W4], inside the box
    weights: Tensor  # [N, G] mask-aware scores in [0, 1]


class Instances(NamedTuple):
    """One image's results in pixels of the output size."""

    boxes: Tensor  # [D, 4] xyxy
    scores: Tensor  # [D]
    labels: Tensor  # [D] 0..C-1
    masks: list[dict]  # D run-length codes. `masks.decode_mask` makes bool [h, w] of each


class Encoded(NamedTuple):
    """A batch of images after the network's dense part."""

    predictions: fcos.Predictions
    locations: fcos.Locations
    mask_features: Tensor  # [N, mask_channels, H8, W8]


class Sampled(NamedTuple):
    """The instances whose masks are learned: K slots an image, some of them padding."""

    logits: Tensor  # [N, K, H4, W4] masks
    probs: Tensor  # their sigmoid
    box_index: Tensor  # [N, K] the instance's box, one of the image's G
    is_real: Tensor  # bool [N, K], False in the padding

    def of_boxes(self, x: Tensor) -> Tensor:
        """What belongs to the boxes, [N, G, ...], for each instance: [N, K, ...]."""
        return x[torch.arange(len(x), device=x.device)[:, None], self.box_index]

    def total(self, per_instance: Tensor) -> Tensor:
        """The sum of [N, K] over real instances. `where`, because 0 * NaN is NaN."""
        return torch.where(self.is_real, per_instance, 0.0).sum()


class CondInst(nn.Module):
    """FCOS with conditional convolutions for masks (arXiv 2003.05664), trained from masks, boxes,
    or boxes and pseudo masks.

    `cfg.mode` chooses the mask losses: condinst (true masks), boxinst (boxes and colors),
    boxteacher (those of boxinst and, where there are pseudo masks, two more).
    """

    def __init__(
        self, backbone: Backbone, head: fcos.FCOSHead, mask_branch: MaskBranch, cfg: Config
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.mask_branch = backbone, head, mask_branch
        self.cfg = cfg
        for name, values in zip(("pixel_mean", "pixel_std"), PIXELS[cfg.pixel_format], strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor, sizes: Sequence[Size]) -> Tensor:
        """uint8 RGB [N, 3, H, W] to what the backbone's weights expect. The padding becomes 0."""
        images = images.flip(1) if self.cfg.pixel_format == "bgr" else images
        normalized = (images - self.pixel_mean) / self.pixel_std
        for image, (height, width) in zip(normalized, sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return normalized

    def encode(self, normalized: Tensor) -> Encoded:
        features = self.backbone(normalized)
        locations = fcos.make_locations(features, self.cfg.size_unit)
        return Encoded(self.head(features), locations, self.mask_branch(features[:3]))

    def mask_logits_s4(self, encoded: Encoded, index: Tensor) -> Tensor:
        """Masks of chosen locations, index [N, K] into P. Returns [N, K, H4, W4]."""
        inputs = encoded.mask_features, *self.mask_inputs(encoded, index)
        return mask_head.aligned_upsample(mask_head.dynamic_mask_logits(*inputs), 2)

    def mask_inputs(self, encoded: Encoded, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What makes the masks of locations [N, K]: parameters, places and sizes of interest."""
        params = self.head.dynamic_params(encoded.predictions.box_features, index)
        return params, encoded.locations.xy[index], encoded.locations.sizes_of_interest[index]

    # --- the student's step -----------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        batch: Batch,
        weak_factor: float = 1.0,
        pseudo: PseudoMasks | None = None,
        has_begun: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted losses of one batch, and metrics: fractions [2] (numerator, denominator).

        images uint8 [N, 3, H, W]: what the student sees (`batch.images` is the plain copy, from
        which colors are compared). weak_factor in [0, 1]: the warm-up of the weak losses (pairwise,
        pseudo_mask, pseudo_affinity). has_begun: cfg.pseudo_start is over.
        Sums are divided by the mean count over ranks, whatever the number of processes.
        """
        cfg = self.cfg
        encoded = self.encode(self.normalize(images, batch.sizes))
        reliable = [(h - cut, w) for (h, w), cut in zip(batch.sizes, batch.cut_rows, strict=True)]
        rows, columns = (side // 4 for side in images.shape[-2:])
        inside_image = losses.inside_masks(reliable, rows, columns, images.device)
        mixed = with_true_masks(pseudo, batch) if cfg.use_masks else pseudo
        sums, metrics = self.loss_sums(encoded, batch, inside_image, mixed)
        if pseudo is not None:
            metrics |= pseudo_mask_metrics(*pseudo, batch)

        dtype = encoded.predictions.class_logits.dtype
        counts = reduce_mean(torch.stack([count.to(dtype) for _, count in sums.values()]))
        weak = {
            "pairwise": 0.0 if has_begun and cfg.pairwise_ends else cfg.pairwise_weight,
            "pseudo_mask": cfg.pseudo_mask_weight,
            "pseudo_affinity": cfg.pseudo_affinity_weight,
        }
        weighted = {}
        for (name, (total, _)), count in zip(sums.items(), counts.unbind(), strict=True):
            weight = weak[name] * weak_factor if name in weak else 1.0
            # at least 1, except for the box loss, whose count is a sum of centernesses
            weighted[name] = weight * total / count.clamp(min=1e-6 if name == "box" else 1.0)
        return weighted, metrics

    def loss_sums(
        self, encoded: Encoded, batch: Batch, inside_image: Tensor, pseudo: PseudoMasks | None
    ) -> tuple[LossSums, dict[str, Tensor]]:
        """Every loss of the mode as (sum, count), and metrics. Shapes may change when compiled.

        inside_image bool [N, H4, W4]: the images without their padding and unreliable bottom rows.
        """
        cfg = self.cfg
        targets = fcos.assign_targets(
            encoded.locations, batch.boxes, batch.labels, batch.valid, batch.centers
        )
        sums = detection_losses(encoded.predictions, targets)
        sampled = self.sample_instances(encoded, batch, targets)
        metrics = lost_box_metrics(targets.box_index, targets.is_positive, batch)
        if cfg.mode == "condinst":
            return sums | condinst_losses(sampled, batch.masks), metrics

        rows, columns = inside_image.shape[-2:]
        inside_box = losses.box_masks(sampled.of_boxes(batch.boxes), rows, columns)
        inside_box = inside_box & sampled.is_real[..., None, None]
        similar_pairs = losses.color_similarity(batch.images, inside_image) >= cfg.color_threshold
        sums |= boxinst_losses(sampled, inside_box, similar_pairs)
        if pseudo is not None:
            sums |= pseudo_losses(sampled, inside_box, inside_image, pseudo, cfg.affinity_threshold)

        _, alike_pairs = sums["pairwise"]
        pixels = inside_box.sum().to(alike_pairs.dtype)
        filled = ((sampled.logits > 0) & inside_box).sum()
        metrics["similar_pair_share"] = torch.stack((alike_pairs, 8 * pixels)).detach()
        return sums, metrics | {"mask_fill": torch.stack((filled, pixels))}  # of the boxes

    def sample_instances(self, encoded: Encoded, batch: Batch, targets: fcos.Targets) -> Sampled:
        """Choose positive locations, at random (CondInst) or the best of each box, and predict
        their masks."""
        limit, predictions = self.cfg.max_mask_locations, encoded.predictions
        if self.cfg.mode == "condinst":
            index, is_real = fcos.sample_random_locations(targets.is_positive, limit)
        else:
            quality = predictions.class_logits.amax(-1).sigmoid()
            quality = quality * predictions.centerness_logits.sigmoid()
            num_boxes = batch.boxes.shape[1]
            index, is_real = fcos.sample_best_locations(targets, quality, num_boxes, limit)
        box_index = targets.box_index.gather(1, index)
        logits = self.mask_logits_s4(encoded, index)
        return Sampled(logits, logits.sigmoid(), box_index, is_real)

    # --- the teacher's step -----------------------------------------------------------------------

    @torch.no_grad()
    def make_pseudo_masks(self, batch: Batch, resize: bool = True) -> PseudoMasks:
        """The teacher's step (BoxTeacher): detect on the plain images, score the masks, assign them
        to the boxes.

        The images are enlarged to `cfg.teacher_size`, unless that is 0 or `resize` is False. A run
        calls this in train mode: batch norms use the batch's statistics.
        """
        rows, columns = (side // 4 for side in batch.images.shape[-2:])
        masks = batch.valid.new_zeros(*batch.valid.shape, rows, columns)
        weights = batch.boxes.new_zeros(batch.valid.shape)

        images, seen_sizes = self.normalize(batch.images, batch.sizes), batch.sizes
        if resize and self.cfg.teacher_size:
            limits = self.cfg.teacher_size, self.cfg.test_max_size
            images, seen_sizes = resize_images(images, batch.sizes, *limits)
        encoded = self.encode(images)
        for n, found in enumerate(self.detect(encoded)):
            assigned = self.masks_for_boxes(encoded, n, found, seen_sizes[n], batch)
            if assigned is not None:
                of_image, weights[n] = assigned
                masks[n, :, : of_image.shape[1], : of_image.shape[2]] = of_image
        return PseudoMasks(masks & losses.box_masks(batch.boxes, rows, columns), weights)

    def masks_for_boxes(
        self, encoded: Encoded, n: int, found: fcos.Detections, seen_size: Size, batch: Batch
    ) -> tuple[Tensor, Tensor] | None:
        """Masks bool [G, h/4, w/4] and weights [G] for the boxes of image n, or None if no
        detection fits any of them. seen_size: the image's size as the teacher saw it."""
        cfg, size = self.cfg, batch.sizes[n]
        boxes, _ = scale_boxes(found.boxes, seen_size, size)
        ious = box_iou(boxes, batch.boxes[n]).masked_fill(~batch.valid[n], -1)  # [D, G]
        # Only detections that overlap a box enough can be assigned. Only they need masks.
        is_useful = (ious >= cfg.iou_threshold).any(1)
        if not is_useful.any():
            return None
        boxes, ious, scores = boxes[is_useful], ious[is_useful], found.scores[is_useful]
        # Each is scored in its detection's box and sampled on the stride-4 grid.
        trust, masks = [], []
        for part, maps in self.mask_maps(encoded, n, found.location_index[is_useful]):
            rows, columns = mask_head.pixel_positions(maps, seen_size, size)
            trust.append(self.scores_in_boxes(maps, boxes[part], scores[part], rows, columns))
            masks.append(mask_head.read_maps(maps, rows[2::4], columns[2::4]) > cfg.mask_threshold)
        trust = torch.cat(trust)
        assigned = assign_to_boxes(ious, trust, cfg.iou_threshold, cfg.score_threshold)
        others = {"detection": scores, "constant": torch.ones_like(scores)}  # to compare with
        return take_assigned(torch.cat(masks), others.get(cfg.pseudo_score, trust), assigned)

    def scores_in_boxes(
        self, maps: Tensor, boxes: Tensor, scores: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """Mask-aware scores [D] of detections: maps [D, H4, W4], boxes [D, 4], scores [D]. Of the
        image, whose pixels lie at rows [h] and columns [w] of the maps, only the boxes are read."""
        x1, y1, x2, y2 = boxes.long()[..., None].unbind(1)  # [D, 1]: first and last pixels
        sides = torch.cat((y2 - y1, x2 - x1), dim=1).amax(0).tolist()
        windows, inside = [], []  # at the boxes' first pixels, all as large as the largest box
        for positions, first, last, side in ((rows, y1, y2, sides[0]), (columns, x1, x2, sides[1])):
            pixels = first + torch.arange(side + 1, device=boxes.device)
            inside.append((pixels <= last) & (pixels < len(positions)))
            windows.append(positions[pixels.clamp(max=len(positions) - 1)])
        probs = mask_head.read_maps(maps, *windows)
        inside_box = inside[0][:, :, None] & inside[1][:, None]
        return mask_aware_scores(probs, scores, inside_box, self.cfg.mask_threshold)

    # --- inference --------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[Size], output_sizes: Sequence[Size]
    ) -> list[Instances]:
        """Detect in uint8 images [N, 3, H, W], whose own sizes are `sizes`. The results are
        in pixels of `output_sizes`. Empty boxes are dropped.

        A mask is a run-length code in COCO's format, {"size": [h, w], "counts": text}, because most
        of the pixels are empty. `masks.decode_mask(code)` is the full mask, bool [h, w].

        In mode boxteacher the score is sqrt(c * mean probability of the mask's foreground), 0 for
        an empty mask, with c the detection's score. In the other modes it is c. (The score of
        pseudo masks takes the mean inside the detection's box only: `mask_aware_scores`.)
        """
        encoded = self.encode(self.normalize(images, sizes))
        results = []
        for n, found in enumerate(self.detect(encoded)):
            boxes, is_box = scale_boxes(found.boxes, sizes[n], output_sizes[n])
            boxes, scores, index = boxes[is_box], found.scores[is_box], found.location_index[is_box]
            masks, means = [], []
            for _, maps in self.mask_maps(encoded, n, index):
                positions = mask_head.pixel_positions(maps, sizes[n], output_sizes[n])
                for probs, corner in mask_head.mask_windows(maps, *positions, 0.5):
                    mask = probs > 0.5
                    means.append(float((probs * mask).sum() / mask.sum().clamp(min=1)))
                    masks.append(encode_mask(mask.cpu().numpy(), corner, output_sizes[n]))
            if self.cfg.mode == "boxteacher":
                scores = (scores * scores.new_tensor(means)).sqrt()
            results.append(Instances(boxes, scores, found.labels[is_box], masks))
        return results

    def predict_image(self, image: np.ndarray) -> Instances:
        """Detect in one image, uint8 RGB [h, w, 3], stretched and resized as for evaluation. The
        results are in the image's own pixels. Call `eval()` before."""
        image = stretch_contrast(image) if self.cfg.contrast == "stretch" else image
        view = whole_view(image.shape[:2], self.cfg)
        images = view.padded(image).to(self.pixel_mean.device)
        return self.predict(images, [view.resized], [view.original])[0]

    def detect(self, encoded: Encoded) -> list[fcos.Detections]:
        limit = self.cfg.max_detections
        return fcos.detect(encoded.predictions, encoded.locations, max_detections=limit)

    def mask_maps(self, encoded: Encoded, n: int, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Mask probabilities [d, H4, W4] of image n's locations index [D], some at a time: which of
        the D, and their maps."""
        box_features = [level[n : n + 1] for level in encoded.predictions.box_features]
        predictions = encoded.predictions._replace(box_features=box_features)
        alone = Encoded(predictions, encoded.locations, encoded.mask_features[n : n + 1])
        inputs = self.mask_inputs(alone, index[None])
        cells = MASK_CELLS[index.device.type]
        count = max(cells // (4 * alone.mask_features[0, 0].numel()), 8)
        for start in range(0, len(index), count):
            part = slice(start, start + count)
            inputs_of_part = (x[:, part] for x in inputs)
            logits_s8 = mask_head.dynamic_mask_logits(alone.mask_features, *inputs_of_part)
            yield part, mask_head.aligned_upsample(logits_s8, 2)[0].sigmoid()


# --- the losses, in the order of the methods: FCOS, CondInst, BoxInst, BoxTeacher -----------------


def detection_losses(predictions: fcos.Predictions, targets: fcos.Targets) -> LossSums:
    """FCOS (arXiv 1904.01355, section 3): class, box and centerness, over all locations."""

    def total(per_location: Tensor) -> Tensor:
        return torch.where(targets.is_positive, per_location, 0.0).sum()

    centerness = losses.centerness_targets(targets.distances)
    giou = losses.giou_loss(predictions.distances, targets.distances)
    logits = predictions.centerness_logits
    bce = F.binary_cross_entropy_with_logits(logits, centerness, reduction="none")
    num_positive = targets.is_positive.sum()
    return {
        "class": (losses.focal_loss(predictions.class_logits, targets.labels).sum(), num_positive),
        "box": (total(centerness * giou), total(centerness)),
        "centerness": (total(bce), num_positive),
    }


def condinst_losses(sampled: Sampled, true_masks: Tensor) -> LossSums:
    """CondInst (arXiv 2003.05664): dice against true masks, bool [N, G, H4, W4]."""
    true_masks = sampled.of_boxes(true_masks).to(sampled.probs.dtype)
    dice = losses.dice_loss(sampled.probs, true_masks)
    return {"mask": (sampled.total(dice), sampled.is_real.sum())}


def boxinst_losses(sampled: Sampled, inside_box: Tensor, similar_pairs: Tensor) -> LossSums:
    """BoxInst (arXiv 2012.02310): a mask has its box's projections, and pixels of similar color
    have the same label. inside_box bool [N, K, H4, W4], similar_pairs bool [N, 8, H4, W4]."""
    projection = losses.projection_loss(sampled.probs, inside_box.to(sampled.probs.dtype))
    pairwise, weight = losses.color_pairwise_sums(sampled.logits, similar_pairs, inside_box)
    return {
        "projection": (sampled.total(projection), sampled.is_real.sum()),
        "pairwise": (sampled.total(pairwise), sampled.total(weight)),
    }


def pseudo_losses(
    sampled: Sampled,
    inside_box: Tensor,
    inside_image: Tensor,
    pseudo: PseudoMasks,
    affinity_threshold: float,
) -> LossSums:
    """BoxTeacher (arXiv 2210.05174): the noise-aware pixel loss and the noise-reduced affinity loss
    against pseudo masks, each weighted by its mask's score. The affinity loss is a mean over an
    instance's pairs. The count makes both means over instances."""
    trust = sampled.of_boxes(pseudo.weights)  # [N, K]
    masks = sampled.of_boxes(pseudo.masks).to(sampled.probs.dtype)
    dice = losses.dice_loss(sampled.probs, masks)
    affinity = losses.affinity_loss(
        sampled.logits, masks, inside_box, inside_image, affinity_threshold
    )
    num_trusted = (sampled.is_real & (trust > 0)).sum()
    return {
        "pseudo_mask": (sampled.total(trust * dice), num_trusted),
        "pseudo_affinity": (sampled.total(trust * affinity), num_trusted),
    }


def with_true_masks(pseudo: PseudoMasks | None, batch: Batch) -> PseudoMasks:
    """Mixed supervision (not in the paper): a box that has a true mask learns from it with weight
    1, also before `pseudo_start`."""
    if pseudo is None:
        return PseudoMasks(batch.masks, batch.has_mask.float())
    masks = torch.where(batch.has_mask[..., None, None], batch.masks, pseudo.masks)
    return PseudoMasks(masks, torch.where(batch.has_mask, 1.0, pseudo.weights))


# --- sizes ----------------------------------------------------------------------------------------


def scale_boxes(boxes: Tensor, size: Size, output_size: Size) -> tuple[Tensor, Tensor]:
    """Boxes [D, 4] scaled from one size to another and clipped; which of them are not empty."""
    scale_y, scale_x = output_size[0] / size[0], output_size[1] / size[1]
    boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    boxes = clip_boxes_to_image(boxes, output_size)
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def whole_view(size: Size, cfg: Config) -> View:
    """An image of `size` as evaluation sees it."""
    resized = resized_size(*size, cfg.test_size, cfg.test_max_size, cfg.test_scale)
    return View(size, resized, (0, 0, *resized), flip=False)


def resize_images(
    images: Tensor, sizes: Sequence[Size], short_side: int, long_side: int
) -> tuple[Tensor, list[Size]]:
    """Normalized images [N, 3, H, W] resized bilinearly, without antialiasing, and padded anew with
    0 to multiples of 32. Returns them and their new sizes.
    """
    new_sizes = [resized_size(height, width, short_side, long_side) for height, width in sizes]
    height, width = (-(-max(side) // 32) * 32 for side in zip(*new_sizes, strict=True))
    resized = images.new_zeros(len(images), 3, height, width)
    for n, ((old_h, old_w), (h, w)) in enumerate(zip(sizes, new_sizes, strict=True)):
        image = images[n : n + 1, :, :old_h, :old_w]
        resized[n, :, :h, :w] = F.interpolate(image, size=(h, w), mode="bilinear")[0]
    return resized, new_sizes


# --- building -------------------------------------------------------------------------------------


def build_model(cfg: Config, num_classes: int) -> CondInst:
    """The network of a configuration, with random weights."""
    if cfg.backbone in SWINS:
        body = Swin(cfg.backbone, cfg.freeze_at)
    elif cfg.backbone == "mobilenet_v2":
        body = MobileNetV2(cfg.norm, cfg.freeze_at)
    else:
        body = ResNet(cfg.backbone, cfg.norm, cfg.freeze_at, cfg.stride_in_1x1, cfg.deformable)
    backbone = Backbone(body, cfg.fpn_channels)
    num_dynamic = sum(mask_head.dynamic_sizes(cfg.mask_channels))
    head = fcos.FCOSHead(num_classes, cfg.fpn_channels, cfg.tower_convs, num_dynamic)
    widths = cfg.fpn_channels, cfg.mask_branch_channels, cfg.mask_channels
    mask_branch = MaskBranch(*widths, cfg.mask_branch_convs, NORMS[cfg.mask_norm])
    return CondInst(backbone, head, mask_branch, cfg)


def make_teacher(student: CondInst) -> CondInst:
    """A copy of the student, train mode included, that is never trained. It has no stochastic depth
    (the published teacher keeps it)."""
    return without_drop_path(copy.deepcopy(student).requires_grad_(False))
