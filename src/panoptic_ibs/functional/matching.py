"""Bipartite matching of queries and ground-truth segments."""

from __future__ import annotations

from collections.abc import Sequence

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
    pairs = []
    for i, part in enumerate(flat.split([c.numel() for c in costs])):
        cost = part.view(costs[i].shape).numpy()
        if not torch.isfinite(part).all():
            bad = [names[j] for j in range(len(costs)) if j < len(names) and not torch.isfinite(costs[j]).all()]
            bad = list(dict.fromkeys(bad))  # an image is there once for each prediction
            raise DivergedError(
                f"Matching costs are not finite for {', '.join(bad) or f'image {i}'}: the network's outputs have "
                "diverged. Lower optim.lr, lengthen optim.warmup_steps or set trainer.precision=32-true; look at these "
                "images with panoptic_ibs.prepare check. The last checkpoint is from before."
            )
        rows, columns = linear_sum_assignment(cost)
        pairs.append((torch.from_numpy(rows), torch.from_numpy(columns)))
    return pairs
