"""The convolutional parts of Panoptic FCN (Li et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs.layers.convolution import ConvStack


@dataclass
class PanopticFCNOutput:
    """Raw outputs; the lists run over the levels P3 to P7 (strides 8 to 128).

    Attributes:
        centers: (B, thing channels, h, w) logits of thing centres.
        regions: (B, stuff channels, h, w) logits of stuff regions.
        kernels: (B, K, h, w) kernel features.
        features: (B, C, H / 4, W / 4) encoded features.
    """

    centers: list[Tensor]
    regions: list[Tensor]
    kernels: list[Tensor]
    features: Tensor


class PositionHead(nn.Module):
    """Thing centres and stuff regions from one level; weights are shared by the levels."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_things: int,
        num_stuff: int,
        depth: int = 3,
        deform: bool = False,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.stack = ConvStack(in_channels, channels, depth, deform=deform, groups=groups)
        self.out_thing = nn.Conv2d(channels, num_things, 3, padding=1)
        self.out_stuff = nn.Conv2d(channels, num_stuff, 3, padding=1)
        for conv in (self.out_thing, self.out_stuff):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.constant_(conv.bias, -2.19)  # type: ignore[arg-type]  # sigmoid(-2.19) is 0.1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of things and stuff."""
        x = self.stack(x)
        return self.out_thing(x), self.out_stuff(x)


class KernelHead(nn.Module):
    """Kernel features of one level, from which the generators take segment embeddings."""

    def __init__(
        self, in_channels: int, channels: int, depth: int = 3, groups: int | None = None, init_std: float = 0.01
    ) -> None:
        super().__init__()
        self.stack = ConvStack(in_channels, channels, depth, coord=True, groups=groups)
        self.out = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.normal_(self.out.weight, std=init_std)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, K, h, w)."""
        result: Tensor = self.out(self.stack(x))
        return result


class Generator(nn.Module):
    """Kernels to embeddings of the features' width: a 1 x 1 convolution applied to gathered positions."""

    def __init__(self, in_channels: int, out_channels: int, init_std: float = 0.01) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, out_channels, 1)
        nn.init.normal_(self.embed.weight, std=init_std)
        nn.init.zeros_(self.embed.bias)  # type: ignore[arg-type]

    def forward(self, kernels: Tensor) -> Tensor:
        """(..., K) to (..., C)."""
        return F.linear(kernels, self.embed.weight.flatten(1), self.embed.bias)


def run_levels(
    position: PositionHead, kernel: KernelHead, levels: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Centers, regions and kernels of every level."""
    positions = [position(x) for x in levels]
    return [c for c, _ in positions], [r for _, r in positions], [kernel(x) for x in levels]
