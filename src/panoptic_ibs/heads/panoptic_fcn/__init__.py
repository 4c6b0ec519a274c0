"""Panoptic FCN (Li et al., CVPR 2021): things by centre positions, stuff by regions, masks as kernel x feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional.fusion import combine
from panoptic_ibs.heads.base import Head
from panoptic_ibs.layers.convolution import ConvStack
from panoptic_ibs.layers.pyramid import FeaturePyramid, SemanticPyramid
from panoptic_ibs.ranges import AtLeastOne, NonNegative, OptionsOf, Positive, Whole
from panoptic_ibs.segments import EmbeddingView, Prediction, SoftSegments
from panoptic_ibs.structures import FeatureLevel, HeadLosses, ImageSize, Target

from .inference import InferenceOptions, find_centers, find_regions, fuse_kernels, merge_regions, rescore
from .losses import stuff_losses, thing_losses
from .network import Generator, KernelHead, PanopticFCNOutput, PositionHead, run_levels
from .targets import stuff_targets, thing_targets

__all__ = ["InferenceOptions", "PanopticFCN", "PanopticFCNOutput"]

CITYSCAPES_RANGES = ((1, 128), (64, 256), (128, 512), (256, 1024), (512, 2048))


class PanopticFCN(Head):
    """Panoptic FCN on a backbone with outputs at strides 4 to 32.

    Args:
        classes: the class table.
        levels: the backbone's levels.
        stuff: what the semantic branch predicts: ``"all"`` classes, thing classes included (published for Cityscapes),
            or ``"merged"``: stuff classes and, as channel 0, all things as one (published for COCO and Vistas).
        channels: width of pyramid and heads.
        feature_channels: width of embeddings and encoded features (COCO 64, Cityscapes and Vistas 256).
        depth: convolutions of each head before its output.
        deform: modulated deformable convolutions in the position head (published).
        deform_features: the same in the feature encoder (published as Panoptic FCN*).
        norm_groups: groups of the group norms; None for 32, or fewer on narrow layers.
        instance_ranges: range of sqrt(box area), in input pixels, per level P3 to P7.
        num_positions: positions k an instance and level (7; Vistas 3).
        position_weight: factor of both position losses.
        segment_weight: factor of both dice losses (Cityscapes 4, else 3).
        init_std: standard deviation of the first weights that embeddings pass through (0.01). The published value suits
            long schedules; with it the masks of a short run from scratch stay undecided for its first fifty steps.
        inference: overrides of :class:`InferenceOptions` by name.

    Raises:
        ConfigError: unknown option values; a class table without things.
    """

    def __init__(
        self,
        classes: ClassTable,
        levels: Sequence[FeatureLevel],
        stuff: Literal["all", "merged"] = "merged",
        channels: AtLeastOne = 256,
        feature_channels: AtLeastOne = 256,
        depth: Whole = 3,
        deform: bool = False,
        deform_features: bool = False,
        norm_groups: AtLeastOne | None = None,
        instance_ranges: Sequence[tuple[NonNegative, NonNegative]] = CITYSCAPES_RANGES,
        num_positions: AtLeastOne = 7,
        position_weight: NonNegative = 1.0,
        segment_weight: NonNegative = 3.0,
        init_std: Positive = 0.01,
        inference: Annotated[Mapping[str, Any], OptionsOf(f"{__name__}.InferenceOptions")] | None = None,
    ) -> None:
        super().__init__(classes, levels)
        if depth < 1:
            raise ConfigError(f"head.depth is {depth}; the heads of Panoptic FCN need at least 1 convolution.")
        if len(instance_ranges) != 5:
            raise ConfigError(f"head.instance_ranges needs 5 ranges, one a level P3 to P7; got {len(instance_ranges)}.")
        self.instance_ranges = [(float(low), float(high)) for low, high in instance_ranges]
        self.num_positions = num_positions
        self.weights = {"position_things": position_weight, "position_stuff": position_weight}
        self.weights |= {"segment_things": segment_weight, "segment_stuff": segment_weight}
        self.inference = _options(inference)
        self._channels(classes, stuff)
        self.fpn = FeaturePyramid(levels, channels)
        self.semantic_fpn = SemanticPyramid(channels, channels, groups=norm_groups)
        self.position_head = PositionHead(
            channels, channels, len(self.class_of_thing), len(self.class_of_stuff), depth, deform, norm_groups
        )
        self.kernel_head = KernelHead(channels, channels, depth, norm_groups, init_std)
        self.feature_encoder = ConvStack(
            channels, feature_channels, depth, norm=False, deform=deform_features, coord=True
        )
        self.thing_generator = Generator(channels, feature_channels, init_std)
        self.stuff_generator = Generator(channels, feature_channels, init_std)

    def _channels(self, classes: ClassTable, stuff: str) -> None:
        """Maps between contiguous classes and the channels of both branches; -1 where there is none."""
        if not classes.thing_ids:
            raise ConfigError("Panoptic FCN needs at least one thing class; the class table has none.")
        if stuff not in ("all", "merged"):
            raise ConfigError(f"head.stuff is {stuff!r}; choose 'all' or 'merged'.")
        self.class_of_thing = torch.tensor(classes.thing_ids)
        self.thing_channel = torch.full((len(classes),), -1)
        self.thing_channel[self.class_of_thing] = torch.arange(len(classes.thing_ids))
        if stuff == "all":
            self.stuff_channel = torch.arange(len(classes))
            self.class_of_stuff = torch.where(torch.tensor(classes.is_thing), -1, self.stuff_channel)
        else:
            self.stuff_channel = torch.zeros(len(classes), dtype=torch.long)
            self.stuff_channel[list(classes.stuff_ids)] = torch.arange(1, len(classes.stuff_ids) + 1)
            self.class_of_stuff = torch.tensor([-1, *classes.stuff_ids])

    def forward(self, features: Sequence[Tensor]) -> PanopticFCNOutput:
        """Positions and kernels of P3 to P7, and the encoded stride-4 features."""
        pyramid = self.fpn(features)
        encoded = self.feature_encoder(self.semantic_fpn(pyramid[:4]))
        centers, regions, kernels = run_levels(self.position_head, self.kernel_head, pyramid[1:])
        return PanopticFCNOutput(centers, regions, kernels, encoded)

    def exported(self, output: PanopticFCNOutput) -> dict[str, Any]:
        """The raw output, and the embeddings (B, C, h, w) that the generators make of the kernels at every position."""
        generators = {"thing_embeddings": self.thing_generator, "stuff_embeddings": self.stuff_generator}
        dense = {
            name: [generator(kernel.movedim(1, -1)).movedim(-1, 1) for kernel in output.kernels]
            for name, generator in generators.items()
        }
        return {**vars(output), **dense}

    def losses(self, output: PanopticFCNOutput, targets: Sequence[Target]) -> HeadLosses:
        """Terms ``position_things``, ``position_stuff``, ``segment_things``, ``segment_stuff``, and the embeddings."""
        things = thing_targets(targets, self.thing_channel)
        stuff = stuff_targets(targets, self.stuff_channel)
        position_things, segment_things, segments = thing_losses(
            output, things, self.thing_generator, self.instance_ranges, self.num_positions
        )
        position_stuff, segment_stuff = stuff_losses(output, stuff, self.stuff_generator)
        losses = {
            "position_things": position_things,
            "position_stuff": position_stuff,
            "segment_things": segment_things,
            "segment_stuff": segment_stuff,
        }
        return losses, [segments]

    @torch.no_grad()
    def segments(
        self, output: PanopticFCNOutput, sizes: Sequence[ImageSize], targets: Sequence[Target] | None = None
    ) -> Iterator[SoftSegments]:
        """Mask logits of the instances, best first, and of the regions."""
        for i, size in enumerate(sizes):
            _, masks, score, classes = self._things(output, i)
            kernel, region, region_score = find_regions(
                [r[i] for r in output.regions], [k[i] for k in output.kernels], self.inference.region_threshold
            )
            embedding, region, region_score = merge_regions(self.stuff_generator(kernel), region, region_score)
            stuff = self.class_of_stuff.to(region.device, non_blocking=True)[region]
            yield SoftSegments(
                masks=torch.cat([masks, _masks(embedding, output.features[i]).float()]),
                class_ids=torch.cat([classes, stuff]),
                is_thing=torch.arange(len(classes) + len(stuff)) < len(classes),
                scores=torch.cat([score, region_score]),
                size=size,
            )

    @torch.no_grad()
    def fuse(self, soft: SoftSegments) -> Prediction:
        """Things by score, then stuff where no thing is."""
        parts = [soft.things, len(soft) - soft.things]
        (things, stuff), classes, scores = (x.split(parts) for x in (soft.masks, soft.class_ids, soft.scores))
        return Prediction(
            *combine(
                things.sigmoid(),
                classes[0],
                scores[0],
                stuff.sigmoid(),
                classes[1],
                scores[1],
                soft.size,
                mask_threshold=self.inference.mask_threshold,
                overlap=self.inference.overlap,
                stuff_area=self.inference.stuff_area,
                stride=soft.stride,
            )
        )

    def _things(self, output: PanopticFCNOutput, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings (N, C), logits (N, h, w), scores and classes (N,) of an image's instances, best first."""
        centers, kernels = [c[i] for c in output.centers], [k[i] for k in output.kernels]
        kernel, channel, score = find_centers(centers, kernels, self.inference)
        embedding, channel, score = fuse_kernels(
            self.thing_generator(kernel), channel, score, self.inference.similarity
        )
        logits = _masks(embedding, output.features[i]).float()
        score, order = rescore(logits, score, self.inference)
        classes = self.class_of_thing.to(channel.device, non_blocking=True)[channel[order]]
        return embedding[order], logits[order], score, classes

    @torch.no_grad()
    def embedding_view(
        self, output: PanopticFCNOutput, image: int, size: ImageSize, target: Target | None = None
    ) -> EmbeddingView:
        """The encoded features, and the embeddings made from the kernels at the instances' centres."""
        queries, _, scores, classes = self._things(output, image)
        return EmbeddingView(output.features[image].float(), size, queries.float(), classes, scores, cosine=False)


def _masks(embeddings: Tensor, features: Tensor) -> Tensor:
    """Logits (N, h, w) of embeddings (N, C) on features (C, h, w)."""
    return (embeddings @ features.flatten(1)).unflatten(1, features.shape[-2:])


def _options(overrides: Mapping[str, Any] | None) -> InferenceOptions:
    values = dict(overrides or {})
    if "pool_sizes" in values:
        values["pool_sizes"] = tuple(values["pool_sizes"])
    unknown = set(values) - set(InferenceOptions.__dataclass_fields__)
    if unknown:
        known = ", ".join(InferenceOptions.__dataclass_fields__)
        raise ConfigError(f"head.inference has no option {', '.join(sorted(unknown))}; the options are {known}.")
    return InferenceOptions(**values)
