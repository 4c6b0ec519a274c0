"""What the heads of two branches share: neck, instance branch, semantic branch, and what goes in and out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.functional.box_masks import paste
from panoptic_ibs.functional.fusion import scale_boxes
from panoptic_ibs.functional.rle import encode_masks
from panoptic_ibs.heads.base import Head
from panoptic_ibs.segments import Instances, SoftSegments
from panoptic_ibs.structures import FeatureLevel, HeadLosses, ImageSize, Target

from .class_map import ClassMap, Semantic
from .detection import Detections, InferenceOptions
from .instances import InstanceBranch
from .proposals import AnchorOutput
from .semantic import semantic_loss
from .targets import instance_targets, semantic_labels

STRIDES = (4, 8, 16, 32, 64)  # P2 to P6
CHUNK = 8  # masks brought to full size at a time


@dataclass
class TwoBranchOutput:
    """Raw outputs.

    Attributes:
        pyramid: P2 to P6, (B, C, h, w).
        anchors: what is said of the anchors; None without thing classes.
        semantic: (B, K, H / 4, W / 4) logits; None without a semantic branch.
        features: (B, D, H / 4, W / 4) what the semantic logits were made from, from branches that hand it out.
    """

    pyramid: list[Tensor]
    anchors: AnchorOutput | None
    semantic: Tensor | None
    features: Tensor | None = None


class TwoBranchHead(Head):
    """An instance branch and a semantic branch on one pyramid. A subclass makes the parts and has ``fuse``.

    Without thing classes there is no instance branch and without stuff no semantic one; their loss terms are missing
    then. There are no segment embeddings: instances are told apart by boxes.

    Args:
        classes: the class table.
        levels: the backbone's levels.
        semantic_classes: channels of the semantic branch, see :meth:`ClassMap.of`.

    Attributes:
        neck: maps the backbone's features to P2 to P6.
        instances: the instance branch, or None.
        semantic: maps P2 to P5 to logits at stride 4, or None.
        inference: which boxes become instances.
    """

    embeds = False
    neck: Callable[[Sequence[Tensor]], list[Tensor]]
    instances: InstanceBranch | None
    semantic: nn.Module | None
    inference: InferenceOptions

    def __init__(
        self, classes: ClassTable, levels: Sequence[FeatureLevel], semantic_classes: Semantic = "merged"
    ) -> None:
        super().__init__(classes, levels)
        self.map = ClassMap.of(classes, semantic_classes)
        self.makes_instances = bool(classes.thing_ids)

    def forward(self, features: Sequence[Tensor]) -> TwoBranchOutput:
        """The pyramid, what is said of its anchors, and the semantic logits."""
        pyramid = self.neck(features)
        anchors = None if self.instances is None else self.instances(pyramid)
        return TwoBranchOutput(pyramid, anchors, None if self.semantic is None else self.semantic(pyramid[:4]))

    def losses(self, output: TwoBranchOutput, targets: Sequence[Target]) -> HeadLosses:
        """Those of the instance branch, and ``semantic``."""
        terms: dict[str, Tensor] = {}
        if self.instances is not None and output.anchors is not None:
            things = instance_targets(targets, self.map)
            terms |= self.instances.losses(output.pyramid, output.anchors, things)
        if output.semantic is not None:
            terms["semantic"] = semantic_loss(output.semantic, semantic_labels(targets, self.map))
        return terms, []

    # --- inference

    def detected(
        self, output: TwoBranchOutput, sizes: Sequence[ImageSize], options: InferenceOptions
    ) -> list[Detections]:
        """Things of each image, without masks."""
        if self.instances is None or output.anchors is None:
            device = output.pyramid[0].device
            none = torch.zeros(0, device=device)
            return [Detections(none.view(0, 4), none, none.long())] * len(sizes)
        limits = torch.tensor([size.valid[::-1] for size in sizes], dtype=torch.float32)
        return self.instances.detect(output.pyramid, output.anchors, limits.to(output.pyramid[0].device), options)

    def soft_segments(
        self, output: TwoBranchOutput, i: int, size: ImageSize, found: Detections, score: float, keep_instances: bool
    ) -> SoftSegments:
        """Those of image i: masks in boxes of the detections with more than ``score``, and the semantic logits.

        Args:
            output: of :meth:`forward`.
            i: which image.
            size: of it.
            found: its things, best first.
            score: least score of a segment.
            keep_instances: with the instance segmentation, of all detections.
        """
        image = torch.full_like(found.labels, i)
        masks = output.pyramid[0].new_zeros(0, 1, 1)
        if self.instances is not None and len(found):
            masks = self.instances.masks(output.pyramid, found.boxes, image, found.labels)
        classes = self.map.class_of_label.to(found.labels.device)[found.labels]
        boxes = scale_boxes(found.boxes, size)
        instances = None
        if keep_instances:
            instances = Instances(box_rles(masks, boxes, size.original), classes.cpu(), found.scores.cpu())
        kept = found.scores >= score
        return SoftSegments(
            masks=masks[kept[: len(masks)]].float(),
            class_ids=classes[kept],
            is_thing=torch.ones(int(kept.sum()), dtype=torch.bool),
            scores=found.scores[kept],
            size=size,
            boxes=boxes[kept],
            in_boxes=True,
            semantic=None if output.semantic is None else output.semantic[i].float(),
            semantic_classes=None if output.semantic is None else self.stuff_classes(output.semantic.device),
            instances=instances,
        )

    def stuff_classes(self, device: torch.device) -> Tensor:
        """(K,) class of each semantic channel of stuff; -1 for the others."""
        return torch.where(self.map.stuff_channels, self.map.class_of_channel, -1).to(device)


def box_rles(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> list[dict[str, object]]:
    """Run lengths of (N, m, m) mask logits in boxes (N, 4) of an image of ``size``, a few masks at a time."""
    rles: list[dict[str, object]] = []
    for start in range(0, len(masks), CHUNK):
        part = slice(start, start + CHUNK)
        rles += encode_masks(paste(masks[part].float().sigmoid(), boxes[part], size) > threshold)
    return rles
