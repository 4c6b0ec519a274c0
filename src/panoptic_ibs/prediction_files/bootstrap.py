"""Confidence intervals over images: how far would the numbers move with other images of the same kind?

Images are drawn with replacement, as many as there are, ``samples`` times; each time the metrics are computed from the
sums over the drawn images (percentile bootstrap). Several sets of predictions get the same draws, so that differences
are paired. What is kept are sums, samples x counts: memory grows with the images by no more than a byte a draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.metrics.overlap import Array
from panoptic_ibs.metrics.statistics import (
    ConfusionStatistic,
    QualityStatistic,
    Statistic,
    ThingPixelStatistic,
    class_means,
    quality,
    ratio,
)

_AT_ONCE = 128  # images that are multiplied together
_DRAWN_AT_ONCE = 1 << 16


def draws(images: int, samples: int, seed: int) -> Array:
    """(samples, images) uint8: how often each image is drawn; every row sums to ``images``.

    Being drawn more than 255 times does not come up: a dozen is rare.
    """
    rng = np.random.default_rng(seed)
    table = np.empty((samples, images), np.uint8)
    rows = max(1, _DRAWN_AT_ONCE // images)
    for start in range(0, samples, rows):
        part = table[start : start + rows]
        drawn = rng.integers(images, size=part.shape)
        drawn += np.arange(len(part))[:, None] * images
        part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)
    return table


class Bootstrap:
    """Resampled sums of per-image counts.

    Args:
        classes: the class table.
        thresholds: of the confusion curve, percent.
        weights: (samples, images), see :func:`draws`.
    """

    def __init__(self, classes: ClassTable, thresholds: Sequence[float], weights: Array) -> None:
        self.classes, self.weights = classes, weights
        self.confusion = ConfusionStatistic(classes, thresholds)
        self.statistics: list[Statistic] = [QualityStatistic(classes), ThingPixelStatistic(classes), self.confusion]
        self._zeros = {name: zero for s in self.statistics for name, zero in s.zeros().items()}
        self._sums = np.zeros((len(weights), sum(zero.size for zero in self._zeros.values())))
        self._waiting: list[tuple[int, Array]] = []

    def add(self, position: int, counts: Mapping[str, Array]) -> None:
        """Add the counts of the image at ``position``."""
        self._waiting.append((position, np.concatenate([np.ravel(counts[name]) for name in self._zeros])))
        if len(self._waiting) == _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            weights = self.weights[:, [p for p, _ in self._waiting]].astype(np.float64)
            self._sums += weights @ np.stack([values for _, values in self._waiting])
            self._waiting.clear()

    def values(self) -> dict[str, Array]:
        """Of every metric its ``samples`` values (B,); of ``per_class`` PQ (B, C), nan where a class does not occur."""
        self._flush()
        sums, start = {}, 0
        for name, zero in self._zeros.items():
            sums[name] = self._sums[:, start : start + zero.size].reshape(-1, *zero.shape)
            start += zero.size
        return metric_values(sums, self.classes, self.confusion.keys)


def metric_values(sums: Mapping[str, Array], classes: ClassTable, thresholds: Sequence[str]) -> dict[str, Array]:
    """The metrics of ``PanopticMetrics`` from sums with an axis in front, (B, ...); see :meth:`Bootstrap.values`."""
    found = class_means(sums, np.array(classes.is_thing))
    correct = sums["thing_pixels_correct"]
    found["acc_things"] = ratio(correct, sums["thing_pixels_target"])
    found["prec_things"] = ratio(correct, correct + sums["thing_pixels_wrong"])
    share = ratio(sums["confused_things"].sum(-1), sums["predicted_things"].sum(-1)[:, None])
    found |= {f"confusion@{key}": share[:, i] for i, key in enumerate(thresholds)}
    tp, fp, fn = sums["tp"], sums["fp"], sums["fn"]
    pq = quality(tp, fp, fn, sums["iou_sum"])["pq"]
    return found | {"per_class": np.where(tp + fp + fn > 0, pq, np.nan)}


def interval(values: Array, level: float = 0.95) -> list[float] | None:
    """[low, high] of the percentile interval; None without a finite value."""
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    return [float(v) for v in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def intervals(values: Mapping[str, Array], classes: ClassTable, level: float = 0.95) -> dict[str, Any]:
    """Intervals of every metric, and of the PQ of every class."""
    names = [key for key in values if key != "per_class"]
    table: dict[str, Any] = dict(zip(names, _intervals([values[key] for key in names], level), strict=True))
    return table | {"per_class": dict(zip(classes.names, _intervals(values["per_class"].T, level), strict=True))}


def _intervals(rows: Sequence[Array] | Array, level: float) -> list[list[float] | None]:
    """:func:`interval` of each row; those of finite values alone at once."""
    stacked = np.asarray(rows)
    whole = np.isfinite(stacked).all(1) & (stacked.shape[1] > 0)
    found: list[list[float] | None] = [
        None if done else interval(row, level) for row, done in zip(rows, whole, strict=True)
    ]
    if whole.any():
        both = np.quantile(stacked[whole], [(1 - level) / 2, (1 + level) / 2], axis=1)
        for i, (low, high) in zip(np.flatnonzero(whole), both.T.tolist(), strict=True):
            found[i] = [low, high]
    return found


def compare(
    names: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    values: Sequence[Mapping[str, Array]],
    level: float = 0.95,
) -> dict[str, Any]:
    """Every set of predictions beside the first one: differences and their intervals, by metric and by class.

    Args:
        names: of the sets.
        results: their metrics.
        values: their resampled values, from the same draws; empty without a bootstrap.

    Returns:
        ``reference`` and ``sets`` (the names), and ``differences``: name -> metric -> ``value low high``, with
        ``per_class``: class -> the same of its PQ. A class that occurs in neither is left out.
    """
    first = results[0]
    differences: dict[str, Any] = {}
    for k in range(1, len(names)):
        table: dict[str, Any] = {}
        for key in values[0] if values else (k for k, v in first.items() if isinstance(v, float)):
            if key != "per_class":
                drawn = values[k][key] - values[0][key] if values else np.zeros(0)
                table[key] = _difference(metric_of(results[k], key) - metric_of(first, key), drawn, level)
        per_class = {}
        for i, (name, row) in enumerate(results[k].get("per_class", {}).items()):
            other = first["per_class"][name]
            if any(r[c] for r in (row, other) for c in ("tp", "fp", "fn")):
                drawn = np.zeros(0)
                if values:  # a class that a draw lacks has PQ 0 there in either set
                    drawn = np.nan_to_num(values[k]["per_class"][:, i]) - np.nan_to_num(values[0]["per_class"][:, i])
                per_class[name] = _difference(row["pq"] - other["pq"], drawn, level)
        differences[names[k]] = table | {"per_class": per_class}
    return {"reference": names[0], "sets": list(names), "differences": differences}


def metric_of(result: Mapping[str, Any], key: str) -> float:
    """A metric by its name; ``confusion@50`` means ``confusion["50"]``."""
    if key.startswith("confusion@"):
        return float(result["confusion"][key.partition("@")[2]])
    return float(result[key])


def _difference(value: float, drawn: Array, level: float) -> dict[str, float | None]:
    low, high = interval(drawn, level) or (None, None)
    return {"value": float(value), "low": low, "high": high}
