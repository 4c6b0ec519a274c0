"""Losses of Mask2Former: matching, classes, masks at points, for every prediction of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.masks import sample_masks
from panoptic_ibs.functional.matching import hungarian, pairwise_bce, pairwise_dice
from panoptic_ibs.functional.points import sample_points, uncertain_points
from panoptic_ibs.structures import SegmentEmbeddings, Target

from .network import Mask2FormerOutput


@dataclass(frozen=True)
class LossOptions:
    """Weights and sampling, with the published values; matching costs have the same weights as the losses."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75


@dataclass
class Matches:
    """Matched queries of one prediction, the crops one after another; all (S,) on the CPU."""

    image: Tensor
    query: Tensor
    row: Tensor


def usable_rows(target: Target, crop_fix: bool) -> Tensor:
    """Rows to learn: not crowd; with the crop fix, not those that the crop removed (one pixel or fewer left)."""
    usable = ~target.is_crowd
    return (usable & (target.areas > 1) if crop_fix else usable).nonzero().squeeze(1)


@torch.no_grad()
def match(
    output: Mask2FormerOutput, layer: int, targets: Sequence[Target], rows: Sequence[Tensor], options: LossOptions
) -> Matches:
    """Hungarian matching of one prediction, on uniform points shared by all masks of a crop, in float32."""
    costs = []
    for i, (target, wanted) in enumerate(zip(targets, rows, strict=True)):
        device = output.features.device
        points = torch.rand(1, options.points, 2, device=device)
        sampled = sample_points(output.features[i].float(), points.expand(output.features.shape[1], -1, -1))
        logits = output.embeddings[layer][i].float() @ sampled
        masks = sample_masks(target.id_map, wanted.to(device, non_blocking=True), points[0])
        classes = target.class_ids[wanted].to(device, non_blocking=True)
        probability = output.logits[layer][i].float().softmax(-1)[:, classes]
        cost = options.mask_weight * pairwise_bce(logits, masks) - options.class_weight * probability
        costs.append(cost + options.dice_weight * pairwise_dice(logits, masks))
    pairs = hungarian(costs, [t.image_id for t in targets])
    return Matches(
        image=torch.cat([torch.full((len(q),), i) for i, (q, _) in enumerate(pairs)]),
        query=torch.cat([q for q, _ in pairs]),
        row=torch.cat([r[c] for (_, c), r in zip(pairs, rows, strict=True)]),
    )


def class_loss(logits: Tensor, matches: Matches, targets: Sequence[Target], no_object: float) -> Tensor:
    """Weighted cross-entropy over all queries; those without a match should say "no object"."""
    b, q, channels = logits.shape
    wanted = torch.full((b, q), channels - 1)
    ids = [targets[i].class_ids[matches.row[matches.image == i]] for i in range(b)]
    wanted[matches.image, matches.query] = torch.cat(ids)
    weight = torch.ones(channels)
    weight[-1] = no_object
    wanted, weight = (x.to(logits.device, non_blocking=True) for x in (wanted, weight))
    return F.cross_entropy(logits.float().transpose(1, 2), wanted, weight)


def mask_losses(
    embeddings: Tensor, features: Tensor, matches: Matches, targets: Sequence[Target], options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Sums over matched masks of cross-entropy (mean over points) and dice loss, on uncertain points.

    Args:
        embeddings: (S, C) of the matched queries; features: (B, C, h, w).
    """
    bce = dice = embeddings.sum() * 0.0 + features.flatten()[:0].sum()
    for i, target in enumerate(targets):
        chosen = (matches.image == i).nonzero().squeeze(1)
        if not len(chosen):
            continue
        device = features.device
        maps = (embeddings[chosen.to(device, non_blocking=True)] @ features[i].flatten(1)).float()
        maps = maps.unflatten(1, features.shape[-2:])
        points = uncertain_points(maps, options.points, options.oversample, options.importance)
        logits = sample_points(maps, points)
        masks = sample_masks(target.id_map, matches.row[chosen].to(device, non_blocking=True), points)
        bce = bce + F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1).sum()
        p = logits.sigmoid()
        dice = dice + (1 - (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)).sum()
    return bce, dice


def layer_losses(
    output: Mask2FormerOutput, layer: int, targets: Sequence[Target], rows: Sequence[Tensor], options: LossOptions
) -> tuple[dict[str, Tensor], SegmentEmbeddings]:
    """Weighted terms ``class``, ``mask``, ``dice`` of one prediction, and the matched embeddings."""
    matches = match(output, layer, targets, rows, options)
    flat = matches.image * output.logits[layer].shape[1] + matches.query
    embeddings = output.embeddings[layer].flatten(0, 1)[flat.to(output.features.device, non_blocking=True)]
    bce, dice = mask_losses(embeddings, output.features, matches, targets, options)
    count = normalizer(sum(len(r) for r in rows), output.features)
    losses = {
        "class": options.class_weight * class_loss(output.logits[layer], matches, targets, options.no_object),
        "mask": options.mask_weight * bce / count,
        "dice": options.dice_weight * dice / count,
    }
    is_thing = [targets[i].is_thing[matches.row[matches.image == i]] for i in range(len(targets))]
    segments = SegmentEmbeddings(
        embeddings,
        output.features,
        image_index=matches.image,
        is_thing=torch.cat(is_thing),
        segment_index=matches.row,
        name=f"layer {layer}",
    )
    return losses, segments
