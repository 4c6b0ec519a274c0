"""Panoptic fusion of soft masks by panopticapi's heuristic, without a tensor of segments x full resolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.structures import ImageSize, id_map_dtype


def upsample(masks: Tensor, size: ImageSize, stride: int = 4) -> Tensor:
    """Bring (N, h, w) maps of a padded input to the original image: (N, H, W).

    First by ``stride`` to the network's input, cut to its valid part, then to the original size (bilinear).
    """
    full = F.interpolate(masks[None], scale_factor=stride, mode="bilinear", align_corners=False)
    full = full[..., : size.valid[0], : size.valid[1]]
    if full.shape[-2:] != size.original:
        full = F.interpolate(full, size=size.original, mode="bilinear", align_corners=False)
    return full[0]


def scale_boxes(boxes: Tensor, size: ImageSize) -> Tensor:
    """Boxes (N, 4), or points (N, 2), in input pixels to such in pixels of the original image."""
    (height, width), (full_height, full_width) = size.valid, size.original
    return boxes * boxes.new_tensor([full_width / width, full_height / height] * (boxes.shape[1] // 2))


def paste_things(
    masks: Tensor,
    threshold: float,
    overlap: float,
    resize: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Paste instances in the order given; one that is covered by more than ``overlap`` of its area is dropped.

    Args:
        masks: (N, h, w) probabilities, best first.
        threshold: a pixel belongs to an instance above it.
        resize: brings (n, h, w) to (n, H, W).
        size: (H, W).
        chunk: instances that are brought to full size at a time.

    Returns:
        (H, W) ids with k + 1 where instance k was pasted, and (N,) bool, the instances kept. No host-device sync.
    """
    id_map = torch.zeros(size, dtype=id_map_dtype(len(masks)), device=masks.device)
    kept = []
    for start in range(0, len(masks), chunk):
        for k, mask in enumerate(resize(masks[start : start + chunk]) > threshold, start=start):
            free = mask & (id_map == 0)
            area = mask.sum()
            keep = (area > 0) & ((area - free.sum()) <= overlap * area)
            id_map.masked_fill_(free & keep, k + 1)
            kept.append(keep)
    return id_map, torch.stack(kept) if kept else torch.zeros(0, dtype=torch.bool, device=masks.device)


def running_argmax(masks: Tensor, resize: Callable[[Tensor], Tensor], size: tuple[int, int], chunk: int) -> Tensor:
    """Arg-max over the first axis of the resized maps, (H, W) int64, a few maps at a time; the first wins a tie."""
    best = torch.full(size, -torch.inf, device=masks.device)
    label = torch.zeros(size, dtype=torch.long, device=masks.device)
    for start in range(0, len(masks), chunk):
        value, index = resize(masks[start : start + chunk]).max(dim=0)
        better = value > best
        label = torch.where(better, index + start, label)
        best = torch.where(better, value, best)
    return label


def combine(
    thing_masks: Tensor,
    thing_classes: Tensor,
    thing_scores: Tensor,
    stuff_masks: Tensor,
    stuff_classes: Tensor,
    stuff_scores: Tensor,
    size: ImageSize,
    mask_threshold: float = 0.5,
    overlap: float = 0.5,
    stuff_area: int = 4096,
    stride: int = 4,
    chunk: int = 8,
    paste: Callable[[Tensor], Tensor] | None = None,
    whole_stuff: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Things by score, then stuff where no thing is, if its area is at least ``stuff_area`` pixels.

    Args:
        thing_masks: (N, h, w) probabilities, best first; ``thing_classes`` and ``thing_scores`` (N,).
        stuff_masks: (M, h, w) probabilities or logits; ``stuff_classes`` (M,), -1 for a channel that only competes for
            pixels (things merged into one, or thing classes of a semantic branch); ``stuff_scores`` (M,).
        size: sizes of the image.
        paste: brings some rows of ``thing_masks``, which may then be anything, to (n, H, W) of the original image.
        whole_stuff: things count in the area of the stuff behind them.

    Returns:
        (H, W) id map of :func:`id_map_dtype`, class ids (S,) and scores (S,) of its segments.
    """
    device = thing_masks.device

    def resize(masks: Tensor) -> Tensor:
        return upsample(masks, size, stride)

    id_map, kept = paste_things(thing_masks, mask_threshold, overlap, paste or resize, size.original, chunk)
    things, stuff = len(thing_masks), len(stuff_masks)
    rank = torch.zeros(things + stuff + 1, dtype=id_map_dtype(things + stuff), device=device)
    keep = kept
    if stuff:
        label = running_argmax(stuff_masks, resize, size.original, chunk)
        left = torch.bincount(label[id_map == 0], minlength=stuff)
        areas = torch.bincount(label.flatten(), minlength=stuff) if whole_stuff else left
        keep = torch.cat([kept, (areas >= stuff_area) & (left > 0) & (stuff_classes >= 0)])
        id_map = torch.where(id_map > 0, id_map.to(rank.dtype), (label + things + 1).to(rank.dtype))
    rank[1 : len(keep) + 1] = torch.where(keep, keep.cumsum(0), 0).to(rank.dtype)
    classes = torch.cat([thing_classes, stuff_classes])[keep]
    scores = torch.cat([thing_scores, stuff_scores])[keep]
    return rank[id_map.long()], classes, scores
