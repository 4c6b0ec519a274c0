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
    """What the network says of all anchors, without a gradient: :meth:`ProposalNetwork.said` has it for some of them.

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

    @torch.no_grad()
    def forward(self, levels: Sequence[Tensor]) -> AnchorOutput:
        """Scores and moves of all anchors, from (B, C, h, w) a level."""
        output = AnchorOutput([], [], [])
        for x, stride, cell in zip(levels, self.strides, self.cells, strict=True):
            x = F.relu(self.conv(x))
            output.logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
            output.deltas.append(self.deltas(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))
            output.anchors.append(anchors.grid(cell, stride, (x.shape[-2], x.shape[-1])))
        return output

    def said(self, levels: Sequence[Tensor], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` says of some anchors, once more and with a gradient.

        Few anchors train. Backward over them alone, a step neither keeps the convolution's output on all levels nor
        goes back through it.

        Args:
            levels: (B, C, h, w) each.
            chosen: (B, S) numbers of anchors, counted through all levels.

        Returns:
            (B, S) logits and (B, S, 4) moves, float32.
        """
        count = len(self.options.anchor_ratios)
        place, shape = chosen.div(count, rounding_mode="floor"), chosen.remainder(count)[..., None]
        x = neighbourhoods(levels, place).to(levels[0].dtype)
        x = F.relu(F.linear(x, self.conv.weight.flatten(1), self.conv.bias))
        logits = F.linear(x, self.objectness.weight.flatten(1), self.objectness.bias).float()
        moves = F.linear(x, self.deltas.weight.flatten(1), self.deltas.bias).float().unflatten(-1, (count, 4))
        return logits.gather(-1, shape).squeeze(-1), moves.gather(2, shape[..., None].expand(-1, -1, 1, 4)).squeeze(2)

    def losses(self, levels: Sequence[Tensor], output: AnchorOutput, targets: InstanceTargets) -> tuple[Tensor, Tensor]:
        """Terms of the scores and of the moves, over the sampled anchors of all crops (torchvision's definition).

        Args:
            levels: those that ``output`` was made from.
            output: of :meth:`forward`.
            targets: of the crops.
        """
        o = self.options
        places = torch.cat(output.anchors)
        label, truth = match(places, targets, o.positive, o.negative, best=True)
        chosen, kind, counts = sample(label, o.sampled, o.positive_share)
        logits, moved = self.said(levels, chosen)
        count = normalizer(counts.sum(), logits)
        by_class = F.binary_cross_entropy_with_logits(logits, kind.float(), counts.float(), reduction="sum") / count
        wanted = targets.boxes.gather(1, truth.gather(1, chosen)[..., None].expand(-1, -1, 4))
        wanted = boxes.encode(places[chosen], wanted, self.WEIGHTS)
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


def neighbourhoods(levels: Sequence[Tensor], places: Tensor) -> Tensor:
    """(B, S, 9 C) the 3 x 3 pixels around some places, zeros beyond the border, in the order of a convolution's weight.

    Args:
        levels: (B, C, h, w) each.
        places: (B, S) numbers of pixels, row by row and counted through all levels.
    """
    kind = torch.promote_types(levels[0].dtype, torch.float32)
    reach = torch.arange(-1, 2, device=places.device)
    dy, dx = reach.repeat_interleave(3), reach.repeat(3)
    found: Tensor | None = None
    with torch.autocast(places.device.type, enabled=False):  # half precision cannot number the columns
        for level in levels:
            height, width = level.shape[-2:]
            y, x = places.div(width, rounding_mode="floor"), places.remainder(width)
            x = torch.where((y >= 0) & (y < height), x, -2)  # of another level: outside, where zeros are
            grid = torch.stack([(2 * (x[..., None] + dx) + 1) / width, (2 * (y[..., None] + dy) + 1) / height], -1) - 1
            here = F.grid_sample(level.to(kind), grid.to(kind), mode="nearest", align_corners=False)
            found = here if found is None else found + here
            places = places - height * width
    assert found is not None
    return found.transpose(1, 2).flatten(2)


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
