"""The triplet loss of pixel embeddings against query embeddings (Gao et al., 2020, Eq. 5 to 9), strip by strip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional import forms
from panoptic_ibs.functional.upsampling import phases, row_strips, upsample_phases, upsample_phases_backward

STRIP = 1 << 15  # full-resolution pixels at a time on a CPU: a strip of 30 similarities stays in the cache
LEAST_ROOM = 1e-6  # of 1 - l' / (2 + margin) in Eq. 8, which is zero for a pixel opposite to its own query


@dataclass
class Term:
    """One application of Eq. 9: which queries a pixel is held against and which of them is its own.

    Attributes:
        start, stop: the slice of queries.
        labels: (N + 1,) own query of the pixels of each id of the id map, counted from ``start``; any value for void.
        weights: (N + 1,) weight of the pixels of each id; 0 for void.
    """

    start: int
    stop: int
    labels: Tensor
    weights: Tensor


def largest(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest of (..., K, P) values of each column, best first: (..., count, P).

    On a CPU by insertion of whole rows, six times as fast as ``topk`` over a few dozen rows; on a GPU ``topk``.
    """
    if forms.batched(values.device) or values.ndim > 2:
        return values.topk(count, dim=-2).values
    if not count:
        return values[:0]
    best = [torch.full_like(values[0], -torch.inf) for _ in range(count)]
    for row in values:
        for i, held in enumerate(best):
            best[i], row = torch.maximum(held, row), torch.minimum(held, row)
    return torch.stack(best)


def triplet_term(
    similarity: Tensor, labels: Tensor, weights: Tensor, margin: float, top_k: int, grad: Tensor
) -> Tensor:
    """Weighted sum over pixels of Eq. 5 to 9; its gradient is added to ``grad``.

    With similarities s instead of distances, Eq. 7 is ``max(s_k - s_own + margin, 0)``, where s_k is 1 for the own
    query (Eq. 6 sets that distance to 0). It grows with s_k, so that the own query's loss is the largest of a pixel and
    the ``top_k`` largest are those of the own and of the ``top_k - 1`` most similar other queries: selecting needs no
    loss of the rest.

    Args:
        similarity: (..., K, P) cosines; changed and restored.
        labels: (..., P) own query; weights: (..., P).
        grad: (..., K, P), added to. Others that tie at the last place all get the gradient: two equal queries only.
    """
    own, weights, scale = labels.unsqueeze(-2), weights.unsqueeze(-2), 2 + margin
    positive = similarity.gather(-2, own)
    similarity.scatter_(-2, own, -2.0)  # below any cosine
    others = largest(similarity, min(top_k - 1, similarity.shape[-2] - 1))
    compared = torch.cat([torch.ones_like(positive), others], -2)
    hinge = (compared - positive).add_(margin).clamp_(min=0)
    room = (scale - hinge).clamp_(min=LEAST_ROOM * scale)
    loss = -((room / scale).log_().sum(-2, keepdim=True) * weights).sum()
    slope = (weights / room).mul_(hinge > 0).sum(-2, keepdim=True)
    if others.shape[-2]:
        least = torch.maximum(others[..., -1:, :], positive - margin)
        selected = (similarity >= least).to(weights.dtype).mul_(weights)
        grad.addcdiv_(selected, (2 + positive).clamp_(min=1 + 2 * LEAST_ROOM * scale) - similarity)  # 2 + margin - l'
    similarity.scatter_(-2, own, positive)
    grad.scatter_add_(-2, own, -slope)
    return loss


