"""Boundary PQ: panoptic quality that asks for good outlines (Cheng et al., "Boundary IoU", 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.functional.overlap import joint_histogram
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

from .overlap import Array, SegmentOverlap, segment_overlap
from .panoptic import SegmentMetric
from .statistics import QualityStatistic

BOUNDARY_RATIO = 0.02  # of the image's diagonal, the published width


def boundary_width(size: tuple[int, int], ratio: float = BOUNDARY_RATIO) -> int:
    """Width in pixels of the boundary zone of an image (height, width): ``ratio`` of its diagonal, at least 1."""
    return max(1, round(ratio * float(np.hypot(*size))))


def boundary_zone(id_map: Array, width: int) -> Array:
    """(H, W) bool: pixels that leave their segment when it is eroded ``width`` times by a 3 x 3 square.

    That is, pixels with a pixel of another id, or the outside of the image, at most ``width`` rows and columns away.
    All segments at once: the chessboard distance to the nearest pixel that has another id for a neighbour.
    """
    inner = np.zeros(id_map.shape, np.uint8)
    if min(id_map.shape) > 2:
        low, high = (_extremum(id_map, f) for f in (np.minimum, np.maximum))
        inner[1:-1, 1:-1] = low == high
    if not inner.any():
        return np.ones(id_map.shape, bool)
    distance: Array = cv2.distanceTransform(inner, cv2.DIST_C, 3)
    zone: Array = distance < width
    return zone


def _extremum(ids: Array, function: np.ufunc) -> Array:
    """(H - 2, W - 2) minimum or maximum over the 3 x 3 squares."""
    rows = function(function(ids[:-2], ids[1:-1]), ids[2:])
    result: Array = function(function(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    return result


@dataclass(frozen=True)
class BoundaryOverlap(SegmentOverlap):
    """A :class:`SegmentOverlap` whose matches are judged by the smaller of mask IoU and boundary IoU.

    Attributes:
        zones: (G + 2, P + 1) int64 pixel counts of the boundary zones alone. Column 0 is everything outside the zones
            of the predictions; row 0 is void of the ground truth, the last row what of its segments is outside their
            zones.
    """

    zones: Array

    @cached_property
    def pairs(self) -> tuple[Array, Array, Array]:
        """As for masks: same class, no crowd, IoU above 0.5; void pixels are taken out of both unions."""
        rows, columns, ious = super().pairs
        shared = self.zones[1:-1, 1:][rows, columns]
        target, predicted = self.zones[1:-1].sum(1)[rows], (self.zones[1:, 1:].sum(0))[columns]
        union = target + predicted - shared
        matched = 2 * shared > union
        smaller = np.minimum(ious, shared / np.maximum(union, 1))
        return rows[matched], columns[matched], smaller[matched]


def boundary_overlap(
    prediction: Prediction, target: Target, num_classes: int, ratio: float = BOUNDARY_RATIO
) -> BoundaryOverlap:
    """Count the shared pixels of segments and of their boundary zones in one image, on the CPU.

    Raises:
        ValueError: as :func:`panoptic_ibs.metrics.overlap.segment_overlap`.
    """
    overlap = segment_overlap(prediction, target, num_classes)
    true, predicted = target.id_map.cpu().numpy(), prediction.id_map.cpu().numpy()
    zones = boundary_table(true, predicted, len(target), len(prediction), ratio)
    return BoundaryOverlap(
        overlap.table, overlap.target_classes, overlap.target_crowd, overlap.predicted_classes, zones
    )


def boundary_table(true: Array, predicted: Array, num_true: int, num_predicted: int, ratio: float) -> Array:
    """``BoundaryOverlap.zones`` of two dense id maps (H, W)."""
    width = boundary_width((true.shape[0], true.shape[1]), ratio)
    rows = np.where(boundary_zone(true, width) | (true == 0), true.astype(np.int32), num_true + 1)
    columns = np.where(boundary_zone(predicted, width), predicted, 0).astype(np.int32)
    table: Array = joint_histogram(
        torch.from_numpy(rows), torch.from_numpy(columns), num_true + 1, num_predicted
    ).numpy()
    return table


class BoundaryStatistic(QualityStatistic):
    """Sums and results of boundary PQ, under names of their own."""

    KEYS = ("pq", "sq", "rq")

    def zeros(self) -> dict[str, Array]:
        """Sums before the first image: (C,) each."""
        return {f"boundary_{k}": v for k, v in super().zeros().items() if not k.startswith("pixels")}

    def counts(self, overlap: SegmentOverlap) -> dict[str, Array]:
        """What one image adds."""
        return {f"boundary_{k}": v for k, v in super().counts(overlap).items() if not k.startswith("pixels")}

    def result(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """``boundary_pq boundary_sq boundary_rq`` (also ``_things``, ``_stuff``) and ``boundary_per_class``."""
        plain = {k.removeprefix("boundary_"): v for k, v in sums.items()}
        result = super().result(QualityStatistic.zeros(self) | plain)
        per_class = {
            name: {k: row[k] for k in (*self.KEYS, "tp", "fp", "fn")} for name, row in result["per_class"].items()
        }
        means = {f"boundary_{k}": v for k, v in result.items() if k.partition("_")[0] in self.KEYS}
        return means | {"boundary_per_class": per_class}


class BoundaryQuality(SegmentMetric):
    """Boundary PQ: PQ in which the IoU of two segments is the smaller of their mask IoU and their boundary IoU.

    The boundary IoU is the IoU of the two boundary zones: the pixels of a segment that are at most ``ratio`` of the
    image's diagonal away from its outline (:func:`boundary_zone`). Matching, crowds, void and means are those of
    :class:`PanopticQuality`; predicted zone pixels on void are taken out of the union.

    ``compute`` returns ``boundary_pq boundary_sq boundary_rq`` (also with ``_things`` and ``_stuff``),
    ``boundary_per_class`` and ``num_images``.

    Args:
        classes: the class table.
        ratio: width of the zone as a share of the diagonal; 0.02 is the published one.
    """

    higher_is_better = True
    num_images: Tensor

    def __init__(self, classes: ClassTable, ratio: float = BOUNDARY_RATIO, **kwargs: Any) -> None:
        super().__init__(classes, [BoundaryStatistic(classes)], **kwargs)
        self.ratio = ratio

    def overlap(self, prediction: Prediction, target: Target) -> SegmentOverlap:
        """What the statistics count in one image."""
        return boundary_overlap(prediction, target, len(self.classes), self.ratio)
