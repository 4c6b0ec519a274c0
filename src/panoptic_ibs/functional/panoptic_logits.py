"""Panoptic logits of UPSNet (Xiong et al., CVPR 2019): stuff, instances and "unknown" compete for every pixel.

The channels are the semantic logits of the stuff classes; for every instance, inside its box, the semantic logit of its
class plus its mask logit; and "unknown", the largest semantic logit of a thing class less the largest that an instance
took of them. Outside of its box an instance's part is 0.

A box is taken for the whole pixels that it touches, at least one (our reading).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.segments import SoftSegments
from panoptic_ibs.structures import ImageSize

from .fusion import scale_boxes

STRIP = 2**16  # pixels whose semantic logits are upsampled at a time on a CPU; they stay in its cache
STRIP_ELSEWHERE = 2**20
NEVER = -1e4  # a logit that wins nowhere

Window = tuple[int, int, int, int]


# --- training: planes of all instances, at the stride of the semantic logits


def cells(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First pixel, and the one behind the last, along an axis of ``size`` pixels, that [start, end) touches."""
    first = start.floor().clamp(0, size - 1)
    return first, torch.maximum(end.ceil(), first + 1).clamp(max=size)


def resize_weights(start: Tensor, end: Tensor, size: int, bins: int) -> tuple[Tensor, Tensor]:
    """Bilinear resizing of ``bins`` values to the pixels that an interval touches, as a matrix.

    Args:
        start: (..., N) of the intervals; end: (..., N).
        size: pixels of the axis.
        bins: values along it.

    Returns:
        (..., N, size, bins) weights, rows outside of the interval are zero; and (..., N, size) bool, inside.
    """
    first, last = cells(start, end, size)
    pixel = torch.arange(size, device=start.device)
    inside = (pixel >= first[..., None]) & (pixel < last[..., None])
    place = (pixel + 0.5 - first[..., None]) * (bins / (last - first))[..., None] - 0.5
    near = 1 - (place.clamp(0, bins - 1)[..., None] - torch.arange(bins, device=start.device)).abs()
    return near.clamp(min=0) * inside[..., None], inside


def panoptic_logits(
    semantic: Tensor, stuff: int, channels: Tensor, boxes: Tensor, masks: Tensor, kept: Tensor, closed: bool = False
) -> Tensor:
    """Panoptic logits of B crops with G places for instances.

    Args:
        semantic: (B, K, h, w), the stuff classes first.
        stuff: their number.
        channels: (B, G) int64, semantic channel of each instance's class.
        boxes: (B, G, 4) in pixels of the maps.
        masks: (B, G, M, M) mask logits in the boxes.
        kept: (B, G) bool, the instances there are; the others' channels win nowhere.
        closed: an instance wins nowhere outside of its box.

    Returns:
        (B, stuff + G + 1, h, w) float32, "unknown" last. Without thing classes "unknown" wins nowhere.
    """
    semantic, (height, width) = semantic.float(), semantic.shape[-2:]
    down, rows = resize_weights(boxes[..., 1], boxes[..., 3], height, masks.shape[-2])
    across, columns = resize_weights(boxes[..., 0], boxes[..., 2], width, masks.shape[-1])
    inside = rows[..., None] & columns[..., None, :]
    index = channels[..., None, None].expand(-1, -1, height, width)
    part = semantic.gather(1, index) * inside
    instances = part + down @ masks.float() @ across.mT
    if closed:
        instances = instances.masked_fill(~inside, NEVER)
    instances = instances.masked_fill(~kept[..., None, None], NEVER)
    if semantic.shape[1] == stuff:
        return torch.cat([semantic, instances, torch.full_like(semantic[:, :1], NEVER)], 1)
    taken = part.masked_fill(~kept[..., None, None], -torch.inf)
    # Without an instance nothing is taken.
    taken = F.pad(taken, (0, 0, 0, 0, 0, 1), value=-torch.inf).amax(1, keepdim=True)
    taken = torch.where(kept.any(1)[:, None, None, None], taken, 0)
    unknown = semantic[:, stuff:].amax(1, keepdim=True) - taken
    return torch.cat([semantic[:, :stuff], instances, unknown], 1)


