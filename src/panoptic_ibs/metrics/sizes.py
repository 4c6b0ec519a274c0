"""Panoptic quality by the size of the segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from panoptic_ibs.classes import ClassTable

from .overlap import Array, SegmentOverlap
from .statistics import SIZE_LIMITS, SIZES, mean_where, quality


class SizeQualityStatistic:
    """PQ, SQ and RQ of small, medium and large segments (COCO's areas: below 32^2 pixels, below 96^2, the rest).

    The matching is that of PQ over all sizes. A match and a miss count at the size of the ground-truth segment, a
    false prediction at its own size, void included. One prediction that swallows ten small cars is thus one *large*
    false positive and ten *small* misses. Means are over the classes that occur at the size; 0 where none does.
    """

    def __init__(self, classes: ClassTable) -> None:
        self.is_thing = np.array(classes.is_thing)

    def zeros(self) -> dict[str, Array]:
        """Sums before the first image: (C, 3) each."""
        shape = (len(self.is_thing), len(SIZES))
        counts = {f"{name}_by_size": np.zeros(shape, np.int64) for name in ("tp", "fp", "fn")}
        return counts | {"iou_sum_by_size": np.zeros(shape, np.float64)}

    def counts(self, overlap: SegmentOverlap) -> dict[str, Array]:
        """What one image adds."""
        rows, _, ious = overlap.pairs
        target = overlap.target_classes * len(SIZES) + np.digitize(overlap.target_areas, SIZE_LIMITS)
        predicted = overlap.predicted_classes * len(SIZES) + np.digitize(overlap.predicted_areas, SIZE_LIMITS)
        return {
            "tp_by_size": self._sum(target[rows]),
            "fp_by_size": self._sum(predicted[~overlap.matched & ~overlap.ignored]),
            "fn_by_size": self._sum(target[overlap.missed]),
            "iou_sum_by_size": self._sum(target[rows], ious),
        }

    def _sum(self, places: Array, weights: Array | None = None) -> Array:
        return np.bincount(places, weights, self.is_thing.size * len(SIZES)).reshape(-1, len(SIZES))

    def result(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """``pq_by_size``: size -> ``pq sq rq pq_things pq_stuff tp fp fn``."""
        tp, fp, fn, iou_sum = (sums[f"{name}_by_size"] for name in ("tp", "fp", "fn", "iou_sum"))
        values, occurs = quality(tp, fp, fn, iou_sum), tp + fp + fn > 0
        means = {key: mean_where(value.T, occurs.T) for key, value in values.items()}
        for suffix, kind in (("things", self.is_thing), ("stuff", ~self.is_thing)):
            means[f"pq_{suffix}"] = mean_where(values["pq"].T, occurs.T & kind)
        table = {
            size: {key: float(mean[i]) for key, mean in means.items()}
            | {k: int(v[:, i].sum()) for k, v in (("tp", tp), ("fp", fp), ("fn", fn))}
            for i, size in enumerate(SIZES)
        }
        return {"pq_by_size": table}
