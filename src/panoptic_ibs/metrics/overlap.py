"""Overlap of one prediction with its ground truth: what remains of an image once the pixels were counted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from panoptic_ibs.functional.overlap import joint_histogram, joint_histogram_of_arrays
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

Array = npt.NDArray


@dataclass(frozen=True)
class SegmentOverlap:
    """Pixels shared by G ground-truth and P predicted segments, and the matching that panopticapi defines on them.

    Attributes:
        table: (G + 1, P + 1) int64 pixel counts; row 0 and column 0 are void.
        target_classes: (G,) int64 contiguous class ids.
        target_crowd: (G,) bool.
        predicted_classes: (P,) int64 contiguous class ids.
    """

    table: Array
    target_classes: Array
    target_crowd: Array
    predicted_classes: Array

    @cached_property
    def shared(self) -> Array:
        """(G, P) pixels shared by two segments."""
        return self.table[1:, 1:]

    @cached_property
    def target_areas(self) -> Array:
        """(G,) pixels of the ground-truth segments, those of no prediction included."""
        return np.add.reduce(self.table[1:], 1)

    @cached_property
    def predicted_areas(self) -> Array:
        """(P,) pixels of the predicted segments, those on void included."""
        return np.add.reduce(self.table[:, 1:], 0)

    @cached_property
    def judged_areas(self) -> Array:
        """(P,) pixels of the predicted segments that are not on void."""
        return self.predicted_areas - self.table[0, 1:]

    @cached_property
    def same_class(self) -> Array:
        """(G, P) bool: equal classes."""
        return self.target_classes[:, None] == self.predicted_classes[None, :]

    @cached_property
    def pairs(self) -> tuple[Array, Array, Array]:
        """Matched pairs: ground-truth rows (M,), predicted rows (M,) and IoUs (M,) float64.

        A pair matches when the classes agree, the ground truth is no crowd and the IoU is above 0.5; pixels of the
        prediction on void are taken out of the union, pixels of no prediction stay in it (they belong to the ground
        truth's area). Above 0.5 a segment can be in one pair only.
        """
        judged = self.judged_areas
        # Twice the shared pixels above those of the union. Few pairs are: classes are compared for them alone.
        rows, columns = (3 * self.shared > self.target_areas[:, None] + judged).nonzero()
        allowed = (self.target_classes[rows] == self.predicted_classes[columns]) & ~self.target_crowd[rows]
        rows, columns = rows[allowed], columns[allowed]
        shared = self.shared[rows, columns]
        return rows, columns, shared / (self.target_areas[rows] + judged[columns] - shared)

    @cached_property
    def matched(self) -> Array:
        """(P,) bool: predictions in a pair."""
        return _mark(self.pairs[1], len(self.predicted_classes))

    @cached_property
    def ignored(self) -> Array:
        """(P,) bool: predictions that count neither for nor against.

        Unmatched, and either without a pixel or with more than half of the area on void or on the crowd of the same
        class. As in panopticapi only the last crowd segment of a class in an image is considered.
        """
        excused = self.table[0, 1:]
        (crowd,) = self.target_crowd.nonzero()
        if crowd.size:
            later = np.triu(self.target_classes[crowd][:, None] == self.target_classes[crowd][None, :], 1).any(1)
            crowd = crowd[~later]
            excused = excused + np.where(self.same_class[crowd], self.shared[crowd], 0).sum(0)
        return ~self.matched & ((2 * excused > self.predicted_areas) | (self.predicted_areas == 0))

    @cached_property
    def missed(self) -> Array:
        """(G,) bool: ground-truth segments in no pair, crowds left out. One without a pixel is missed, too."""
        return ~_mark(self.pairs[0], len(self.target_classes)) & ~self.target_crowd


def segment_overlap(prediction: Prediction, target: Target, num_classes: int) -> SegmentOverlap:
    """Count the shared pixels of one image.

    Args:
        prediction: id map (H, W), class ids (P,).
        target: id map (H, W) on the same device, class ids (G,).
        num_classes: class ids must lie below it.

    Raises:
        ValueError: if the sizes differ or an id has no row in its table, with the name of the image.
    """
    name = target.image_id or prediction.image_id or f"number {target.image_index}"
    target_classes, predicted_classes = _array(target.class_ids), _array(prediction.class_ids)
    if prediction.id_map.shape != target.id_map.shape:
        raise ValueError(
            f"Image {name}: the prediction has size {tuple(prediction.id_map.shape)}, the ground truth "
            f"{tuple(target.id_map.shape)}; predict at the size of the annotation (ImageSize.original)."
        )
    for what, ids in (("prediction", predicted_classes), ("ground truth", target_classes)):
        if ids.size and not (np.minimum.reduce(ids) >= 0 and np.maximum.reduce(ids) < num_classes):
            raise ValueError(
                f"Image {name}: class ids of the {what} must lie in 0 to {num_classes - 1} (contiguous ids), "
                f"found {ids.min()} to {ids.max()}."
            )
    try:
        table = _shared_pixels(target.id_map, prediction.id_map, len(target_classes), len(predicted_classes))
    except ValueError as error:
        raise ValueError(f"Image {name} (first: ground truth, second: prediction): {error}") from error
    return SegmentOverlap(table, target_classes, _array(target.is_crowd).astype(bool, copy=False), predicted_classes)


def _shared_pixels(target: Tensor, predicted: Tensor, num_target: int, num_predicted: int) -> Array:
    if target.is_cpu and predicted.is_cpu:  # no detour by tensors: the fixed cost of an update shows on small maps
        return joint_histogram_of_arrays(target.numpy(), predicted.numpy(), num_target, num_predicted)
    return joint_histogram(target, predicted.to(target.device), num_target, num_predicted).cpu().numpy()


def _array(values: Tensor) -> Array:
    return (values if values.is_cpu else values.cpu()).numpy()


def _mark(rows: Array, size: int) -> Array:
    flags = np.zeros(size, dtype=bool)
    flags[rows] = True
    return flags
