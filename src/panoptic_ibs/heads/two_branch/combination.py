"""The heuristic combination (Kirillov et al., 2019): things by score where no better one is, stuff on what is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from panoptic_ibs.functional.box_masks import paste
from panoptic_ibs.functional.fusion import combine
from panoptic_ibs.ranges import Share, Whole
from panoptic_ibs.segments import Prediction, SoftSegments


@dataclass(frozen=True)
class CombinationOptions:
    """Thresholds of the combination; the defaults are panopticapi's and detectron2's.

    Attributes:
        score: least score of a thing (mmdetection 0.6).
        mask_threshold: probability above which a pixel is in a mask.
        overlap: a thing is dropped if better ones cover more than this share of its mask (UPSNet 0.3).
        stuff_area: least area of a stuff segment, in pixels of the original image (COCO 4096, Cityscapes 2048).
        whole_stuff: count what things cover as well (UPSNet).
    """

    score: Share = 0.5
    mask_threshold: Share = 0.5
    overlap: Share = 0.5
    stuff_area: Whole = 4096
    whole_stuff: bool = False


def combined(soft: SoftSegments, options: CombinationOptions) -> Prediction:
    """An id map from masks of things, best first, and semantic logits.

    Args:
        soft: masks of things, in boxes or (refined ones) of the whole image, and ``semantic`` with
            ``semantic_classes`` (-1 for channels of things), or without stuff.
        options: see there. Things are chosen by ``score`` before, when the masks are made.
    """
    boxes, masks, device = soft.boxes, soft.masks.sigmoid(), soft.masks.device
    late = boxes is not None and soft.in_boxes
    stuff, classes = soft.semantic, soft.semantic_classes
    if stuff is None or classes is None:
        stuff, classes = soft.masks.new_zeros(0, 1, 1), soft.class_ids[:0]
    found = combine(
        torch.arange(len(masks), device=device) if late else masks,
        soft.class_ids,
        soft.scores,
        stuff,
        classes,
        torch.ones(len(stuff), device=device),
        soft.size,
        mask_threshold=options.mask_threshold,
        overlap=options.overlap,
        stuff_area=options.stuff_area,
        stride=soft.stride,
        paste=(lambda rows: paste(masks[rows], boxes[rows], soft.size.original)) if late else None,  # type: ignore[index]
        whole_stuff=options.whole_stuff,
    )
    return Prediction(*found, instances=soft.instances)
