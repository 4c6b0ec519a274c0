"""Tables of different lengths as one padded tensor, in as many operations for eight of them as for two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def padded(parts: Sequence[Tensor], fill: float) -> Tensor:
    """B tensors (N_b, ...) of one type on the CPU as (B, N, ...), N the largest N_b, filled up with ``fill``."""
    most = max(map(len, parts))
    places = np.concatenate([np.arange(len(part)) + i * most for i, part in enumerate(parts)])
    table = parts[0].new_full((len(parts) * most, *parts[0].shape[1:]), fill)
    table[torch.from_numpy(places)] = torch.cat(list(parts))
    return table.view(len(parts), most, *parts[0].shape[1:])
