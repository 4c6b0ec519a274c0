"""UPSNet (Xiong et al., CVPR 2019); with a cascade, the network of Liu et al. (COCO and Mapillary challenge, 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional.forms import batched
from panoptic_ibs.heads.options import grouped
from panoptic_ibs.layers.pyramid import FeaturePyramid
from panoptic_ibs.ranges import AtLeastOne, Bounds, NonNegative, OptionsOf
from panoptic_ibs.segments import Prediction, SoftSegments
from panoptic_ibs.structures import FeatureLevel, HeadLosses, ImageSize, Target

from .base import STRIDES, TwoBranchHead, TwoBranchOutput
from .deformable import DeformableBranch, DeformableOptions, WithContext, deform_outputs, region_semantic_loss
from .detection import Detections, InferenceOptions, detections
from .instances import InstanceBranch, StageOptions
from .matching import RoiOptions
from .network import BoxHeadOptions, MaskHeadOptions
from .proposals import ProposalOptions
from .semantic import semantic_loss
from .targets import InstanceTargets, instance_targets, semantic_labels
from .unified import PanopticOptions, chosen_things, panoptic_labels, panoptic_loss, unified, without_hidden

_HERE = __package__
Group = Mapping[str, Any] | None
Level = Annotated[int, Bounds(least=2, most=5)]


class UPSNet(TwoBranchHead):
    """Mask R-CNN, a deformable semantic branch, and a panoptic head without parameters that both compete in.

    Args:
        classes: the class table.
        levels: the backbone's levels; strides 4 to 32 are used.
        channels: of the pyramid.
        neck_norm: group normalisation in the pyramid.
        context: add a linear function of the mean of the last features to P5 (UPSNet on COCO).
        deformable_outputs: levels of the pyramid, 2 for P2 to 5 for P5, whose output convolution is deformable.
        cascade: three stages of boxes in place of one.
        instance_stage: which stage of the cascade makes the instances. A number: boxes and masks are those after so
            many stages, scores the mean of these, and the mask head trains on the boxes that they made; ``"avg"``: all
            stages, and the mask head trains on the proposals, as in a plain cascade; null: as ``stages`` says.
        semantic_weight: of the semantic loss; the instance branch is weighed by ``stages.weights``.
        region_semantic_weight: of the semantic loss inside the things' boxes; without weight it is not computed.
        panoptic_weight: of the panoptic loss.
        instances: predict instances (masks that may overlap) beside the panoptic result.
        proposals: overrides of :class:`ProposalOptions` by name.
        regions: overrides of :class:`RoiOptions`.
        stages: overrides of :class:`StageOptions`.
        box_head: overrides of :class:`BoxHeadOptions`.
        mask_head: overrides of :class:`MaskHeadOptions`.
        semantic: overrides of :class:`DeformableOptions`.
        inference: overrides of :class:`InferenceOptions`, for the instances beside the panoptic result.
        panoptic: overrides of :class:`PanopticOptions`.

    Raises:
        ConfigError: an option that there is not, or options that contradict each other.
    """

    def __init__(
        self,
        classes: ClassTable,
        levels: Sequence[FeatureLevel],
        channels: AtLeastOne = 256,
        neck_norm: bool = False,
        context: bool = False,
        deformable_outputs: Sequence[Level] = (),
        cascade: bool = False,
        instance_stage: Literal[1, 2, 3, "avg"] | None = None,
        semantic_weight: NonNegative = 1.0,
        region_semantic_weight: NonNegative = 0.0,
        panoptic_weight: NonNegative = 0.5,
        instances: bool = True,
        proposals: Annotated[Group, OptionsOf(f"{_HERE}.proposals.ProposalOptions")] = None,
        regions: Annotated[Group, OptionsOf(f"{_HERE}.matching.RoiOptions")] = None,
        stages: Annotated[Group, OptionsOf(f"{_HERE}.instances.StageOptions")] = None,
        box_head: Annotated[Group, OptionsOf(f"{_HERE}.network.BoxHeadOptions")] = None,
        mask_head: Annotated[Group, OptionsOf(f"{_HERE}.network.MaskHeadOptions")] = None,
        semantic: Annotated[Group, OptionsOf(f"{_HERE}.deformable.DeformableOptions")] = None,
        inference: Annotated[Group, OptionsOf(f"{_HERE}.detection.InferenceOptions")] = None,
        panoptic: Annotated[Group, OptionsOf(f"{_HERE}.unified.PanopticOptions")] = None,
    ) -> None:
        super().__init__(classes, levels, "all")
        self.makes_instances = instances and self.makes_instances
        self.inference = grouped(InferenceOptions, inference, "head.inference")
        self.panoptic = grouped(PanopticOptions, panoptic, "head.panoptic")
        self.neck = self._neck(channels, neck_norm, context, deformable_outputs)
        made = InstanceBranch(
            channels,
            max(len(classes.thing_ids), 1),
            STRIDES,
            cascade,
            grouped(ProposalOptions, proposals, "head.proposals"),
            grouped(RoiOptions, regions, "head.regions"),
            staged(grouped(StageOptions, stages, "head.stages"), instance_stage, cascade),
            grouped(BoxHeadOptions, box_head, "head.box_head"),
            grouped(MaskHeadOptions, mask_head, "head.mask_head"),
        )
        self.instances = made if classes.thing_ids else None
        options = grouped(DeformableOptions, semantic, "head.semantic")
        self.semantic = DeformableBranch(channels, len(self.map.class_of_channel), options)
        self.weights = {"semantic": semantic_weight}
        if self.instances is not None:
            self.weights |= {**self.instances.weights, "panoptic": panoptic_weight}
            if region_semantic_weight:
                self.weights["region_semantic"] = region_semantic_weight

    def _neck(self, channels: int, norm: bool, context: bool, deformable: Sequence[int]) -> FeaturePyramid:
        neck = FeaturePyramid(self.levels, channels, top="subsampled", norm=norm)
        if unknown := sorted(set(deformable) - {2, 3, 4, 5}):
            raise ConfigError(f"head.deformable_outputs holds {unknown[0]}; the levels are 2 (P2) to 5 (P5).")
        deform_outputs(neck, sorted(set(deformable)))
        if context:
            neck.lateral[3] = WithContext(neck.lateral[3], self.levels[neck.inputs[3]].channels, channels)
        return neck

    # --- training

    def losses(self, output: TwoBranchOutput, targets: Sequence[Target]) -> HeadLosses:
        """Those of the instance branch, ``semantic``, ``panoptic`` and, if it has a weight, ``region_semantic``."""
        assert output.semantic is not None
        labels = semantic_labels(targets, self.map)
        terms = {"semantic": semantic_loss(output.semantic, labels)}
        if self.instances is None or output.anchors is None:
            return terms, []
        things = instance_targets(targets, self.map)
        terms |= self.instances.losses(output.pyramid, output.anchors, things)
        if "region_semantic" in self.weights:
            terms["region_semantic"] = region_semantic_loss(output.semantic, labels, things.boxes, things.valid)
        kept = chosen_things(things.valid, self.panoptic.kept_share)
        wanted = panoptic_labels(targets, things, kept, self.map)
        masks = self._true_masks(output, things)
        terms["panoptic"] = panoptic_loss(output.semantic, masks, things, wanted, kept, self.map, self.panoptic.closed)
        return terms, []

    def _true_masks(self, output: TwoBranchOutput, things: InstanceTargets) -> Tensor:
        """(B, G, M, M) mask logits in the true boxes."""
        assert self.instances is not None
        b, g = things.labels.shape
        image = torch.arange(b, device=things.boxes.device).repeat_interleave(g)
        boxes, labels = things.boxes.flatten(0, 1), things.labels.flatten()
        if batched(boxes.device):  # what fills up costs less than counting it
            return self.instances.masks(output.pyramid, boxes, image, labels).unflatten(0, (b, g))
        index = labels.nonzero().squeeze(1)
        masks = self.instances.masks(output.pyramid, boxes[index], image[index], labels[index])
        whole = masks.new_zeros((b * g, *masks.shape[1:])).index_copy(0, index, masks)
        return whole.unflatten(0, (b, g))

    # --- inference

    @torch.no_grad()
    def segments(
        self, output: TwoBranchOutput, sizes: Sequence[ImageSize], targets: Sequence[Target] | None = None
    ) -> Iterator[SoftSegments]:
        """Masks in boxes of the things that are sure and not hidden, and all semantic logits."""
        sure = InferenceOptions(
            score=self.panoptic.score, nms=self.panoptic.nms, across_classes=True, kept=self.panoptic.kept
        )
        all_found = self._all_detected(output, sizes, (sure, self.inference))
        for i, (size, (found, others)) in enumerate(zip(sizes, all_found, strict=True)):
            soft = self.soft_segments(output, i, size, found, 0.0, False)
            if self.makes_instances:
                listed = self.soft_segments(output, i, size, others, float("inf"), True)
                soft = replace(soft, instances=listed.instances)
            channels = self.map.channel_of_class.to(soft.class_ids.device)[soft.class_ids]
            yield without_hidden(replace(soft, kind="panoptic", channels=channels), self.panoptic)

    def _all_detected(
        self, output: TwoBranchOutput, sizes: Sequence[ImageSize], options: Sequence[InferenceOptions]
    ) -> list[tuple[Detections, ...]]:
        """Things of each image by several choices of thresholds; the network looks at the regions once."""
        if self.instances is None or output.anchors is None:
            return list(zip(*(self.detected(output, sizes, o) for o in options), strict=True))
        limits = torch.tensor([size.valid[::-1] for size in sizes], dtype=torch.float32)
        found = self.instances.classified(output.pyramid, output.anchors, limits.to(output.pyramid[0].device))
        return [tuple(detections(*of_image, o) for o in options) for of_image in zip(*found, strict=True)]

    @torch.no_grad()
    def fuse(self, soft: SoftSegments) -> Prediction:
        """Arg-max of the panoptic logits, and UPSNet's rules on it."""
        return unified(soft, len(self.classes.stuff_ids), self.panoptic)


def staged(options: StageOptions, stage: int | str | None, cascade: bool) -> StageOptions:
    """The stages with those that :class:`UPSNet`'s ``instance_stage`` names for the instances.

    Raises:
        ConfigError: there is no such stage.
    """
    if stage is None:
        return options
    if not cascade:
        raise ConfigError(f"head.instance_stage={stage} chooses a stage of a cascade; set head.cascade=true.")
    if stage not in (1, 2, 3, "avg"):
        raise ConfigError(f"head.instance_stage is {stage!r}; choose 1, 2, 3 or avg.")
    if stage == "avg":
        return replace(options, used=None, masks_from="proposals")
    return replace(options, used=int(stage), masks_from="refined")
