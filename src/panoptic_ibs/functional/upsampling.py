"""Bilinear upsampling by a whole factor without the upsampled map: strips of it, sums over it, single pixels of it.

All of it is linear in the map, and equals ``F.interpolate(..., scale_factor=factor, mode="bilinear")``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F


def _phase_kernel(like: Tensor) -> Tensor:
    """Weights (16, 3, 3) of the neighbours of a cell in its 4 x 4 upsampled pixels."""
    axis = [[0.375, 0.625, 0.0], [0.125, 0.875, 0.0], [0.0, 0.875, 0.125], [0.0, 0.625, 0.375]]
    weights = torch.tensor(axis, dtype=like.dtype).to(like.device, non_blocking=True)
    return torch.einsum("yi,xj->yxij", weights, weights).flatten(0, 1)


def upsample_phases(padded: Tensor) -> Tensor:
    """Fourfold upsampling in an order that costs no interleaving: (C, h + 2, w + 2) to (C, 16 h w).

    Pixels come out by their place in the 4 x 4 cell first, see :func:`phases`.

    Args:
        padded: maps, or some rows of them, with a border of one: the neighbours, or copies of the edge.
    """
    return F.conv2d(padded[:, None], _phase_kernel(padded)[:, None]).flatten(1)


def upsample_phases_backward(grad: Tensor, width: int) -> Tensor:
    """Gradient (C, h + 2, w + 2) of :func:`upsample_phases` from that of its result, (C, 16 h w)."""
    kernel = _phase_kernel(grad).flatten(1)
    neighbours = kernel.T @ grad.unflatten(1, (16, -1))
    height = neighbours.shape[-1] // width
    return F.fold(neighbours, (height + 2, width + 2), 3)[:, 0]


def phases(pixels: Tensor) -> Tensor:
    """(4 h, 4 w) pixels in the order of :func:`upsample_phases`: (16 h w,)."""
    return phases_of(pixels[None])[0]


def phases_of(pixels: Tensor) -> Tensor:
    """:func:`phases` of several maps: (B, 4 h, 4 w) to (B, 16 h w)."""
    b, height, width = pixels.shape
    return pixels.view(b, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3).flatten(1)


def row_strips(size: tuple[int, int], pixels: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) rows of a map of ``size`` whose fourfold strips hold about so many pixels."""
    rows = max(pixels // (16 * max(size[1], 1)), 1)
    for top in range(0, size[0], rows):
        yield top, min(top + rows, size[0])


def _sources(positions: Tensor, length: int, factor: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two source positions (2, N) and weights (2, N) of positions on an upsampled axis."""
    source = ((positions.to(dtype) + 0.5) / factor - 0.5).clamp(min=0)
    first = source.floor().long().clamp(max=length - 1)
    share = source - first
    return torch.stack([first, (first + 1).clamp(max=length - 1)]), torch.stack([1 - share, share])


def label_shares(labels: Tensor, count: int, factor: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each place of a map contributes to the pixels of each label of its upsampled version.

    The transposed upsampling of the labels' masks, scattered straight from the label map: ``shares.flatten(1) @
    maps.flatten(1).T`` is the sum of the upsampled maps over each label. No mask of full size is made.

    Args:
        labels: (factor * h, factor * w) integer, 0 to ``count - 1``; negative labels belong to none.
        count: number of labels N.
        factor: of the upsampling.
        dtype: of the result.

    Returns:
        (N, h, w).

    Raises:
        ValueError: if the size is not a multiple of the factor.
    """
    return label_shares_of(labels[None], count, factor, dtype)[0]


def label_shares_of(labels: Tensor, count: int, factor: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`label_shares` of several label maps: (B, factor * h, factor * w) to (B, N, h, w)."""
    b, height, width = labels.shape
    if height % factor or width % factor:
        raise ValueError(f"The label map of size {(height, width)} is not padded to a multiple of {factor}.")
    h, w = height // factor, width // factor
    rows, row_weights = _sources(torch.arange(height, device=labels.device), h, factor, dtype)
    columns, column_weights = _sources(torch.arange(width, device=labels.device), w, factor, dtype)
    crop = torch.arange(b, device=labels.device)[:, None, None] * (count + 1)
    base = (labels.long() + 1 + crop) * (h * w)  # negative labels go to a plane that is cut off
    shares = torch.zeros(b * (count + 1) * h * w, dtype=dtype, device=labels.device)
    for y, x in product((0, 1), (0, 1)):
        index = base + (rows[y] * w)[:, None] + columns[x]
        weight = (row_weights[y][:, None] * column_weights[x]).expand_as(base)
        shares.scatter_add_(0, index.flatten(), weight.flatten())
    return shares.view(b, count + 1, h, w)[:, 1:]


def upsampled_at(maps: Tensor, points: Tensor, factor: int = 4) -> Tensor:
    """Pixels (N, C) of the upsampled (C, h, w) maps at (N, 2) integer positions x, y on the upsampled grid."""
    columns, column_weights = _sources(points[:, 0], maps.shape[-1], factor, maps.dtype)
    rows, row_weights = _sources(points[:, 1], maps.shape[-2], factor, maps.dtype)
    result = maps.new_zeros(maps.shape[0], len(points))
    for y, x in product((0, 1), (0, 1)):
        result = result + maps[:, rows[y], columns[x]] * (row_weights[y] * column_weights[x])
    return result.T
