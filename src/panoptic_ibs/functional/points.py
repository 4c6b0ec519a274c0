"""Point sampling on maps of logits (PointRend, Kirillov et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (S, H, W) maps at (S, P, 2) points (x, y) in [0, 1] of the map's extent; returns (S, P)."""
    grid = points.unsqueeze(2) * 2 - 1
    return F.grid_sample(maps.unsqueeze(1), grid, mode="bilinear", align_corners=False).flatten(1)


def corners(points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The four pixels around each point of a map and their bilinear shares.

    Args:
        points: (..., 2), x and y in [0, 1] of the map's extent.
        size: (H, W) of the map.

    Returns:
        (4, ...) int64 index of the pixels in the flattened map, and (4, ...) share of each, zero outside the map.
    """
    axes = []
    for place, length in zip(points.unbind(-1), size[::-1], strict=True):
        place = place * length - 0.5
        both = torch.stack([place.floor(), place.floor() + 1])
        share = (1 - (place - both).abs()) * ((both >= 0) & (both < length))
        axes.append((both.clamp(0, length - 1).long(), share))
    (x, x_share), (y, y_share) = axes
    index = y[:, None] * size[1] + x
    return index.flatten(0, 1), (y_share[:, None] * x_share).flatten(0, 1)


def sample_rows(rows: Tensor, size: tuple[int, int], points: Tensor) -> Tensor:
    """Bilinear values, zeros outside, of maps at points that all maps share; many times faster than ``grid_sample``.

    Args:
        rows: (H W, C), one row a pixel.
        size: (H, W).
        points: (P, 2), x and y in [0, 1] of the maps' extent.

    Returns:
        (P, C), in the type of ``rows``; the points get no gradient.
    """
    index, share = corners(points.detach(), size)
    return F.embedding_bag(index.T, rows, per_sample_weights=share.T.to(rows.dtype), mode="sum")


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear values, zeros outside, of (B, C, H, W) features at (B, P, 2) points in [0, 1]: (B, C, P)."""
    grid = points.unsqueeze(2) * 2 - 1
    return F.grid_sample(features, grid, mode="bilinear", align_corners=False).squeeze(3)


@torch.no_grad()
def uncertain_points(
    logits: Tensor,
    count: int,
    oversample: float = 3.0,
    importance: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points where the logits are nearest to zero, and some random ones.

    Draws ``oversample * count`` uniform points, keeps the ``importance`` share of ``count`` that is most uncertain
    and fills up with fresh uniform points.

    Args:
        logits: (S, H, W).
        count: points a map.

    Returns:
        (S, count, 2), x and y in [0, 1].
    """
    s = logits.shape[0]
    options = {"device": logits.device, "dtype": torch.float32, "generator": generator}
    candidates = torch.rand(s, int(count * oversample), 2, **options)  # type: ignore[call-overload]
    uncertain = int(importance * count)
    certainty = sample_points(logits.float(), candidates).abs()
    index = certainty.topk(uncertain, dim=1, largest=False).indices
    chosen = candidates.gather(1, index.unsqueeze(2).expand(-1, -1, 2))
    fresh = torch.rand(s, count - uncertain, 2, **options)  # type: ignore[call-overload]
    return torch.cat([chosen, fresh], dim=1)
