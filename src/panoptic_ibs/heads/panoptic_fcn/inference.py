"""Inference of Panoptic FCN: peaks, kernel fusion, rescoring, panoptic combination; one image at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.ranges import AtLeastOne, Cosine, Items, Share, Whole

from .losses import pool_regions


@dataclass(frozen=True)
class InferenceOptions:
    """Thresholds of inference; the defaults are the published ones for Cityscapes.

    Attributes:
        center_threshold: least score of a centre (COCO 0.05, Cityscapes 0.01, Vistas 0.2).
        top_num: instances kept; each level gives at most half of it (COCO 100, else 200).
        region_threshold: least mean score of a stuff region on a level (COCO 0.05, else 0.1).
        similarity: cosine above which kernels of one class are one instance (COCO 0.9, Cityscapes 0.97, Vistas 0.95).
        mask_threshold: probability above which a pixel is in an instance (COCO 0.4, else 0.5).
        min_score: instances below this rescored score are dropped.
        instance_threshold: least score of an instance in the panoptic result.
        overlap: an instance with more than this share already covered is dropped.
        stuff_area: least area of a stuff segment in pixels (COCO 4096, else 2048).
        pool_sizes: average pool that smooths the centres, per level.
    """

    center_threshold: Share = 0.01
    top_num: AtLeastOne = 200
    region_threshold: Share = 0.1
    similarity: Cosine = 0.97
    mask_threshold: Share = 0.5
    min_score: Share = 0.05
    instance_threshold: Share = 0.2
    overlap: Share = 0.5
    stuff_area: Whole = 2048
    pool_sizes: Annotated[Sequence[AtLeastOne], Items(5)] = (3, 3, 3, 5, 5)


def find_centers(
    centers: Sequence[Tensor], kernels: Sequence[Tensor], options: InferenceOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels (N, K), thing channels (N,) and scores (N,) of the peaks of all levels, best first.

    Args:
        centers: (C, h, w) logits per level; kernels: (K, h, w) per level.
    """
    found = []
    for logits, kernel, pool in zip(centers, kernels, options.pool_sizes, strict=True):
        score = logits.float().sigmoid()[None]
        score = (score + F.avg_pool2d(score, pool, stride=1, padding=(pool - 1) // 2)) / 2
        score = score * (F.max_pool2d(score, 3, stride=1, padding=1) == score)
        places = score.shape[-1] * score.shape[-2]
        best, index = score.flatten().topk(min(places, options.top_num // 2))
        keep = best > options.center_threshold
        best, index = best[keep], index[keep]
        found.append((kernel.flatten(1)[:, index % places].T, index // places, best))
    kernel, channel, best = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = best.argsort(descending=True, stable=True)
    return kernel[order], channel[order], best[order]


def fuse_kernels(
    embeddings: Tensor, channels: Tensor, scores: Tensor, similarity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the embeddings of one class that point the same way; the best-scored of a group lends class and score.

    In the order of scores, an embedding that is similar to no earlier one opens a group. Any other one joins the group
    of the first earlier one that it is similar to, if that one has opened a group, and is dropped otherwise: chains
    are not followed, as in the published program.

    Args:
        embeddings: (N, C), best first; channels (N,); scores (N,).
    """
    unit = F.normalize(embeddings, dim=1, eps=1e-8)
    alike = ((unit @ unit.T) >= similarity).triu() & (channels[:, None] == channels)
    alike |= torch.eye(len(unit), dtype=torch.bool, device=unit.device)  # rounding must not part a row from itself
    first = alike.cumsum(0) < 2
    opens = first.diagonal()
    member = (alike & first)[opens].to(embeddings.dtype)
    return member @ embeddings / member.sum(1, keepdim=True), channels[opens], scores[opens]


def find_regions(
    regions: Sequence[Tensor], kernels: Sequence[Tensor], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels (M, K), stuff channels (M,) and scores (M,) of the regions of all levels.

    A level's region of a channel is where the channel has the highest score; its score is the mean there.
    """
    found = []
    for logits, kernel in zip(regions, kernels, strict=True):
        score = logits.float().sigmoid()
        label = score.argmax(dim=0)
        masks = F.one_hot(label, score.shape[0]).permute(2, 0, 1).float()
        area = masks.flatten(1).sum(1)
        mean = (score * masks).flatten(1).sum(1) / area.clamp(min=1)
        channel = ((area > 0) & (mean > threshold)).nonzero().squeeze(1)
        found.append((pool_regions(masks[None, channel], kernel[None])[0], channel, mean[channel]))
    kernel, channel, mean = (torch.cat(parts) for parts in zip(*found, strict=True))
    return kernel, channel, mean


def merge_regions(embeddings: Tensor, channels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average embeddings and scores of each channel over the levels; channels come out sorted."""
    if not len(channels):  # no region passed the threshold, or there is no stuff
        return embeddings, channels, scores
    unique, group = channels.unique(return_inverse=True)
    member = F.one_hot(group, len(unique)).T.to(embeddings.dtype)
    share = member / member.sum(1, keepdim=True).clamp(min=1)
    return share @ embeddings, unique, share.float() @ scores


def rescore(logits: Tensor, scores: Tensor, options: InferenceOptions) -> tuple[Tensor, Tensor]:
    """Scores and former positions of the instances worth pasting, best first.

    The score of a centre is multiplied by the mean probability inside the mask. Filtering comes before any upsampling.

    Args:
        logits: (N, h, w); scores: (N,).
    """
    masks = logits.float().sigmoid()
    inside = masks > options.mask_threshold
    scores = scores * (masks * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    order = scores.argsort(descending=True, stable=True)[: options.top_num]
    order = order[scores[order] >= max(options.min_score, options.instance_threshold)]
    return scores[order], order