class _EmbeddingLoss(torch.autograd.Function):
    """Sum of the terms of one crop. The forward pass makes the gradient too, so that no pixel x query tensor outlives
    its strip and none is made twice."""

    @staticmethod
    def forward(
        ctx: Any,
        padded: Tensor,
        queries: Tensor,
        id_map: Tensor,
        terms: Sequence[Term],
        boxes: Tensor,
        margin: float,
        top_k: int,
        strip: int,
    ) -> Tensor:
        padded_grad, query_grad = torch.zeros_like(padded), torch.zeros_like(queries)
        total, first = padded.new_zeros(()), len(queries) - len(boxes)
        size = (padded.shape[1] - 2, padded.shape[2] - 2)
        for top, bottom in row_strips(size, strip):
            raw = upsample_phases(padded[:, top : bottom + 2])
            ids = phases(id_map[4 * top : 4 * bottom]).long()
            inverse = raw.square().sum(0).clamp_(min=1e-24).rsqrt_()
            unit = raw.mul_(inverse)  # Eq. 1
            similarity = queries @ unit
            grad = torch.zeros_like(similarity)
            inside = inside_boxes(boxes, 4 * top, 4 * bottom, 4 * size[1])
            _filter(similarity[first:], inside)
            for term in terms:
                rows = slice(term.start, term.stop)
                total += triplet_term(similarity[rows], term.labels[ids], term.weights[ids], margin, top_k, grad[rows])
            _filter(grad[first:], inside)
            query_grad += grad @ unit.T
            slope = queries.T @ grad
            along = (unit * slope).sum(0)
            slope.addcmul_(unit, along, value=-1).mul_(inverse)  # through the normalisation
            padded_grad[:, top : bottom + 2] += upsample_phases_backward(slope, size[1])
        ctx.save_for_backward(padded_grad, query_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padded_grad, query_grad = ctx.saved_tensors
        return padded_grad * grads[0], query_grad * grads[0], None, None, None, None, None, None


def inside_boxes(boxes: Tensor, top: int, bottom: int, width: int) -> tuple[Tensor, Tensor]:
    """Which rows and columns of pixel centres lie in the (N, 4) boxes, 0 or 1, in the order of phases.

    Shaped (N, 4, 1, rows / 4, 1) and (N, 1, 4, 1, width / 4): their product is never made.
    """
    y = torch.arange(top, bottom, device=boxes.device, dtype=boxes.dtype) + 0.5
    x = torch.arange(width, device=boxes.device, dtype=boxes.dtype) + 0.5
    left, upper, right, lower = boxes[:, :, None].unbind(1)
    rows, columns = (y >= upper) & (y <= lower), (x >= left) & (x <= right)
    rows, columns = (side.to(boxes.dtype).unflatten(1, (-1, 4)).transpose(1, 2) for side in (rows, columns))
    return rows[:, :, None, :, None].contiguous(), columns[:, None, :, None].contiguous()


def _filter(values: Tensor, inside: tuple[Tensor, Tensor]) -> None:
    """Set (N, P) values outside the boxes to zero, in place."""
    rows, columns = inside
    values.view(len(values), 4, 4, rows.shape[3], columns.shape[4]).mul_(rows).mul_(columns)


def embedding_loss(
    maps: Tensor,
    queries: Tensor,
    id_map: Tensor,
    terms: Sequence[Term],
    boxes: Tensor,
    margin: float = 0.15,
    top_k: int = 5,
    strip: int | None = None,
) -> Tensor:
    """Weighted sum over the pixels of a crop of the embedding losses of Eq. 9, all terms together.

    Args:
        maps: (D, h, w) embeddings at stride 4, before upsampling and normalisation.
        queries: (K, D) of unit length.
        id_map: (4 h, 4 w) ids.
        terms: CAE and IAE.
        boxes: (N, 4) boxes in pixels, outside which the similarity to the last N queries is 0 (Section IV-B).
        margin: of Eq. 7. top_k: losses kept a pixel (Eq. 9).
        strip: pixels at a time.

    Returns:
        A scalar in the dtype of ``maps``.
    """
    terms = [t for t in terms if t.stop > t.start]
    if not terms or not len(queries):
        return maps.sum() * 0.0 + queries.sum() * 0.0
    strip = strip or (STRIP if maps.device.type == "cpu" else 8 * STRIP)
    padded = F.pad(maps[None], (1, 1, 1, 1), mode="replicate")[0]
    total: Tensor = _EmbeddingLoss.apply(padded, queries, id_map, terms, boxes.to(maps.dtype), margin, top_k, strip)
    return total
