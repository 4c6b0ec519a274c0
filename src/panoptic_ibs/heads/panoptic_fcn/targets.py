"""Targets of Panoptic FCN: which instance on which level, centre heat maps, stuff regions. No loop over instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from panoptic_ibs.functional.masks import class_masks_at_stride_4, masks_at_stride_4
from panoptic_ibs.structures import Target


@dataclass
class ThingTargets:
    """The N instances of a batch, in the order of the crops. Small tables are on the CPU, masks on the device.

    Attributes:
        image: (N,) crop of each instance.
        channel: (N,) thing channel.
        row: (N,) row in the crop's target.
        boxes: (N, 4) x1 y1 x2 y2 in pixels.
        masks: (N, H / 4, W / 4), on the device.
        centers: (N, 2) mass centre (x, y) in pixels of the stride-4 map, on the device.
        visible: (N,) 1.0 where the instance has a pixel at stride 4, else 0.0, on the device.
    """

    image: Tensor
    channel: Tensor
    row: Tensor
    boxes: Tensor
    masks: Tensor
    centers: Tensor
    visible: Tensor


@dataclass
class StuffTargets:
    """The M (crop, channel) pairs of semantic regions of a batch, in the order of the crops.

    Attributes:
        image: (M,) crop, on the CPU.
        channel: (M,) stuff channel, on the CPU.
        masks: (M, H / 4, W / 4), on the device.
    """

    image: Tensor
    channel: Tensor
    masks: Tensor


def thing_targets(targets: Sequence[Target], channel_of_class: Tensor) -> ThingTargets:
    """Instances to learn: things that are not crowd and have a pixel in the crop.

    Args:
        targets: B targets of one size.
        channel_of_class: (classes,) thing channel of a class, -1 for stuff, on the CPU.
    """
    rows = [((t.is_thing & ~t.is_crowd) & (t.areas > 0)).nonzero().squeeze(1) for t in targets]
    image, row = _numbered(rows), torch.cat(rows)
    id_maps = torch.stack([t.id_map for t in targets])
    masks = masks_at_stride_4(id_maps, *torch.stack([image, row]).to(id_maps.device, non_blocking=True))
    centers, visible = mass_centers(masks)
    return ThingTargets(
        image=image,
        channel=channel_of_class[torch.cat([t.class_ids[r] for t, r in zip(targets, rows, strict=True)])],
        row=row,
        boxes=torch.cat([t.boxes[r] for t, r in zip(targets, rows, strict=True)]),
        masks=masks,
        centers=centers,
        visible=visible,
    )


def stuff_targets(targets: Sequence[Target], channel_of_class: Tensor) -> StuffTargets:
    """Semantic regions to learn; crowd segments count as pixels of their class.

    Args:
        targets: B targets of one size.
        channel_of_class: (classes,) stuff channel of a class, on the CPU.
    """
    of_row = [channel_of_class[t.class_ids] for t in targets]
    present = [channel[t.areas > 0].unique() for channel, t in zip(of_row, targets, strict=True)]
    image, channel = _numbered(present), torch.cat(present)
    id_maps = torch.stack([t.id_map for t in targets])
    tables = pad_sequence(of_row, batch_first=True, padding_value=-1).to(id_maps.device, non_blocking=True)
    wanted = torch.stack([image, channel]).to(id_maps.device, non_blocking=True)
    return StuffTargets(image, channel, class_masks_at_stride_4(id_maps, tables, *wanted))


def _numbered(parts: Sequence[Tensor]) -> Tensor:
    """For each element of the parts the number of its part."""
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


def mass_centers(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (x, y) of the pixels that a mask touches, (N, 2), and 1.0 where it touches any, (N,)."""
    touched = (masks > 0).float()
    rows, columns = touched.sum(2), touched.sum(1)
    area = rows.sum(1)
    y = rows @ torch.arange(rows.shape[1], device=masks.device, dtype=torch.float32)
    x = columns @ torch.arange(columns.shape[1], device=masks.device, dtype=torch.float32)
    return torch.stack([x, y], dim=1) / area.clamp(min=1)[:, None], (area > 0).float()


def assign_levels(boxes: Tensor, ranges: Sequence[tuple[float, float]]) -> Tensor:
    """Which levels learn an instance: (N, L) bool, true where sqrt(box area) lies in the level's range (inclusive).

    The published ranges overlap, so an instance may be on two levels.
    """
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    low, high = torch.tensor([tuple(r) for r in ranges], dtype=size.dtype).unbind(1)
    return (size[:, None] >= low) & (size[:, None] <= high)


