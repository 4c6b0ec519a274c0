"""Intra-Batch Supervision (de Geus and Dubbelman, WACV 2023): thing embeddings of one crop must be empty on another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .functional.distributed import normalizer
from .functional.losses import focal_to_empty
from .functional.points import sample_points, uncertain_points
from .ranges import AtLeastOne, Bounds, NonNegative, Share
from .structures import SegmentEmbeddings, Target


def random_partners(batch_size: int, num_targets: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """For each crop ``num_targets`` different other crops, drawn uniformly; (B, K) int64 on the CPU.

    Raises:
        ConfigError: if there are not enough other crops.
    """
    if num_targets >= batch_size:
        raise ConfigError(
            f"Intra-batch supervision with {num_targets} target crop(s) needs at least {num_targets + 1} crops a "
            f"device, got {batch_size}: raise sampling.batch_size, lower ibs.num_targets or set ibs=none."
        )
    others = torch.rand(batch_size, batch_size - 1, generator=generator).argsort(dim=1)[:, :num_targets]
    return others + (others >= torch.arange(batch_size)[:, None])  # step over the crop itself


def paired_partners(pairs: Tensor) -> Tensor:
    """The other crop of each pair, (B, 1) int64.

    Args:
        pairs: (B,) number of the pair of each crop; the two crops of a pair are neighbours (2i, 2i + 1).

    Raises:
        ConfigError: if the batch does not consist of pairs of neighbours.
    """
    pairs = pairs.cpu()
    whole = pairs.numel() > 0 and pairs.numel() % 2 == 0 and bool((pairs >= 0).all())
    if not whole or not torch.equal(pairs[0::2], pairs[1::2]):
        raise ConfigError(
            "ibs=paired needs batches made of crop pairs: use sampling=paired_crop with an even sampling.batch_size, "
            "or ibs=random."
        )
    return (torch.arange(pairs.numel()) ^ 1)[:, None]


def held_by(outputs: Sequence[SegmentEmbeddings], targets: Sequence[Target]) -> Tensor | None:
    """Which crops hold the very segment of an embedding: (S, B) bool on the CPU, or None if one is unknown.

    Two crops of one image may overlap; an instance must not be pushed away from a crop that really contains it.

    Args:
        outputs: S embeddings in all.
        targets: those of the B crops.
    """
    if any(output.segment_index is None for output in outputs):
        return None
    identity = [t.segment_ids.cpu() + (t.image_index << 32) for t in targets]
    first = torch.tensor([0, *itertools.accumulate(len(ids) for ids in identity)])
    rows = [first[o.image_index.cpu()] + o.segment_index.cpu() for o in outputs if o.segment_index is not None]
    own = torch.cat(identity)[torch.cat(rows)]
    known = torch.tensor([t.image_index >= 0 for t in targets])
    return torch.stack([torch.isin(own, ids) for ids in identity], dim=1) & known


class IntraBatchSupervision(nn.Module):
    """Loss that asks the thing embeddings of one crop to give an empty mask on another crop of the batch.

    For a crop i and its target crop t the intra-batch logits are ``E_i F_t`` (Section 4.1). Every thing
    embedding's mask is held against zero by the focal loss, averaged over pixels, weighted by the embedding's weight,
    summed, and divided by the number of thing instances, averaged over ranks: the head's ``count``, else the summed
    weights of all thing embeddings. With several target crops the mean over them is taken.

    Args:
        weight: factor of the loss (Panoptic FCN: 1.0 on Cityscapes, 5.0 on Vistas; Mask2Former: 50 and 100).
        alpha: focal loss weight of positives; negatives get ``1 - alpha``.
        gamma: focal loss exponent.
        points: None for all pixels (dense), or the number of points that are sampled where the intra-batch logits
            are most uncertain (12544 in the paper's Mask2Former).
        partners: ``"random"`` draws target crops anew for each output; ``"paired"`` takes the other crop of the pair.
        num_targets: target crops of each crop with ``partners="random"``.
        scale: second factor, the head's own weight of the losses that this one stands beside (Panoptic FCN's segment
            weight: 4.0 on Cityscapes, 3.0 on Vistas), so that the two cannot drift apart.
        outputs: which of several supervised outputs count: ``(start, stop)`` or ``(start, stop, step)`` of a slice
            over them in the head's order, e.g. ``(-1, None)`` for the last alone; None for all (published).

    Examples:
        Two crops, one car each, two feature channels on a 1 x 2 map. Car 0 answers to channel 0, and so does the first
        pixel of the other crop: that is confusion, and it costs more than car 1, which finds nothing in crop 0.

        >>> import torch
        >>> from panoptic_ibs.ibs import IntraBatchSupervision
        >>> from panoptic_ibs.structures import SegmentEmbeddings
        >>> features = torch.tensor([[[[4.0, 0.0]], [[-9.0, -9.0]]], [[[4.0, 0.0]], [[0.0, 4.0]]]])  # (B, C, H, W)
        >>> things = SegmentEmbeddings(
        ...     embeddings=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        ...     features=features,
        ...     image_index=torch.tensor([0, 1]),
        ...     is_thing=torch.tensor([True, True]),
        ... )
        >>> ibs = IntraBatchSupervision(partners="random")  # two crops: each is the other's target
        >>> round(ibs(things).item(), 4)
        0.759
        >>> mine = torch.tensor([True, False])
        >>> first = SegmentEmbeddings(things.embeddings, features, things.image_index, mine)
        >>> round(ibs(first).item(), 4)  # the confused car alone: 0.75 * mean(p^2 softplus) over logits 4 and 0
        1.5181
    """

    def __init__(
        self,
        weight: NonNegative = 1.0,
        alpha: Share = 0.25,
        gamma: NonNegative = 2.0,
        points: AtLeastOne | None = None,
        partners: Literal["random", "paired"] = "random",
        num_targets: AtLeastOne = 1,
        oversample: Annotated[float, Bounds(least=1)] = 3.0,
        importance: Share = 0.75,
        outputs: Sequence[int | None] | None = None,
        scale: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        if partners not in ("random", "paired"):
            raise ConfigError(f"ibs.partners is {partners!r}; choose 'random' or 'paired'.")
        if num_targets < 1 or (partners == "paired" and num_targets != 1):
            raise ConfigError(f"ibs.num_targets is {num_targets}; it must be at least 1, and 1 with ibs=paired.")
        if points is not None and points < 1:
            raise ConfigError(f"ibs.points is {points}; give a number of points, or null for all pixels.")
        if outputs is not None and (len(outputs) not in (2, 3) or 0 in outputs[2:]):
            raise ConfigError(f"ibs.outputs={list(outputs)} is not [start, stop] or [start, stop, step]; null for all.")
        self.weight, self.scale, self.alpha, self.gamma = weight, scale, alpha, gamma
        self.outputs = slice(None) if outputs is None else slice(*outputs)
        self.points, self.oversample, self.importance = points, oversample, importance
        self.partners, self.num_targets = partners, num_targets

    def forward(
        self,
        outputs: SegmentEmbeddings | Sequence[SegmentEmbeddings],
        pairs: Tensor | None = None,
        targets: Sequence[Target] | None = None,
        partners: Tensor | None = None,
    ) -> Tensor:
        """Loss of one or several supervised outputs, summed over the outputs; a scalar that always has a gradient path.

        Args:
            outputs: embeddings and features.
            pairs: (B,) number of the pair of each crop; needed with ``partners="paired"``.
            targets: B targets, for the guard that spares crops which hold the very same segment.
            partners: (B,) or (B, K) target crops to use instead of drawing them; -1 for none.

        Raises:
            ConfigError: there are no outputs, or ``outputs`` of the constructor leaves none of these.
        """
        outputs = [outputs] if isinstance(outputs, SegmentEmbeddings) else list(outputs)
        if not outputs:
            raise ConfigError(
                f"ibs={self.partners}: the head gave no segment embeddings, so there is nothing to supervise: set "
                "ibs=none, or choose another head."
            )
        if not outputs[self.outputs]:
            raise ConfigError(f"ibs.outputs selects none of the head's {len(outputs)} supervised output(s).")
        losses = [self._loss(group, pairs, targets, partners) for group in _share_features(outputs[self.outputs])]
        return self.weight * self.scale * torch.stack(losses).sum()

    def _partners(self, output: SegmentEmbeddings, pairs: Tensor | None, partners: Tensor | None) -> Tensor:
        if partners is not None:
            return partners.cpu().reshape(len(partners), -1)
        if self.partners == "paired":
            return paired_partners(torch.empty(0, dtype=torch.long) if pairs is None else pairs)
        return random_partners(output.features.shape[0], self.num_targets)

    def _jobs(
        self,
        group: Sequence[SegmentEmbeddings],
        pairs: Tensor | None,
        targets: Sequence[Target] | None,
        partners: Tensor | None,
    ) -> tuple[Tensor, Tensor, int]:
        """(rows, target crops) of the products to make, both (J,) on the CPU and in the order of the crops, and how
        many target crops a row may have. Rows count through the embeddings of all outputs.
        """
        image = [output.image_index.cpu() for output in group]
        target = torch.cat([self._partners(o, pairs, partners)[i] for o, i in zip(group, image, strict=True)])
        things = torch.cat([output.is_thing.cpu() for output in group])
        allowed = things[:, None] & (target >= 0) & (target != torch.cat(image)[:, None])
        held = None if targets is None else held_by(group, targets)
        if held is not None:
            allowed &= ~held.gather(1, target.clamp(min=0))
        row, column = allowed.nonzero(as_tuple=True)
        crop = target[row, column]
        order = crop.argsort(stable=True)
        return row[order], crop[order], target.shape[1]

    def _loss(
        self,
        group: Sequence[SegmentEmbeddings],
        pairs: Tensor | None,
        targets: Sequence[Target] | None,
        partners: Tensor | None,
    ) -> Tensor:
        """All products of outputs that share their features: one matrix product a target crop, one loss over them."""
        features = group[0].features
        rows, crop, fan_out = self._jobs(group, pairs, targets, partners)
        shares = _shares(group)  # all ranks take part, also one without things
        if not len(rows):
            return sum((_connected_zero(o) for o in group), start=torch.zeros((), device=features.device))
        rows = rows.to(features.device, non_blocking=True)
        embeddings = _joined([output.embeddings for output in group]).index_select(0, rows)
        weight = shares.index_select(0, rows) / fan_out
        counts = torch.bincount(crop, minlength=len(features)).tolist()
        products = zip(embeddings.split(counts), features.flatten(2), counts, strict=True)
        logits = _joined([group[0].logits(part, feature) for part, feature, count in products if count])
        return (weight * self._focal(logits, features.shape[-2:])).sum()

    def _focal(self, logits: Tensor, size: torch.Size) -> Tensor:
        if self.points is not None:
            maps = logits.float().unflatten(1, size)
            logits = sample_points(maps, uncertain_points(maps, self.points, self.oversample, self.importance))
        return focal_to_empty(logits, self.alpha, self.gamma)


def _shares(group: Sequence[SegmentEmbeddings]) -> Tensor:
    """(S,) what each embedding of the outputs weighs in its output's loss, on the features' device."""
    device = group[0].features.device
    lengths = [len(output.embeddings) for output in group]
    things = torch.cat([output.is_thing.to(device, non_blocking=True) for output in group]).float()
    weight = _joined([torch.ones(len(o.embeddings), device=device) if o.weight is None else o.weight for o in group])
    weight = weight.float()
    parts = zip(group, (weight.detach() * things).split(lengths), strict=True)
    sums = torch.stack([part.sum() if o.count is None else part.new_full((), o.count) for o, part in parts])
    output = torch.arange(len(group)).repeat_interleave(torch.tensor(lengths)).to(device, non_blocking=True)
    return weight / normalizer(sums, weight)[output]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _connected_zero(output: SegmentEmbeddings) -> Tensor:
    """Zero with a gradient path to embeddings and features: the sum of no elements."""
    return output.embeddings.flatten()[:0].sum().float() + output.features.flatten()[:0].sum().float()


def _share_features(outputs: Sequence[SegmentEmbeddings]) -> list[list[SegmentEmbeddings]]:
    """Outputs grouped by the tensor of features (and the logits' form) that they share, e.g. decoder layers."""
    groups: dict[tuple[int, object], list[SegmentEmbeddings]] = {}
    for output in outputs:
        groups.setdefault((id(output.features), output.logits), []).append(output)
    return list(groups.values())
