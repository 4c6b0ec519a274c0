"""UPSNet's panoptic head (Xiong et al., CVPR 2019): its training on true boxes, and its rules of inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.functional.fusion import running_argmax, upsample
from panoptic_ibs.functional.panoptic_logits import input_windows, panoptic_logits, uncovered, winners
from panoptic_ibs.functional.ragged import padded
from panoptic_ibs.ranges import AtLeastOne, Share, Whole
from panoptic_ibs.segments import Prediction, SoftSegments
from panoptic_ibs.structures import ImageSize, Target, id_map_dtype

from .class_map import ClassMap
from .targets import InstanceTargets, copied

STRIDE = 4  # of the semantic logits
IGNORED = -100
CHUNK = 8


@dataclass(frozen=True)
class PanopticOptions:
    """The panoptic head; the defaults are UPSNet's.

    Attributes:
        kept_share: of the things of a crop that are instances in training, at least one; the others train "unknown".
        score: least score of a thing at test.
        nms: a thing is dropped if its box overlaps that of a better one, of any class, by more than this IoU.
        kept: most things of an image.
        overlap: a thing is dropped if better ones of its class cover more than this share of its mask.
        majority: an instance in whose region the semantic branch sees most often a class of stuff, in at least this
            share of it, becomes that stuff.
        stuff_area: least area of a stuff segment, in pixels of the original image (COCO 4096, Cityscapes 2048).
        closed: an instance's logit is out of the question outside of its box; as published it is 0 there.
    """

    kept_share: Share = 0.7
    score: Share = 0.6
    nms: Share = 0.5
    kept: AtLeastOne = 100
    overlap: Share = 0.3
    majority: Share = 0.5
    stuff_area: Whole = 4096
    closed: bool = False


# --- training


def chosen_things(valid: Tensor, share: float) -> Tensor:
    """A random choice of each crop's things: the whole part of ``share`` of their number, at least one.

    Args:
        valid: (B, G) bool, what is a thing.
        share: see above.

    Returns:
        (B, G) bool.
    """
    wanted = (valid.sum(1) * share + 1e-4).floor().clamp(min=1)  # 0.7 x 10 is 7, whatever the rounding
    drawn = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, 2.0)
    return (drawn.argsort(1).argsort(1) < wanted[:, None]) & valid


def panoptic_labels(targets: Sequence[Target], things: InstanceTargets, kept: Tensor, classes: ClassMap) -> Tensor:
    """The channel of the panoptic logits that each pixel should win, from the panoptic maps.

    Stuff has its channel; a kept thing its own; other things, crowds among them, are "unknown"; void is ignored.

    Args:
        targets: B crops.
        things: of them, with G places.
        kept: (B, G) bool.
        classes: the maps of classes, of all channels.

    Returns:
        (B, H / 4, W / 4) int64, 0 to S - 1 stuff, S to S + G - 1 things, S + G unknown, -100 for void. The pixel in the
        middle of a cell speaks for it.
    """
    stuff, places = int(classes.stuff_channels.sum()), kept.shape[1]
    unknown = stuff + places
    is_thing, names = torch.cat([t.is_thing for t in targets]), torch.cat([t.class_ids for t in targets])
    channels = torch.where(is_thing, unknown, classes.channel_of_class[names])
    table = F.pad(padded(channels.split([len(t) for t in targets]), IGNORED), (1, 0), value=IGNORED)
    table = copied(table, kept.device)
    own = torch.where(kept, torch.arange(stuff, unknown, device=kept.device), unknown)
    table.scatter_(1, things.rows + 1, own)  # filling has row -1: it writes on void's entry
    table[:, 0] = IGNORED
    half = STRIDE // 2
    cells = things.id_maps[:, half::STRIDE, half::STRIDE]
    return table.gather(1, cells.flatten(1).long()).view(cells.shape)


def panoptic_loss(
    semantic: Tensor, masks: Tensor, things: InstanceTargets, labels: Tensor, kept: Tensor, classes: ClassMap,
    closed: bool = False,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the panoptic logits, averaged over the labelled cells of all ranks.

    Args:
        semantic: (B, K, H / 4, W / 4) logits.
        masks: (B, G, M, M) mask logits in the true boxes.
        things: of the crops.
        labels: of :func:`panoptic_labels`.
        kept: (B, G) bool, the same.
        classes: the maps of classes.
        closed: see :class:`PanopticOptions`.
    """
    stuff = int(classes.stuff_channels.sum())
    channels = (things.labels - 1).clamp(min=0) + stuff  # things follow stuff, in the detector's order
    channels = channels.clamp(max=semantic.shape[1] - 1)
    with torch.autocast(semantic.device.type, enabled=False):
        logits = panoptic_logits(semantic, stuff, channels, things.boxes / STRIDE, masks.float(), kept, closed)
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / normalizer((labels != IGNORED).sum(), total)


