"""Bipartite matching of queries and ground-truth segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.errors import DivergedError


def pairwise_bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean binary cross-entropy of every (S, P) prediction with every (N, P) mask: (S, N)."""
    # softplus(-x) m + softplus(x) (1 - m) = softplus(x) - x m
    return (F.softplus(logits).sum(1, keepdim=True) - logits @ masks.T) / logits.shape[1]


def pairwise_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice loss, with one added above and below, of every (S, P) prediction with every (N, P) mask: (S, N)."""
    p = logits.sigmoid()
    return 1 - (2 * p @ masks.T + 1) / (p.sum(1, keepdim=True) + masks.sum(1) + 1)


def hungarian(costs: Sequence[Tensor], names: Sequence[str] = ()) -> list[tuple[Tensor, Tensor]]:
    """Cheapest assignment of each (S, N) cost matrix: row and column indices, sorted by row, on the CPU.

    All matrices travel to the CPU in one copy, so that a step waits for the device once. With more segments than
    queries, the cheapest segments get one.

    Raises:
        DivergedError: on a cost that is not finite; the message names the images.
    """
    flat = torch.cat([c.detach().float().flatten() for c in costs]).cpu() if costs else torch.zeros(0)
    parts = flat.split([c.numel() for c in costs])
    pairs = _assign([part.view(c.shape).numpy() for part, c in zip(parts, costs, strict=True)], names)
    return [(torch.from_numpy(rows), torch.from_numpy(columns)) for rows, columns in pairs]


def assign(costs: Tensor, counts: Sequence[int], names: Sequence[str] = ()) -> Tensor:
    """:func:`hungarian` of (L, B, Q, N) costs at once, padded to N columns; ``counts[b]`` of them are crop b's.

    Returns:
        (M, 4) int64 on the CPU, sorted: prediction, crop, query and column of each pair.
    """
    whole = costs.detach().float().cpu().numpy()
    pairs = _assign([layer[i, :, :n] for layer in whole for i, n in enumerate(counts)], [*names] * len(whole))
    table = [np.stack([np.full_like(q, k // len(counts)), np.full_like(q, k % len(counts)), q, column], 1)
             for k, (q, column) in enumerate(pairs)]  # fmt: skip
    return torch.from_numpy(np.concatenate(table).astype(np.int64))


Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _assign(costs: Sequence[npt.NDArray[np.float32]], names: Sequence[str]) -> list[Pairs]:
    bad = [i for i, cost in enumerate(costs) if not np.isfinite(cost).all()]
    if bad:
        named = list(dict.fromkeys(names[i] for i in bad if i < len(names)))  # an image is there once a prediction
        raise DivergedError(
            f"Matching costs are not finite for {', '.join(named) or f'image {bad[0]}'}: the network's outputs have "
            "diverged. Lower optim.lr, lengthen optim.warmup_steps or set trainer.precision=32-true; look at these "
            "images with panoptic_ibs.prepare check. The last checkpoint is from before."
        )
    return [linear_sum_assignment(cost) for cost in costs]
