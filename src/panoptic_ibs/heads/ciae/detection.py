"""FCOS's targets, losses and proposals (Tian et al., ICCV 2019), with positives only inside ground-truth masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, generalized_box_iou_loss, sigmoid_focal_loss

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.ragged import padded
from panoptic_ibs.structures import Target

from .network import STRIDES, CIAEOutput

Ranges = Sequence[tuple[float, float]]


@dataclass
class LocationTargets:
    """What the L locations of P3 to P7 should say, for B crops.

    Attributes:
        points: (L, 2) x and y of each location in pixels.
        channel: (B, L) thing channel, -1 for background.
        boxes: (B, L, 4) box; a dummy of positive area where there is none.
        centerness: (B, L) in [0, 1], 0 where there is none.
        counted: (B, L) 0 on crowd, which is neither object nor background, else 1.
    """

    points: Tensor
    channel: Tensor
    boxes: Tensor
    centerness: Tensor
    counted: Tensor


def locations(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Points (L, 2) of all levels: half a stride from the top left corner of each cell."""
    points = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y = torch.arange(height, device=device) * stride + stride // 2
        x = torch.arange(width, device=device) * stride + stride // 2
        points.append(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1))
    return torch.cat(points)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Levels of (B, C, h, w) as (B, L, C), float32 at least."""
    flat = torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


@torch.no_grad()
def location_targets(
    targets: Sequence[Target], channel_of_class: Tensor, sizes: Sequence[tuple[int, int]], ranges: Ranges
) -> LocationTargets:
    """Look up, at every location, the instance whose mask holds it; it is positive if the instance is of its level.

    An instance is of the level whose range holds the largest of the location's distances to the sides of the box
    (FCOS, Section 3.2). A pixel is of one instance only, so that no location is ambiguous.

    Args:
        targets: B crops.
        channel_of_class: (classes,) thing channel of each class on the CPU, -1 for stuff.
        sizes: (height, width) of P3 to P7.
        ranges: (low, high] of the largest distance, in pixels, per level.
    """
    device = targets[0].id_map.device
    points = locations(sizes, device)
    lengths = [len(target) for target in targets]
    crowd, class_ids = (torch.cat([getattr(t, name) for t in targets]) for name in ("is_crowd", "class_ids"))
    channels = torch.where(crowd, -2, channel_of_class[class_ids])
    channel_table = F.pad(padded(channels.split(lengths), -1), (1, 0), value=-1)  # void first
    box_table = F.pad(padded([t.boxes for t in targets], 0.0), (0, 0, 1, 0))
    ids = _ids_at(torch.stack([t.id_map for t in targets]), points)
    channel = channel_table.to(device, non_blocking=True).gather(1, ids)
    box = box_table.to(device, non_blocking=True).gather(1, ids[..., None].expand(-1, -1, 4))
    center = points.to(box.dtype)
    sides = torch.cat([center - box[..., :2], box[..., 2:] - center], dim=-1)
    # Values from counts: nothing is copied from the host.
    low, high = (torch.cat([box.new_full((h * w,), r[end]) for (h, w), r in zip(sizes, ranges, strict=True)])
                 for end in (0, 1))  # fmt: skip
    reach = sides.amax(-1)
    positive = (channel >= 0) & (reach > low) & (reach <= high)
    least, most = torch.minimum(sides[..., :2], sides[..., 2:]), torch.maximum(sides[..., :2], sides[..., 2:])
    centerness = (least.clamp(min=0) / most.clamp(min=1e-6)).prod(-1).sqrt()
    dummy = torch.cat([center - 1, center + 1], dim=-1)
    return LocationTargets(
        points,
        torch.where(positive, channel, -1),
        torch.where(positive[..., None], box, dummy),
        torch.where(positive, centerness, 0.0),
        (channel != -2).to(box.dtype),
    )


def _ids_at(id_maps: Tensor, points: Tensor) -> Tensor:
    """(B, L) ids at the points (L, 2) of maps (B, H, W); 0 beyond the maps, where the coarse levels reach."""
    height, width = id_maps.shape[1:]
    x, y = points.unbind(1)
    ids = id_maps[:, y.clamp(max=height - 1), x.clamp(max=width - 1)].long()
    return torch.where((x < width) & (y < height), ids, 0)


def decode(points: Tensor, sides: Tensor) -> Tensor:
    """Boxes x1 y1 x2 y2 (..., L, 4) from points (L, 2) and distances to left, top, right and bottom (..., L, 4)."""
    center = points.to(sides.dtype)
    return torch.cat([center - sides[..., :2], center + sides[..., 2:]], dim=-1)


def detection_losses(output: CIAEOutput, wanted: LocationTargets) -> dict[str, Tensor]:
    """Focal loss of the classes, binary cross-entropy of the centre-ness, generalised IoU loss of the boxes.

    Each is summed and divided by the number of positive locations (averaged over ranks). All locations take part with
    weights of 0 or 1, so that no step waits for the number of positives.
    """
    logits, centerness, sides = (flatten_levels(m) for m in (output.classes, output.centerness, output.boxes))
    positive = (wanted.channel >= 0).to(logits.dtype)
    count = normalizer(positive.sum(), logits)
    hot = F.one_hot(wanted.channel + 1, logits.shape[2] + 1)[..., 1:].to(logits.dtype)
    focal = sigmoid_focal_loss(logits, hot) * wanted.counted[..., None]
    centre = F.binary_cross_entropy_with_logits(
        centerness[..., 0], wanted.centerness.to(logits.dtype), reduction="none"
    )
    iou = generalized_box_iou_loss(decode(wanted.points, sides), wanted.boxes.to(sides.dtype))
    return {
        "class": focal.sum() / count,
        "centerness": (centre * positive).sum() / count,
        "box": (iou * positive).sum() / count,
    }


@dataclass
class Proposals:
    """Instances found in an image, best first.

    Attributes:
        boxes: (N, 4) in input pixels.
        channels: (N,) thing channel.
        scores: (N,) in [0, 1].
        points: (N, 2) x and y of the locations that they come from.
    """

    boxes: Tensor
    channels: Tensor
    scores: Tensor
    points: Tensor

    def take(self, index: Tensor) -> Proposals:
        """Some of them."""
        return Proposals(self.boxes[index], self.channels[index], self.scores[index], self.points[index])


@torch.no_grad()
def propose(
    output: CIAEOutput,
    image: int,
    valid: tuple[int, int],
    score_threshold: float = 0.2,
    nms_threshold: float = 0.6,
    per_level: int = 1000,
    limit: int = 100,
    agnostic: bool = False,
) -> Proposals:
    """Proposals of one image after non-maximum suppression.

    Args:
        output: of the network; image: which of its images.
        valid: (height, width) of the image in the input; locations in the padding propose nothing.
        score_threshold: least square root of class probability times centre-ness.
        nms_threshold: of the IoU of boxes of one class, or of any two with ``agnostic``.
        per_level: candidates a level.
        limit: proposals an image.
    """
    found = []
    for level, stride in enumerate(STRIDES):
        logits, sides = output.classes[level][image].float(), output.boxes[level][image].float().flatten(1).T
        points = _level_points(logits, stride)
        score = (logits.sigmoid() * output.centerness[level][image].float().sigmoid()).sqrt().flatten(1)
        inside = (points[:, 0] < valid[1]) & (points[:, 1] < valid[0])
        score = torch.where(inside, score, 0.0).flatten()
        best, index = score.topk(min(per_level, len(score)))
        keep = best > score_threshold
        best, index = best[keep], index[keep]
        place = index % len(points)
        boxes = decode(points[place], sides[place])
        found.append((boxes, index // len(points), best, points[place]))
    boxes, channels, scores, points = (torch.cat(parts) for parts in zip(*found, strict=True))
    height, width = valid
    boxes = torch.stack(
        [boxes[:, 0].clamp(0, width), boxes[:, 1].clamp(0, height), boxes[:, 2].clamp(0, width),
         boxes[:, 3].clamp(0, height)], dim=1)  # fmt: skip
    keep = batched_nms(boxes, scores, torch.zeros_like(channels) if agnostic else channels, nms_threshold)[:limit]
    return Proposals(boxes[keep], channels[keep], scores[keep], points[keep])


def _level_points(logits: Tensor, stride: int) -> Tensor:
    """(h w, 2) x and y of the locations of one level."""
    height, width = logits.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=logits.device), torch.arange(width, device=logits.device), indexing="ij"
    )
    return torch.stack([x, y], dim=-1).flatten(0, 1) * stride + stride // 2