# --- inference


def without_hidden(soft: SoftSegments, options: PanopticOptions) -> SoftSegments:
    """The segments without those that better ones of their class hide."""
    if not len(soft):
        return soft
    kept = uncovered(soft.masks, soft.class_ids, input_windows(soft), soft.size.valid, options.overlap)
    assert soft.boxes is not None
    assert soft.channels is not None
    return replace(
        soft, masks=soft.masks[kept], class_ids=soft.class_ids[kept], is_thing=soft.is_thing[kept.cpu()],
        scores=soft.scores[kept], boxes=soft.boxes[kept], channels=soft.channels[kept],
    )  # fmt: skip


def unified(soft: SoftSegments, stuff: int, options: PanopticOptions) -> Prediction:
    """An id map from segments of kind ``"panoptic"``.

    Those in boxes compete by their panoptic logits. Maps of the whole image, as the dense CRF leaves them (stuff,
    things, "unknown"), compete as they are. An instance where the semantic branch sees stuff is turned into it, and
    small stuff is dropped.

    Args:
        soft: the segments, and the semantic logits, stuff first.
        stuff: number of stuff channels, of segments in boxes.
        options: see there.
    """
    size = soft.size
    assert soft.semantic is not None
    assert soft.semantic_classes is not None
    if soft.in_boxes:
        assert soft.channels is not None
        found = winners(
            soft.semantic,
            stuff,
            soft.channels,
            input_windows(soft),
            soft.masks,
            size.valid,
            soft.stride,
            options.closed,
        )
        label, semantic = (nearest(x, size).long() for x in (found.label, found.semantic))
        n, one = len(soft), soft.scores.new_ones(1)
        names = torch.cat([soft.semantic_classes[:stuff], soft.class_ids, soft.class_ids.new_tensor([-1])])
        scores = torch.cat([one.expand(stuff), soft.scores, 0 * one])
    else:
        label, semantic = (
            running_argmax(maps, lambda m: upsample(m, size, soft.stride), size.original, CHUNK)
            for maps in (soft.masks, soft.semantic)
        )
        n, names, scores = soft.things, soft.class_ids, soft.scores
        stuff = len(names) - n - 1
    own = torch.arange(stuff + n + 1, device=label.device)
    own[stuff : stuff + n] = _by_majority(label, semantic, stuff, n, len(soft.semantic), options.majority)
    return Prediction(*_segments(own[label], names, stuff, n, scores, options), instances=soft.instances)


def nearest(labels: Tensor, size: ImageSize) -> Tensor:
    """(h, w) labels of the network's input at the original size (H, W)."""
    if size.valid == size.original:
        return labels
    axes = [
        ((torch.arange(full, device=labels.device) + 0.5) * (part / full)).long().clamp(max=part - 1)
        for part, full in zip(size.valid, size.original, strict=True)
    ]
    return labels[axes[0]][:, axes[1]]


def _by_majority(label: Tensor, semantic: Tensor, stuff: int, n: int, channels: int, least: float) -> Tensor:
    """(N,) what each instance's label becomes: its own, or the stuff that fills its region.

    Args:
        label: (H, W) int64, instances from ``stuff`` on.
        semantic: (H, W) int64 semantic channels.
        stuff: number of stuff channels.
        n: number of instances.
        channels: of the semantic branch.
        least: share of the region.
    """
    inside = (label >= stuff) & (label < stuff + n)
    seen = (label[inside] - stuff) * channels + semantic[inside]
    counts = torch.bincount(seen, minlength=n * channels).view(n, channels)
    most, which = counts.max(1) if n else (counts.sum(1), counts.sum(1))
    turned = (which < stuff) & (most >= least * counts.sum(1)) & (most > 0)
    return torch.where(turned, which, torch.arange(stuff, stuff + n, device=label.device))


def _segments(
    label: Tensor, classes: Tensor, stuff: int, n: int, scores: Tensor, options: PanopticOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Id map, classes and scores from labels (H, W): void is where the class is -1 or stuff is small; things first."""
    area = torch.bincount(label.flatten(), minlength=len(classes))
    keep = (area > 0) & (classes >= 0)
    keep[:stuff] &= area[:stuff] >= options.stuff_area
    own = torch.arange(len(classes), device=label.device)
    order = torch.cat([own[stuff : stuff + n], own[:stuff]])
    order = order[keep[order]]
    rank = torch.zeros(len(classes), dtype=id_map_dtype(len(order)), device=label.device)
    rank[order] = torch.arange(1, len(order) + 1, device=label.device).to(rank.dtype)
    return rank[label], classes[order], scores[order]
