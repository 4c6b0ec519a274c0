"""Point sampling on maps of logits (PointRend, Kirillov et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (S, H, W) maps at (S, P, 2) points (x, y) in [0, 1] of the map's extent; returns (S, P)."""
    grid = points.unsqueeze(2) * 2 - 1
    return F.grid_sample(maps.unsqueeze(1), grid, mode="bilinear", align_corners=False).flatten(1)


def sample_map(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (C, H, W) maps at (P, 2) points that all maps share; returns (C, P)."""
    grid = points[None, None] * 2 - 1
    return F.grid_sample(maps[None], grid, mode="bilinear", align_corners=False)[0, :, 0]


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
