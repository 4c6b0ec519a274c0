"""Boxes x1 y1 x2 y2: overlap, coding of one box relative to another, clipping; any leading dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_STEP = math.log(1000 / 16)
"""Of the logarithm of a box's size, in decoding (Girshick et al., 2018): larger ones would overflow."""


def areas(boxes: Tensor) -> Tensor:
    """(..., 4) to (...); zero for boxes that are turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def intersections(a: Tensor, b: Tensor) -> Tensor:
    """Area that two boxes share, broadcast over the leading dimensions."""
    # Axis by axis: a last dimension of 2 would double the largest tensor of the matching.
    width = torch.minimum(a[..., 2], b[..., 2]).sub_(torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = torch.minimum(a[..., 3], b[..., 3]).sub_(torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    return width.mul_(height)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union, broadcast over the leading dimensions; 0 where neither box has an area."""
    shared = intersections(a, b)
    union = (areas(a) + areas(b)).sub_(shared)
    return shared.div_(union.clamp_(min=1e-9))


def encode(boxes: Tensor, truth: Tensor, weights: Sequence[float]) -> Tensor:
    """What a box head is to say of ``boxes`` so that :func:`decode` gives ``truth`` (Girshick, 2015), (..., 4).

    Boxes without an area give finite numbers, which no loss may use.

    Args:
        boxes: (..., 4).
        truth: (..., 4).
        weights: of the four numbers, 1 over their standard deviations.
    """
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    true_size = (truth[..., 2:] - truth[..., :2]).clamp(min=1e-6)
    shift = (truth[..., :2] + 0.5 * true_size - boxes[..., :2] - 0.5 * size) / size
    return torch.cat([shift, (true_size / size).log()], -1) * shift.new_tensor(list(weights))


def decode(deltas: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """The boxes (..., 4) that ``deltas`` (..., 4) make of ``boxes``, broadcast; see :func:`encode`."""
    dx, dy, dw, dh = deltas.unbind(-1)
    wx, wy, ww, wh = weights
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    x, y = boxes[..., 0] + 0.5 * width + dx / wx * width, boxes[..., 1] + 0.5 * height + dy / wy * height
    half_w = 0.5 * (dw / ww).clamp(max=LARGEST_STEP).exp() * width
    half_h = 0.5 * (dh / wh).clamp(max=LARGEST_STEP).exp() * height
    return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], -1)


def clip(boxes: Tensor, limits: Tensor) -> Tensor:
    """Boxes (..., 4) cut to images of width and height ``limits`` (..., 2), broadcast."""
    return torch.minimum(boxes.clamp(min=0), torch.cat([limits, limits], -1))
