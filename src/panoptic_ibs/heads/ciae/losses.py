"""CIAE-loss of a batch (Gao et al., 2020, Eq. 3, 4 and 10 to 12): queries, terms and the memory's new means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.upsampling import label_shares
from panoptic_ibs.ranges import AtLeastOne, NonNegative, Positive
from panoptic_ibs.structures import SegmentEmbeddings, Target

from .embedding import Term, embedding_loss


@dataclass(frozen=True)
class LossOptions:
    """Options of the embedding loss, with the published values.

    Attributes:
        margin: of both triplet terms (Eq. 7).
        top_k: losses kept a pixel (Eq. 9).
        category_weight: of L_CAE; 0 leaves the categories of things out (Table IV, last row).
        instance_weight: alpha, of L_IAE (Eq. 12).
        thing_factor: factor of the pixels of things in L_IAE.
        box_filter: an instance is compared with the pixels in its box grown by this factor; None: all (Table VIII).
        other_crops: hold the pixels also against the instances of the other crops of the batch, without filter: the
            paper's own triplet term as intra-batch supervision. An instance that the other crop holds too is left out.

    Raises:
        ConfigError: a value outside its range.
    """

    margin: NonNegative = 0.15
    top_k: AtLeastOne = 5
    category_weight: NonNegative = 1.0
    instance_weight: NonNegative = 2.0
    thing_factor: NonNegative = 5.0
    box_filter: Positive | None = 1.5
    other_crops: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 2:
            raise ConfigError(
                f"head.loss.margin is {self.margin}; cosine distances lie in [0, 2], and so must the margin "
                "(published: 0.15)."
            )
        if self.top_k < 1:
            raise ConfigError(f"head.loss.top_k is {self.top_k}; keep at least one loss a pixel (published: 5).")
        if self.box_filter is not None and self.box_filter <= 0:
            raise ConfigError(f"head.loss.box_filter is {self.box_filter}; give a positive factor, or null for none.")


@dataclass(frozen=True)
class ScaledCosine:
    """Logits from cosines, for losses on masks: ``scale * (cosine - threshold)``.

    A mask of this head is not where a product is positive but where an instance is *more similar than any other*. With
    the threshold at ``1 - margin`` a logit is zero where the triplet loss of Eq. 7 is just satisfied for a pixel that
    coincides with its own query: what is more similar would count as confusion within a crop too. A threshold of zero
    would ask for opposite directions, which many instances in one space, all near the memory of things, cannot have.
    """

    scale: float
    threshold: float

    def __call__(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(S, P) logits of (S, C) embeddings and (C, P) pixel embeddings of any length."""
        with torch.autocast(features.device.type, enabled=False):  # the scale would blow up a half-precision error
            cosine = F.normalize(embeddings.float(), dim=1) @ F.normalize(features.float(), dim=0)
        return self.scale * (cosine - self.threshold)


class Categories:
    """Categories of the memory, things first: one for all things, or one each; then one for each stuff class.

    Attributes:
        of_class: (classes,) category of each contiguous class, on the CPU.
        things: number of thing categories; ``count``: of all.
        stuff_classes: (M,) contiguous classes of the categories from ``things`` on.
        thing_classes: (things,) contiguous classes of the thing categories; empty if merged.
    """

    def __init__(self, classes: ClassTable, merged: bool) -> None:
        self.things = 1 if merged else len(classes.thing_ids)
        self.count = self.things + len(classes.stuff_ids)
        self.of_class = torch.zeros(len(classes), dtype=torch.long)
        if not merged:
            self.of_class[list(classes.thing_ids)] = torch.arange(self.things)
        self.of_class[list(classes.stuff_ids)] = self.things + torch.arange(len(classes.stuff_ids))
        self.stuff_classes = torch.tensor(classes.stuff_ids, dtype=torch.long)
        self.thing_classes = torch.tensor([] if merged else classes.thing_ids, dtype=torch.long)
        self.names = ["things"] if merged else [classes[i].name for i in classes.thing_ids]
        self.names += [classes[i].name for i in classes.stuff_ids]


@dataclass
class CropSegments:
    """The segments of one crop that teach: not crowd, not empty.

    Attributes:
        rows: (R,) their rows in the target; ``instances`` (N,) those of things among ``rows``. On the CPU.
        sums: (R, D) summed upsampled embeddings (Eq. 3 and 4 before normalisation), in the graph.
        means: (N, D) unit mean embeddings of the instances (Eq. 4).
    """

    rows: Tensor
    instances: Tensor
    sums: Tensor
    means: Tensor


def crop_segments(maps: Tensor, target: Target) -> CropSegments:
    """Sums and means over the segments of one crop; maps (D, h, w) float32 or better."""
    rows = (~target.is_crowd & (target.areas > 0)).nonzero().squeeze(1)
    label = torch.full((len(target) + 1,), -1)
    label[rows + 1] = torch.arange(len(rows))
    labels = label.to(maps.device, non_blocking=True)[target.id_map.long()]
    sums = label_shares(labels, len(rows), dtype=maps.dtype).flatten(1) @ maps.flatten(1).T
    instances = target.is_thing[rows].nonzero().squeeze(1)
    means = F.normalize(sums[instances.to(maps.device, non_blocking=True)], dim=1)
    return CropSegments(rows, rows[instances], sums, means)


