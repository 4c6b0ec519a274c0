"""Losses of Panoptic FCN: positions by focal loss, segments by (weighted) dice, and the embeddings that IBS uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.losses import dice_loss
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
    levels = [on.nonzero().squeeze(1) for on in assign_levels(things.boxes, ranges).unbind(1)]
    position = output.features.new_zeros((), dtype=torch.float32)
    kernels, weights = [], []
    for assigned, center, kernel in zip(levels, output.centers, output.kernels, strict=True):
        target = center_targets(things, assigned, center.shape)
        position = position + sigmoid_focal_loss(center.float(), target, reduction="sum")
        gathered, weight = _positions(things, assigned, center, kernel, num_positions)
        kernels.append(gathered)
        weights.append(weight)
    instance = torch.cat(levels)
    count = normalizer(len(instance), output.features)
    order = things.image[instance].argsort(stable=True)  # rows of one crop become neighbours
    instance, on_device = instance[order], order.to(output.features.device, non_blocking=True)
    embeddings = generator(torch.cat(kernels)[on_device])  # (A, k, C)
    weight = torch.cat(weights)[on_device]
    segment = _dice(embeddings, things.image[instance], instance, things.masks, output.features, weight) / count
    k = embeddings.shape[1]
    segments = SegmentEmbeddings(
        embeddings=embeddings.flatten(0, 1),
        features=output.features,
        image_index=things.image[instance].repeat_interleave(k),
        is_thing=torch.ones(len(instance) * k, dtype=torch.bool),
        weight=weight.flatten(),
        segment_index=things.row[instance].repeat_interleave(k),
    )
    return position / count, segment, segments


def _positions(things: ThingTargets, assigned: Tensor, center: Tensor, kernel: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Kernels (A, k, K) at the k best positions inside each instance, and their weights (A, k), which sum to one.

    A map of fewer than k positions, or a mask that fills fewer, leaves positions of weight zero.
    """
    size = center.shape[-2:]
    device = center.device
    index, image = assigned.to(device, non_blocking=True), things.image[assigned].to(device, non_blocking=True)
    masks = things.masks[index]
    if len(assigned):
        masks = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]
    else:
        masks = masks.new_zeros(0, *size)
    scores = center[image, things.channel[assigned].to(device, non_blocking=True)].float().sigmoid()
    guidance = torch.where(masks > 0.1, scores, 0.0).flatten(1)
    weights, place = guidance.topk(min(k, guidance.shape[1]), dim=1)
    short = k - weights.shape[1]
    weights, place = F.pad(weights, (0, short)), F.pad(place, (0, short))
    gathered = kernel.flatten(2).transpose(1, 2)[image[:, None], place]
    return gathered, weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-8)


def stuff_losses(output: PanopticFCNOutput, stuff: StuffTargets, generator: Generator) -> tuple[Tensor, Tensor]:
    """Position loss (mean over pixels, summed over classes, per image) and dice loss (per region on a level).

    A region's kernel is the sum of kernel features over the region divided by the area of the *whole* map, in training
    as in inference: the published network has learnt this scale.
    """
    position = output.features.new_zeros((), dtype=torch.float32)
    kernels, valid = [], []
    device = output.features.device
    image, channel = stuff.image.to(device, non_blocking=True), stuff.channel.to(device, non_blocking=True)
    for region, kernel in zip(output.regions, output.kernels, strict=True):
        target, on_level = region_targets(stuff, region.shape)
        loss = sigmoid_focal_loss(region.float(), target, reduction="none")
        position = position + loss.flatten(2).mean(2).sum()
        kernels.append(pool_regions((target > 0).float(), kernel)[image, channel])
        valid.append(on_level)
    embeddings = generator(torch.stack(kernels, dim=1))  # (M, L, C)
    weight = torch.stack(valid, dim=1)
    row = torch.arange(len(stuff.image))
    segment = _dice(embeddings, stuff.image, row, stuff.masks, output.features, weight)
    return position / output.features.shape[0], segment / normalizer(weight.sum(), weight)


def pool_regions(regions: Tensor, kernels: Tensor) -> Tensor:
    """Sum of (B, K, h, w) kernels over (B, C, h, w) regions, divided by h w: (B, C, K)."""
    pooled = torch.bmm(regions.flatten(2).to(kernels.dtype), kernels.flatten(2).transpose(1, 2))
    return pooled / (regions.shape[-1] * regions.shape[-2])


def _dice(embeddings: Tensor, image: Tensor, row: Tensor, masks: Tensor, features: Tensor, weight: Tensor) -> Tensor:
    """Sum of weighted dice losses; one matrix product a crop.

    Args:
        embeddings: (A, k, C), sorted by crop.
        image: (A,) crop, on the CPU.
        row: (A,) row in ``masks``, on the CPU.
        masks: (N, h, w).
        features: (B, C, h, w).
        weight: (A, k).
    """
    counts = torch.bincount(image, minlength=features.shape[0]).tolist()
    total = embeddings.sum() * 0.0
    parts = zip(embeddings.split(counts), row.split(counts), weight.split(counts), features, strict=True)
    for embedding, rows, share, feature in parts:
        if not len(rows):
            continue
        logits = embedding.flatten(0, 1) @ feature.flatten(1)
        probabilities = logits.float().sigmoid().unflatten(0, embedding.shape[:2])
        total = (
            total + (share * dice_loss(probabilities, masks[rows.to(masks.device, non_blocking=True)].flatten(1))).sum()
        )
    return total
