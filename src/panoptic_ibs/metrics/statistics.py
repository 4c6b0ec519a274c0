"""What each metric counts in an image and how sums of counts become numbers; plain NumPy, no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from panoptic_ibs.classes import ClassTable

from .overlap import Array, SegmentOverlap

SIZES = ("small", "medium", "large")
SIZE_LIMITS = (32**2, 96**2)  # COCO's areas: small below the first, large from the second on


class Statistic(Protocol):
    """Sums over images and a result computed from them."""

    def zeros(self) -> dict[str, Array]:
        """Sums before the first image, by name."""

    def counts(self, overlap: SegmentOverlap) -> dict[str, Array]:
        """What one image adds to each of the sums."""

    def result(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Numbers, ready for JSON."""


class QualityStatistic:
    """PQ, SQ, RQ and semantic IoU per class; see ``PanopticQuality``."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes

    def zeros(self) -> dict[str, Array]:
        """Sums before the first image: (C,) each."""
        names = ("tp", "fp", "fn", "pixels_shared", "pixels_target", "pixels_predicted")
        c = len(self.classes)
        return {name: np.zeros(c, np.int64) for name in names} | {"iou_sum": np.zeros(c, np.float64)}

    def counts(self, overlap: SegmentOverlap) -> dict[str, Array]:
        """What one image adds."""
        rows, _, ious = overlap.pairs
        tp_classes = overlap.target_classes[rows]
        false = overlap.predicted_classes[~(overlap.matched | overlap.ignored)]
        return {
            "tp": self._sum(tp_classes),
            "fp": self._sum(false),
            "fn": self._sum(overlap.target_classes[overlap.missed]),
            "iou_sum": np.bincount(tp_classes, ious, len(self.classes)),
            # The semantic IoU leaves void pixels out, and has crowds in: they are of their class.
            "pixels_shared": self._sum(overlap.predicted_classes, (overlap.shared * overlap.same_class).sum(0)),
            "pixels_target": self._sum(overlap.target_classes, overlap.target_areas),
            "pixels_predicted": self._sum(overlap.predicted_classes, overlap.judged_areas),
        }

    def _sum(self, class_ids: Array, weights: Array | None = None) -> Array:
        sums = np.bincount(class_ids, weights, len(self.classes))
        return sums if weights is None else sums.astype(np.int64)

    def result(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Means over all, thing and stuff classes that occur, mean semantic IoU, numbers of things, a row per class."""
        tp, fp, fn = sums["tp"], sums["fp"], sums["fn"]
        values = quality(tp, fp, fn, sums["iou_sum"])
        iou = semantic_iou(sums)
        things = np.array(self.classes.is_thing)
        result: dict[str, Any] = {k: float(v) for k, v in class_means(sums, things).items()}
        result["things"] = {
            "predicted": int((tp + fp)[things].sum()),
            "matched": int(tp[things].sum()),
            "true": int((tp + fn)[things].sum()),
        }
        result["per_class"] = {
            name: {key: float(value[i]) for key, value in values.items()}
            | {"tp": int(tp[i]), "fp": int(fp[i]), "fn": int(fn[i]), "iou": float(iou[i])}
            for i, name in enumerate(self.classes.names)
        }
        return result


