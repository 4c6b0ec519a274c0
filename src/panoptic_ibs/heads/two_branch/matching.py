"""Which boxes are which things, and which of them train; fixed shapes, whatever is found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from panoptic_ibs.functional.forms import batched
from panoptic_ibs.ranges import AtLeastOne, Share

from . import boxes
from .targets import InstanceTargets

IN_CROWD = (
    0.5  # a box with more than this share inside a crowd's box is no background (our reading; COCO's is the same)
)


@dataclass(frozen=True)
class RoiOptions:
    """Which regions train the box and mask heads.

    Attributes:
        sampled: regions per crop.
        positive_share: at most this share of them are things.
        add_truth: the true boxes are proposals as well.
    """

    sampled: AtLeastOne = 512
    positive_share: Share = 0.25
    add_truth: bool = True


def match(
    places: Tensor, targets: InstanceTargets, positive: float, negative: float, best: bool = False
) -> tuple[Tensor, Tensor]:
    """The thing that overlaps each box most, and whether the box is taken for it.

    Args:
        places: (N, 4) boxes that all crops share, or (B, N, 4).
        targets: things of the B crops.
        positive: least IoU.
        negative: a box of less IoU is background.
        best: the boxes that overlap a thing most are taken for the thing they overlap most, whatever their IoU.

    Returns:
        (B, N) int64 with 1 for a thing, 0 for background, -1 for what is neither; (B, N) int64 column in ``targets``.
    """
    wide = places if places.ndim == 3 else places[None]
    overlap = boxes.iou(targets.boxes[:, :, None], wide[:, None])  # (B, G, N)
    overlap.masked_fill_(~targets.valid[:, :, None], -1)
    value, index = overlap.max(dim=1)
    label = torch.where(value >= positive, 1, torch.where(value < negative, 0, -1))
    if targets.crowds.shape[1]:
        inside = boxes.intersections(targets.crowds[:, :, None], wide[:, None]).amax(1)
        label = torch.where((label == 0) & (inside > IN_CROWD * boxes.areas(wide)), -1, label)
    if best:
        most = overlap.amax(2, keepdim=True)
        label = torch.where(((overlap == most) & (most > 0)).any(1), 1, label)
    return label, index


def sample(label: Tensor, count: int, positive_share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Random boxes to train on: as many things as ``positive_share`` allows, filled up with background.

    Args:
        label: (B, N) of :func:`match`.
        count: boxes per crop.
        positive_share: largest share of things among them.

    Returns:
        (B, S) int64 the boxes, things first; (B, S) bool whether they are things; (B, S) bool whether they count: there
        are ``count`` of them, or fewer where there is no more.
    """
    most = int(count * positive_share)
    draw = torch.rand(label.shape, device=label.device)
    draw.clamp_(min=1e-7)  # above all that may not be drawn
    things, index = torch.where(label == 1, draw, 0).topk(min(most, label.shape[1]), dim=1)
    rest, rest_index = torch.where(label == 0, draw, 0).topk(min(count, label.shape[1]), dim=1)
    is_thing = things > 0
    room = count - is_thing.sum(1, keepdim=True)
    counts = (rest > 0) & (torch.arange(rest.shape[1], device=label.device) < room)
    kind = torch.cat([is_thing, torch.zeros_like(counts)], 1)
    return torch.cat([index, rest_index], 1), kind, torch.cat([is_thing, counts], 1)


@dataclass
class Regions:
    """K boxes of all crops that a head is run on, one crop after the other.

    Attributes:
        boxes: (K, 4) without a gradient.
        image: (K,) int64, their crops.
        labels: (K,) int64, detector labels; 0 for background.
        truth: (K, 4) boxes of the things they are taken for; of any thing for background.
        rows: (K,) int64, rows of these things in the crops' tables.
        counts: (K,) float32, 1, or 0 for what only fills up or is neither a thing nor background.
    """

    boxes: Tensor
    image: Tensor
    labels: Tensor
    truth: Tensor
    rows: Tensor
    counts: Tensor

    @property
    def things(self) -> Tensor:
        """(K,) bool: what is taken for a thing, and counts."""
        return (self.labels > 0) & (self.counts > 0)

    def __getitem__(self, index: Tensor) -> Regions:
        """Some of them."""
        return Regions(**{name: value[index] for name, value in vars(self).items()})


