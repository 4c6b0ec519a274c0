"""From id maps to the masks that a loss needs, at the resolution that it needs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .points import corners


def _quarter_views(id_maps: Tensor) -> list[Tensor]:
    """The four pixels around the centre of each 4 x 4 cell, as four (B, H/4, W/4) views."""
    return [id_maps[:, y::4, x::4] for y in (1, 2) for x in (1, 2)]


def masks_at_stride_4(id_maps: Tensor, image: Tensor, rows: Tensor) -> Tensor:
    """Masks of segments of several images at stride 4, straight from the id maps.

    Equals bilinear resizing (``align_corners=False``, no antialias) of the full-size binary masks by 1/4: at that
    factor every output pixel is the mean of the four central pixels of its cell. No full-size mask is ever made.

    Args:
        id_maps: (B, H, W) integer, H and W multiples of 4; 0 is void, k >= 1 is row k - 1 of the image's table.
        image: (N,) integer, image of each segment, on the id maps' device.
        rows: (N,) integer, row of each segment, on the same device.

    Returns:
        (N, H / 4, W / 4) float32 in {0, 0.25, 0.5, 0.75, 1}.

    Raises:
        ValueError: if the size is not a multiple of 4.
    """
    if id_maps.shape[-2] % 4 or id_maps.shape[-1] % 4:
        raise ValueError(f"The id maps of size {tuple(id_maps.shape[-2:])} are not padded to a multiple of 4.")
    ids = (rows.to(id_maps.dtype) + 1)[:, None, None]
    masks = torch.zeros(len(rows), id_maps.shape[-2] // 4, id_maps.shape[-1] // 4, device=id_maps.device)
    for view in _quarter_views(id_maps):
        masks += view.index_select(0, image) == ids
    return masks.mul_(0.25)


def class_masks_at_stride_4(id_maps: Tensor, channel_of_row: Tensor, image: Tensor, channels: Tensor) -> Tensor:
    """Semantic masks at stride 4: like :func:`masks_at_stride_4` with the segments of a channel joined.

    Args:
        id_maps: (B, H, W) integer id maps.
        channel_of_row: (B, R) integer semantic channel of each row, -1 for none, on the id maps' device; tables of
            fewer than R rows are filled up.
        image: (M,) image of each mask.
        channels: (M,) channel of each mask.

    Returns:
        (M, H / 4, W / 4) float32; void belongs to no channel.
    """
    lookup = F.pad(channel_of_row, (1, 0), value=-1)  # void
    channels = channels.to(lookup.dtype)[:, None, None]
    masks = torch.zeros(len(channels), id_maps.shape[-2] // 4, id_maps.shape[-1] // 4, device=id_maps.device)
    for view in _quarter_views(id_maps):
        labels = lookup.gather(1, view.flatten(1).long()).view(view.shape)
        masks += labels.index_select(0, image) == channels
    return masks.mul_(0.25)


def sample_masks(id_map: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """Values of segments' masks at points, straight from the id map.

    Equals bilinear ``grid_sample`` (``align_corners=False``, zeros outside) of the full-size binary masks, which are
    never made: the ids of the four pixels around a point are looked up instead.

    Args:
        id_map: (H, W) integer id map.
        rows: (N,) integer rows on the id map's device.
        points: (P, 2) points shared by the segments, or (N, P, 2); x and y in [0, 1].

    Returns:
        (N, P) float32 in [0, 1].
    """
    points = points if points.ndim == 3 else points[None]
    index, share = corners(points, (id_map.shape[0], id_map.shape[1]))
    ids = id_map.flatten().index_select(0, index.flatten()).view(index.shape)
    return ((ids == rows[:, None] + 1) * share).sum(0)


def sample_masks_of(id_maps: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """:func:`sample_masks` of several images in a handful of operations.

    Args:
        id_maps: (B, H, W) integer id maps.
        rows: (B, N) integer rows on the id maps' device; -1 stands for void.
        points: (B, P, 2) points shared by the segments of an image, or (B, N, P, 2).

    Returns:
        (B, N, P) float32 in [0, 1].
    """
    points = points if points.ndim == 4 else points[:, None]
    b, height, width = id_maps.shape
    index, share = corners(points, (height, width))
    first = torch.arange(0, b * height * width, height * width, device=id_maps.device)[:, None, None]
    ids = id_maps.flatten().index_select(0, (index + first).flatten()).view(index.shape)
    return ((ids == rows[:, :, None] + 1) * share).sum(0)
