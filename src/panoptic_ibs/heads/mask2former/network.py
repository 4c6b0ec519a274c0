"""The network of Mask2Former (Cheng et al., CVPR 2022): MSDeformAttn pixel decoder and masked-attention decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.layers.attention import MLP, DeformableAttention, Size, sine_rows
from panoptic_ibs.structures import FeatureLevel


@dataclass
class Mask2FormerOutput:
    """Raw outputs; the lists run over the ten predictions, the learnable queries' first.

    Attributes:
        logits: (B, Q, classes + 1); the last is "no object".
        embeddings: (B, Q, C) mask embeddings.
        features: (B, C, H / 4, W / 4) mask features, shared by all predictions.
    """

    logits: list[Tensor]
    embeddings: list[Tensor]
    features: Tensor


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a residual and a norm behind it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, sizes: Sequence[Size]) -> Tensor:
        """(B, V, C) to the same."""
        x = self.norm1(x + self.attention(x + position, reference, x, sizes))
        result: Tensor = self.norm2(x + self.linear2(F.relu(self.linear1(x))))
        return result


class PixelDecoder(nn.Module):
    """Six deformable encoder layers over strides 32, 16 and 8, then one FPN step to stride 4.

    Args:
        levels: the backbone's levels.
        channels: width.
        hidden: width inside the feed-forward networks.
        depth: encoder layers.
    """

    strides = (32, 16, 8, 4)

    def __init__(self, levels: Sequence[FeatureLevel], channels: int = 256, hidden: int = 1024, depth: int = 6) -> None:
        super().__init__()
        by_stride = {level.stride: i for i, level in enumerate(levels)}
        if any(s not in by_stride for s in self.strides):
            raise ConfigError(
                f"Mask2Former needs backbone outputs at strides 4, 8, 16 and 32; this backbone has "
                f"{sorted(by_stride)}. Choose a backbone with a stride-4 stage, e.g. backbone=resnet50."
            )
        self.inputs = [by_stride[s] for s in self.strides]
        self.project = nn.ModuleList(
            nn.Sequential(nn.Conv2d(levels[i].channels, channels, 1), nn.GroupNorm(32, channels))
            for i in self.inputs[:3]
        )
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.layers = nn.ModuleList(EncoderLayer(channels, hidden) for _ in range(depth))
        finest = levels[self.inputs[3]].channels
        self.lateral = nn.Sequential(nn.Conv2d(finest, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.output = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(32, channels), nn.ReLU()
        )
        self.mask_features = nn.Conv2d(channels, channels, 1)
        for row in self.project:
            nn.init.xavier_uniform_(row[0].weight)  # type: ignore[index]
            nn.init.zeros_(row[0].bias)  # type: ignore[index]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Features at strides 32, 16, 8, and mask features at stride 4, all (B, C, h, w)."""
        maps = [layer(features[i]) for i, layer in zip(self.inputs, self.project, strict=False)]
        sizes = [(m.shape[-2], m.shape[-1]) for m in maps]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        position = self._positions(sizes, x)
        reference = torch.cat([_centers(size, x.device) for size in sizes])
        for layer in self.layers:
            x = layer(x, position, reference, sizes)
        parts = x.transpose(1, 2).split([h * w for h, w in sizes], dim=2)
        outputs = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        lateral = self.lateral(features[self.inputs[3]])
        up = F.interpolate(outputs[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return outputs, self.mask_features(self.output(lateral + up))

    def _positions(self, sizes: Sequence[Size], like: Tensor) -> Tensor:
        """(1, V, C): sine position plus the level's embedding."""
        rows = []
        for size, embed in zip(sizes, self.level_embed, strict=True):
            rows.append(sine_rows(size, like.shape[2], like.device) + embed)
        return torch.cat(rows)[None].to(like.dtype)


def _centers(size: Size, device: torch.device) -> Tensor:
    """(H W, 2) x and y of pixel centres in [0, 1]."""
    y = (torch.arange(size[0], device=device) + 0.5) / size[0]
    x = (torch.arange(size[1], device=device) + 0.5) / size[1]
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x.flatten(), grid_y.flatten()], dim=1)


