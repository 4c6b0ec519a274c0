"""CIAE (Gao et al., 2020): FCOS proposals, and pixel embeddings that tell categories and instances apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional import forms
from panoptic_ibs.functional.fusion import scale_boxes
from panoptic_ibs.functional.masks import class_masks_at_stride_4
from panoptic_ibs.functional.upsampling import upsampled_at
from panoptic_ibs.heads.base import Head
from panoptic_ibs.layers.pyramid import FeaturePyramid
from panoptic_ibs.ranges import AtLeastOne, Cosine, NonNegative, OptionsOf, Positive, Whole
from panoptic_ibs.segments import EmbeddingView, Prediction, SoftSegments
from panoptic_ibs.structures import FeatureLevel, HeadLosses, ImageSize, SegmentEmbeddings, Target

from . import batched
from .detection import Proposals, detection_losses, location_targets, propose
from .inference import InferenceOptions, Queries, first_of_duplicates, fuse, oracle_queries
from .losses import (
    Categories,
    LossOptions,
    ScaledCosine,
    category_sums,
    ciae_loss,
    crop_segments,
    instance_embeddings,
)
from .memory import CategoryMemory
from .network import CIAEOutput, EmbeddingBranch, ProposalHead

__all__ = ["CIAE", "CIAEOutput", "InferenceOptions", "LossOptions"]

FCOS_RANGES = ((0, 64), (64, 128), (128, 256), (256, 512), (512, float("inf")))


class CIAE(Head):
    """CIAE on a backbone with outputs at strides 4 to 32.

    Args:
        classes: the class table.
        levels: the backbone's levels.
        dimension: of the embedding.
        channels: width of pyramid and proposal head.
        embedding_channels: width of the embedding branch.
        finest_channels: width of P2, which the embedding branch alone sees; None for ``embedding_channels``. Its output
            convolution and the branch's first follow each other without an activation, at stride 4: with 256 channels
            between them inference takes 1.44 instead of 1.24 times as long as FCOS (``scripts/benchmark.py ciae``).
        depth: convolutions of each tower of the proposal head.
        coord_conv: coordinates in the embedding branch's convolutions on P5 (Table VI).
        box_embedding: fuse the proposal head's box embeddings into the pixel embeddings (Table VI).
        thing_categories: ``"merged"``: the embedding knows things as one category (published default);
            ``"separate"``: one category a thing class.
        detector_classes: ``"separate"`` thing classes in the proposal head, or ``"merged"`` into one (Table IV).
        category_source: what names an instance: the ``"detector"``, or the ``"embedding"`` by the most similar memory.
        consistent_stuff: stuff by the embedding; False: by a semantic branch with cross-entropy (Table III).
        level_ranges: (low, high] of the largest distance from a location to the sides of its box, in input pixels, per
            level P3 to P7; null stands for no limit.
        init_std: of the proposal head's output weights.
        cosine_scale: scale of the cosine logits of the segment embeddings, see :class:`ScaledCosine`.
        cosine_threshold: their threshold; None for ``1 - margin``.
        memory: ``momentum`` at the first step (Eq. 13); it rises to 1 with :meth:`progress`.
        loss: overrides of :class:`LossOptions` by name.
        inference: overrides of :class:`InferenceOptions` by name.

    Raises:
        ConfigError: unknown or contradictory options; a class table without things.
    """

    def __init__(
        self,
        classes: ClassTable,
        levels: Sequence[FeatureLevel],
        dimension: AtLeastOne = 32,
        channels: AtLeastOne = 256,
        embedding_channels: AtLeastOne = 128,
        finest_channels: AtLeastOne | None = None,
        depth: Whole = 4,
        coord_conv: bool = True,
        box_embedding: bool = True,
        thing_categories: Literal["merged", "separate"] = "merged",
        detector_classes: Literal["merged", "separate"] = "separate",
        category_source: Literal["detector", "embedding"] = "detector",
        consistent_stuff: bool = True,
        level_ranges: Sequence[tuple[NonNegative, Positive | None]] = FCOS_RANGES,
        init_std: Positive = 0.01,
        cosine_scale: Positive = 20.0,
        cosine_threshold: Cosine | None = None,
        memory: Annotated[Mapping[str, Any], OptionsOf(f"{__name__}.CategoryMemory", partly=True)] | None = None,
        loss: Annotated[Mapping[str, Any], OptionsOf(f"{__name__}.LossOptions")] | None = None,
        inference: Annotated[Mapping[str, Any], OptionsOf(f"{__name__}.InferenceOptions")] | None = None,
    ) -> None:
        super().__init__(classes, levels)
        _check(classes, dimension, thing_categories, detector_classes, category_source, level_ranges)
        self.loss = LossOptions(**_known("loss", loss, LossOptions.__dataclass_fields__))
        self.inference = InferenceOptions(**_known("inference", inference, InferenceOptions.__dataclass_fields__))
        self.category_source, self.consistent_stuff = category_source, consistent_stuff
        names = ("class", "centerness", "box", "embedding", *(() if consistent_stuff else ("semantic",)))
        self.weights = dict.fromkeys(names, 1.0)  # Eq. 15; alpha and beta are inside of the embedding loss
        self.level_ranges = [(float(a), float("inf") if b is None else float(b)) for a, b in level_ranges]
        self.logits = ScaledCosine(cosine_scale, 1 - self.loss.margin if cosine_threshold is None else cosine_threshold)
        self.categories = Categories(classes, thing_categories == "merged")
        separate = detector_classes == "separate"
        self.class_of_channel = torch.tensor(classes.thing_ids if separate else classes.thing_ids[:1])
        self.channel_of_class = torch.full((len(classes),), -1)
        self.channel_of_class[list(classes.thing_ids)] = torch.arange(len(classes.thing_ids)) if separate else 0
        self.memory = _memory(self.categories.count, dimension, memory)
        self.fpn = FeaturePyramid(levels, channels)
        finest = finest_channels or embedding_channels
        if finest != channels:
            self.fpn.output[0] = nn.Conv2d(channels, finest, 3, padding=1)
            nn.init.kaiming_uniform_(self.fpn.output[0].weight, a=1)  # type: ignore[arg-type]
            nn.init.zeros_(self.fpn.output[0].bias)  # type: ignore[arg-type]
        self.proposal_head = ProposalHead(
            channels, len(self.class_of_channel), dimension if box_embedding else 0, depth, init_std
        )
        semantic = 0 if consistent_stuff else len(classes.stuff_ids) + 1
        self.embedding_branch = EmbeddingBranch(
            channels, embedding_channels, dimension, coord_conv, box_embedding, semantic, finest
        )
        self._warned = False

    def forward(self, features: Sequence[Tensor]) -> CIAEOutput:
        """Proposals of P3 to P7, and the pixel embeddings."""
        pyramid = self.fpn(features)
        classes, centerness, boxes, box_embeddings = self.proposal_head(pyramid[1:])
        embeddings, semantic = self.embedding_branch(pyramid[:4], box_embeddings)
        return CIAEOutput(classes, centerness, boxes, embeddings, semantic)

    def progress(self, share: float) -> None:
        """The memory's momentum rises with the share of the training that is done."""
        self.memory.share = share

    def exported(self, output: CIAEOutput) -> dict[str, Any]:
        """The raw output, and the memory (categories, D), things first; a pixel is of the most similar stuff."""
        return {**vars(output), "memory": self.memory.directions.clone()}

    def losses(self, output: CIAEOutput, targets: Sequence[Target]) -> HeadLosses:
        """Eq. 15: terms ``class``, ``centerness``, ``box`` and ``embedding``, and the mean embeddings of the instances.

        With a semantic branch also ``semantic``. In training mode the memory moves on, after it was used.
        """
        sizes = [(c.shape[-2], c.shape[-1]) for c in output.classes]
        wanted = location_targets(targets, self.channel_of_class, sizes, self.level_ranges)
        losses = detection_losses(output, wanted)
        maps = output.embeddings.to(torch.promote_types(output.embeddings.dtype, torch.float32))
        memory = self.memory.directions.clone()  # it changes below, before the backward pass
        with torch.autocast(maps.device.type, enabled=False):
            losses["embedding"], sums, segments = self._embedding_loss(maps, targets, memory)
            if self.training:
                self.memory.update(*sums)
        if output.semantic is not None:
            losses["semantic"] = self._semantic_loss(output.semantic, targets)
        return losses, [segments]

    def _embedding_loss(
        self, maps: Tensor, targets: Sequence[Target], memory: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], SegmentEmbeddings]:
        """CIAE-loss, what the memory learns from, and the instances' embeddings; all crops at once on a GPU."""
        categories, stuff = self.categories, self.consistent_stuff
        if forms.batched(maps.device) and not self.loss.other_crops:
            x = batched.Stacked.make(maps, targets)
            loss = batched.ciae_loss(maps, x, memory, categories, self.loss, stuff)
            return loss, batched.category_sums(x, categories), batched.instance_embeddings(maps, x, self.logits)
        crops = [crop_segments(m, target) for m, target in zip(maps, targets, strict=True)]
        loss = ciae_loss(maps, targets, crops, memory, categories, self.loss, stuff=stuff)
        return loss, category_sums(crops, targets, categories), instance_embeddings(maps, crops, self.logits)

    def _semantic_loss(self, logits: Tensor, targets: Sequence[Target]) -> Tensor:
        """Cross-entropy with the stride-4 masks of stuff and of all things; void counts nothing."""
        channel = (self.categories.of_class - self.categories.things + 1).clamp(min=0)
        of_row = [torch.where(target.is_crowd, -1, channel[target.class_ids]) for target in targets]
        tables = pad_sequence(of_row, batch_first=True, padding_value=-1).to(logits.device, non_blocking=True)
        images, channels = (torch.arange(n, device=logits.device) for n in logits.shape[:2])
        masks = class_masks_at_stride_4(
            torch.stack([target.id_map for target in targets]),
            tables,
            images.repeat_interleave(len(channels)),
            channels.repeat(len(images)),
        ).view(logits.shape)
        total, area = -(masks * logits.float().log_softmax(1)).sum(), masks.sum()
        return total / area.clamp(min=1)

    @torch.no_grad()
    def segments(
        self, output: CIAEOutput, sizes: Sequence[ImageSize], targets: Sequence[Target] | None = None
    ) -> Iterator[SoftSegments]:
        """Similarities of the pixels to the instances' queries and to the stuff memories.

        In oracle mode boxes, masks and classes of the instances are the targets'.

        Raises:
            ConfigError: oracle mode without targets.
        """
        if self.inference.oracle and not targets:
            raise ConfigError("head.inference.oracle=true needs the ground truth: evaluate on a labelled split.")
        for i, size in enumerate(sizes):
            maps, things = self._things(output, i, size, targets[i] if targets else None)
            yield self.soft(maps, things, size, None if output.semantic is None else output.semantic[i])

    def soft(self, maps: Tensor, things: Queries, size: ImageSize, semantic: Tensor | None = None) -> SoftSegments:
        """The segments of one image.

        All similarities of a pixel share the pixel's own norm, so products do in their place (Eq. 16).

        Args:
            maps: its embeddings (D, h, w).
            things: the queries of its instances.
            size: its sizes.
            semantic: (M + 1, h, w) logits that decide on stuff, channel 0 for things; else the memories do.
        """
        self._warn_unseen()
        stuff = self.categories.stuff_classes.to(maps.device)
        products, classes, scores = things.embeddings @ maps.flatten(1), things.class_ids, things.scores
        if semantic is None:
            memory = self.memory.directions[self.categories.things :].to(maps.dtype)
            products = torch.cat([products, memory @ maps.flatten(1)])
            classes = torch.cat([classes, stuff])
            scores = torch.cat([scores, torch.ones_like(stuff, dtype=scores.dtype)])
        return SoftSegments(
            masks=products.unflatten(1, maps.shape[-2:]),
            class_ids=classes,
            is_thing=torch.arange(len(classes)) < len(things.scores),
            scores=scores,
            size=size,
            kind="similarity",
            boxes=things.boxes,
            semantic=None if semantic is None else semantic.to(maps.dtype),
            semantic_classes=None if semantic is None else F.pad(stuff, (1, 0), value=-1),
        )

    @torch.no_grad()
    def fuse(self, soft: SoftSegments) -> Prediction:
        """Every pixel to the most similar instance or stuff class."""
        return Prediction(*fuse(soft, self.inference.stuff_area))

    @torch.no_grad()
    def embedding_view(
        self, output: CIAEOutput, image: int, size: ImageSize, target: Target | None = None
    ) -> EmbeddingView:
        """The embedding map, the instances' queries, and the pixels and boxes that they come from."""
        maps, things = self._things(output, image, size, target)
        return EmbeddingView(
            maps, size, things.embeddings, things.class_ids, things.scores, points=things.points, boxes=things.boxes
        )

    def _things(self, output: CIAEOutput, image: int, size: ImageSize, target: Target | None) -> tuple[Tensor, Queries]:
        """The embedding map of one image and the queries of its instances."""
        maps = output.embeddings[image].float()
        if self.inference.oracle and target is not None:
            return maps, oracle_queries(maps, target, size)
        return maps, self.queries(maps, self.proposals(output, image, size), size)

    def proposals(self, output: CIAEOutput, image: int, size: ImageSize) -> Proposals:
        """Proposals of one image after non-maximum suppression."""
        o = self.inference
        return propose(
            output, image, size.valid, o.score_threshold, o.nms_threshold, o.per_level, o.proposals, o.agnostic_nms
        )

    def queries(self, maps: Tensor, found: Proposals, size: ImageSize) -> Queries:
        """Query embeddings: the pixel embedding where a proposal comes from (Section IV-C)."""
        embeddings = F.normalize(upsampled_at(maps, found.points), dim=1)
        if self.inference.duplicates is not None:
            first = first_of_duplicates(embeddings, found.boxes, found.points, self.inference.duplicates)
            embeddings, found = embeddings[first], found.take(first)
        classes = self.class_of_channel.to(maps.device)[found.channels]
        if self.category_source == "embedding" and len(self.categories.thing_classes):
            nearest = (embeddings @ self.memory.directions[: self.categories.things].T).argmax(1)
            classes = self.categories.thing_classes.to(maps.device)[nearest]
        points = scale_boxes(found.points.to(found.boxes.dtype) + 0.5, size)
        return Queries(embeddings, scale_boxes(found.boxes, size), classes, found.scores, points)

    def _warn_unseen(self) -> None:
        """Say once which categories' memories are still random; an untrained head needs no warning."""
        if self._warned or not self.consistent_stuff:
            return
        self._warned = True
        seen = self.memory.seen.tolist()
        unseen = [name for name, known in zip(self.categories.names, seen, strict=True) if not known]
        if any(seen) and unseen:
            warnings.warn(
                f"CIAE never saw {', '.join(unseen)} in training: their memory embeddings are still random, and what "
                "is predicted of these classes means nothing.",
                stacklevel=2,
            )


