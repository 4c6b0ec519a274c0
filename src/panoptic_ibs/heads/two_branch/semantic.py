"""The semantic branch (semantic FPN), and its loss at full resolution without maps of full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.forms import batched
from panoptic_ibs.layers.pyramid import SemanticPyramid
from panoptic_ibs.ranges import AtLeastOne

from .class_map import IGNORE

STRIP_PIXELS = 2**17  # upsampled pixels of a crop at a time on a CPU: they stay in its caches
STRIPS = 4  # elsewhere


@dataclass(frozen=True)
class SemanticOptions:
    """The semantic branch.

    Attributes:
        width: of its convolutions.
        groups: of their normalisation; None: 32, fewer on narrow layers.
    """

    width: AtLeastOne = 128
    groups: AtLeastOne | None = None


class SemanticBranch(nn.Module):
    """Semantic FPN (Kirillov et al., 2019): logits (B, K, H / 4, W / 4) from P2 to P5.

    Args:
        channels: of the pyramid.
        classes: K.
        options: see there.
    """

    def __init__(self, channels: int, classes: int, options: SemanticOptions) -> None:
        super().__init__()
        self.pyramid = SemanticPyramid(channels, options.width, groups=options.groups)
        self.predict = nn.Conv2d(options.width, classes, 1)
        nn.init.kaiming_normal_(self.predict.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.predict.bias)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits at stride 4 from the four levels."""
        logits: Tensor = self.predict(self.pyramid(levels))
        return logits


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the logits at full resolution (bilinear), averaged over the labelled pixels of all ranks.

    Args:
        logits: (B, K, h, w).
        labels: (B, f h, f w) uint8, :data:`IGNORE` where nothing is said.

    Returns:
        A scalar; 0 with a gradient path where no pixel is labelled.
    """
    total: Tensor = _UpsampledCrossEntropy.apply(logits, labels)
    return total / normalizer((labels != IGNORE).sum(), total)


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Sum over the pixels, with the gradient made along with it, a strip of rows after the other: a step holds one
    tensor of the logits' size, in place of several of full resolution.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        x = logits.float()
        gradient = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        total = x.new_zeros(())
        crops = [slice(None)] if batched(x.device) else [slice(i, i + 1) for i in range(len(x))]
        for crop in crops:
            for rows in _strips(x.shape[-2], labels.shape[-1] * (labels.shape[-2] // x.shape[-2]), batched(x.device)):
                slope = None if gradient is None else gradient[crop]
                total += _strip(x[crop], labels[crop], rows, slope)
        ctx.save_for_backward(*([] if gradient is None else [gradient.to(logits.dtype)]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def _strips(rows: int, pixels: int, whole: bool) -> list[tuple[int, int]]:
    """(first, last) rows of the logits whose upsampled pixels (``pixels`` a row) are done at a time."""
    step = -(-rows // STRIPS) if whole else max(STRIP_PIXELS // max(pixels, 1), 1)
    return [(top, min(top + step, rows)) for top in range(0, rows, step)]


def _strip(x: Tensor, labels: Tensor, rows: tuple[int, int], gradient: Tensor | None) -> Tensor:
    """The sum over the pixels of some rows of the logits; adds their gradient to ``gradient``."""
    height, factor = x.shape[-2], labels.shape[-2] // x.shape[-2]
    low, high = max(rows[0] - 1, 0), min(rows[1] + 1, height)  # bilinear pixels look one row further
    with torch.enable_grad():
        source = x[..., low:high, :].detach().requires_grad_(gradient is not None)
        full = F.interpolate(source, size=((high - low) * factor, labels.shape[-1]), mode="bilinear")
        full = full[..., (rows[0] - low) * factor : (rows[1] - low) * factor, :]
        wanted = labels[..., rows[0] * factor : rows[1] * factor, :].long()
        loss = F.cross_entropy(full, wanted, ignore_index=IGNORE, reduction="sum")
        if gradient is not None:
            gradient[..., low:high, :] += torch.autograd.grad(loss, source)[0]
    return loss.detach()
