"""Attention blocks: multi-scale deformable attention in pure PyTorch, sine positions, a small MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sampling import Size, deformable_sampling


def sine_position(size: Size, channels: int, device: torch.device, temperature: float = 10000.0) -> Tensor:
    """Sine position encoding (DETR, normalised to 2 pi), (channels, H, W) float32: rows first, then columns."""
    height, width = size
    half = channels // 2
    scale, eps = 2 * math.pi, 1e-6
    rows = torch.arange(1, height + 1, device=device, dtype=torch.float32) / (height + eps) * scale
    columns = torch.arange(1, width + 1, device=device, dtype=torch.float32) / (width + eps) * scale
    index = torch.arange(half, device=device, dtype=torch.float32)
    frequency = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / half)

    def encode(places: Tensor) -> Tensor:
        angles = places[:, None] / frequency
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)

    y = encode(rows)[:, None].expand(height, width, half)
    x = encode(columns)[None].expand(height, width, half)
    return torch.cat([y, x], dim=2).permute(2, 0, 1)


@lru_cache(maxsize=64)
def sine_rows(size: Size, channels: int, device: torch.device) -> Tensor:
    """:func:`sine_position` as rows (H W, channels), made once a size and device."""
    with torch.inference_mode(False), torch.no_grad():  # also for training, whoever asks first
        return sine_position(size, channels, device).flatten(1).T.contiguous()


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021).

    Every query looks at ``points`` places a head and level, bilinearly.

    Args:
        channels: width of queries and values.
        levels, heads, points: numbers of each.
    """

    def __init__(self, channels: int = 256, levels: int = 3, heads: int = 8, points: int = 4) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.offsets = nn.Linear(channels, heads * levels * points * 2)
        self.weights = nn.Linear(channels, heads * levels * points)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self._initialize()

    def _initialize(self) -> None:
        """Offsets start as rays, one direction a head; weights start equal (as published)."""
        nn.init.zeros_(self.offsets.weight)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=1)
        ray = (ray / ray.abs().amax(1, keepdim=True)).view(self.heads, 1, 1, 2)
        reach = torch.arange(1, self.points + 1, dtype=torch.float32).view(1, 1, self.points, 1)
        with torch.no_grad():
            self.offsets.bias.copy_((ray * reach).expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, value: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C), positions added.
            reference: (Q, 2) x and y in [0, 1].
            value: (B, V, C), the levels one after another.
            sizes: (height, width) of each level.

        Returns:
            (B, Q, C).
        """
        b, q, c = query.shape
        offsets = self.offsets(query).view(b, q, self.heads, self.levels, self.points, 2)
        weights = self.weights(query).view(b, q, self.heads, -1).softmax(-1)
        weights = weights.view(b, q, self.heads, self.levels, self.points)
        values = self.value(value).view(b, -1, self.heads, c // self.heads)
        sampled = deformable_sampling(values, sizes, reference, offsets, weights)
        attended: Tensor = self.output(sampled.reshape(b, q, c))
        return attended


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, depth: int) -> None:
        super().__init__()
        widths = [in_channels] + [hidden] * (depth - 1) + [out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C')."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        result: Tensor = self.layers[-1](x)
        return result