def regions_of(places: Tensor, label: Tensor, index: Tensor, counts: Tensor, targets: InstanceTargets) -> Regions:
    """Boxes (B, S, 4) with what :func:`match` said of them, as :class:`Regions`.

    On a CPU those that do not count are left out; elsewhere nobody knows how many they are without waiting.

    Args:
        places: (B, S, 4).
        label: (B, S), 1 for a thing, 0 for background.
        index: (B, S), column in ``targets``.
        counts: (B, S) bool.
        targets: of the B crops.
    """
    b, s = label.shape
    image = torch.arange(b, device=places.device)[:, None].expand(b, s)
    found = Regions(
        boxes=places.detach().flatten(0, 1),
        image=image.flatten(),
        labels=(targets.labels.gather(1, index) * (label == 1)).flatten(),
        truth=targets.boxes.gather(1, index[..., None].expand(-1, -1, 4)).flatten(0, 1),
        rows=targets.rows.gather(1, index).clamp(min=0).flatten(),
        counts=counts.float().flatten(),
    )
    return found if batched(places.device) else found[found.counts > 0]


@torch.no_grad()
def sampled_regions(
    places: Tensor, valid: Tensor, targets: InstanceTargets, threshold: float, options: RoiOptions
) -> Regions:
    """Proposals (B, P, 4), of which those in ``valid`` (B, P) are some, matched and sampled."""
    if options.add_truth:
        places, valid = torch.cat([places, targets.boxes], 1), torch.cat([valid, targets.valid], 1)
    label, index = match(places, targets, threshold, threshold)
    chosen, kind, counts = sample(torch.where(valid, label, -1), options.sampled, options.positive_share)
    picked = places.gather(1, chosen[..., None].expand(-1, -1, 4))
    return regions_of(picked, kind.long(), index.gather(1, chosen), counts, targets)


@torch.no_grad()
def rematched(regions: Regions, moved: Tensor, targets: InstanceTargets, threshold: float) -> Regions:
    """Regions with other boxes (K, 4), matched anew, all of them; boxes without an area no longer count."""
    overlap = boxes.iou(targets.boxes[regions.image], moved[:, None])  # (K, G)
    overlap.masked_fill_(~targets.valid[regions.image], -1)
    value, index = overlap.max(dim=1)
    thing = value >= threshold
    counts = regions.counts * (boxes.areas(moved) > 0)
    if targets.crowds.shape[1]:
        inside = boxes.intersections(targets.crowds[regions.image], moved[:, None]).amax(1)
        counts = counts * (thing | (inside <= IN_CROWD * boxes.areas(moved)))
    found = Regions(
        boxes=moved.detach(),
        image=regions.image,
        labels=targets.labels[regions.image, index] * thing,
        truth=targets.boxes[regions.image, index],
        rows=targets.rows[regions.image, index].clamp(min=0),
        counts=counts,
    )
    return found if batched(moved.device) else found[counts > 0]


def positives(regions: Regions, most: int, crops: int) -> Regions:
    """At most ``most`` things of each crop, for the mask head.

    On a CPU they alone; elsewhere ``most`` a crop, filled up with what does not count.

    Args:
        regions: those of all crops; elsewhere than on a CPU, as many of each.
        most: a crop.
        crops: B.
    """
    if not batched(regions.boxes.device):
        things = regions.things
        number = things.cumsum(0)
        before = number.new_zeros(crops).index_add_(0, regions.image, things.long()).cumsum(0).roll(1)
        before[0] = 0
        return regions[things & (number - before[regions.image] <= most)]
    kind = regions.things.view(crops, -1)
    order = kind.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    first = torch.arange(crops, device=order.device)[:, None] * kind.shape[1]
    found = regions[(order + first).flatten()]
    found.counts = found.things.float()
    return found