class Attention(nn.Module):
    """Multi-head attention through ``scaled_dot_product_attention``, with one projection for q, k and v."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.input.weight)
        nn.init.zeros_(self.input.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """(B, Q, C) queries, (B, K, C) keys and values, (B, 1, Q, K) bool where attention may go: (B, Q, C)."""
        inputs, shares = ((query, key, value), 3) if key is not query else ((query, value), 2)
        widths = [query.shape[2] * (1 if shares == 3 else 2), *[query.shape[2]] * (shares - 1)]
        projected = [
            F.linear(x, w, b)
            for x, w, b in zip(inputs, self.input.weight.split(widths), self.input.bias.split(widths), strict=True)
        ]
        if key is query:  # one product for both
            projected = [*projected[0].chunk(2, dim=2), projected[1]]
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        result: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return result


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and a feed-forward network; norms behind the residuals."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross, self.norm1 = Attention(channels, heads), nn.LayerNorm(channels)
        self.own, self.norm2 = Attention(channels, heads), nn.LayerNorm(channels)
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, place: Tensor, memory: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """(B, Q, C) queries and (1, Q, C) positions, (B, K, C) memory without and with positions, (B, 1, Q, K) mask."""
        x = self.norm1(x + self.cross(x + place, keys, memory, allowed))
        placed = x + place
        x = self.norm2(x + self.own(placed, placed, x))
        result: Tensor = self.norm3(x + self.linear2(F.relu(self.linear1(x))))
        return result


class QueryDecoder(nn.Module):
    """Nine masked-attention layers over strides 32, 16, 8 in turn; ten predictions.

    The attention mask of a layer is the former prediction's mask, brought to the layer's resolution. Bilinear resizing
    is linear, so the features are resized once a level and then multiplied: the same mask at a fraction of the cost.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        queries: int = 100,
        depth: int = 9,
        heads: int = 8,
        hidden: int = 2048,
    ) -> None:
        super().__init__()
        self.query = nn.Embedding(queries, channels)
        self.place = nn.Embedding(queries, channels)
        self.level_embed = nn.Embedding(3, channels)
        self.layers = nn.ModuleList(DecoderLayer(channels, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        self.classify = nn.Linear(channels, num_classes + 1)
        self.embed = MLP(channels, channels, channels, 3)

    def forward(self, levels: Sequence[Tensor], features: Tensor) -> Mask2FormerOutput:
        """Predictions from (B, C, h, w) levels at strides 32, 16, 8 and (B, C, H / 4, W / 4) mask features."""
        memories, keys, small = [], [], []
        for level, embed in zip(levels, self.level_embed.weight, strict=True):
            size = (level.shape[-2], level.shape[-1])
            memories.append(level.flatten(2).transpose(1, 2) + embed)
            keys.append(memories[-1] + sine_rows(size, level.shape[1], level.device).to(level.dtype))
            resized = F.interpolate(features.detach(), size=size, mode="bilinear", align_corners=False)
            small.append(resized.flatten(2))
        x = self.query.weight.expand(features.shape[0], -1, -1)
        place = self.place.weight[None]
        found, embeddings = [], []
        for i in range(len(self.layers) + 1):
            normed = self.norm(x)
            found.append(normed)
            embeddings.append(self.embed(normed))
            if i < len(self.layers):
                at = i % len(levels)
                allowed = attention_mask(embeddings[-1], small[at])
                x = self.layers[i](x, place, memories[at], keys[at], allowed)
        logits = self.classify(torch.stack(found)).unbind()
        return Mask2FormerOutput(list(logits), embeddings, features)


@torch.no_grad()
def attention_mask(embeddings: Tensor, features: Tensor) -> Tensor:
    """Where each query may look: (B, 1, Q, K) bool. A query whose mask is empty may look everywhere.

    Args:
        embeddings: (B, Q, C); features: (B, C, K).
    """
    inside = torch.bmm(embeddings, features) >= 0  # sigmoid(x) >= 0.5
    return (inside | ~inside.any(dim=2, keepdim=True))[:, None]
