"""Inference of Mask2Former: panoptic, semantic and instance results; filter first, full resolution in row stripes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional.fusion import upsample
from panoptic_ibs.functional.rle import encode_masks
from panoptic_ibs.segments import Instances
from panoptic_ibs.structures import ImageSize, id_map_dtype

STRIPE = 32  # rows; a multiple of 4


def confident(logits: Tensor, score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that are some class with more than this score: (Q,) bool, and of those channels and scores.

    Args:
        logits: (Q, classes + 1), the last for "no object".
        score_threshold: least score.
    """
    score, label = logits.float().softmax(-1).max(-1)
    keep = (label != logits.shape[-1] - 1) & (score > score_threshold)
    return keep, label[keep], score[keep]


def panoptic(
    masks: Tensor,
    score: Tensor,
    label: Tensor,
    is_thing: Tensor,
    size: ImageSize,
    overlap_threshold: float = 0.8,
    chunk: int = 8,
    stride: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:
    """The published panoptic post-processing of what passed the score threshold.

    Args:
        masks: (N, h, w) float32 mask logits at ``stride`` of the padded input.
        score: (N,).
        label: (N,) class ids.
        is_thing: (N,) bool.
        size: sizes of the image.
        overlap_threshold: least share of a mask that must be left after the competition for pixels.
        chunk: masks at full resolution at a time.
        stride: of the masks.

    Returns:
        (H, W) id map of :func:`id_map_dtype`, class ids (S,) and scores (S,).
    """
    count = len(label)
    if not count:
        return torch.zeros(size.original, dtype=id_map_dtype(0), device=masks.device), label, score
    # What a pixel says: query k won it, and lies inside its own mask (k + count) or not (k).
    said = torch.empty(size.original, dtype=torch.uint8 if 2 * count < 256 else torch.int16, device=masks.device)
    pixels = torch.zeros(2 * count, dtype=torch.long, device=masks.device)
    area = torch.zeros(count, dtype=torch.long, device=masks.device)
    for rows, resize in _stripes(masks, size, stride):
        found = _compete(masks, score, resize, area, chunk)
        pixels += torch.bincount(found.flatten(), minlength=2 * count)
        said[rows] = found.to(said.dtype)
    drawn = pixels[count:]
    won = pixels[:count] + drawn
    kept = (won > 0) & (area > 0) & (drawn > 0) & (won / area.clamp(min=1) >= overlap_threshold)
    first = _first_of_class(label, kept & ~is_thing.to(label.device))
    opened = kept & (first == torch.arange(count, device=label.device))
    rank = torch.where(kept, opened.cumsum(0)[first], 0).to(id_map_dtype(count))
    table = torch.cat([torch.zeros_like(rank), rank])
    id_map = torch.empty(size.original, dtype=rank.dtype, device=masks.device)
    for part, source in zip(id_map.split(STRIPE), said.split(STRIPE), strict=True):
        part.copy_(table[source.int()])
    return id_map, label[opened], score[opened]


def _stripes(masks: Tensor, size: ImageSize, stride: int = 4) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
    """Rows of the image, and how masks get there; together they say what :func:`upsample` says of whole masks.

    Rows come in stripes whose tensors fit in a cache, with one row of the small masks above and below. An image that is
    resized a second time is one stripe: the second factor may be any.
    """
    height = size.original[0]
    if size.valid != size.original or not masks.is_cpu or stride != 4:
        yield slice(0, height), partial(upsample, size=size, stride=stride)
        return
    for top in range(0, height, STRIPE):
        rows = slice(top, min(top + STRIPE, height))
        yield rows, partial(_upsample_rows, rows=rows, width=size.valid[1])


def _upsample_rows(masks: Tensor, rows: slice, width: int) -> Tensor:
    """These rows, from a multiple of 4, of the masks upsampled by 4."""
    low, high = max(rows.start // 4 - 1, 0), -(-rows.stop // 4) + 1
    valid = (rows.stop - 4 * low, width)
    return upsample(masks[:, low:high], ImageSize(valid, valid))[:, rows.start - 4 * low :]


def _compete(masks: Tensor, score: Tensor, resize: Callable[[Tensor], Tensor], area: Tensor, chunk: int) -> Tensor:
    """(h, W) int64: the winner of each pixel, plus the number of masks where it is inside its own mask.

    Adds the pixels inside each mask to ``area``. A few masks at a time; the first wins a tie.
    """
    count, best, winner = len(score), None, None
    for start in range(0, count, chunk):
        p = resize(masks[start : start + chunk]).sigmoid_()
        inside = p >= 0.5
        area[start : start + chunk] += inside.flatten(1).sum(1)
        value, index = p.mul_(score[start : start + chunk, None, None]).max(dim=0)
        index = index.add(start).add_(inside.gather(0, index[None])[0], alpha=count)
        if best is None or winner is None:
            best, winner = value, index
        else:
            winner = torch.where(value > best, index, winner)
            best = torch.maximum(best, value)
    assert winner is not None
    return winner


def _first_of_class(label: Tensor, stuff: Tensor) -> Tensor:
    """(N,) for a kept stuff segment the first kept one of its class, for anything else itself."""
    own = torch.arange(len(label), device=label.device)
    same = (label[:, None] == label) & stuff[:, None] & stuff
    return torch.where(stuff, same.int().argmax(dim=1), own)


def semantic(logits: Tensor, masks: Tensor, size: ImageSize) -> Tensor:
    """Class scores (classes, H, W): masks weighted by class probabilities (published semantic inference)."""
    probabilities = logits.float().softmax(-1)[:, :-1].T
    height, width = size.valid
    scores = masks.new_empty(len(probabilities), height, width, dtype=torch.float32)
    for top in range(0, height, STRIPE):
        rows = slice(top, min(top + STRIPE, height))
        inside = _upsample_rows(masks.float(), rows, width).sigmoid_()
        scores[:, rows] = (probabilities @ inside.flatten(1)).unflatten(1, inside.shape[1:])
    if scores.shape[-2:] != size.original:
        scores = F.interpolate(scores[None], size=size.original, mode="bilinear", align_corners=False)[0]
    return scores


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
    for some in used.split(chunk) if len(used) else ():  # all of the best pairs may be stuff
        full = upsample(masks[some].float(), size)
        inside = full > 0
        quality.append((full.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6))
        rles += encode_masks(inside)
    score = best * torch.cat(quality)[place]
    return Instances([rles[k] for k in place.tolist()], label.cpu(), score.cpu())
