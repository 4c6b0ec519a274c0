"""Swin on images of any size, as detection and segmentation networks use it."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F


class PadFirstBlock(nn.Module):
    """A Swin block (Liu et al., ICCV 2021) that pads its map to whole windows *before* the cyclic shift.

    timm's block shifts first. The two agree on maps that windows tile, as in classification, and differ on all others;
    published segmentation checkpoints were trained with the order here. Takes over the parts of ``block``, under the
    same names.

    Args:
        block: a timm block made with ``always_partition=True``, so that window and shift are the nominal ones.
    """

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = block.norm1, block.attn, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2
        self.window: tuple[int, int] = block.window_size
        self.shift: tuple[int, int] = block.shift_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = x + self.drop_path1(self._attend(self.norm1(x)))
        result: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return result

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        (wh, ww), (sh, sw) = self.window, self.shift
        x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
        size = (x.shape[1], x.shape[2])
        if sh or sw:
            x = x.roll((-sh, -sw), (1, 2))
        windows = window_partition(x, self.window).flatten(1, 2)
        attended = self.attn(windows, mask=self._mask(size, x) if sh or sw else None)
        x = window_reverse(attended.unflatten(1, self.window), self.window, *size)
        if sh or sw:
            x = x.roll((sh, sw), (1, 2))
        return x[:, :height, :width].contiguous()

    def _mask(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """(windows, N, N): -100 between pixels that are neighbours only by the cyclic shift."""
        rows, columns = (
            (torch.arange(n, device=like.device) >= n - w).int() + (torch.arange(n, device=like.device) >= n - s).int()
            for n, w, s in zip(size, self.window, self.shift, strict=True)
        )
        region = (3 * rows[:, None] + columns)[None, :, :, None]
        part = window_partition(region, self.window).flatten(1)
        return (part[:, None] != part[:, :, None]).to(like.dtype) * -100.0


def pad_first(module: nn.Module) -> None:
    """Replace every timm Swin block inside ``module``."""
    for name, child in list(module.named_children()):
        if isinstance(child, SwinTransformerBlock):
            setattr(module, name, PadFirstBlock(child))
        else:
            pad_first(child)


SWIN_OPTIONS: dict[str, Any] = {"strict_img_size": False, "always_partition": True}  # any image size, nominal windows
