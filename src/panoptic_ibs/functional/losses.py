"""Losses on logits, computed in float32 whatever the autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _working(x: Tensor) -> torch.dtype:
    """Float32, or float64 if the input has it."""
    return torch.promote_types(x.dtype, torch.float32)


class _FocalToEmpty(torch.autograd.Function):
    """Row means of the focal loss with target 0. The slope is made along with the loss and kept in the logits' type,
    so a step holds one tensor, not five, and goes over it once, not twice.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, alpha: float, gamma: float) -> Tensor:
        x = logits.to(_working(logits))
        share = (1 - alpha if alpha >= 0 else 1.0) / max(x.shape[1], 1)
        p, losses = torch.sigmoid(x), F.softplus(x)
        ctx.share = share
        if not ctx.needs_input_grad[0]:
            return losses.mul_(p.pow_(gamma)).sum(dim=1).mul_(share)
        # d/dx [p^g softplus(x)] = p^g (g (1 - p) softplus(x) + p), since softplus' = p and p' = p (1 - p).
        slope = (1 - p).mul_(losses).mul_(gamma).add_(p)
        powers = p.pow_(gamma)
        ctx.save_for_backward(slope.mul_(powers).to(logits.dtype))
        return losses.mul_(powers).sum(dim=1).mul_(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * (grad * ctx.share).to(slope.dtype)[:, None], None, None


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


class _DiceOfProducts(torch.autograd.Function):
    """See :func:`dice_of_products`. Keeps the probabilities alone, and makes their gradient in one buffer."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, features: Tensor, masks: Tensor, counts: Sequence[int], eps: float
    ) -> Tensor:
        segments, k, channels = embeddings.shape
        rows, sizes = embeddings.reshape(-1, channels), [k * count for count in counts]
        p = features.new_empty(len(rows), features.shape[2])
        for part, feature, out in zip(rows.split(sizes), features, p.split(sizes), strict=True):
            torch.mm(part, feature, out=out)
        p = p.to(_working(p)).sigmoid_()
        intersection = torch.bmm(p.view(segments, k, p.shape[1]), masks.unsqueeze(2)).squeeze(2)
        squares = torch.einsum("np,np->n", p, p).view(segments, k)
        total = squares + torch.einsum("np,np->n", masks, masks).unsqueeze(1)
        ctx.save_for_backward(rows, features, masks, p, intersection, total)
        ctx.sizes, ctx.eps = sizes, eps
        return 1 - 2 * intersection / total.clamp(min=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, features, masks, p, intersection, total = ctx.saved_tensors
        # d/dp (1 - 2 I / D) = -2 m / D + 4 I p / D^2, the second term where D is not clamped; then p (1 - p).
        floor = total.clamp(min=ctx.eps)
        by_mask = -2 * grad / floor
        by_p = torch.where(total > ctx.eps, -2 * by_mask * intersection / floor, 0.0)
        slope = p * by_p.reshape(-1, 1)
        slope.view(*grad.shape, p.shape[1]).addcmul_(by_mask.unsqueeze(2), masks.unsqueeze(1))
        slope.mul_(p).addcmul_(slope, p, value=-1)
        slope = slope.to(features.dtype)
        to_rows, to_features = torch.empty_like(rows), torch.empty_like(features)
        parts = (t.split(ctx.sizes) for t in (rows, slope, to_rows))
        for part, grads, out, feature, out_feature in zip(*parts, features, to_features, strict=True):
            torch.mm(grads, feature.T, out=out)
            torch.mm(part.T, grads, out=out_feature)
        return to_rows.view(*grad.shape, rows.shape[1]), to_features, None, None, None


def dice_of_products(
    embeddings: Tensor, features: Tensor, masks: Tensor, counts: Sequence[int], eps: float = 1e-8
) -> Tensor:
    """Dice loss with squared terms in the denominator (V-Net; Panoptic FCN Eq. 6) of embedding x feature masks.

    ``1 - 2 sum(p m) / (sum(p^2) + sum(m^2))`` with ``p = sigmoid(embedding @ features)``; k predictions a segment. The
    product is made in the type of autocast, all else in float32.

    Args:
        embeddings: (A, k, C), those of one crop after those of another.
        features: (B, C, P).
        masks: (A, P) in [0, 1], without a gradient.
        counts: segments of each of the B crops, A in all.
        eps: floor of the denominator.

    Returns:
        (A, k) float32.
    """
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
    with torch.autocast(kind, enabled=False):  # the sums of the dice loss would be rounded as well
        result: Tensor = _DiceOfProducts.apply(embeddings.to(dtype), features.to(dtype), masks, counts, eps)
    return result
