"""Panoptic metrics with fixed-size sum states: synchronised between processes by one addition each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

from .overlap import SegmentOverlap, segment_overlap
from .plain import Predictions, Targets, predictions_of, targets_of
from .sizes import SizeQualityStatistic
from .statistics import ConfusionStatistic, QualityStatistic, Statistic, ThingPixelStatistic

DEFAULT_THRESHOLDS: tuple[float, ...] = tuple(range(5, 100, 5))


class SegmentMetric(Metric):
    """Sums what some statistics count in the overlap of prediction and ground truth, which is made once an image.

    Base of the metrics below. ``compute`` returns plain Python numbers in (nested) dictionaries, ready for JSON.
    ``update`` takes this package's predictions and targets, or plain tensors in one of two forms:

    - one mapping an image: ``id_map`` (H, W) integer, 0 void, k the row k - 1 of ``class_ids`` (N,), contiguous; in
      targets also ``is_crowd`` (N,), all false if it is left out.
    - a tensor (B, H, W, 2) integer, as torchmetrics' panoptic quality takes it: category ids of the data set, and
      instance ids, which are ignored on stuff. The category -1 is void.

    Examples:
        >>> import torch
        >>> from panoptic_ibs.classes import ClassTable
        >>> from panoptic_ibs.metrics import PanopticQuality
        >>> road, car = {"id": 7, "name": "road", "isthing": 0}, {"id": 26, "name": "car", "isthing": 1}
        >>> metric = PanopticQuality(ClassTable.from_coco([road, car]))
        >>> truth = torch.tensor([[1, 1, 2, 2], [1, 1, 3, 3]])
        >>> found = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]])  # both cars in one segment
        >>> metric.update(
        ...     [{"id_map": found, "class_ids": [0, 1]}], [{"id_map": truth, "class_ids": [0, 1, 1]}]
        ... )
        >>> round(metric.compute()["pq"], 3), metric.compute()["per_class"]["car"]["fn"]
        (0.5, 2)
        >>> category = torch.tensor([[7, 7, 26, 26], [7, 7, 26, 26]])
        >>> metric.reset()
        >>> metric.update(torch.stack([category, found], -1)[None], torch.stack([category, truth], -1)[None])
        >>> round(metric.compute()["pq"], 3)
        0.5
    """

    is_differentiable = False
    full_state_update = False
    num_images: Tensor

    def __init__(self, classes: ClassTable, statistics: Sequence[Statistic], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes
        self.statistics = tuple(statistics)
        self.add_state("num_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for statistic in self.statistics:
            for name, zero in statistic.zeros().items():
                self.add_state(name, torch.from_numpy(zero), dist_reduce_fx="sum")

    def update(self, predictions: Predictions, targets: Targets) -> None:
        """Add images.

        Args:
            predictions: one an image, id maps (H, W); or plain tensors, see above.
            targets: one an image, id maps of the same sizes; or plain tensors.

        Raises:
            ValueError: if the numbers of images or the sizes of an image differ, an id has no row in its table, or a
                category is not in the class table.
        """
        predictions, targets = predictions_of(predictions, self.classes), targets_of(targets, self.classes)
        if len(predictions) != len(targets):
            raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets; expected one each.")
        # All images are counted before any is added: an error leaves the sums as they were.
        overlaps = [self.overlap(p, t) for p, t in zip(predictions, targets, strict=True)]
        sums: dict[str, Any] = {"num_images": len(overlaps)}
        for overlap in overlaps:
            for statistic in self.statistics:
                for name, count in statistic.counts(overlap).items():
                    sums[name] = sums[name] + count if name in sums else count
        for name, value in sums.items():
            state: Tensor = getattr(self, name)
            if state.is_cpu:
                view = state.numpy()  # in place: setting an attribute of a module takes longer than the addition
                view += value
            else:
                setattr(self, name, state + torch.as_tensor(value, device=state.device))

    def overlap(self, prediction: Prediction, target: Target) -> SegmentOverlap:
        """What the statistics count in one image."""
        return segment_overlap(prediction, target, len(self.classes))

    def compute(self) -> dict[str, Any]:
        """Results over all images (and processes) as plain numbers; fractions from 0 to 1."""
        result: dict[str, Any] = {}
        for statistic in self.statistics:
            result |= statistic.result({name: getattr(self, name).cpu().numpy() for name in statistic.zeros()})
        return result | {"num_images": int(self.num_images)}


class PanopticQuality(SegmentMetric):
    """Panoptic quality (Kirillov et al., "Panoptic Segmentation", 2019), equal to panopticapi's to the last digit.

    - A predicted and a ground-truth segment match when their classes agree and their IoU is above 0.5. Predicted
      pixels on void are taken out of the union; pixels of no prediction stay in it.
    - Unmatched predictions with more than half of their area on void, or on the crowd of the same class, are ignored.
    - Crowd segments are neither matched nor missed. Of several crowds of a class in an image only the last one
      excuses predictions.
    - Means are over the classes that occur (tp + fp + fn > 0). Where none occurs, panopticapi divides by zero; here
      the mean is 0.
    - A predicted row without a pixel is left out (panopticapi rejects the file); a ground-truth row without a pixel
      is missed, as in panopticapi.

    ``compute`` returns ``pq sq rq`` (also with ``_things`` and ``_stuff``), ``miou``, ``num_images``, ``things`` and
    ``per_class``: class name -> ``pq sq rq tp fp fn iou``. ``iou`` is the *semantic* IoU: pixels of the class in both
    maps over pixels in either, void pixels of the ground truth left out, crowds included; unlike the rest it knows no
    segments. ``miou`` is its mean over the classes with a pixel in either map. ``things`` counts thing segments:
    ``predicted`` (tp + fp), ``matched`` (tp) and ``true`` (tp + fn).
    """

    higher_is_better = True

    def __init__(self, classes: ClassTable, **kwargs: Any) -> None:
        super().__init__(classes, [QualityStatistic(classes)], **kwargs)


class ThingPixelQuality(SegmentMetric):
    """Pixel accuracy and precision of things (de Geus and Dubbelman, "Intra-Batch Supervision", 2023, Eq. 2 and 3).

    A pixel is correct (TP) when its predicted thing segment is matched as for PQ and it lies in the matched segment.
    ``acc_things`` = TP / ground-truth thing pixels, ``prec_things`` = TP / (TP + FP). Both are pooled over pixels and
    images, so large objects weigh more, which is what shows confusion. The paper leaves void and crowds open; they
    follow PQ, so that one set of matches underlies all numbers:

    - Ground-truth pixels of crowds are not in the denominator of the accuracy: a crowd cannot be matched, so they
      could not be correct. Void has no class, so it is not in it either.
    - Predicted thing pixels on void are not wrong: PQ takes them out of the union.
    - Predictions that PQ ignores (unmatched, mostly on void or on a crowd of their class) count no pixel as wrong.
    - Every other predicted thing pixel outside the matched segment is wrong, also on a crowd: PQ leaves it in the
      union.

    Either is 0 where its denominator is 0.
    """

    higher_is_better = True

    def __init__(self, classes: ClassTable, **kwargs: Any) -> None:
        super().__init__(classes, [ThingPixelStatistic(classes)], **kwargs)


class ConfusionCurve(SegmentMetric):
    """Share of confused thing segments over the threshold (de Geus and Dubbelman, 2023, Section 6.2 and Fig. 5).

    A predicted thing segment is confused at T when it covers *more* than T % of the area of at least two ground-truth
    thing segments, of whatever classes. Crowds do not count as ground truth: they are several objects already. All
    predicted thing segments with a pixel are in the denominator, also those that PQ ignores, as in the figure.

    ``compute`` returns ``confusion`` (threshold in percent as a string -> share), ``confusion_by_size`` (the same for
    ``small``, ``medium`` and ``large`` predicted segments: area below 32^2, below 96^2, the rest) and ``num_images``.

    Args:
        classes: the class table.
        thresholds: distinct percentages in [0, 100).
    """

    higher_is_better = False

    def __init__(self, classes: ClassTable, thresholds: Sequence[float] = DEFAULT_THRESHOLDS, **kwargs: Any) -> None:
        super().__init__(classes, [ConfusionStatistic(classes, thresholds)], **kwargs)


class PanopticMetrics(SegmentMetric):
    """The three metrics above and PQ by size (:class:`SizeQualityStatistic`) from one overlap table an image.

    ``compute`` has the keys of ``metrics.json``.
    """

    higher_is_better = None

    def __init__(self, classes: ClassTable, thresholds: Sequence[float] = DEFAULT_THRESHOLDS, **kwargs: Any) -> None:
        statistics: list[Statistic] = [
            QualityStatistic(classes),
            ThingPixelStatistic(classes),
            ConfusionStatistic(classes, thresholds),
            SizeQualityStatistic(classes),
        ]
        super().__init__(classes, statistics, **kwargs)
