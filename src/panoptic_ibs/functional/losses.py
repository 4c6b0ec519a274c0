"""Losses on logits, computed in float32 whatever the autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _working(x: Tensor) -> torch.dtype:
    """Float32, or float64 if the input has it."""
    return torch.promote_types(x.dtype, torch.float32)


class _FocalToEmpty(torch.autograd.Function):
    """Row means of the focal loss with target 0. Saves the logits alone, so it costs one tensor, not five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, alpha: float, gamma: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.alpha, ctx.gamma = alpha, gamma
        x = logits.to(_working(logits))
        loss = torch.sigmoid(x).pow_(gamma).mul_(F.softplus(x))
        return loss.mean(dim=1).mul_(1 - alpha if alpha >= 0 else 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        x = logits.to(_working(logits))
        p = torch.sigmoid(x)
        # d/dx [p^g softplus(x)] = p^g (g (1 - p) softplus(x) + p), since softplus' = p and p' = p (1 - p).
        slope = F.softplus(x).mul_(1 - p).mul_(ctx.gamma).add_(p).mul_(p.pow_(ctx.gamma))
        scale = grad * ((1 - ctx.alpha if ctx.alpha >= 0 else 1.0) / max(x.shape[1], 1))
        return slope.mul_(scale[:, None]).to(logits.dtype), None, None


def focal_to_empty(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017) against an all-zero mask, averaged over pixels.

    Equals ``sigmoid_focal_loss(logits, zeros_like(logits), alpha, gamma).mean(1)`` without the target tensor.

    Args:
        logits: (S, P).
        alpha: weight of the positive class; the negatives here get ``1 - alpha``. Negative: no weighting.
        gamma: focusing exponent, at least 0.

    Returns:
        (S,) float32.
    """
    result: Tensor = _FocalToEmpty.apply(logits, alpha, gamma)
    return result


def dice_loss(probabilities: Tensor, masks: Tensor, eps: float = 1e-8) -> Tensor:
    """Dice loss with squared terms in the denominator (V-Net; Panoptic FCN Eq. 6), for k predictions a segment.

    ``1 - 2 sum(p m) / (sum(p^2) + sum(m^2))``.

    Args:
        probabilities: (N, k, P) in [0, 1].
        masks: (N, P) in [0, 1].
        eps: floor of the denominator.

    Returns:
        (N, k).
    """
    intersection = torch.bmm(probabilities, masks.unsqueeze(2)).squeeze(2)
    squares = torch.einsum("nkp,nkp->nk", probabilities, probabilities)
    denominator = squares + torch.einsum("np,np->n", masks, masks).unsqueeze(1)
    return 1 - 2 * intersection / denominator.clamp(min=eps)
