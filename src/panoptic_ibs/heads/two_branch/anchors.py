"""Anchors with fixed strides: the same places whatever the size and padding of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cells(sizes: Sequence[float], ratios: Sequence[float], rounded: bool = False) -> Tensor:
    """(len(sizes) * len(ratios), 4) boxes around the origin, all ratios of a size before the next.

    Args:
        sizes: sides of the square anchor of the same area, in pixels.
        ratios: height over width.
        rounded: to whole pixels, as torchvision does.
    """
    ratio = torch.tensor(list(ratios), dtype=torch.float32).sqrt()
    size = torch.tensor(list(sizes), dtype=torch.float32)[:, None]
    half = torch.stack([size / ratio, size * ratio], -1).flatten(0, 1) / 2
    boxes = torch.cat([-half, half], 1)
    return boxes.round() if rounded else boxes


def grid(cell: Tensor, stride: int, shape: tuple[int, int]) -> Tensor:
    """(h * w * A, 4) anchors of a level, row by row, all cells of a place together.

    Args:
        cell: (A, 4).
        stride: of the level, in pixels.
        shape: (h, w) of the level.
    """
    y = torch.arange(shape[0], device=cell.device) * stride
    x = torch.arange(shape[1], device=cell.device) * stride
    places = torch.stack([x.repeat(shape[0]), y.repeat_interleave(shape[1])], 1).repeat(1, 2)
    return (places[:, None] + cell).flatten(0, 1)
