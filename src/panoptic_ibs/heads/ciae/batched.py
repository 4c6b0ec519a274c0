"""CIAE-loss in a few operations over all crops: the form for GPUs. The same numbers as :mod:`.losses`.

Segments and instances are padded to the most that a crop has; a padded instance is a query that no pixel is held
against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.ragged import padded
from panoptic_ibs.functional.upsampling import (
    label_shares_of,
    phases_of,
    row_strips,
    upsample_phases,
    upsample_phases_backward,
)
from panoptic_ibs.structures import SegmentEmbeddings, Target

from .embedding import Term, inside_boxes, triplet_term
from .losses import Categories, LossOptions, ScaledCosine, grow_boxes, terms_of_rows

PIXELS = 1 << 21  # full-resolution pixels of all crops together that are looked at at a time


@dataclass
class Stacked:
    """The segments of B crops that teach, as whole tensors; R rows and N instances at most in a crop.

    Attributes:
        id_maps: (B, H, W).
        kept: (B, R) rows that are neither crowd nor empty; ``classes``, ``things``, ``areas``, ``boxes`` of all rows.
        number: (B, R) which instance of its crop a row is, -1 for none. These tables are on the CPU.
        row: (B, N) rows of the instances, -1 for padding; on the CPU.
        sums: (B, R, D) summed upsampled embeddings, in the graph.
        means: (B, N, D) unit mean embeddings of the instances; anything for padding.
    """

    id_maps: Tensor
    kept: Tensor
    classes: Tensor
    things: Tensor
    areas: Tensor
    boxes: Tensor
    number: Tensor
    row: Tensor
    sums: Tensor
    means: Tensor

    @classmethod
    def make(cls, maps: Tensor, targets: Sequence[Target]) -> Stacked:
        """From (B, D, h, w) float32 embeddings at stride 4."""
        dtype = max((t.id_map.dtype for t in targets), key=lambda d: d.itemsize)
        id_maps = torch.stack([t.id_map if t.id_map.dtype == dtype else t.id_map.to(dtype) for t in targets])
        areas = padded([t.areas for t in targets], 0)
        kept = ~padded([t.is_crowd for t in targets], True) & (areas > 0)
        things = padded([t.is_thing for t in targets], False)
        instance = kept & things
        number = torch.where(instance, instance.cumsum(1) - 1, -1)
        row = torch.full((len(targets), int(instance.sum(1).max())), -1)
        image, place = instance.nonzero(as_tuple=True)
        row[image, number[image, place]] = place
        label = torch.where(kept, torch.arange(kept.shape[1]), -1)
        table = F.pad(label, (1, 0), value=-1).to(maps.device, non_blocking=True)
        labels = table.gather(1, id_maps.flatten(1).long()).view(id_maps.shape)
        shares = label_shares_of(labels, kept.shape[1], dtype=maps.dtype)
        sums = shares.flatten(2) @ maps.flatten(2).transpose(1, 2)
        where = row.clamp(min=0).to(maps.device, non_blocking=True)[..., None].expand(-1, -1, maps.shape[1])
        classes, boxes = padded([t.class_ids for t in targets], 0), padded([t.boxes for t in targets], 0.0)
        means = F.normalize(sums.gather(1, where), dim=2)
        return cls(id_maps, kept, classes, things, areas, boxes, number, row, sums, means)


def category_sums(x: Stacked, categories: Categories) -> tuple[Tensor, Tensor]:
    """Summed embeddings (C, D) and numbers of pixels (C,) of the categories over the batch; no gradient."""
    of_row = torch.where(x.kept, categories.of_class[x.classes], categories.count).flatten()
    sums = x.sums.new_zeros(categories.count + 1, x.sums.shape[2])
    sums.index_add_(0, of_row.to(sums.device, non_blocking=True), x.sums.detach().flatten(0, 1))
    pixels = torch.zeros(categories.count + 1).index_add_(0, of_row, x.areas.flatten().float())
    return sums[:-1], pixels[:-1]


def terms_of(x: Stacked, categories: Categories, queries: int, options: LossOptions, stuff: bool) -> list[Term]:
    """CAE and IAE of all crops, tables (B, R + 1); for queries in the order memories, instances."""
    kept, number = F.pad(x.kept, (1, 0)), F.pad(x.number, (1, 0), value=-1)
    category = F.pad(categories.of_class[x.classes], (1, 0))
    return terms_of_rows(kept, category, number >= 0, number, categories, queries, options, stuff)


def ciae_loss(
    maps: Tensor, x: Stacked, memory: Tensor, categories: Categories, options: LossOptions, stuff: bool
) -> Tensor:
    """Eq. 12 of a batch, divided by its number of valid pixels (averaged over ranks); see ``losses.ciae_loss``."""
    valid = x.kept if stuff else x.number >= 0
    return _summed(maps, x, memory, categories, options, stuff) / normalizer(int(x.areas[valid].sum()), maps)


def instance_embeddings(maps: Tensor, x: Stacked, logits: ScaledCosine) -> SegmentEmbeddings:
    """The mean embedding of every instance, with the pixel embeddings at stride 4."""
    image, place = (x.row >= 0).nonzero(as_tuple=True)
    flat = (image * x.row.shape[1] + place).to(maps.device, non_blocking=True)
    return SegmentEmbeddings(
        embeddings=x.means.flatten(0, 1).index_select(0, flat),
        features=maps,
        image_index=image,
        is_thing=torch.ones(len(image), dtype=torch.bool),
        segment_index=x.row[image, place],
        logits=logits,
    )


def _summed(
    maps: Tensor, x: Stacked, memory: Tensor, categories: Categories, options: LossOptions, stuff: bool
) -> Tensor:
    b, device = len(maps), maps.device
    queries = torch.cat([memory.to(maps.dtype).expand(b, -1, -1), x.means], 1)
    terms = [t for t in terms_of(x, categories, queries.shape[1], options, stuff) if t.stop > t.start]
    if not terms:
        return maps.sum() * 0.0 + queries.sum() * 0.0
    for term in terms:
        term.labels = term.labels.to(device, non_blocking=True)
        term.weights = term.weights.to(device, maps.dtype, non_blocking=True)
    rows = x.row.clamp(min=0)[..., None].expand(-1, -1, 4)
    boxes = grow_boxes(x.boxes.gather(1, rows).flatten(0, 1), options.box_filter).view(b, -1, 4)
    real = (x.row >= 0).to(device, non_blocking=True)
    boxes = boxes.to(device, maps.dtype, non_blocking=True)
    bordered = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    total: Tensor = _Loss.apply(
        bordered, queries, x.id_maps, terms, boxes, real, options.margin, options.top_k, max(1, PIXELS // b)
    )
    return total


class _Loss(torch.autograd.Function):
    """Sum of the terms of all crops; the forward pass makes the gradient too, as in :mod:`.embedding`."""

    @staticmethod
    def forward(
        ctx: Any,
        bordered: Tensor,
        queries: Tensor,
        id_maps: Tensor,
        terms: Sequence[Term],
        boxes: Tensor,
        real: Tensor,
        margin: float,
        top_k: int,
        strip: int,
    ) -> Tensor:
        map_grad, query_grad = torch.zeros_like(bordered), torch.zeros_like(queries)
        b, d = bordered.shape[:2]
        total, first = bordered.new_zeros(()), queries.shape[1] - boxes.shape[1]
        size = (bordered.shape[2] - 2, bordered.shape[3] - 2)
        for top, bottom in row_strips(size, strip):
            raw = upsample_phases(bordered[:, :, top : bottom + 2].flatten(0, 1)).unflatten(0, (b, d))
            ids = phases_of(id_maps[:, 4 * top : 4 * bottom]).long()
            inverse = raw.square().sum(1, keepdim=True).clamp_(min=1e-24).rsqrt_()
            unit = raw.mul_(inverse)  # Eq. 1
            similarity = queries @ unit
            grad = torch.zeros_like(similarity)
            inside = inside_boxes(boxes.flatten(0, 1), 4 * top, 4 * bottom, 4 * size[1])
            _filter(similarity[:, first:], inside)
            similarity[:, first:].masked_fill_(~real[..., None], -2.0)  # below any cosine
            for term in terms:
                part = slice(term.start, term.stop)
                labels, weights = term.labels.gather(1, ids), term.weights.gather(1, ids)
                total += triplet_term(similarity[:, part], labels, weights, margin, top_k, grad[:, part])
            _filter(grad[:, first:], inside)
            grad[:, first:].masked_fill_(~real[..., None], 0.0)
            query_grad += grad @ unit.transpose(1, 2)
            slope = queries.transpose(1, 2) @ grad
            along = (unit * slope).sum(1, keepdim=True)
            slope.addcmul_(unit, along, value=-1).mul_(inverse)  # through the normalisation
            back = upsample_phases_backward(slope.flatten(0, 1), size[1]).unflatten(0, (b, d))
            map_grad[:, :, top : bottom + 2] += back
        ctx.save_for_backward(map_grad, query_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        map_grad, query_grad = ctx.saved_tensors
        return map_grad * grads[0], query_grad * grads[0], *[None] * 7


def _filter(values: Tensor, inside: tuple[Tensor, Tensor]) -> None:
    """Set (B, N, P) values outside the boxes to zero, in place."""
    b, n, _ = values.shape
    rows, columns = (side.unflatten(0, (b, n)) for side in inside)
    values.view(b, n, 4, 4, rows.shape[4], columns.shape[5]).mul_(rows).mul_(columns)
