"""Inference of Mask2Former: panoptic, semantic and instance results; filter first, full resolution in row stripes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional.fusion import upsample
from panoptic_ibs.functional.rle import encode_masks
from panoptic_ibs.structures import ImageSize, Instances, id_map_dtype


def panoptic(
    logits: Tensor,
    masks: Tensor,
    is_thing: Tensor,
    size: ImageSize,
    score_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    chunk: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """The published panoptic post-processing.

    Args:
        logits: (Q, classes + 1); masks: (Q, h, w) mask logits at stride 4 of the padded input.
        is_thing: (classes,) bool.
        size: sizes of the image.
        chunk: masks at full resolution at a time.

    Returns:
        (H, W) id map of :func:`id_map_dtype`, class ids (S,) and scores (S,).
    """
    score, label = logits.float().softmax(-1).max(-1)
    keep = (label != logits.shape[-1] - 1) & (score > score_threshold)
    score, label, masks = score[keep], label[keep], masks[keep].float()
    count = len(label)
    best = torch.full(size.original, -1.0, device=masks.device)
    winner = torch.zeros(size.original, dtype=torch.long, device=masks.device)
    inside = torch.zeros(size.original, dtype=torch.bool, device=masks.device)
    original_area = []
    for start in range(0, count, chunk):
        p = upsample(masks[start : start + chunk], size).sigmoid()
        original_area.append((p >= 0.5).flatten(1).sum(1))
        value, index = (p * score[start : start + chunk, None, None]).max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        winner = torch.where(better, index + start, winner)
        inside = torch.where(better, p.gather(0, index[None])[0] >= 0.5, inside)
    if not count:
        return winner.to(id_map_dtype(0)), label, score
    area = torch.cat(original_area)
    won = torch.bincount(winner.flatten(), minlength=count)
    drawn = torch.bincount(winner[inside], minlength=count)
    kept = (won > 0) & (area > 0) & (drawn > 0) & (won / area.clamp(min=1) >= overlap_threshold)
    first = _first_of_class(label, kept & ~is_thing.to(label.device)[label])
    ids = torch.where(kept & (first == torch.arange(count, device=label.device)), 1, 0)
    rank = torch.where(kept, (ids.cumsum(0))[first], 0)
    opened = ids.bool()
    return torch.where(inside, rank.to(id_map_dtype(count))[winner], 0), label[opened], score[opened]


def _first_of_class(label: Tensor, stuff: Tensor) -> Tensor:
    """(N,) for a kept stuff segment the first kept one of its class, for anything else itself."""
    own = torch.arange(len(label), device=label.device)
    same = (label[:, None] == label) & stuff[:, None] & stuff
    return torch.where(stuff, same.int().argmax(dim=1), own)


def semantic(logits: Tensor, masks: Tensor, size: ImageSize) -> Tensor:
    """Class scores (classes, H, W): masks weighted by class probabilities (published semantic inference)."""
    probabilities = logits.float().softmax(-1)[:, :-1]
    scores = torch.einsum("qc,qhw->chw", probabilities, upsample_input(masks, size).sigmoid())
    if scores.shape[-2:] != size.original:
        scores = F.interpolate(scores[None], size=size.original, mode="bilinear", align_corners=False)[0]
    return scores


def upsample_input(masks: Tensor, size: ImageSize) -> Tensor:
    """(Q, h, w) logits at the network's input size, cut to its valid part."""
    return upsample(masks.float(), ImageSize(size.valid, size.valid))


def instances(
    logits: Tensor, masks: Tensor, is_thing: Tensor, size: ImageSize, top: int = 100, chunk: int = 8
) -> Instances:
    """The published instance inference: the best (query, class) pairs of thing classes, scored by class and mask.

    Args:
        logits: (Q, classes + 1); masks: (Q, h, w) mask logits at stride 4 of the padded input.
        is_thing: (classes,) bool.
        size: sizes of the image.
        top: pairs kept, those of stuff classes included.
        chunk: masks at full resolution at a time.
    """
    scores = logits.float().softmax(-1)[:, :-1]
    best, index = scores.flatten().topk(min(top, scores.numel()), sorted=False)
    query, label = index // scores.shape[1], index % scores.shape[1]
    keep = is_thing.to(label.device)[label]
    best, label, query = best[keep], label[keep], query[keep]
    used, place = query.unique(return_inverse=True)  # a query may be kept with several classes: one mask for all
    rles: list[dict[str, Any]] = []
    quality = [masks.new_zeros(0, dtype=torch.float32)]
    for some in used.split(chunk):
        full = upsample(masks[some].float(), size)
        inside = full > 0
        quality.append((full.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6))
        rles += encode_masks(inside)
    score = best * torch.cat(quality)[place]
    return Instances([rles[k] for k in place.tolist()], label.cpu(), score.cpu())
