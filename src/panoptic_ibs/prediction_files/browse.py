"""Looking through anybody's predictions: the segments that swallow most true instances, and what they swallow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from panoptic_ibs.data.dataset import make_target
from panoptic_ibs.metrics.overlap import Array
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target
from panoptic_ibs.visualize import Confused, find_confused

from .panoptic_files import PredictionSet
from .problems import Problems, raise_all


@dataclass(frozen=True)
class ConfusedSegment:
    """A confused prediction and where it is: ``index`` is the image's position in the reader."""

    index: int
    image_id: str
    segment: Confused

    @property
    def error(self) -> tuple[int, float]:
        """Number of swallowed instances, then the sum of their covered shares."""
        return len(self.segment.swallowed), sum(s.share for s in self.segment.swallowed)


def read_pair(found: PredictionSet, index: int) -> tuple[Prediction, Target]:
    """The prediction for image ``index`` of the reader, and its ground truth at the same size.

    Raises:
        DataError: the prediction cannot be used; the message says why.
    """
    problems = Problems(found.source)
    raw = found.read(index, problems)
    raise_all([problems or found.problems])
    if raw is None:  # an image outside of ``found.indices`` has no entry and no problem
        problems.add("missing", f"image {found.reader.records[index].image_id}")
        raise_all([problems])
    assert raw is not None
    target = make_target(found.reader.read_id_map(index), found.reader, index, min_pixels=0)
    return raw.dense(target.image_id), target


def confused_segments(found: PredictionSet, threshold: float = 0.25) -> list[ConfusedSegment]:
    """Predicted things that cover more than ``threshold`` of two or more true ones, over all images, worst first.

    Ordered by the number of instances that they swallow, then by the sum of the covered shares.

    Raises:
        DataError: a prediction is missing or cannot be used.
    """
    listed = []
    for index in found.indices:
        prediction, target = read_pair(found, index)
        rows = find_confused(prediction, target, found.reader.classes, threshold)
        listed += [ConfusedSegment(index, target.image_id, row) for row in rows]
    return sorted(listed, key=lambda c: (-c.error[0], -c.error[1], c.index, c.segment.row))


def window_around(mask: Array, margin: float = 0.3, least: int = 64) -> tuple[slice, slice]:
    """Rows and columns of a mask's box, widened by ``margin`` of its longer side, at least ``least`` pixels a side.

    It ends at the image's border; an empty mask gives the whole image.
    """
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    spans = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
    edge = margin * max(int(s[-1] - s[0] + 1) for s in spans)
    found = []
    for span, limit in zip(spans, mask.shape, strict=True):
        first, last = int(span[0]), int(span[-1]) + 1
        side = max(last - first + 2 * edge, least)
        start = round((first + last - side) / 2)
        found.append(slice(max(0, start), min(limit, round(start + side))))
    return found[0], found[1]
