"""Reductions that do nothing in a single process."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average a tensor over the processes; used for normalisers, so that every rank weighs its segments alike."""
    value = value.detach()
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value / distributed.get_world_size()


def normalizer(count: int | Tensor, like: Tensor) -> Tensor:
    """Number of segments to divide a loss by: averaged over ranks, at least one, float32 on ``like``'s device."""
    if isinstance(count, int):
        count = torch.full((), count, dtype=torch.float32, device=like.device)  # a fill, not a copy: no sync
    return mean_over_ranks(count.float()).clamp(min=1.0)
