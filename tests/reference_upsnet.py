"""UPSNet's panoptic head by its description: one plane of full resolution an instance, loops over instances."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def window(box: list[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """top, bottom, left, right of the pixels that a box touches, at least one."""
    edges = []
    for start, end, length in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        first = min(max(math.floor(start), 0), length - 1)
        edges += [first, min(max(math.ceil(end), first + 1), length)]
    return edges[0], edges[1], edges[2], edges[3]


def plane(mask: Tensor, box: list[float], size: tuple[int, int]) -> Tensor:
    """Mask logits resized to their box, zero outside."""
    top, bottom, left, right = window(box, size)
    result = torch.zeros(size)
    resized = F.interpolate(mask[None, None], size=(bottom - top, right - left), mode="bilinear", align_corners=False)
    result[top:bottom, left:right] = resized[0, 0]
    return result


def crop(plane_: Tensor, box: list[float], size: tuple[int, int]) -> Tensor:
    """A plane, zero outside of the box."""
    top, bottom, left, right = window(box, size)
    result = torch.zeros(size)
    result[top:bottom, left:right] = plane_[top:bottom, left:right]
    return result


def logits(semantic: Tensor, stuff: int, channels: list[int], boxes: list[list[float]], masks: Tensor) -> Tensor:
    """All channels: stuff, instances, unknown; semantic (K, H, W) at the size of the result."""
    size = (semantic.shape[1], semantic.shape[2])
    things = [crop(semantic[c], box, size) for c, box in zip(channels, boxes, strict=True)]
    instances = [x + plane(m, box, size) for x, m, box in zip(things, masks, boxes, strict=True)]
    most = torch.stack(things).amax(0) if things else torch.zeros(size)
    unknown = semantic[stuff:].amax(0) - most
    return torch.stack([*semantic[:stuff], *instances, unknown])


def pruned(masks: Tensor, labels: list[int], boxes: list[list[float]], size: tuple[int, int], most: float) -> list[int]:
    """Instances kept, best first: not empty, and not hidden by better ones of their class."""
    taken: dict[int, Tensor] = {}
    kept = []
    for i, label in enumerate(labels):
        inside = plane(masks[i], boxes[i], size) > 0
        before = taken.setdefault(label, torch.zeros(size, dtype=torch.bool))
        if not inside.any() or (inside & before).sum() / inside.sum() > most:
            continue
        before |= inside
        kept.append(i)
    return kept