# --- inference: no plane of an instance


@dataclass
class Winners:
    """Which channel wins each pixel.

    Attributes:
        label: (H, W) int32, 0 to S - 1 stuff channels, S + i instances, S + N "unknown".
        semantic: (H, W) int32 the best semantic channel.
    """

    label: Tensor
    semantic: Tensor


def touched(boxes: Tensor, size: tuple[int, int]) -> list[Window]:
    """(top, bottom, left, right) of the pixels of an image that boxes (N, 4) touch; the host waits for them."""
    left, right = cells(boxes[:, 0], boxes[:, 2], size[1])
    top, bottom = cells(boxes[:, 1], boxes[:, 3], size[0])
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in torch.stack([top, bottom, left, right], 1).tolist()]


def input_windows(soft: SoftSegments) -> list[Window]:
    """Those of an image's boxes in the network's input."""
    if soft.boxes is None or not len(soft):
        return []
    boxes = scale_boxes(soft.boxes, ImageSize(valid=soft.size.original, original=soft.size.valid))
    return touched(boxes, soft.size.valid)


def in_window(mask: Tensor, window: Window) -> Tensor:
    """Logits (M, M) resized to a window: (h, w)."""
    top, bottom, left, right = window
    return F.interpolate(mask[None, None].float(), size=(bottom - top, right - left), mode="bilinear")[0, 0]


def uncovered(
    masks: Tensor, labels: Tensor, windows: list[Window], size: tuple[int, int], overlap: float = 0.3
) -> Tensor:
    """Which instances are not hidden by better ones of their class (UPSNet's pruning).

    In the order given, one is dropped if its mask is empty, or if more than ``overlap`` of it lies in the masks kept
    before it of the same class.

    Args:
        masks: (N, M, M) logits, best first.
        labels: (N,) classes.
        windows: their boxes.
        size: (H, W) of the image.
        overlap: see above.

    Returns:
        (N,) bool.
    """
    kept = torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
    taken = torch.zeros(size, dtype=torch.bool, device=masks.device)
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        by_class.setdefault(label, []).append(i)
    for members in by_class.values():
        for i in members:
            top, bottom, left, right = windows[i]
            there, inside = taken[top:bottom, left:right], in_window(masks[i], windows[i]) > 0
            area = inside.sum()
            kept[i] = (area > 0) & ((inside & there).sum() <= overlap * area)
            there |= inside & kept[i]
        for i in members:
            top, bottom, left, right = windows[i]
            taken[top:bottom, left:right] = False
    return kept


def winners(
    semantic: Tensor,
    stuff: int,
    channels: Tensor,
    windows: list[Window],
    masks: Tensor,
    size: tuple[int, int],
    stride: int = 4,
    closed: bool = False,
) -> Winners:
    """Arg-max of the panoptic logits at full resolution; instances are looked at in their windows alone.

    Args:
        semantic: (K, h, w) logits at ``stride``, the stuff classes first.
        stuff: their number.
        channels: (N,) semantic channel of each instance's class.
        windows: (N,) their boxes.
        masks: (N, M, M) their mask logits.
        size: (H, W), upsampled semantic logits are cut to it.
        stride: of the semantic logits.
        closed: an instance wins nowhere outside of its box.
    """
    n, device = len(masks), semantic.device
    best, label, thing, semantic_label = _semantic_winners(semantic.float(), stuff, size, stride)
    if n:
        taken = torch.full(size, -torch.inf, device=device)
        covered, leading = (torch.zeros(size, dtype=torch.int16, device=device) for _ in range(2))
        for i, (channel, window) in enumerate(zip(channels.tolist(), windows, strict=True)):
            here = (slice(window[0], window[1]), slice(window[2], window[3]))
            part = _upsampled(semantic[channel].float(), window, stride)
            value = part + in_window(masks[i], window)
            label[here].masked_fill_(value > best[here], stuff + i)
            best[here], taken[here] = torch.maximum(best[here], value), torch.maximum(taken[here], part)
            covered[here] += 1
            leading[here] += leading[here] == i
        outside = covered < n  # of some box, where that instance's logit is 0; the first such one wins
        if not closed:
            wins = outside & (best < 0)
            label = torch.where(wins, leading.int() + stuff, label)
            best.masked_fill_(wins, 0.0)
        thing -= torch.where(outside, taken.clamp(min=0), taken)
    label.masked_fill_(thing > best, stuff + n)
    return Winners(label, semantic_label)


