"""Fixed batch norms folded into the convolutions before them: the same function without passes over their outputs."""

from __future__ import annotations

from itertools import pairwise

import torch
from timm.models import FeatureListNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class FoldedNorm(FrozenBatchNorm2d):
    """A fixed batch norm whose convolution has taken its work over; keeps its numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Its input."""
        return x


class FoldedConv(nn.Conv2d):
    """A convolution that does the work of the fixed batch norm behind it as well.

    Attributes:
        norms: the norm, in a tuple: it stays a child of the block, where state dicts have it.
    """

    norms: tuple[FoldedNorm]

    def forward(self, x: Tensor) -> Tensor:
        """Convolution and norm."""
        (norm,) = self.norms
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = torch.addcmul(shift, self.bias, scale)
        return self._conv_forward(x, self.weight * scale[:, None, None, None], shift)


def fold_norms(model: nn.Module) -> None:
    """Fold the fixed batch norms of a timm ResNet, in place; other networks stay as they are.

    Names and values in its state dict do not change.
    """
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
    stem = [model] if blocks and isinstance(model, FeatureListNet) else []
    for parent in [*stem, *blocks, *(b.downsample for b in blocks if isinstance(b.downsample, nn.Sequential))]:
        for conv, norm in pairwise(parent.children()):
            if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d:
                conv.__class__, norm.__class__ = FoldedConv, FoldedNorm
                conv.norms = (norm,)  # type: ignore[assignment]


def unfold(conv: nn.Module) -> None:
    """Give a convolution's norm its work back, in place; anything else stays as it is."""
    if isinstance(conv, FoldedConv):
        for norm in conv.norms:
            norm.__class__ = FrozenBatchNorm2d
        del conv.norms
        conv.__class__ = nn.Conv2d  # type: ignore[assignment]