def gaussian_radius(width: Tensor, height: Tensor, min_overlap: float = 0.7) -> Tensor:
    """Radius of CornerNet (Law and Deng 2018) as its published program computes it, which CenterNet-like heads share.

    The smallest of the larger roots of its three quadratics, each divided by 2 (not by 2a as algebra would have it).
    """
    roots = []
    for a, b, c in (
        (1.0, height + width, width * height * (1 - min_overlap) / (1 + min_overlap)),
        (4.0, 2 * (height + width), (1 - min_overlap) * width * height),
        (4 * min_overlap, -2 * min_overlap * (height + width), (min_overlap - 1) * width * height),
    ):
        roots.append((b + (b * b - 4 * a * c).clamp(min=0).sqrt()) / 2)
    return torch.stack(roots).amin(0).clamp(min=0)


def draw_gaussians(
    size: int, first: Tensor, height: Tensor, width: Tensor, centers: Tensor, radii: Tensor, peak: Tensor, reach: int
) -> Tensor:
    """Heat maps of any sizes, one after the other in a flat tensor; overlapping Gaussians are joined by the maximum.

    Args:
        size: elements of all maps together.
        first: (A,) element at which the map of each Gaussian begins.
        height: (A,) integer, of that map.
        width: (A,) integer, of that map.
        centers: (A, 2) integer (x, y) in it.
        radii: (A,) integer; the Gaussian has sigma (2 r + 1) / 3 and is cut off beyond r.
        peak: (A,) height of each Gaussian.
        reach: the largest radius.

    Returns:
        (size,) float32.
    """
    heat = torch.zeros(size, device=centers.device)
    if len(first) == 0:
        return heat
    offset = torch.arange(-reach, reach + 1, device=centers.device)
    dy, dx = offset[None, :, None], offset[None, None, :]
    first, h, w, radius, peak = (t[:, None, None] for t in (first, height, width, radii, peak))
    value = torch.exp((dx * dx + dy * dy) * (-4.5 / (2 * radius + 1).float().square())) * peak
    x, y = centers[:, 0, None, None] + dx, centers[:, 1, None, None] + dy
    inside = (torch.maximum(dx.abs(), dy.abs()) <= radius) & (x >= 0) & (x < w) & (y >= 0) & (y < h)
    index = torch.where(inside, first + y * w + x, 0)
    return heat.scatter_reduce_(0, index.flatten(), (value * inside).flatten(), reduce="amax")


def center_targets(
    things: ThingTargets, instance: Tensor, level: Tensor, sizes: Sequence[torch.Size], channels: int, images: int
) -> Tensor:
    """Heat maps of all levels, each flattened from (B, C, h, w), one after the other.

    Args:
        things: the instances.
        instance: (A,) instances on levels, on the CPU.
        level: (A,) level of each.
        sizes: (h, w) of the levels.
        channels: C thing channels.
        images: B crops.
    """
    map_h, map_w = things.masks.shape[-2:]
    h, w = torch.tensor([tuple(s) for s in sizes]).unbind(1)
    numbers = h * w * (images * channels)
    begin = numbers.cumsum(0) - numbers
    h, w = h[level], w[level]
    boxes = things.boxes[instance]
    width = (boxes[:, 2] - boxes[:, 0]) * (w / (4 * map_w))
    height = (boxes[:, 3] - boxes[:, 1]) * (h / (4 * map_h))
    radii = gaussian_radius(width, height).long()
    first = begin[level] + (things.image[instance] * channels + things.channel[instance]) * h * w
    table = torch.stack([instance, first, h, w, radii]).to(things.masks.device, non_blocking=True)
    on_device, first, h, w, radius = table
    scale = torch.stack([w / map_w, h / map_h], dim=1)
    centers = (things.centers.index_select(0, on_device) * scale).long()
    peak = things.visible.index_select(0, on_device)
    return draw_gaussians(int(numbers.sum()), first, h, w, centers, radius, peak, int(radii.max()) if len(radii) else 0)


def region_targets(stuff: StuffTargets, plane: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Stuff regions of one level: soft scores (B, C, h, w), zero below 0.5, and (M,) whether a pair is on the level.

    Args:
        stuff: the M pairs.
        plane: (M,) number b C + c of each, on the device.
        shape: (B, C, h, w).
    """
    dense = torch.zeros(shape, device=stuff.masks.device)
    if len(stuff.image) == 0:
        return dense, dense.new_zeros(0)
    scores = F.interpolate(stuff.masks[None], size=shape[-2:], mode="bilinear", align_corners=False)[0].clamp(max=1)
    scores = torch.where(scores < 0.5, 0.0, scores)
    dense.flatten(0, 1).index_copy_(0, plane, scores)
    return dense, (scores.flatten(1).amax(1) > 0).float()
