"""CondInst with the losses of CondInst, BoxInst and BoxTeacher, and the teacher's step.

N images · G boxes · K instances · C classes · P locations · D detections · h, w image pixels
Masks are learned on the stride-4 grid [H, W] of the padded image; names say so: `_s8`, `_s4`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image

from . import fcos, losses
from .backbone import NORMS, SWINS, Backbone, ResNet, Swin, pretrained_state_dict, without_drop_path
from .config import Config
from .data import Batch
from .distributed import reduce_mean
from .mask_head import MaskBranch, aligned_upsample, dynamic_mask_logits, num_dynamic_params
from .pseudo_labels import assign_to_boxes, mask_aware_scores, published_scores
from .published import read_backbone
from .transforms import resized_size

PIXELS = {  # means (0..255) and deviations of the channels that a backbone's weights expect
    "rgb": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "bgr": ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
}
WEAK_LOSSES = ("pairwise", "pseudo_mask", "pseudo_affinity")  # those that warm up
MASK_CHUNK = 64  # instances whose full-resolution masks are held in memory at a time


class PseudoMasks(NamedTuple):
    """What the teacher says of the ground-truth boxes; a box without a detection has weight 0."""

    masks: Tensor  # bool [N, G, H, W] stride 4, inside the box
    weights: Tensor  # [N, G] mask-aware scores in [0, 1]


class Instances(NamedTuple):
    """One image's results in pixels of the wanted output size."""

    boxes: Tensor  # [D, 4] xyxy
    scores: Tensor  # [D]
    labels: Tensor  # [D] 0..C-1
    masks: Tensor  # bool [D, h, w]


class Encoded(NamedTuple):
    """A batch of images after the network's dense part."""

    predictions: fcos.Predictions
    locations: fcos.Locations
    mask_features: Tensor  # [N, mask_channels, H/2, W/2] stride 8


