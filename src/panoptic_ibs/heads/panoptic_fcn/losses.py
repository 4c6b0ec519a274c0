"""Losses of Panoptic FCN: positions by focal loss, segments by (weighted) dice, and the embeddings that IBS uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.losses import dice_of_products
from panoptic_ibs.structures import SegmentEmbeddings

from .network import Generator, PanopticFCNOutput
from .targets import StuffTargets, ThingTargets, assign_levels, center_targets, region_targets

Ranges = Sequence[tuple[float, float]]


def thing_losses(
    output: PanopticFCNOutput, things: ThingTargets, generator: Generator, ranges: Ranges, num_positions: int
) -> tuple[Tensor, Tensor, SegmentEmbeddings]:
    """Position loss, weighted dice loss (both divided by the number of instances on levels) and the embeddings.

    For every instance on a level the ``num_positions`` positions inside its mask with the highest predicted score of
    its class give an embedding each; their scores, normalised to one, weigh the losses (Panoptic FCN, Section 3.3).
    """
    device = output.features.device
    on_level = assign_levels(things.boxes, ranges)
    level, instance = on_level.T.nonzero(as_tuple=True)
    image, counts = things.image[instance], on_level.sum(0).tolist()
    images, channels = output.centers[0].shape[:2]
    count = normalizer(len(instance), output.features)
    target = center_targets(things, instance, level, [c.shape[-2:] for c in output.centers], channels, images)
    logits = torch.cat([center.flatten() for center in output.centers]).float()
    position = sigmoid_focal_loss(logits, target, reduction="sum") / count

    places = torch.stack([instance, image, image * channels + things.channel[instance]]).to(device, non_blocking=True)
    found = [
        _positions(things.masks, center, kernel, place, num_positions)
        for center, kernel, place in zip(output.centers, output.kernels, places.split(counts, dim=1), strict=True)
    ]
    order = image.argsort(stable=True)  # rows of one crop become neighbours
    instance, image, on_device = instance[order], image[order], order.to(device, non_blocking=True)
    kernels, scores = (torch.cat(parts).index_select(0, on_device) for parts in zip(*found, strict=True))
    embeddings = generator(kernels)  # (A, k, C)
    weight = scores / scores.sum(dim=1, keepdim=True).clamp(min=1e-8)
    masks = things.masks.index_select(0, instance.to(device, non_blocking=True))
    segment = _dice(embeddings, image, masks, output.features, weight) / count
    segments = SegmentEmbeddings(
        embeddings=embeddings.flatten(0, 1),
        features=output.features,
        image_index=image.repeat_interleave(num_positions),
        is_thing=torch.ones(len(instance) * num_positions, dtype=torch.bool),
        weight=weight.flatten(),
        segment_index=things.row[instance].repeat_interleave(num_positions),
        count=len(instance),
    )
    return position, segment, segments


def _positions(masks: Tensor, center: Tensor, kernel: Tensor, place: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Kernels (A, k, K) at the k best positions inside each of a level's instances, and the scores (A, k) there.

    A map of fewer than k positions, or a mask that fills fewer, leaves positions of score zero.

    Args:
        masks: (N, H / 4, W / 4) of all instances.
        center: (B, C, h, w) logits of the level.
        kernel: (B, K, h, w) of the level.
        place: (3, A) instance, crop and plane b C + c of each instance, on the device.
        k: positions an instance.
    """
    instance, image, plane = place
    pixels = center.shape[-2] * center.shape[-1]
    inside = masks.new_zeros(0, pixels)
    if len(instance):
        mask = masks.index_select(0, instance)[None]
        inside = F.interpolate(mask, size=center.shape[-2:], mode="bilinear", align_corners=False)[0].flatten(1)
    scores = center.flatten(2).flatten(0, 1).index_select(0, plane).float().sigmoid()
    guidance = torch.where(inside > 0.1, scores, 0.0)
    best, index = guidance.topk(min(k, pixels), dim=1)
    if pixels < k:
        best, index = F.pad(best, (0, k - pixels)), F.pad(index, (0, k - pixels))
    rows = kernel.flatten(2).transpose(1, 2).flatten(0, 1)  # one a pixel
    index = (image[:, None] * pixels + index).flatten()
    return rows.index_select(0, index).view(len(instance), k, rows.shape[1]), best


def stuff_losses(output: PanopticFCNOutput, stuff: StuffTargets, generator: Generator) -> tuple[Tensor, Tensor]:
    """Position loss (mean over pixels, summed over classes, per image) and dice loss (per region on a level).

    A region's kernel is the sum of kernel features over the region divided by the area of the *whole* map, in training
    as in inference: the published network has learnt this scale.
    """
    device = output.features.device
    images, channels = output.regions[0].shape[:2]
    plane = (stuff.image * channels + stuff.channel).to(device, non_blocking=True)
    kernels, valid, targets = [], [], []
    for region, kernel in zip(output.regions, output.kernels, strict=True):
        target, on_level = region_targets(stuff, plane, region.shape)
        kernels.append(pool_regions((target > 0).float(), kernel).flatten(0, 1).index_select(0, plane))
        valid.append(on_level)
        targets.append(target.flatten(2))
    logits = torch.cat([region.flatten(2) for region in output.regions], dim=2).float()
    loss = sigmoid_focal_loss(logits, torch.cat(targets, dim=2), reduction="none").sum(dim=(0, 1))
    position = torch.stack([level.mean() for level in loss.split([t.shape[2] for t in targets])]).sum() / images
    embeddings = generator(torch.stack(kernels, dim=1))  # (M, L, C)
    weight = torch.stack(valid, dim=1)
    segment = _dice(embeddings, stuff.image, stuff.masks, output.features, weight)
    return position, segment / normalizer(weight.sum(), weight)


def pool_regions(regions: Tensor, kernels: Tensor) -> Tensor:
    """Sum of (B, K, h, w) kernels over (B, C, h, w) regions, divided by h w: (B, C, K)."""
    pooled = torch.bmm(regions.flatten(2).to(kernels.dtype), kernels.flatten(2).transpose(1, 2))
    return pooled / (regions.shape[-1] * regions.shape[-2])


def _dice(embeddings: Tensor, image: Tensor, masks: Tensor, features: Tensor, weight: Tensor) -> Tensor:
    """Sum of weighted dice losses; one matrix product a crop, and one loss over all rows.

    Args:
        embeddings: (A, k, C), sorted by crop.
        image: (A,) crop, on the CPU.
        masks: (A, h, w).
        features: (B, C, h, w).
        weight: (A, k).
    """
    counts = torch.bincount(image, minlength=features.shape[0]).tolist()
    return (weight * dice_of_products(embeddings, features.flatten(2), masks.flatten(1), counts)).sum()
