"""The heads that look at regions: two layers for classes and boxes, a small convolutional network for masks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs.layers.convolution import ConvBlock
from panoptic_ibs.ranges import AtLeastOne, Whole


@dataclass(frozen=True)
class BoxHeadOptions:
    """The box head of every stage.

    Attributes:
        size: side of the region's features.
        convs: 3 x 3 convolutions before the layers.
        layers: fully connected layers.
        width: of the layers.
        norm: group normalisation behind the convolutions.
    """

    size: AtLeastOne = 7
    convs: Whole = 0
    layers: AtLeastOne = 2
    width: AtLeastOne = 1024
    norm: bool = False


@dataclass(frozen=True)
class MaskHeadOptions:
    """The mask head.

    Attributes:
        size: side of the region's features; masks have twice of it.
        convs: 3 x 3 convolutions.
        width: of the convolutions.
        norm: group normalisation behind the convolutions.
    """

    size: AtLeastOne = 14
    convs: Whole = 4
    width: AtLeastOne = 256
    norm: bool = False


def _convs(channels: int, width: int, depth: int, norm: bool) -> nn.Sequential:
    blocks = [ConvBlock(width if k else channels, width, norm=norm) for k in range(depth)]
    for block in blocks:
        nn.init.kaiming_normal_(block.conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        if block.conv.bias is not None:
            nn.init.zeros_(block.conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(*blocks)


class BoxHead(nn.Module):
    """Class and box of regions: features (K, C, S, S) to (K, T + 1) logits and (K, 4) or (K, T, 4) moves.

    Args:
        channels: of the features.
        things: T, number of thing classes; label 0 is the background.
        options: see there.
        agnostic: one move for all classes.
    """

    def __init__(self, channels: int, things: int, options: BoxHeadOptions, agnostic: bool) -> None:
        super().__init__()
        self.agnostic = agnostic
        self.convs = _convs(channels, channels, options.convs, options.norm)
        widths = [channels * options.size**2] + [options.width] * options.layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.classify = nn.Linear(options.width, things + 1)
        self.move = nn.Linear(options.width, 4 if agnostic else 4 * things)
        for layer in self.layers:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # type: ignore[arg-type]
        for out, std in ((self.classify, 0.01), (self.move, 0.001)):
            nn.init.normal_(out.weight, std=std)
        for layer in (*self.layers, self.classify, self.move):
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and moves, float32."""
        x = self.convs(features).flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        moves = self.move(x).float()
        return self.classify(x).float(), moves if self.agnostic else moves.unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Masks of regions, one a thing class: features (K, C, S, S) to logits of the wanted class, (K, 2 S, 2 S).

    Args:
        channels: of the features.
        things: number of thing classes.
        options: see there.
    """

    def __init__(self, channels: int, things: int, options: MaskHeadOptions) -> None:
        super().__init__()
        width = options.width if options.convs else channels
        self.convs = _convs(channels, width, options.convs, options.norm)
        self.grow = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.predict = nn.Conv2d(width, things, 1)
        nn.init.kaiming_normal_(self.grow.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predict.weight, std=0.001)
        for layer in (self.grow, self.predict):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Float32 logits of each region's own class.

        Only that class's channel is computed: the last layer is a product with one row of its weights a region.

        Args:
            features: (K, C, S, S).
            labels: (K,) detector labels, 1 to T; 0, of what does not count, is taken for 1.
        """
        x = F.relu(self.grow(self.convs(features)))
        channel = (labels - 1).clamp(min=0)
        weight, bias = self.predict.weight.flatten(1)[channel], self.predict.bias
        assert bias is not None
        logits = torch.bmm(weight[:, None].to(x.dtype), x.flatten(2)).squeeze(1).float() + bias[channel, None].float()
        return logits.unflatten(1, (x.shape[-2], x.shape[-1]))