class CondInst(nn.Module):
    """FCOS with conditional convolutions for masks (arXiv 2003.05664), trained from masks, boxes,
    or boxes and pseudo masks.

    `mode` chooses the mask losses: condinst (dice against true masks), boxinst (projection, color
    pairwise), boxteacher (those of boxinst, and the two of pseudo masks where there are any; masks
    rescore detections). `loss_weights` by the names of the losses; `detect_options` go to
    fcos.detect.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: fcos.FCOSHead,
        mask_branch: MaskBranch,
        mode: str,
        loss_weights: dict[str, float],
        color_threshold: float = 0.3,
        affinity_threshold: float = 0.5,
        max_mask_locations: int = 64,
        size_unit: float = 64,
        detect_options: dict[str, float] | None = None,
        pixel_format: str = "rgb",
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.mask_branch = backbone, head, mask_branch
        self.mode, self.loss_weights = mode, loss_weights
        self.color_threshold, self.affinity_threshold = color_threshold, affinity_threshold
        self.max_mask_locations, self.size_unit = max_mask_locations, size_unit
        self.detect_options = detect_options or {}
        self.is_bgr = pixel_format == "bgr"
        for name, values in zip(("pixel_mean", "pixel_std"), PIXELS[pixel_format], strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """uint8 RGB [N, 3, h, w] to what the backbone's weights expect; the padding becomes 0."""
        images = images.flip(1) if self.is_bgr else images
        normalized = (images - self.pixel_mean) / self.pixel_std
        for image, (height, width) in zip(normalized, sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return normalized

    def encode(self, normalized: Tensor) -> Encoded:
        features = self.backbone(normalized)
        locations = fcos.make_locations(features, self.size_unit)
        return Encoded(self.head(features), locations, self.mask_branch(features[:3]))

    def mask_logits_s4(self, encoded: Encoded, index: Tensor) -> Tensor:
        """Masks of chosen locations, index [N, K] into P. Returns [N, K, H, W]."""
        params = self.head.dynamic_params(encoded.predictions.box_features, index)
        xy, scale = encoded.locations.xy[index], encoded.locations.sizes_of_interest[index]
        logits_s8 = dynamic_mask_logits(encoded.mask_features, params, xy, scale)
        return aligned_upsample(logits_s8, 2)

    def forward(
        self,
        images: Tensor,
        batch: Batch,
        weak_factor: float = 1.0,
        pseudo: PseudoMasks | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted losses of one batch, and figures worth watching.

        images uint8 [N, 3, h, w]: what the student sees (`batch.images` is the plain copy, for
        color similarity); weak_factor in [0, 1] is the warm-up of the losses without true masks.
        Normalizers are means over ranks, so the losses of a global batch do not depend on how many
        processes share it.
        """
        encoded = self.encode(self.normalize(images, batch.sizes))
        reliable = [(h - cut, w) for (h, w), cut in zip(batch.sizes, batch.cut_rows, strict=True)]
        rows, columns = (side // 4 for side in images.shape[-2:])
        inside_image = losses.inside_masks(reliable, rows, columns, images.device)
        sums, norms, figures = self.loss_sums(encoded, batch, inside_image, pseudo)

        dtype = encoded.predictions.class_logits.dtype
        means = reduce_mean(torch.stack([n.to(dtype) for n in norms.values()]))
        weighted = {}
        for name, mean in zip(norms, means.unbind(), strict=True):
            weight = self.loss_weights[name] * (weak_factor if name in WEAK_LOSSES else 1.0)
            # at least 1, but for the boxes' sum of centernesses, which may well be less
            weighted[name] = weight * sums[name] / mean.clamp(min=1e-6 if name == "box" else 1.0)
        return weighted, figures

    def loss_sums(
        self, encoded: Encoded, batch: Batch, inside_image: Tensor, pseudo: PseudoMasks | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Sums of the losses over their locations or instances, what each is to be divided by, and
        figures. Tensors alone matter here, not sizes known to Python, so that it compiles.

        inside_image bool [N, H, W]: where colors can be relied on.
        """
        targets = fcos.assign_targets(
            encoded.locations, batch.boxes, batch.labels, batch.valid, batch.centers
        )
        sums, norms = detection_loss_sums(encoded.predictions, targets)

        if self.mode == "condinst":
            index, is_real = fcos.sample_random_locations(
                targets.is_positive, self.max_mask_locations
            )
        else:
            quality = encoded.predictions.class_logits.amax(-1).sigmoid()
            quality = quality * encoded.predictions.centerness_logits.sigmoid()
            num_boxes = batch.boxes.shape[1]
            index, is_real = fcos.sample_best_locations(
                targets, quality, num_boxes, self.max_mask_locations
            )
        box_index = targets.box_index.gather(1, index)  # [N, K]
        logits = self.mask_logits_s4(encoded, index)
        num_masks = is_real.sum()

        def of_boxes(x: Tensor) -> Tensor:  # [N, G, ...] -> [N, K, ...]
            return x[torch.arange(len(x), device=x.device)[:, None], box_index]

        def total(per_instance: Tensor) -> Tensor:  # where, not times: 0 * NaN is NaN
            return torch.where(is_real, per_instance, 0.0).sum()

        figures: dict[str, Tensor] = {}
        probs = logits.sigmoid()
        if self.mode == "condinst":
            true_masks = of_boxes(batch.masks).to(probs.dtype)
            sums["mask"], norms["mask"] = total(losses.dice_loss(probs, true_masks)), num_masks
        else:
            rows, columns = logits.shape[-2:]
            inside_box = (
                losses.box_masks(of_boxes(batch.boxes), rows, columns) & is_real[..., None, None]
            )
            similarity = losses.color_similarity(batch.images, inside_image)
            color_edges = similarity >= self.color_threshold
            projection = losses.projection_loss(probs, inside_box.to(probs.dtype))
            sums["projection"], norms["projection"] = total(projection), num_masks
            pairwise, weight = losses.color_pairwise_sums(logits, color_edges, inside_box)
            sums["pairwise"], norms["pairwise"] = total(pairwise), total(weight)
            edges = torch.stack((total(weight), 8 * inside_box.sum().to(weight.dtype)))
            figures["color_edge_share"] = edges.detach()

        if self.mode == "boxteacher" and pseudo is not None:
            trust = of_boxes(pseudo.weights)
            pseudo_masks = of_boxes(pseudo.masks).to(probs.dtype)
            num_trusted = (is_real & (trust > 0)).sum()
            dice = losses.dice_loss(probs, pseudo_masks)
            affinity = losses.affinity_loss(
                logits, pseudo_masks, inside_box, inside_image, self.affinity_threshold
            )
            for name, loss in (("pseudo_mask", dice), ("pseudo_affinity", affinity)):
                sums[name], norms[name] = total(trust * loss), num_trusted
        return sums, norms, figures

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Each image's results in pixels of its output size (height, width).

        Empty boxes are dropped. In mode boxteacher the score is sqrt(c * mean probability of the
        mask's foreground), 0 for an empty mask; else c.
        """
        encoded = self.encode(self.normalize(images, sizes))
        results = []
        for n, found in enumerate(self.detect(encoded)):
            boxes, keep = fit_boxes(found.boxes, sizes[n], output_sizes[n])
            boxes, scores, index = boxes[keep], found.scores[keep], found.location_index[keep]
            masks, means = [], [scores[:0]]
            for part in index.split(MASK_CHUNK) if len(index) else ():
                probs = self.mask_probs(encoded, n, part, sizes[n], output_sizes[n])
                masks.append(probs > 0.5)
                foreground = (probs * masks[-1]).sum((1, 2))
                means.append(foreground / masks[-1].sum((1, 2)).clamp(min=1))
            if self.mode == "boxteacher":
                scores = (scores * torch.cat(means)).sqrt()
            empty = torch.zeros(0, *output_sizes[n], dtype=torch.bool, device=boxes.device)
            results.append(
                Instances(boxes, scores, found.labels[keep], torch.cat(masks) if masks else empty)
            )
        return results

    def detect(self, encoded: Encoded) -> list[fcos.Detections]:
        return fcos.detect(encoded.predictions, encoded.locations, **self.detect_options)

    def mask_probs(
        self,
        encoded: Encoded,
        image: int,
        index: Tensor,
        size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> Tensor:
        """Mask probabilities [D, h, w] at full resolution of one image's locations index [D]."""
        predictions = encoded.predictions
        one = slice(image, image + 1)
        features = [f[one] for f in predictions.box_features]
        alone = encoded._replace(
            predictions=predictions._replace(box_features=features),
            mask_features=encoded.mask_features[one],
        )
        probs = aligned_upsample(self.mask_logits_s4(alone, index[None]).sigmoid(), 4)
        probs = probs[:, :, : size[0], : size[1]]
        if size != output_size:
            probs = F.interpolate(probs, size=output_size, mode="bilinear", align_corners=False)
        return probs[0]

    @torch.no_grad()
    def make_pseudo_masks(
        self,
        batch: Batch,
        short_side: int = 800,
        long_side: int = 1333,
        mask_threshold: float = 0.5,
        iou_threshold: float = 0.5,
        score_threshold: float = 0.0,
        published: bool = False,
    ) -> PseudoMasks:
        """The teacher's step (BoxTeacher): detect on the plain images, score the masks, assign
        them to the boxes. Called in train mode: the mask branch uses the batch's statistics.

        Images are resized to `short_side` (at most `long_side`); short_side 0 keeps the student's
        size. Masks are made only for detections whose IoU with some box reaches the threshold: the
        others cannot be assigned. `published`: scores and assignment as in the published code.
        """
        num_images, num_boxes = batch.valid.shape
        rows, columns = batch.images.shape[-2] // 4, batch.images.shape[-1] // 4
        pseudo = PseudoMasks(
            batch.valid.new_zeros(num_images, num_boxes, rows, columns),
            batch.boxes.new_zeros(num_images, num_boxes),
        )
        normalized, sizes = self.normalize(batch.images, batch.sizes), batch.sizes
        if short_side:
            normalized, sizes = resize_images(normalized, sizes, short_side, long_side)
        encoded = self.encode(normalized)
        for n, found in enumerate(self.detect(encoded)):
            size = batch.sizes[n]
            boxes, is_box = fit_boxes(found.boxes, sizes[n], size)
            ious = box_iou(boxes, batch.boxes[n]).masked_fill(~batch.valid[n], -1)
            is_useful = (ious >= iou_threshold).any(1)
            if not is_useful.any():
                continue
            if published:  # its first detection is a special case, so it must remain the first
                is_useful[is_box.int().argmax()] = True
            boxes, scores, ious = boxes[is_useful], found.scores[is_useful], ious[is_useful]
            index = found.location_index[is_useful]
            probs = self.mask_probs(encoded, n, index, sizes[n], size)
            inside = losses.box_masks(boxes, *size, stride=1)
            order = trust = mask_aware_scores(probs, scores, inside, mask_threshold)
            if published:
                order, trust = published_scores(probs, scores, mask_threshold)
            assigned = assign_to_boxes(ious, order, iou_threshold, score_threshold, published)
            has_mask = (assigned >= 0).to(boxes.device)
            assigned = assigned.to(boxes.device).clamp(min=0)
            sampled = (probs[:, 2::4, 2::4] > mask_threshold)[assigned] & has_mask[:, None, None]
            pseudo.masks[n, :, : sampled.shape[1], : sampled.shape[2]] = sampled
            pseudo.weights[n] = torch.where(has_mask, trust[assigned], 0.0)
        return pseudo._replace(masks=pseudo.masks & losses.box_masks(batch.boxes, rows, columns))


def detection_loss_sums(
    predictions: fcos.Predictions, targets: fcos.Targets
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of FCOS's three losses over all locations, and what each is to be divided by."""

    def of_positives(x: Tensor) -> Tensor:
        return torch.where(targets.is_positive, x, 0.0)

    centerness = losses.centerness_targets(targets.distances)
    giou = losses.giou_loss(predictions.distances, targets.distances)
    bce = F.binary_cross_entropy_with_logits(
        predictions.centerness_logits, centerness, reduction="none"
    )
    num_positive = targets.is_positive.sum()
    sums = {
        "class": losses.focal_loss(predictions.class_logits, targets.labels).sum(),
        "box": of_positives(centerness * giou).sum(),
        "centerness": of_positives(bce).sum(),
    }
    norms = {
        "class": num_positive,
        "box": of_positives(centerness).sum(),
        "centerness": num_positive,
    }
    return sums, norms


def fit_boxes(
    boxes: Tensor, size: tuple[int, int], output_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Boxes [D, 4] scaled from one (height, width) to another and clipped; which are not empty."""
    scale_y, scale_x = output_size[0] / size[0], output_size[1] / size[1]
    boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    boxes = clip_boxes_to_image(boxes, output_size)
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def resize_images(
    images: Tensor, sizes: Sequence[tuple[int, int]], short_side: int, long_side: int
) -> tuple[Tensor, list[tuple[int, int]]]:
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


def build_model(cfg: Config, num_classes: int, load_pretrained: bool = True) -> CondInst:
    """The one place where a configuration becomes modules. `load_pretrained=False` leaves out
    ImageNet weights (for a checkpoint to come).
    """
    state_dict = None
    if load_pretrained and (cfg.pretrained or cfg.backbone_weights):
        state_dict = pretrained_state_dict(cfg.backbone, cfg.backbone_weights, read_backbone)
    if cfg.backbone in SWINS:
        body = Swin(cfg.backbone, cfg.freeze_at, state_dict, cfg.drop_path)
    else:
        variant = (cfg.stride_in_1x1, cfg.deformable)
        body = ResNet(cfg.backbone, cfg.norm, cfg.freeze_at, state_dict, *variant)
    dynamic = num_dynamic_params(cfg.mask_channels)
    return CondInst(
        Backbone(body, cfg.fpn_channels),
        fcos.FCOSHead(num_classes, cfg.fpn_channels, cfg.tower_convs, dynamic),
        MaskBranch(
            cfg.fpn_channels,
            cfg.mask_branch_channels,
            cfg.mask_channels,
            cfg.mask_branch_convs,
            NORMS[cfg.mask_norm],
        ),
        mode=cfg.mode,
        loss_weights={
            "class": cfg.class_weight,
            "box": cfg.box_weight,
            "centerness": cfg.centerness_weight,
            "mask": cfg.mask_weight,
            "projection": cfg.projection_weight,
            "pairwise": cfg.pairwise_weight,
            "pseudo_mask": cfg.pseudo_mask_weight,
            "pseudo_affinity": cfg.pseudo_affinity_weight,
        },
        color_threshold=cfg.color_threshold,
        affinity_threshold=cfg.affinity_threshold,
        max_mask_locations=cfg.max_mask_locations,
        size_unit=cfg.size_unit,
        detect_options={
            "pre_nms_threshold": cfg.pre_nms_threshold,
            "pre_nms_top": cfg.pre_nms_top,
            "nms_threshold": cfg.nms_threshold,
            "max_detections": cfg.max_detections,
        },
        pixel_format=cfg.pixel_format,
    )


def make_teacher(student: CondInst) -> CondInst:
    """A copy that is never trained, without stochastic depth (the published teacher keeps it)."""
    return without_drop_path(copy.deepcopy(student).requires_grad_(False))
