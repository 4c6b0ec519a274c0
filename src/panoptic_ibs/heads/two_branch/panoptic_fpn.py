"""Panoptic FPN (Kirillov et al., CVPR 2019): Mask R-CNN and semantic FPN on one pyramid, combined by a heuristic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.heads.options import grouped
from panoptic_ibs.layers.pyramid import FeaturePyramid
from panoptic_ibs.ranges import AtLeastOne, NonNegative, OptionsOf
from panoptic_ibs.segments import Prediction, SoftSegments
from panoptic_ibs.structures import FeatureLevel, ImageSize, Target

from .base import STRIDES, TwoBranchHead, TwoBranchOutput
from .class_map import Semantic
from .combination import CombinationOptions, combined
from .detection import InferenceOptions
from .instances import InstanceBranch, StageOptions
from .matching import RoiOptions
from .network import BoxHeadOptions, MaskHeadOptions
from .proposals import ProposalOptions
from .semantic import SemanticBranch, SemanticOptions

_HERE = __package__
Group = Mapping[str, Any] | None


class PanopticFPN(TwoBranchHead):
    """Region proposals, one stage or a cascade of boxes, masks; semantic FPN; the heuristic combination.

    Args:
        classes: the class table.
        levels: the backbone's levels; strides 4 to 32 are used.
        channels: of the pyramid.
        neck_norm: group normalisation in the pyramid.
        cascade: three stages of boxes in place of one.
        semantic_classes: ``"merged"``: the stuff classes, and all things as one; ``"all"``: every class.
        semantic_weight: of the semantic loss; the others are weighed by ``stages.weights``.
        instances: predict instances (masks that may overlap) beside the panoptic result.
        proposals: overrides of :class:`ProposalOptions` by name.
        regions: overrides of :class:`RoiOptions`.
        stages: overrides of :class:`StageOptions`.
        box_head: overrides of :class:`BoxHeadOptions`.
        mask_head: overrides of :class:`MaskHeadOptions`.
        semantic: overrides of :class:`SemanticOptions`.
        inference: overrides of :class:`InferenceOptions`.
        combination: overrides of :class:`CombinationOptions`.

    Raises:
        ConfigError: an option that there is not, or options that contradict each other.
    """

    def __init__(
        self,
        classes: ClassTable,
        levels: Sequence[FeatureLevel],
        channels: AtLeastOne = 256,
        neck_norm: bool = False,
        cascade: bool = False,
        semantic_classes: Semantic = "merged",
        semantic_weight: NonNegative = 0.5,
        instances: bool = True,
        proposals: Annotated[Group, OptionsOf(f"{_HERE}.proposals.ProposalOptions")] = None,
        regions: Annotated[Group, OptionsOf(f"{_HERE}.matching.RoiOptions")] = None,
        stages: Annotated[Group, OptionsOf(f"{_HERE}.instances.StageOptions")] = None,
        box_head: Annotated[Group, OptionsOf(f"{_HERE}.network.BoxHeadOptions")] = None,
        mask_head: Annotated[Group, OptionsOf(f"{_HERE}.network.MaskHeadOptions")] = None,
        semantic: Annotated[Group, OptionsOf(f"{_HERE}.semantic.SemanticOptions")] = None,
        inference: Annotated[Group, OptionsOf(f"{_HERE}.detection.InferenceOptions")] = None,
        combination: Annotated[Group, OptionsOf(f"{_HERE}.combination.CombinationOptions")] = None,
    ) -> None:
        super().__init__(classes, levels, semantic_classes)
        self.makes_instances = instances and self.makes_instances
        self.inference = grouped(InferenceOptions, inference, "head.inference")
        self.combination = grouped(CombinationOptions, combination, "head.combination")
        self.neck = FeaturePyramid(levels, channels, top="subsampled", norm=neck_norm)
        made = InstanceBranch(
            channels,
            max(len(classes.thing_ids), 1),
            STRIDES,
            cascade,
            grouped(ProposalOptions, proposals, "head.proposals"),
            grouped(RoiOptions, regions, "head.regions"),
            grouped(StageOptions, stages, "head.stages"),
            grouped(BoxHeadOptions, box_head, "head.box_head"),
            grouped(MaskHeadOptions, mask_head, "head.mask_head"),
        )
        self.instances = made if classes.thing_ids else None
        options = grouped(SemanticOptions, semantic, "head.semantic")
        channels_out = len(self.map.class_of_channel)
        self.semantic = SemanticBranch(channels, channels_out, options) if classes.stuff_ids else None
        self.weights = {
            **({} if self.instances is None else self.instances.weights),
            **({} if self.semantic is None else {"semantic": semantic_weight}),
        }

    @torch.no_grad()
    def segments(
        self, output: TwoBranchOutput, sizes: Sequence[ImageSize], targets: Sequence[Target] | None = None
    ) -> Iterator[SoftSegments]:
        """Masks in boxes of the things that pass the combination's score, and the semantic logits."""
        found = self.detected(output, sizes, self.inference)
        for i, (size, things) in enumerate(zip(sizes, found, strict=True)):
            yield self.soft_segments(output, i, size, things, self.combination.score, self.makes_instances)

    @torch.no_grad()
    def fuse(self, soft: SoftSegments) -> Prediction:
        """Things by score, then stuff where no thing is."""
        return combined(soft, self.combination)
