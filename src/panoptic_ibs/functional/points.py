"""Point sampling on maps of logits (PointRend, Kirillov et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (S, H, W) maps at (S, P, 2) points (x, y) in [0, 1] of the map's extent; returns (S, P)."""
    grid = points.unsqueeze(2) * 2 - 1
    return F.grid_sample(maps.unsqueeze(1), grid, mode="bilinear", align_corners=False).flatten(1)


def sample_rows(rows: Tensor, size: tuple[int, int], points: Tensor) -> Tensor:
    """Bilinear values, zeros outside, of maps at points that all maps share; many times faster than ``grid_sample``.

    Args:
        rows: (H W, C), one row a pixel.
        size: (H, W).
        points: (P, 2), x and y in [0, 1] of the maps' extent.

    Returns:
        (P, C), in the type of ``rows``; the points get no gradient.
    """
    height, width = size
    place = points.detach() * torch.tensor([width, height]).to(points.device, non_blocking=True) - 0.5
    first = place.floor()
    index, share = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = first[:, 0] + dx, first[:, 1] + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index.append(y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long())
            share.append((1 - (place[:, 0] - x).abs()) * (1 - (place[:, 1] - y).abs()) * inside)
    weights = torch.stack(share, dim=1).to(rows.dtype)
    return F.embedding_bag(torch.stack(index, dim=1), rows, per_sample_weights=weights, mode="sum")


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