def _memory(categories: int, dimension: int, options: Mapping[str, Any] | None) -> CategoryMemory:
    former = {"steps", "batches_per_step"}  # in checkpoints of before, whose momentum followed from them
    values = {"momentum": 0.9999}
    values |= _known("memory", {k: v for k, v in (options or {}).items() if k not in former}, values)
    return CategoryMemory(categories, dimension, float(values["momentum"] or 0.0))


def _known(part: str, options: Mapping[str, Any] | None, known: Mapping[str, Any]) -> dict[str, Any]:
    unknown = set(options or {}) - set(known)
    if unknown:
        raise ConfigError(
            f"head.{part} has no option {', '.join(sorted(unknown))}; the options are {', '.join(known)}."
        )
    return dict(options or {})


def _check(
    classes: ClassTable,
    dimension: int,
    thing_categories: str,
    detector_classes: str,
    category_source: str,
    level_ranges: Sequence[Any],
) -> None:
    if not classes.thing_ids:
        raise ConfigError("CIAE needs at least one thing class; the class table has none.")
    if dimension < 1:
        raise ConfigError(f"head.dimension is {dimension}; it must be at least 1 (published: 32).")
    for name, value, choices in (
        ("thing_categories", thing_categories, ("merged", "separate")),
        ("detector_classes", detector_classes, ("merged", "separate")),
        ("category_source", category_source, ("detector", "embedding")),
    ):
        if value not in choices:
            raise ConfigError(f"head.{name} is {value!r}; choose {' or '.join(map(repr, choices))}.")
    if len(level_ranges) != 5:
        raise ConfigError(f"head.level_ranges needs 5 ranges, one a level P3 to P7; got {len(level_ranges)}.")
    several = len(classes.thing_ids) > 1
    if category_source == "embedding" and thing_categories == "merged" and several:
        raise ConfigError("head.category_source=embedding needs head.thing_categories=separate.")
    if category_source == "detector" and detector_classes == "merged" and several:
        raise ConfigError("head.category_source=detector needs head.detector_classes=separate.")