class ThingPixelStatistic:
    """Acc_th and Prec_th; see ``ThingPixelQuality``."""

    def __init__(self, classes: ClassTable) -> None:
        self.is_thing = np.array(classes.is_thing)

    def zeros(self) -> dict[str, Array]:
        """Sums before the first image: pixel counts."""
        return {f"thing_pixels_{name}": np.zeros((), np.int64) for name in ("correct", "wrong", "target")}

    def counts(self, overlap: SegmentOverlap) -> dict[str, Array]:
        """What one image adds."""
        rows, columns, _ = overlap.pairs
        thing_pairs = self.is_thing[overlap.target_classes[rows]]
        correct = overlap.shared[rows, columns][thing_pairs].sum()
        judged = self.is_thing[overlap.predicted_classes] & ~overlap.ignored
        predicted = overlap.judged_areas[judged].sum()
        counted = self.is_thing[overlap.target_classes] & ~overlap.target_crowd
        return {
            "thing_pixels_correct": correct,
            "thing_pixels_wrong": predicted - correct,
            "thing_pixels_target": overlap.target_areas[counted].sum(),
        }

    def result(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """The two ratios; 0 where nothing was counted."""
        correct = sums["thing_pixels_correct"]
        return {
            "acc_things": float(ratio(correct, sums["thing_pixels_target"])),
            "prec_things": float(ratio(correct, correct + sums["thing_pixels_wrong"])),
        }


class ConfusionStatistic:
    """Confused thing segments by threshold and size; see ``ConfusionCurve``."""

    def __init__(self, classes: ClassTable, thresholds: Sequence[float]) -> None:
        self.is_thing = np.array(classes.is_thing)
        self.keys = [f"{t:g}" for t in thresholds]
        self.thresholds = np.array(thresholds, dtype=np.float64)
        if not self.keys or not all(0 <= t < 100 for t in thresholds) or len(set(self.keys)) < len(self.keys):
            raise ValueError(f"thresholds must be distinct percentages in [0, 100), got {list(thresholds)}.")

    def zeros(self) -> dict[str, Array]:
        """Sums before the first image: (3,) thing segments by size, (T, 3) of them confused."""
        return {
            "predicted_things": np.zeros(3, np.int64),
            "confused_things": np.zeros((len(self.keys), 3), np.int64),
        }

    def counts(self, overlap: SegmentOverlap) -> dict[str, Array]:
        """What one image adds."""
        areas = overlap.predicted_areas
        things = self.is_thing[overlap.predicted_classes] & (areas > 0)
        targets = self.is_thing[overlap.target_classes] & ~overlap.target_crowd
        # Two targets are covered by more than T % where the second largest share is above T.
        covered = 100 * overlap.shared[targets][:, things] / np.maximum(overlap.target_areas[targets], 1)[:, None]
        second = np.partition(covered, -2, axis=0)[-2] if len(covered) > 1 else np.zeros(covered.shape[1])
        confused = second > self.thresholds[:, None]
        sizes = np.eye(3, dtype=np.int64)[np.digitize(areas[things], SIZE_LIMITS)]
        return {"predicted_things": sizes.sum(0), "confused_things": confused.astype(np.int64) @ sizes}

    def result(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Shares over all sizes and by size; 0 where no thing was predicted."""
        number, confused = sums["predicted_things"], sums["confused_things"]
        share, by_size = ratio(confused.sum(1), number.sum()), ratio(confused, number)
        return {
            "confusion": dict(zip(self.keys, share.tolist(), strict=True)),
            "confusion_by_size": {
                size: dict(zip(self.keys, by_size[:, i].tolist(), strict=True)) for i, size in enumerate(SIZES)
            },
        }


def quality(tp: Array, fp: Array, fn: Array, iou_sum: Array) -> dict[str, Array]:
    """PQ, SQ and RQ from counts of any shape (Kirillov et al., 2019, Eq. 1 and 2): the one place of the formula."""
    whole = tp + 0.5 * fp + 0.5 * fn
    return {"pq": ratio(iou_sum, whole), "sq": ratio(iou_sum, tp), "rq": ratio(tp, whole)}


def semantic_iou(sums: Mapping[str, Array]) -> Array:
    """(..., C) IoU of the classes' pixels; 0 where a class has no pixel."""
    return ratio(sums["pixels_shared"], sums["pixels_target"] + sums["pixels_predicted"] - sums["pixels_shared"])


def class_means(sums: Mapping[str, Array], is_thing: Array) -> dict[str, Array]:
    """``pq sq rq`` over all, thing (``_things``) and stuff (``_stuff``) classes that occur, and ``miou``.

    Args:
        sums: of :class:`QualityStatistic`, (..., C) each: one row, or one a draw of the bootstrap.
        is_thing: (C,).

    Returns:
        Arrays of the leading shape; 0 where no class occurs.
    """
    tp, fp, fn = sums["tp"], sums["fp"], sums["fn"]
    values, occurs = quality(tp, fp, fn, sums["iou_sum"]), tp + fp + fn > 0
    found = {}
    for suffix, chosen in (("", occurs), ("_things", occurs & is_thing), ("_stuff", occurs & ~is_thing)):
        for key, value in values.items():
            found[key + suffix] = mean_where(value, chosen)
    found["miou"] = mean_where(semantic_iou(sums), sums["pixels_target"] + sums["pixels_predicted"] > 0)
    return found


def mean_where(values: Array, chosen: Array) -> Array:
    """Mean over the last axis of the chosen values; 0 where none is."""
    return ratio(np.where(chosen, values, 0).sum(-1), chosen.sum(-1))


def ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient in float64, 0 where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)
