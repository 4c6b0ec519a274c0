"""Category-aware memory embeddings (Gao et al., 2020, Section III-C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional.distributed import mean_over_ranks
from panoptic_ibs.ranges import Share


class CategoryMemory(nn.Module):
    """One direction a category, learnt by averaging and not by gradients; buffers, so checkpoints hold them.

    Args:
        categories: number of categories.
        dimension: of the embedding.
        momentum: Eq. 13's value at the first step (0.9999); it rises to 1 at the last.

    Attributes:
        share: of the training's steps that are done, t / T of Eq. 13; whoever trains sets it. None keeps the momentum.
        iteration: updates so far.

    Raises:
        ConfigError: a momentum outside [0, 1].
    """

    directions: Tensor
    seen: Tensor
    iteration: Tensor

    def __init__(self, categories: int, dimension: int, momentum: Share = 0.9999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ConfigError(f"head.memory.momentum is {momentum}; it must lie in [0, 1] (published: 0.9999).")
        self.momentum = momentum
        self.share: float | None = None
        self.register_buffer("directions", F.normalize(torch.randn(categories, dimension), dim=1))
        self.register_buffer("seen", torch.zeros(categories, dtype=torch.bool))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))

    def current_momentum(self) -> float:
        """Lambda of Eq. 13 at this step."""
        if self.share is None:
            return self.momentum
        return 1 - (1 - self.momentum) * max(0.0, 1 - self.share) ** 3

    @torch.no_grad()
    def update(self, sums: Tensor, pixels: Tensor) -> None:
        """Eq. 14 for the categories that occur in the batch of any process; the others stay.

        Args:
            sums: (C, D) summed embeddings of each category in this process's crops.
            pixels: (C,) their numbers of pixels.
        """
        joined = mean_over_ranks(torch.cat([sums.detach().float(), pixels[:, None].to(sums.device, torch.float32)], 1))
        present = joined[:, -1] > 0
        means = F.normalize(joined[:, :-1], dim=1)  # Eq. 3
        momentum = self.current_momentum()
        moved = F.normalize(momentum * self.directions + (1 - momentum) * means, dim=1).to(self.directions.dtype)
        self.directions.copy_(torch.where(present[:, None], moved, self.directions))
        self.seen |= present
        self.iteration += 1
