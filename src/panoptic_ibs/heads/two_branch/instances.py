"""The instance branch: proposals, one stage or a cascade of box heads, a mask head.

Mask R-CNN (He et al., 2017) and Cascade R-CNN (Cai and Vasconcelos, 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional.box_masks import mask_targets
from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.ranges import Bounds, Items, NonNegative, Positive, Share, Whole

from . import boxes
from .detection import Detections, InferenceOptions, detections
from .matching import Regions, RoiOptions, positives, rematched, sampled_regions
from .network import BoxHead, BoxHeadOptions, MaskHead, MaskHeadOptions
from .proposals import AnchorOutput, ProposalNetwork, ProposalOptions
from .regions import pool
from .targets import InstanceTargets

STAGES = 3


@dataclass(frozen=True)
class StageOptions:
    """Box heads that follow one another; without a cascade there is the first alone.

    Attributes:
        thresholds: least IoU of a thing, by stage.
        coding: weights of the four numbers of a box, by stage (1 over their standard deviations).
        weights: of the losses, by stage.
        agnostic: one box for all classes; None: in a cascade (Cai and Vasconcelos, 2018). A cascade has no other.
        beta: where the smooth L1 loss becomes linear; 0 is plain L1 (detectron2), 1/9 torchvision's.
        used: boxes, scores and masks are those after so many stages; None: all. Scores are the mean of the used stages.
        masks_from: what trains the mask head: the sampled ``"proposals"`` (detectron2), or the boxes that the used
            stages made of them, ``"refined"``.
        sampling: samples a bin of RoIAlign along each side; 0: adaptive (detectron2), 2 torchvision's.
        aligned: see :func:`panoptic_ibs.heads.two_branch.regions.pool`.
    """

    thresholds: Annotated[Sequence[Share], Items(STAGES)] = (0.5, 0.6, 0.7)
    coding: Annotated[Sequence[Annotated[Sequence[Positive], Items(4)]], Items(STAGES)] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    weights: Annotated[Sequence[NonNegative], Items(STAGES)] = (1.0, 1.0, 1.0)
    agnostic: bool | None = None
    beta: NonNegative = 1 / 9
    used: Annotated[int, Bounds(least=1, most=STAGES)] | None = None
    masks_from: Literal["proposals", "refined"] = "proposals"
    sampling: Whole = 0
    aligned: bool = True


class InstanceBranch(nn.Module):
    """Instances from a pyramid.

    Args:
        channels: of the pyramid.
        things: number of thing classes, at least one.
        strides: of the pyramid, P2 to P6; regions are read from all but the last.
        cascade: three stages of boxes in place of one.
        proposals, regions, stages, box_head, mask_head: see their classes.

    Attributes:
        weights: of the loss terms, by name: ``rpn_class``, ``rpn_box``, ``box_class``, ``box_move`` (in a cascade
            ``box_class_1`` and so on) and ``mask``.

    Raises:
        ConfigError: options that contradict each other.
    """

    def __init__(
        self,
        channels: int,
        things: int,
        strides: Sequence[int],
        cascade: bool = False,
        proposals: ProposalOptions | None = None,
        regions: RoiOptions | None = None,
        stages: StageOptions | None = None,
        box_head: BoxHeadOptions | None = None,
        mask_head: MaskHeadOptions | None = None,
    ) -> None:
        super().__init__()
        self.regions, self.stages = regions or RoiOptions(), stages or StageOptions()
        self.box_options, self.mask_options = box_head or BoxHeadOptions(), mask_head or MaskHeadOptions()
        if cascade and self.stages.agnostic is False:
            raise ConfigError("head.stages.agnostic=false: a cascade has one box for all classes; set it to null.")
        count = STAGES if cascade else 1
        self.used = min(self.stages.used or count, count)
        self.strides = tuple(strides)
        self.proposals = ProposalNetwork(channels, strides, proposals or ProposalOptions())
        agnostic = cascade or bool(self.stages.agnostic)
        self.box_heads = nn.ModuleList(BoxHead(channels, things, self.box_options, agnostic) for _ in range(count))
        self.mask_head = MaskHead(channels, things, self.mask_options)
        self.weights = {"rpn_class": 1.0, "rpn_box": 1.0, "mask": 1.0}
        for name, weight in zip(self._names(), self.stages.weights, strict=False):
            self.weights |= {f"box_class{name}": weight, f"box_move{name}": weight}

    def _names(self) -> list[str]:
        """What is behind the names of a stage's terms."""
        return [""] if len(self.box_heads) == 1 else [f"_{k + 1}" for k in range(len(self.box_heads))]

    def forward(self, pyramid: Sequence[Tensor]) -> AnchorOutput:
        """What is said of the anchors of all levels."""
        found: AnchorOutput = self.proposals(pyramid)
        return found

    # --- training

    def losses(self, pyramid: Sequence[Tensor], anchors: AnchorOutput, targets: InstanceTargets) -> dict[str, Tensor]:
        """The loss terms.

        Args:
            pyramid: P2 to P6, (B, C, h, w).
            anchors: of :meth:`forward`.
            targets: of the B crops, whose size is that of their id maps.
        """
        by_class, by_box = self.proposals.losses(pyramid, anchors, targets)
        found = self.proposals.propose(anchors, self._limits(targets).expand(len(targets.counts), 2))
        regions = sampled_regions(found.boxes, found.valid, targets, self.stages.thresholds[0], self.regions)
        return {"rpn_class": by_class, "rpn_box": by_box, **self.region_losses(pyramid, regions, targets)}

    def _limits(self, targets: InstanceTargets) -> Tensor:
        height, width = targets.id_maps.shape[-2:]
        return (
            targets.boxes.new_tensor([width, height]) if targets.boxes.is_cpu else _filled(width, height, targets.boxes)
        )

    def region_losses(self, pyramid: Sequence[Tensor], regions: Regions, targets: InstanceTargets) -> dict[str, Tensor]:
        """The terms of the box and mask heads on sampled regions."""
        terms: dict[str, Tensor] = {}
        for_masks = regions
        for k, (name, head) in enumerate(zip(self._names(), self.box_heads, strict=True)):
            logits, moves = head(self._shared(self.pool(pyramid, regions.boxes, regions.image, self.box_options.size)))
            by_class, by_box = box_losses(logits, moves, regions, self.stages.coding[k], self.stages.beta)
            terms |= {f"box_class{name}": by_class, f"box_move{name}": by_box}
            refined = self.stages.masks_from == "refined" and k + 1 == self.used
            if k + 1 < len(self.box_heads) or refined:
                moved = boxes.decode(_own(moves.detach(), regions.labels), regions.boxes, self.stages.coding[k])
                moved = boxes.clip(moved, self._limits(targets))
                if refined:
                    for_masks = rematched(regions, moved, targets, self.stages.thresholds[k])
                if k + 1 < len(self.box_heads):
                    regions = rematched(regions, moved, targets, self.stages.thresholds[k + 1])
        terms["mask"] = self.mask_loss(pyramid, for_masks, targets)
        return terms

    def _shared(self, features: Tensor) -> Tensor:
        """Features whose gradient is divided by the number of stages, so that the pyramid feels their mean."""
        share = 1 / len(self.box_heads)
        return features if share == 1 else features * share + features.detach() * (1 - share)

    def mask_loss(self, pyramid: Sequence[Tensor], regions: Regions, targets: InstanceTargets) -> Tensor:
        """Binary cross-entropy of the masks of all things among the regions."""
        most = max(int(self.regions.sampled * self.regions.positive_share), 1)
        things = positives(regions, most, len(targets.counts))
        logits = self.masks(pyramid, things.boxes, things.image, things.labels)
        with torch.no_grad():
            wanted = mask_targets(
                targets.id_maps, things.image, things.rows, things.boxes, logits.shape[-1], self.stages.aligned
            )
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((1, 2))
        return (loss * things.counts).sum() / normalizer(things.counts.sum(), loss)

    # --- parts that other heads use as well

    def pool(self, pyramid: Sequence[Tensor], places: Tensor, image: Tensor, size: int) -> Tensor:
        """Features (K, C, size, size) of boxes (K, 4) in pixels of the input, of crops ``image`` (K,)."""
        levels = len(self.strides) - 1
        options = self.stages
        return pool(pyramid[:levels], self.strides[:levels], places, image, size, options.sampling, options.aligned)

    def masks(self, pyramid: Sequence[Tensor], places: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Mask logits (K, M, M) of the detector labels (K,) inside boxes (K, 4); with their gradient."""
        found: Tensor = self.mask_head(self.pool(pyramid, places, image, self.mask_options.size), labels)
        return found

    # --- inference

    @torch.no_grad()
    def classified(
        self, pyramid: Sequence[Tensor], anchors: AnchorOutput, limits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, P, 4) or (B, P, T, 4), scores (B, P, T) of the thing classes, and (B, P) which of them count.

        Args:
            pyramid: P2 to P6.
            anchors: of :meth:`forward`.
            limits: (B, 2) width and height of the images.
        """
        found = self.proposals.propose(anchors, limits)
        b, p = found.valid.shape
        image = torch.arange(b, device=limits.device).repeat_interleave(p)
        places, limit = found.boxes.flatten(0, 1), limits.repeat_interleave(p, 0)
        scores = []
        for head, coding in zip(self.box_heads[: self.used], self.stages.coding, strict=False):
            logits, moves = head(self.pool(pyramid, places, image, self.box_options.size))
            scores.append(logits.softmax(1)[:, 1:])
            wide = places if moves.ndim == 2 else places[:, None]
            places = boxes.clip(boxes.decode(moves, wide, coding), limit if moves.ndim == 2 else limit[:, None])
        score = torch.stack(scores).mean(0)
        return places.unflatten(0, (b, p)), score.unflatten(0, (b, p)), found.valid

    @torch.no_grad()
    def detect(
        self, pyramid: Sequence[Tensor], anchors: AnchorOutput, limits: Tensor, options: InferenceOptions
    ) -> list[Detections]:
        """Things of each image, best first, without masks: :meth:`masks` makes them for those that are wanted."""
        found = self.classified(pyramid, anchors, limits)
        return [detections(*of_image, options) for of_image in zip(*found, strict=True)]


def _filled(width: int, height: int, like: Tensor) -> Tensor:
    """(2,) on the device of ``like``, without a copy from the host."""
    return torch.stack([like.new_full((), width), like.new_full((), height)])


def _own(moves: Tensor, labels: Tensor) -> Tensor:
    """(K, 4): the move of each region's class, or the only one there is."""
    if moves.ndim == 2:
        return moves
    index = (labels - 1).clamp(min=0)[:, None, None].expand(-1, 1, 4)
    return moves.gather(1, index).squeeze(1)


def box_losses(
    logits: Tensor, moves: Tensor, regions: Regions, coding: Sequence[float], beta: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the classes and smooth L1 of the moves of the things, over all regions that count.

    Args:
        logits: (K, T + 1) float32.
        moves: (K, 4) or (K, T, 4) float32.
        regions: K.
        coding: weights of the four numbers.
        beta: of the smooth L1 loss.
    """
    count = normalizer(regions.counts.sum(), logits)
    by_class = (F.cross_entropy(logits, regions.labels, reduction="none") * regions.counts).sum() / count
    things = regions.things
    wanted = torch.where(things[:, None], boxes.encode(regions.boxes, regions.truth, coding), 0)
    far = F.smooth_l1_loss(_own(moves, regions.labels), wanted, beta=beta, reduction="none").sum(1)
    return by_class, (far * things).sum() / count
