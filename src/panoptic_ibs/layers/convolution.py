"""Convolution blocks of the heads: normalised and deformable convolutions, CoordConv."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d


class ModulatedDeformConv(nn.Module):
    """Deformable convolution v2 (Zhu et al. 2019): offsets and a mask are predicted from the input.

    The offset branch starts at zero, so that training starts from a plain convolution at half strength. Sampling is in
    float32 under autocast: bilinear offsets lose too much in half precision.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.offset_mask = nn.Conv2d(in_channels, 27, 3, padding=1)
        self.conv = DeformConv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            offset, mask = self.offset_mask(x).split((18, 9), dim=1)
            result: Tensor = self.conv(x, offset, mask.sigmoid())
        return result


class DeformableConv(nn.Module):
    """A 3 x 3 convolution that becomes deformable (Dai et al., 2017): its weights are kept, and offsets start at zero.

    Before the first step it is therefore the very convolution that it replaces. Sampling is in float32 under autocast.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        shape: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        self.offset = nn.Conv2d(conv.in_channels, 18, 3, **shape)
        self.conv = DeformConv2d(
            conv.in_channels, conv.out_channels, 3, groups=conv.groups, bias=conv.bias is not None, **shape
        )
        self.conv.load_state_dict(conv.state_dict())
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            result: Tensor = self.conv(x, self.offset(x))
        return result


class ConvBlock(nn.Module):
    """3 x 3 convolution, optional GroupNorm, ReLU.

    With ``groups=None``, groups hold at least 8 channels, and there are at most 32 (so 32 at the published width of
    256): a narrow network's 1 x 1 maps still have something to normalise over.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: bool = True,
        deform: bool = False,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        make = ModulatedDeformConv if deform else _plain
        self.conv = make(in_channels, out_channels, bias=not norm)
        groups = groups or max(min(32, out_channels // 8), 1)
        self.norm = nn.GroupNorm(groups, out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        return F.relu(self.norm(self.conv(x)))


def _plain(in_channels: int, out_channels: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def add_coordinates(x: Tensor) -> Tensor:
    """CoordConv (Liu et al. 2018): append a row and a column coordinate, each from -1 to 1; (B, C + 2, H, W).

    The row (vertical) coordinate comes first, as in the published Panoptic FCN.
    """
    b, _, h, w = x.shape
    rows = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(1, 1, h, 1).expand(b, 1, h, w)
    columns = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).view(1, 1, 1, w).expand(b, 1, h, w)
    return torch.cat([x, rows, columns], dim=1)


class ConvStack(nn.Module):
    """A row of :class:`ConvBlock`, optionally behind a CoordConv."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        norm: bool = True,
        deform: bool = False,
        coord: bool = False,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.coord = coord
        widths = [in_channels + 2 * coord] + [channels] * depth
        self.blocks = nn.Sequential(*(ConvBlock(a, b, norm, deform, groups) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        result: Tensor = self.blocks(add_coordinates(x) if self.coord else x)
        return result
