"""Targets of Panoptic FCN: which instance on which level, centre heat maps, stuff regions. No loop over instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
    masks = torch.cat(
        [
            masks_at_stride_4(t.id_map, r.to(t.id_map.device, non_blocking=True))
            for t, r in zip(targets, rows, strict=True)
        ]
    )
    centers, visible = mass_centers(masks)
    return ThingTargets(
        image=torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)]),
        channel=channel_of_class[torch.cat([t.class_ids[r] for t, r in zip(targets, rows, strict=True)])],
        row=torch.cat(rows),
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
    images, channels, masks = [], [], []
    for i, target in enumerate(targets):
        channel_of_row = channel_of_class[target.class_ids]
        present = channel_of_row[target.areas > 0].unique()
        device = target.id_map.device
        masks.append(
            class_masks_at_stride_4(
                target.id_map, channel_of_row.to(device, non_blocking=True), present.to(device, non_blocking=True)
            )
        )
        channels.append(present)
        images.append(torch.full((len(present),), i))
    return StuffTargets(torch.cat(images), torch.cat(channels), torch.cat(masks))


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


def draw_gaussians(shape: torch.Size, plane: Tensor, centers: Tensor, radii: Tensor, peak: Tensor) -> Tensor:
    """Heat maps with a Gaussian at each centre, overlapping ones joined by the maximum.

    Args:
        shape: (B, C, h, w) of the result.
        plane: (A,) index of the (image, channel) plane, on the CPU.
        centers: (A, 2) integer (x, y).
        radii: (A,) integer radius on the CPU; the Gaussian has sigma (2 r + 1) / 3 and is cut off beyond r.
        peak: (A,) height of each.
    """
    _, _, h, w = shape
    heat = torch.zeros(shape, device=centers.device).flatten()
    if len(plane) == 0:
        return heat.view(shape)
    reach = int(radii.max())
    offset = torch.arange(-reach, reach + 1, device=centers.device)
    radius = radii.to(centers.device, non_blocking=True)[:, None, None]
    dy, dx = offset[None, :, None], offset[None, None, :]
    sigma = (2 * radius + 1).float() / 3
    value = torch.exp(-(dx * dx + dy * dy) / (2 * sigma * sigma)) * peak[:, None, None]
    x, y = centers[:, 0, None, None] + dx, centers[:, 1, None, None] + dy
    inside = (dx.abs() <= radius) & (dy.abs() <= radius) & (x >= 0) & (x < w) & (y >= 0) & (y < h)
    index = (
        plane.to(centers.device, non_blocking=True)[:, None, None] * (h * w) + y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
    )
    return heat.scatter_reduce_(0, index.flatten(), (value * inside).flatten(), reduce="amax").view(shape)


def center_targets(things: ThingTargets, assigned: Tensor, shape: torch.Size) -> Tensor:
    """Heat map of one level, (B, C, h, w).

    Args:
        things: the instances.
        assigned: (A,) instances of this level, on the CPU.
        shape: (B, C, h, w) of the level's centre logits.
    """
    _, channels, h, w = shape
    map_h, map_w = things.masks.shape[-2:]
    boxes = things.boxes[assigned]
    width = (boxes[:, 2] - boxes[:, 0]) * (w / (4 * map_w))
    height = (boxes[:, 3] - boxes[:, 1]) * (h / (4 * map_h))
    on_device = assigned.to(things.masks.device, non_blocking=True)
    x, y = things.centers[on_device].unbind(1)
    centers = torch.stack([x * (w / map_w), y * (h / map_h)], dim=1).long()
    plane = things.image[assigned] * channels + things.channel[assigned]
    radii = gaussian_radius(width, height).int()
    return draw_gaussians(shape, plane, centers, radii, things.visible[on_device])


def region_targets(stuff: StuffTargets, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Stuff regions of one level: soft scores (B, C, h, w), zero below 0.5, and (M,) whether a pair is on the level."""
    if len(stuff.image) == 0:
        return torch.zeros(shape, device=stuff.masks.device), torch.zeros(0, device=stuff.masks.device)
    scores = F.interpolate(stuff.masks[None], size=shape[-2:], mode="bilinear", align_corners=False)[0].clamp(max=1)
    scores = torch.where(scores < 0.5, 0.0, scores)
    dense = torch.zeros(shape, device=scores.device)
    dense[stuff.image.to(scores.device, non_blocking=True), stuff.channel.to(scores.device, non_blocking=True)] = scores
    return dense, (scores.flatten(1).amax(1) > 0).float()
