"""From proposals and pixel embeddings to a panoptic prediction (Gao et al., 2020, Section IV-C)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional.fusion import upsample
from panoptic_ibs.functional.upsampling import label_shares
from panoptic_ibs.ranges import AtLeastOne, Cosine, Share, Whole
from panoptic_ibs.segments import SoftSegments
from panoptic_ibs.structures import ImageSize, Target

CHUNK = 8  # similarity maps brought to full size at a time


@dataclass(frozen=True)
class InferenceOptions:
    """Thresholds of inference; the paper gives ``stuff_area`` alone, the others are FCOS's and ours.

    Attributes:
        score_threshold: least score of a proposal: the square root of class probability times centre-ness.
        nms_threshold: IoU above which the lower-scored of two proposals is dropped.
        agnostic_nms: compare proposals of different classes too, so that no object is proposed under two classes.
        duplicates: ours: drop a proposal if the query of a better one, whose box holds it, is more similar than this.
            The triplet loss puts pixels of one instance near cosine 1, of two below ``1 - margin``. None: keep them.
        per_level: candidates a level before the suppression.
        proposals: proposals an image.
        stuff_area: least area of a stuff segment in pixels of the original image.
        oracle: take boxes, masks and classes of the instances from the ground truth (Table V).
    """

    score_threshold: Share = 0.4
    nms_threshold: Share = 0.6
    agnostic_nms: bool = True
    duplicates: Cosine | None = None
    per_level: AtLeastOne = 1000
    proposals: AtLeastOne = 100
    stuff_area: Whole = 4096
    oracle: bool = False


@dataclass
class Queries:
    """Query embeddings of the things of one image.

    Attributes:
        embeddings: (N, D) of unit length.
        boxes: (N, 4) in pixels of the original image.
        class_ids: (N,) contiguous classes.
        scores: (N,).
        points: (N, 2) x and y, in pixels of the original image, of the centres of the pixels that they were read from;
            None in oracle mode, where they are means.
    """

    embeddings: Tensor
    boxes: Tensor
    class_ids: Tensor
    scores: Tensor
    points: Tensor | None = None


def first_of_duplicates(embeddings: Tensor, boxes: Tensor, points: Tensor, similarity: float) -> Tensor:
    """Positions of the proposals that repeat no better one: not in its box with a more than so similar query.

    Args:
        embeddings: (N, D) unit queries, best first; boxes (N, 4) and points (N, 2) in the same pixels.
    """
    x, y = points.to(boxes.dtype).unbind(1)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    repeats = (embeddings @ embeddings.T > similarity) & inside
    return (~repeats.triu(diagonal=1).any(0)).nonzero().squeeze(1)


def oracle_queries(maps: Tensor, target: Target, size: ImageSize) -> Queries:
    """Mean embeddings within the ground-truth masks (Table V); an instance too small for a pixel is left out.

    Args:
        maps: (D, h, w) embeddings at stride 4 of the padded input.
        target: with an id map of the original size.
    """
    height, width = 4 * maps.shape[-2], 4 * maps.shape[-1]
    rows = (target.is_thing & ~target.is_crowd & (target.areas > 0)).nonzero().squeeze(1)
    label = torch.full((len(target) + 1,), -1)
    label[rows + 1] = torch.arange(len(rows))
    labels = label.to(maps.device)[target.id_map.to(maps.device).long()]
    # The values are labels, far below 2^24: exact in float32.
    labels = F.interpolate(labels[None, None].float(), size=size.valid, mode="nearest-exact")[0, 0].long()
    labels = F.pad(labels, (0, width - labels.shape[1], 0, height - labels.shape[0]), value=-1)
    sums = label_shares(labels, len(rows), dtype=maps.dtype).flatten(1) @ maps.flatten(1).T
    kept = (sums.norm(dim=1) > 0).nonzero().squeeze(1)
    chosen = rows[kept.cpu()]
    return Queries(
        F.normalize(sums[kept], dim=1),
        target.boxes[chosen].to(maps.device),
        target.class_ids[chosen].to(maps.device),
        torch.ones(len(chosen), device=maps.device),
    )


def _best(maps: Tensor, size: ImageSize, boxes: Tensor | None, stride: int = 4) -> tuple[Tensor, Tensor]:
    """Highest value and its index, (H, W) each, of (N, h, w) maps at the original size, a few maps at a time.

    Outside its box a map cannot win.
    """
    best = torch.full(size.original, -torch.inf, dtype=maps.dtype, device=maps.device)
    label = torch.full(size.original, -1, dtype=torch.int32, device=maps.device)
    x = torch.arange(size.original[1], device=maps.device) + 0.5
    y = torch.arange(size.original[0], device=maps.device) + 0.5
    for start in range(0, len(maps), CHUNK):
        full = upsample(maps[start : start + CHUNK], size, stride)
        if boxes is not None:
            left, upper, right, lower = boxes[start : start + CHUNK, :, None].unbind(1)
            inside = ((y >= upper) & (y <= lower))[:, :, None] & ((x >= left) & (x <= right))[:, None]
            full = full.masked_fill(~inside, -torch.inf)
        value, index = full.max(dim=0)
        better = value > best
        label = torch.where(better, (index + start).int(), label)
        best = torch.where(better, value, best)
    return best, label


def fuse(soft: SoftSegments, stuff_area: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give every pixel to the most similar instance or stuff class (Eq. 16), drop small stuff.

    Similarities at stride 4 are upsampled instead of embeddings: upsampling is linear.

    Args:
        soft: the instances, within their boxes, then the stuff classes; or semantic logits in place of those
            (Table III), whose channel 0 stands for things.
        stuff_area: least area of a stuff segment.

    Returns:
        (H, W) int32 id map, class ids (S,) and scores (S,) of its segments.
    """
    n, size, stuff_classes = soft.things, soft.size, soft.class_ids[soft.things :]
    best, owner = _best(soft.masks[:n], size, soft.boxes, soft.stride)
    if soft.semantic is not None and soft.semantic_classes is not None:
        _, region = _best(soft.semantic, size, None, soft.stride)
        label = torch.where(region > 0, region - 1 + n, owner)  # a thing's pixel outside all boxes stays void
        stuff_classes = soft.semantic_classes[1:]
    elif len(soft) > n:
        stuff_best, region = _best(soft.masks[n:], size, None, soft.stride)
        label = torch.where(best >= stuff_best, owner, region + n)
    else:
        label = owner
    classes = torch.cat([soft.class_ids[:n], stuff_classes])
    scores = torch.cat([soft.scores[:n], torch.ones_like(stuff_classes, dtype=soft.scores.dtype)])
    areas = torch.bincount((label + 1).flatten(), minlength=len(classes) + 1)[1:]
    keep = areas > 0
    keep[n:] &= areas[n:] >= stuff_area
    rank = torch.zeros(len(classes) + 1, dtype=torch.int32, device=label.device)
    rank[1:] = torch.where(keep, keep.cumsum(0), 0).int()
    return rank[(label + 1).long()], classes[keep], scores[keep]
