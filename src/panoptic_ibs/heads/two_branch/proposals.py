"""Region proposals (Ren et al., 2015): anchors scored and moved on every level, and the best of them kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, nms

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.forms import batched
from panoptic_ibs.ranges import AtLeastOne, NonNegative, Positive, Share

from . import anchors, boxes
from .matching import match, sample
from .targets import InstanceTargets


@dataclass(frozen=True)
class ProposalOptions:
    """Options of the proposals; the defaults are those that detectron2 and torchvision share.

    Attributes:
        anchor_scale: side of the square anchor over the stride of its level.
        anchor_ratios: height over width of the anchors.
        rounded_anchors: to whole pixels, as torchvision's are; detectron2's are not.
        positive: least IoU of an anchor that is an object; the best anchor of each thing is one too.
        negative: an anchor below it is none; those between train nothing.
        sampled: anchors that train, per crop.
        positive_share: at most this share of them are objects.
        beta: where the smooth L1 loss of the boxes becomes linear; 0 is plain L1 (detectron2), 1/9 torchvision's.
        candidates: anchors of a level that non-maximum suppression sees, per crop.
        kept: proposals per crop in training; ``kept_at_test`` else.
        candidates_at_test: as ``candidates``, at test.
        nms: an anchor that overlaps a better one of its level by more than this IoU is dropped.
        least_side: proposals with a shorter side, in pixels, are dropped (torchvision), and those without an area.
    """

    anchor_scale: Positive = 8.0
    anchor_ratios: Sequence[Positive] = (0.5, 1.0, 2.0)
    rounded_anchors: bool = False
    positive: Share = 0.7
    negative: Share = 0.3
    sampled: AtLeastOne = 256
    positive_share: Share = 0.5
    beta: NonNegative = 1 / 9
    candidates: AtLeastOne = 2000
    kept: AtLeastOne = 2000
    candidates_at_test: AtLeastOne = 1000
    kept_at_test: AtLeastOne = 1000
    nms: Share = 0.7
    least_side: NonNegative = 0.0


@dataclass
class AnchorOutput:
    """What the network says of all anchors.

    Attributes:
        logits: (B, N_l) per level, whether an anchor is an object.
        deltas: (B, N_l, 4) per level, how it is to be moved.
        anchors: (N_l, 4) per level, in pixels of the input.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]


@dataclass
class Proposals:
    """The best boxes of B crops, best first.

    Attributes:
        boxes: (B, P, 4) without a gradient.
        valid: (B, P) bool; False for what only fills up.
    """

    boxes: Tensor
    valid: Tensor


class ProposalNetwork(nn.Module):
    """A 3 x 3 convolution and two 1 x 1 ones, shared by all levels.

    Args:
        channels: of every level.
        strides: of the levels, finest first.
        options: see there.
    """

    WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the coding

    def __init__(self, channels: int, strides: Sequence[int], options: ProposalOptions) -> None:
        super().__init__()
        self.strides, self.options = tuple(strides), options
        count = len(options.anchor_ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, count, 1)
        self.deltas = nn.Conv2d(channels, 4 * count, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        sizes = [stride * options.anchor_scale for stride in strides]
        shapes = [anchors.cells([size], options.anchor_ratios, options.rounded_anchors) for size in sizes]
        self.register_buffer("cells", torch.stack(shapes), persistent=False)

    cells: Tensor

    def forward(self, levels: Sequence[Tensor]) -> AnchorOutput:
        """Scores and moves of all anchors, from (B, C, h, w) a level."""
        output = AnchorOutput([], [], [])
        for x, stride, cell in zip(levels, self.strides, self.cells, strict=True):
            x = F.relu(self.conv(x))
            output.logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
            output.deltas.append(self.deltas(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))
            output.anchors.append(anchors.grid(cell, stride, (x.shape[-2], x.shape[-1])))
        return output

    def losses(self, output: AnchorOutput, targets: InstanceTargets) -> tuple[Tensor, Tensor]:
        """Terms of the scores and of the moves, over the sampled anchors of all crops (torchvision's definition)."""
        o = self.options
        places = torch.cat(output.anchors)
        logits, deltas = torch.cat(output.logits, 1).float(), torch.cat(output.deltas, 1).float()
        label, truth = match(places, targets, o.positive, o.negative, best=True)
        chosen, kind, counts = sample(label, o.sampled, o.positive_share)
        said = logits.gather(1, chosen)
        count = normalizer(counts.sum(), logits)
        by_class = F.binary_cross_entropy_with_logits(said, kind.float(), counts.float(), reduction="sum") / count
        wanted = targets.boxes.gather(1, truth.gather(1, chosen)[..., None].expand(-1, -1, 4))
        wanted = boxes.encode(places[chosen], wanted, self.WEIGHTS)
        moved = deltas.gather(1, chosen[..., None].expand(-1, -1, 4))
        far = F.smooth_l1_loss(moved, torch.where(kind[..., None], wanted, 0), beta=o.beta, reduction="none")
        return by_class, (far.sum(-1) * kind).sum() / count

    @torch.no_grad()
    def propose(self, output: AnchorOutput, limits: Tensor) -> Proposals:
        """The best proposals of each crop.

        Args:
            output: of :meth:`forward`.
            limits: (B, 2) width and height of the crops.
        """
        o = self.options
        candidates = o.candidates if self.training else o.candidates_at_test
        kept = o.kept if self.training else o.kept_at_test
        found, scores, levels = [], [], []
        for level, (logits, deltas, places) in enumerate(
            zip(output.logits, output.deltas, output.anchors, strict=True)
        ):
            score, index = logits.detach().float().topk(min(candidates, logits.shape[1]), dim=1)
            moved = deltas.detach().float().gather(1, index[..., None].expand(-1, -1, 4))
            found.append(boxes.clip(boxes.decode(moved, places[index], self.WEIGHTS), limits[:, None]))
            scores.append(score)
            levels.append(torch.full_like(index[0], level))
        place, score, level_of = torch.cat(found, 1), torch.cat(scores, 1), torch.cat(levels)
        sides = (place[..., 2:] - place[..., :2]).amin(-1)
        keep = _survivors(place, score, level_of, o.nms) & (sides > 0) & (sides >= o.least_side)
        best, index = score.masked_fill(~keep, -torch.inf).topk(min(kept, score.shape[1]), dim=1)
        return Proposals(place.gather(1, index[..., None].expand(-1, -1, 4)), best > -torch.inf)


def _survivors(places: Tensor, scores: Tensor, levels: Tensor, threshold: float) -> Tensor:
    """(B, N) bool: boxes that no better one of the same crop and level overlaps by more than ``threshold``.

    On a device one suppression for all: crops and levels are moved apart, so that none overlaps another's. It is the
    only place of a step where the host waits for the device.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    if not batched(places.device):
        for i, (some, score) in enumerate(zip(places, scores, strict=True)):
            keep[i, batched_nms(some, score, levels, threshold)] = True
        return keep
    reach = places.max() + 1
    crop = torch.arange(len(places), device=places.device)[:, None].expand_as(scores)
    apart = torch.stack([levels.expand_as(scores), crop], -1) * reach
    kept = nms((places + apart.repeat(1, 1, 2)).flatten(0, 1), scores.flatten(), threshold)
    keep.view(-1)[kept] = True
    return keep
