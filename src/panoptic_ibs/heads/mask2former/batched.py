"""The losses of Mask2Former in a few operations over all predictions and crops: the form for GPUs.

The same numbers as :mod:`.losses` for the same points. The matching draws its points once a crop, not anew for each
prediction: the features are then looked up once. Segments are padded to the most that a crop has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional.masks import sample_masks_of
from panoptic_ibs.functional.matching import assign
from panoptic_ibs.functional.points import sample_features, sample_points, uncertain_points
from panoptic_ibs.functional.ragged import padded
from panoptic_ibs.structures import Target

from .network import Mask2FormerOutput
from .options import LossOptions, Matches

MAP_ELEMENTS = 1 << 28  # of the matched masks' logits that are made at a time: 1 GB in float32


@dataclass
class Stacked:
    """Outputs and targets of a step as whole tensors: L predictions, B crops, Q queries, at most N segments a crop.

    Attributes:
        logits: (L, B, Q, classes + 1); embeddings: (L, B, Q, C); features: (B, C, h, w).
        id_maps: (B, H, W).
        rows: (B, N) rows of the usable segments, -1 where a crop has fewer.
        classes: (B, N) their classes; of padding anything.
        rows_on_cpu: the same as ``rows``, on the CPU.
        counts: segments of each crop.
    """

    logits: Tensor
    embeddings: Tensor
    features: Tensor
    id_maps: Tensor
    rows: Tensor
    classes: Tensor
    rows_on_cpu: Tensor
    counts: list[int]

    @classmethod
    def make(cls, output: Mask2FormerOutput, targets: Sequence[Target], rows: Sequence[Tensor]) -> Stacked:
        """Tables travel to the device in one copy."""
        device = output.features.device
        dtype = max((t.id_map.dtype for t in targets), key=lambda d: d.itemsize)
        usable = padded(rows, -1)
        classes = padded([t.class_ids for t in targets], 0)
        table = torch.stack([usable, classes.gather(1, usable.clamp(min=0)) if classes.numel() else usable])
        table = table.to(device, non_blocking=True)
        return cls(
            torch.stack(output.logits),
            torch.stack(output.embeddings),
            output.features,
            torch.stack([t.id_map if t.id_map.dtype == dtype else t.id_map.to(dtype) for t in targets]),
            table[0],
            table[1],
            usable,
            [len(r) for r in rows],
        )


@torch.no_grad()
def costs(x: Stacked, points: Tensor, options: LossOptions) -> Tensor:
    """(L, B, Q, N) matching costs in float32; what a crop's padding costs means nothing.

    Args:
        points: (B, P, 2).
    """
    layers, b, q, _ = x.embeddings.shape
    sampled = sample_features(x.features.float(), points)
    masks = sample_masks_of(x.id_maps, x.rows, points)
    with torch.autocast(points.device.type, enabled=False):
        logits = x.embeddings.float().transpose(0, 1).flatten(1, 2) @ sampled  # (B, L Q, P)
        mask_sums = masks.sum(2)[:, None]
        shared = logits @ masks.transpose(1, 2)
        bce = (F.softplus(logits).sum(2, keepdim=True) - shared) / logits.shape[2]
        p = logits.sigmoid_()
        dice = 1 - (2 * p @ masks.transpose(1, 2) + 1) / (p.sum(2, keepdim=True) + mask_sums + 1)
        cost = (options.mask_weight * bce + options.dice_weight * dice).unflatten(1, (layers, q)).transpose(0, 1)
        wanted = x.classes.clamp(min=0)[None, :, None].expand(layers, b, q, -1)
        return cost - options.class_weight * x.logits.float().softmax(-1).gather(3, wanted)


def match(x: Stacked, names: Sequence[str], options: LossOptions) -> tuple[Tensor, Matches]:
    """Hungarian matching of all predictions: one copy of the costs to the CPU.

    Returns:
        (M,) the prediction that each pair is of, ascending, and the pairs.
    """
    points = torch.rand(len(names), options.points, 2, device=x.features.device)
    layer, image, query, column = assign(costs(x, points, options), x.counts, names).unbind(1)
    return layer, Matches(image, query, x.rows_on_cpu[image, column])


def class_losses(x: Stacked, wanted: Tensor, no_object: float) -> Tensor:
    """Weighted cross-entropy of all queries, a mean a prediction, summed over the predictions.

    Args:
        wanted: (L, B, Q) channels.
    """
    weight = torch.ones(x.logits.shape[-1], device=wanted.device)
    weight[-1] = no_object
    loss = F.cross_entropy(x.logits.float().flatten(0, 2), wanted.flatten(), weight, reduction="none")
    share = weight[wanted.flatten()]
    return (loss.view(len(wanted), -1).sum(1) / share.view(len(wanted), -1).sum(1)).sum()


def mask_losses(
    embeddings: Tensor, features: Tensor, id_maps: Tensor, rows: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Sums over matched masks of cross-entropy (mean over points) and dice loss, on uncertain points.

    Args:
        embeddings: (B, S, C) of each crop's matched queries, padded.
        features: (B, C, h, w).
        id_maps: (B, H, W).
        rows: (B, S) rows of their segments; -1 for padding, which counts nothing.
    """
    b, most = rows.shape
    size = features.shape[-2:]
    bce = dice = embeddings.sum() * 0.0 + features.flatten()[:0].sum()
    at_once = max(1, MAP_ELEMENTS // (b * size[0] * size[1]))
    for start in range(0, most, at_once):
        part = slice(start, start + at_once)
        maps = (embeddings[:, part] @ features.flatten(2)).float().flatten(0, 1).unflatten(1, size)
        real = (rows[:, part] >= 0).flatten()
        points = uncertain_points(maps, options.points, options.oversample, options.importance)
        logits = sample_points(maps, points)
        masks = sample_masks_of(id_maps, rows[:, part], points.unflatten(0, (b, -1))).flatten(0, 1)
        bce = bce + (F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1) * real).sum()
        p = logits.sigmoid()
        dice = dice + ((1 - (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)) * real).sum()
    return bce, dice


@dataclass
class Places:
    """Where the matched queries of all predictions are; S at most in a crop, M in all.

    Attributes:
        channels: (L, B, Q) channel that each query should say.
        by_crop: (B, S) index in (L, B, Q), and ``rows`` (B, S) of the segments; -1 is padding.
        by_layer: (M,) index in (L, B, Q), one prediction after the other.
    """

    channels: Tensor
    by_crop: Tensor
    rows: Tensor
    by_layer: Tensor

    def to(self, device: torch.device) -> Places:
        """Copy to the device, without waiting."""
        return Places(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def places(layer: Tensor, m: Matches, shape: Sequence[int], class_ids: Sequence[Tensor], no_object: int) -> Places:
    """Tables of all matches on the CPU.

    Args:
        layer: (M,) prediction of each pair.
        m: the pairs.
        shape: L, B, Q.
        class_ids: (N,) channel of each row, of each crop's target.
        no_object: the channel of queries without a match.
    """
    _, b, q = shape
    flat = (layer * b + m.image) * q + m.query
    channels = torch.full((math.prod(shape),), no_object)
    channels[flat] = padded(class_ids, 0)[m.image, m.row]
    order = m.image.argsort(stable=True)
    number = torch.bincount(m.image, minlength=b)
    place = torch.arange(len(flat)) - torch.repeat_interleave(number.cumsum(0) - number, number)
    table = torch.full((b, int(number.max()), 2), -1)
    table[m.image[order], place] = torch.stack([flat[order], m.row[order]], 1)
    return Places(channels.view(*shape), table[..., 0], table[..., 1], flat)
