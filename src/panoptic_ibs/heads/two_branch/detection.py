"""From scored boxes to detections: thresholds and non-maximum suppression, one image at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from panoptic_ibs.ranges import AtLeastOne, NonNegative, Share


@dataclass(frozen=True)
class InferenceOptions:
    """Which boxes become instances.

    Attributes:
        score: least score.
        nms: a box that overlaps a better one by more than this IoU is dropped.
        across_classes: a better one of any class; else of its own.
        kept: most instances of an image.
        least_side: boxes with a shorter side, in pixels of the input, are dropped (torchvision); 0: only those without
            an area, and they count among ``kept`` (detectron2).
    """

    score: Share = 0.05
    nms: Share = 0.5
    across_classes: bool = False
    kept: AtLeastOne = 100
    least_side: NonNegative = 0.0


@dataclass
class Detections:
    """Things of one image, best first.

    Attributes:
        boxes: (N, 4) in pixels of the network's input.
        scores: (N,).
        labels: (N,) int64, detector labels from 1 on.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Detections:
        """Some of them."""
        return Detections(self.boxes[index], self.scores[index], self.labels[index])


def detections(places: Tensor, scores: Tensor, valid: Tensor, options: InferenceOptions) -> Detections:
    """Detections of one image.

    Args:
        places: (P, 4) boxes, or (P, T, 4), one for each class.
        scores: (P, T).
        valid: (P,) bool.
        options: see there.
    """
    finite = torch.isfinite(places).flatten(1).all(1) & torch.isfinite(scores).all(1)
    region, label = ((scores > options.score) & (valid & finite)[:, None]).nonzero(as_tuple=True)
    boxes, score = (places[region] if places.ndim == 2 else places[region, label]), scores[region, label]
    large = ((boxes[:, 2:] - boxes[:, :2]) >= options.least_side).all(1)
    boxes, score, label = boxes[large], score[large], label[large]
    group = torch.zeros_like(label) if options.across_classes else label
    kept = batched_nms(boxes, score, group, options.nms)[: options.kept]
    kept = kept[((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)[kept]]
    return Detections(boxes[kept], score[kept], label[kept] + 1)
