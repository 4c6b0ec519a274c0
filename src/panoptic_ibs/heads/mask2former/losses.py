"""Losses of Mask2Former: matching, classes, masks at points, for every prediction of the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional import forms
from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.masks import sample_masks
from panoptic_ibs.functional.matching import hungarian, pairwise_bce, pairwise_dice
from panoptic_ibs.functional.points import sample_points, sample_rows, uncertain_points
from panoptic_ibs.functional.ragged import padded
from panoptic_ibs.structures import SegmentEmbeddings, Target

from . import batched
from .network import Mask2FormerOutput
from .options import LossOptions, Matches

MASKS = 64  # masks whose points are drawn together


def usable_rows(target: Target, crop_fix: bool) -> Tensor:
    """Rows to learn: not crowd; with the crop fix, not those that the crop removed (one pixel or fewer left)."""
    usable = ~target.is_crowd
    return (usable & (target.areas > 1) if crop_fix else usable).nonzero().squeeze(1)


@torch.no_grad()
def match(
    output: Mask2FormerOutput, targets: Sequence[Target], rows: Sequence[Tensor], options: LossOptions
) -> list[Matches]:
    """Hungarian matching of every prediction, in float32, on points drawn anew for each prediction and crop.

    The costs of all predictions travel to the CPU together: a step waits for the device once.
    """
    layers, device = len(output.logits), output.features.device
    size = (output.features.shape[-2], output.features.shape[-1])
    costs: list[list[Tensor]] = [[] for _ in range(layers)]
    for i, (target, wanted) in enumerate(zip(targets, rows, strict=True)):
        features = output.features[i].float().flatten(1).T.contiguous()
        classes = target.class_ids[wanted].to(device, non_blocking=True)
        wanted = wanted.to(device, non_blocking=True)
        for layer in range(layers):
            points = torch.rand(1, options.points, 2, device=device)[0]
            masks = sample_masks(target.id_map, wanted, points)
            with torch.autocast(device.type, enabled=False):
                logits = output.embeddings[layer][i].float() @ sample_rows(features, size, points).T
                cost = options.mask_weight * pairwise_bce(logits, masks)
                cost += options.dice_weight * pairwise_dice(logits, masks)
            probability = output.logits[layer][i].float().softmax(-1)[:, classes]
            costs[layer].append(cost - options.class_weight * probability)
    pairs = hungarian([c for layer in costs for c in layer], [t.image_id for t in targets] * layers)
    groups = [pairs[start : start + len(targets)] for start in range(0, len(pairs), len(targets))]
    return [
        Matches(
            image=torch.cat([torch.full((len(q),), i) for i, (q, _) in enumerate(group)]),
            query=torch.cat([q for q, _ in group]),
            row=torch.cat([r[c] for (_, c), r in zip(group, rows, strict=True)]),
        )
        for group in groups
    ]


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
        embeddings: (S, C) of the matched queries of any number of predictions; features: (B, C, h, w).
        matches: of these embeddings, in their order.
    """
    device = features.device
    bce = dice = embeddings.sum() * 0.0 + features.flatten()[:0].sum()
    for i, (target, feature) in enumerate(zip(targets, features.unbind(0), strict=True)):
        chosen = (matches.image == i).nonzero().squeeze(1)
        if not len(chosen):
            continue
        rows = matches.row[chosen].to(device, non_blocking=True)
        maps = (embeddings[chosen.to(device, non_blocking=True)] @ feature.flatten(1)).float()
        maps = maps.unflatten(1, feature.shape[-2:])
        for part, row in zip(maps.split(MASKS), rows.split(MASKS), strict=True):
            points = uncertain_points(part, options.points, options.oversample, options.importance)
            logits = sample_points(part, points)
            masks = sample_masks(target.id_map, row, points)
            bce = bce + F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1).sum()
            p = logits.sigmoid()
            dice = dice + (1 - (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)).sum()
    return bce, dice


def all_losses(
    output: Mask2FormerOutput, targets: Sequence[Target], rows: Sequence[Tensor], options: LossOptions
) -> tuple[dict[str, Tensor], list[SegmentEmbeddings]]:
    """Unweighted terms ``class``, ``mask``, ``dice``, summed over predictions, and the matched embeddings of each."""
    form = _batched_losses if forms.batched(output.features.device) else _losses
    classes, bce, dice, matches, embeddings = form(output, targets, rows, options)
    count = normalizer(sum(len(r) for r in rows), output.features)
    losses = {"class": classes, "mask": bce / count, "dice": dice / count}
    is_thing = padded([t.is_thing for t in targets], False)
    segments = [
        SegmentEmbeddings(
            embedding,
            output.features,
            image_index=m.image,
            is_thing=is_thing[m.image, m.row],
            segment_index=m.row,
            name=f"layer {layer}",
        )
        for layer, (embedding, m) in enumerate(zip(embeddings, matches, strict=True))
    ]
    return losses, segments


Found = tuple[Tensor, Tensor, Tensor, list[Matches], Sequence[Tensor]]
"""Class, mask and dice loss, summed; matches and matched embeddings of each prediction."""


def _losses(
    output: Mask2FormerOutput, targets: Sequence[Target], rows: Sequence[Tensor], options: LossOptions
) -> Found:
    """Crop after crop, in pieces that stay in a CPU's caches.

    The masks of all predictions are made by one product a crop, and only those of matched queries.
    """
    matches = match(output, targets, rows, options)
    queries, device = output.logits[0].shape[1], output.features.device
    embeddings = [
        e.flatten(0, 1)[(m.image * queries + m.query).to(device, non_blocking=True)]
        for e, m in zip(output.embeddings, matches, strict=True)
    ]
    together = Matches(*(torch.cat([getattr(m, f) for m in matches]) for f in ("image", "query", "row")))
    bce, dice = mask_losses(torch.cat(embeddings), output.features, together, targets, options)
    by_class = [
        class_loss(logits, m, targets, options.no_object) for logits, m in zip(output.logits, matches, strict=True)
    ]
    return torch.stack(by_class).sum(), bce, dice, matches, embeddings


def _batched_losses(
    output: Mask2FormerOutput, targets: Sequence[Target], rows: Sequence[Tensor], options: LossOptions
) -> Found:
    """All predictions and crops at once, for a GPU."""
    x = batched.Stacked.make(output, targets, rows)
    layer, m = batched.match(x, [t.image_id for t in targets], options)
    where = batched.places(layer, m, x.logits.shape[:3], [t.class_ids for t in targets], x.logits.shape[-1] - 1)
    where = where.to(x.features.device)
    flat = x.embeddings.flatten(0, 2)
    classes = batched.class_losses(x, where.channels, options.no_object)
    embeddings = flat.index_select(0, where.by_crop.clamp(min=0).flatten()).unflatten(0, where.by_crop.shape)
    bce, dice = batched.mask_losses(embeddings, x.features, x.id_maps, where.rows, options)
    lengths = torch.bincount(layer, minlength=len(x.logits)).tolist()
    matches = [Matches(*part) for part in zip(*(v.split(lengths) for v in (m.image, m.query, m.row)), strict=True)]
    return classes, bce, dice, matches, flat.index_select(0, where.by_layer).split(lengths)