def label_planes(soft: SoftSegments, stuff: int, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Panoptic logits of some labels at the size of the network's input, one plane at a time.

    Args:
        soft: of kind ``"panoptic"``, in boxes.
        stuff: number of stuff channels, the first ones.
        wanted: labels as in :class:`Winners`.

    Yields:
        The label and its plane (H, W), in any order.
    """
    assert soft.semantic is not None
    assert soft.channels is not None
    n, size = len(soft), soft.size.valid
    whole = (0, size[0], 0, size[1])
    taken = soft.semantic.new_full(size, -torch.inf, dtype=torch.float32)
    thing, covered = torch.full_like(taken, NEVER), torch.zeros(size, dtype=torch.int16, device=taken.device)
    for channel, logits in enumerate(soft.semantic.float()):
        if channel >= stuff:
            thing = torch.maximum(thing, _upsampled(logits, whole, soft.stride))
        elif channel in wanted:
            yield channel, _upsampled(logits, whole, soft.stride)
    for i, (channel, window) in enumerate(zip(soft.channels.tolist(), input_windows(soft), strict=True)):
        here = (slice(window[0], window[1]), slice(window[2], window[3]))
        part = _upsampled(soft.semantic[channel].float(), window, soft.stride)
        taken[here] = torch.maximum(taken[here], part)
        covered[here] += 1
        if stuff + i in wanted:
            plane = torch.zeros_like(taken)
            plane[here] = part + in_window(soft.masks[i], window)
            yield stuff + i, plane
    taken = torch.where(covered < max(n, 1), taken.clamp(min=0), taken)
    yield stuff + n, (thing - taken).clamp(min=NEVER)


def _semantic_winners(
    semantic: Tensor, stuff: int, size: tuple[int, int], stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the upsampled semantic logits the best of stuff, its channel, the best of things, and the best channel."""
    device = semantic.device
    best, thing = (torch.empty(size, device=device) for _ in range(2))
    label, semantic_label = (torch.empty(size, dtype=torch.int32, device=device) for _ in range(2))
    for rows in _strips(size, stride, semantic.is_cpu):
        full = _upsampled(semantic, (rows.start, rows.stop, 0, size[1]), stride)
        value, index = _best(full[:stuff])
        other, other_index = _best(full[stuff:])
        best[rows], label[rows], thing[rows] = value, index.int(), other
        semantic_label[rows] = torch.where(other > value, other_index + stuff, index).int()
    return best, label, thing, semantic_label


def _best(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of some maps and which it is; nothing, where there are none."""
    if len(maps):
        value, index = maps.max(0)
        return value, index
    return maps.new_full(maps.shape[1:], -torch.inf), torch.zeros(maps.shape[1:], dtype=torch.long, device=maps.device)


def _strips(size: tuple[int, int], stride: int, cpu: bool) -> Iterator[slice]:
    rows = max((STRIP if cpu else STRIP_ELSEWHERE) // size[1] // stride * stride, stride)
    for top in range(0, size[0], rows):
        yield slice(top, min(top + rows, size[0]))


def _upsampled(maps: Tensor, window: Window, stride: int) -> Tensor:
    """A window of maps (..., h, w) upsampled by ``stride`` (bilinear): (..., bottom - top, right - left)."""
    top, bottom, left, right = window
    low, first = max(top // stride - 1, 0), max(left // stride - 1, 0)
    part = maps[..., low : -(-bottom // stride) + 1, first : -(-right // stride) + 1]
    lead = part.shape[:-2]
    full = F.interpolate(part.reshape(1, -1, *part.shape[-2:]), scale_factor=stride, mode="bilinear")
    top, left, bottom, right = (v - stride * w for v, w in ((top, low), (left, first), (bottom, low), (right, first)))
    return full[0, :, top:bottom, left:right].reshape(*lead, bottom - top, right - left)
