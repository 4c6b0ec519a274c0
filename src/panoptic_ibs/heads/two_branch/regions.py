"""Features of regions (RoIAlign, He et al., 2017) from the level of a pyramid that fits each, with fixed strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from panoptic_ibs.functional.forms import batched

from .boxes import areas

FAR = -1e5  # where RoIAlign reads nothing but zeros


def level_of(boxes: Tensor, strides: Sequence[int], base: float = 224.0) -> Tensor:
    """(K,) int64: the level that fits each box; a square of side ``base`` goes to stride 16 (Lin et al., 2017)."""
    fits = (4 + torch.log2(areas(boxes).sqrt() / base) + 1e-6).floor()
    lowest, highest = (int(stride).bit_length() - 1 for stride in (strides[0], strides[-1]))
    return fits.clamp(lowest, highest).sub(lowest).long()  # log2 of nothing is clamped as well


def pool(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    size: int,
    sampling: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Features of K boxes from the levels that fit them.

    Args:
        levels: (B, C, h, w), finest first.
        strides: of the levels, powers of two.
        boxes: (K, 4) in pixels of the input.
        image: (K,) int64, crop of each box.
        size: side of the result.
        sampling: samples a bin along each side; 0: as many as it has pixels of the level.
        aligned: with the half pixel that RoIAlign first forgot (detectron2 has it, torchvision's detectors have not).

    Returns:
        (K, C, size, size) float32, or float64 where the levels are.
    """
    with torch.autocast(levels[0].device.type, enabled=False):
        kind = torch.promote_types(levels[0].dtype, torch.float32)
        fits = level_of(boxes, strides)
        regions = torch.cat([image[:, None].to(kind), boxes.to(kind)], 1)
        if len(levels) == 1:
            return roi_align(levels[0].to(kind), regions, size, 1 / strides[0], sampling, aligned)
        if batched(boxes.device):
            # On every level all regions, those of others far outside, where they cost next to nothing: no counting.
            found = []
            for i, (level, stride) in enumerate(zip(levels, strides, strict=True)):
                here = torch.where((fits == i)[:, None], regions, torch.full_like(regions, FAR))
                here = torch.cat([regions[:, :1], here[:, 1:]], 1)
                found.append(roi_align(level.to(kind), here, size, 1 / stride, sampling, aligned))
            return torch.stack(found).sum(0)
        order = fits.argsort(stable=True)
        shares = regions[order].split(fits.bincount(minlength=len(levels)).tolist())
        parts = [
            roi_align(level.to(kind), share, size, 1 / stride, sampling, aligned)
            for level, share, stride in zip(levels, shares, strides, strict=True)
        ]
        return torch.cat(parts)[order.argsort()]