def category_sums(
    crops: Sequence[CropSegments], targets: Sequence[Target], categories: Categories
) -> tuple[Tensor, Tensor]:
    """Summed embeddings (C, D) and numbers of pixels (C,) of the categories over the batch; no gradient."""
    like = crops[0].sums.detach()
    sums = like.new_zeros(categories.count, like.shape[1])
    pixels = torch.zeros(categories.count)
    for crop, target in zip(crops, targets, strict=True):
        category = categories.of_class[target.class_ids[crop.rows]]
        sums.index_add_(0, category.to(sums.device, non_blocking=True), crop.sums.detach())
        pixels.index_add_(0, category, target.areas[crop.rows].float())
    return sums, pixels


def grow_boxes(boxes: Tensor, factor: float | None) -> Tensor:
    """Boxes (N, 4) grown about their centres; with None, boxes that hold everything."""
    if factor is None:
        return boxes.new_tensor([-torch.inf, -torch.inf, torch.inf, torch.inf]).expand(len(boxes), 4)
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * factor
    return torch.cat([center - half, center + half], dim=1)


def crop_terms(
    crop: CropSegments, target: Target, categories: Categories, queries: int, options: LossOptions, stuff: bool
) -> list[Term]:
    """CAE and IAE of one crop, for queries in the order: thing categories, stuff categories, instances.

    Args:
        queries: their number.
        stuff: whether stuff is embedded; if not, instances are told apart among themselves only (Table III).
    """
    kept = torch.zeros(len(target) + 1, dtype=torch.bool)
    kept[crop.rows + 1] = True
    category = torch.zeros(len(target) + 1, dtype=torch.long)
    category[1:] = categories.of_class[target.class_ids]
    is_instance = torch.zeros_like(kept)
    is_instance[crop.instances + 1] = True
    number = torch.zeros_like(category)
    number[crop.instances + 1] = torch.arange(len(crop.instances))
    return terms_of_rows(kept, category, is_instance, number, categories, queries, options, stuff)


def terms_of_rows(
    kept: Tensor,
    category: Tensor,
    is_instance: Tensor,
    number: Tensor,
    categories: Categories,
    queries: int,
    options: LossOptions,
    stuff: bool,
) -> list[Term]:
    """CAE and IAE from tables (..., N + 1) by id of the map: who teaches, as which category and instance."""
    own = torch.where(is_instance, categories.count + number, category)
    weight = options.instance_weight * torch.where(is_instance, options.thing_factor, 1.0)
    if not stuff:
        first = categories.count
        return [Term(first, queries, (own - first).clamp(min=0), weight * is_instance)]
    first = categories.things
    terms = [Term(first, queries, (own - first).clamp(min=0), weight * kept)]
    if options.category_weight > 0:
        terms.append(Term(0, categories.count, category, options.category_weight * kept.float()))
    return terms


def ciae_loss(
    maps: Tensor,
    targets: Sequence[Target],
    crops: Sequence[CropSegments],
    memory: Tensor,
    categories: Categories,
    options: LossOptions,
    stuff: bool = True,
) -> Tensor:
    """Eq. 12 of a batch, divided by its number of valid pixels (averaged over ranks).

    Args:
        maps: (B, D, h, w) embeddings at stride 4, float32 or better.
        crops: from :func:`crop_segments`.
        memory: (C, D) directions M of iteration t - 1.
        stuff: whether stuff is embedded (False: Table III's first row).
    """
    device = maps.device
    valid = [crop.rows if stuff else crop.instances for crop in crops]
    count = normalizer(sum(int(t.areas[rows].sum()) for t, rows in zip(targets, valid, strict=True)), maps)
    total = maps.sum() * 0.0
    for i, (crop, target) in enumerate(zip(crops, targets, strict=True)):
        boxes = grow_boxes(target.boxes[crop.instances], options.box_filter)
        means, others = [crop.means], []
        for j in range(len(crops)) if options.other_crops else ():
            if j != i:
                means.append(crops[j].means)
                others.append(_foreign_boxes(crops[j], targets[j], target))
        queries = torch.cat([memory.to(maps.dtype), *means])
        terms = crop_terms(crop, target, categories, len(queries), options, stuff)
        for term in terms:
            term.labels = term.labels.to(device, non_blocking=True)
            term.weights = term.weights.to(device, maps.dtype, non_blocking=True)
        boxes = torch.cat([boxes, *others]).to(device, non_blocking=True)
        total = total + embedding_loss(maps[i], queries, target.id_map, terms, boxes, options.margin, options.top_k)
    return total / count


def _foreign_boxes(crop: CropSegments, source: Target, target: Target) -> Tensor:
    """Where another crop's instances are compared: everywhere; nowhere (an empty box) if this crop holds them too."""
    boxes = grow_boxes(source.boxes[crop.instances], None).clone()
    if source.image_index == target.image_index and source.image_index >= 0:
        same = torch.isin(source.segment_ids[crop.instances], target.segment_ids)
        boxes[same] = torch.tensor([0.0, 0.0, -1.0, -1.0])
    return boxes


def instance_embeddings(maps: Tensor, crops: Sequence[CropSegments], logits: ScaledCosine) -> SegmentEmbeddings:
    """The mean embedding of every instance, with the pixel embeddings at stride 4."""
    image = [torch.full((len(crop.instances),), i) for i, crop in enumerate(crops)]
    instances = torch.cat([crop.instances for crop in crops])
    return SegmentEmbeddings(
        embeddings=torch.cat([crop.means for crop in crops]),
        features=maps,
        image_index=torch.cat(image),
        is_thing=torch.ones(len(instances), dtype=torch.bool),
        segment_index=instances,
        logits=logits,
    )
