"""Counting whole folders of predictions: images in threads, sums in order, memory that does not grow with them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from panoptic_ibs.cores import usable_cores
from panoptic_ibs.data.dataset import make_target
from panoptic_ibs.data.readers import PanopticReader, Record
from panoptic_ibs.data.readers.images import dense_rows
from panoptic_ibs.data.readers.png import Canvases, PngError, read_png_ids
from panoptic_ibs.errors import DataError
from panoptic_ibs.functional.overlap import joint_histogram_raw
from panoptic_ibs.metrics.boundary import BOUNDARY_RATIO, BoundaryOverlap, BoundaryStatistic, boundary_table
from panoptic_ibs.metrics.instances import (
    ClassTablesOfImage,
    average_precision,
    tables_of_instances,
    tables_of_overlap,
)
from panoptic_ibs.metrics.overlap import Array, SegmentOverlap
from panoptic_ibs.metrics.panoptic import DEFAULT_THRESHOLDS
from panoptic_ibs.metrics.sizes import SizeQualityStatistic
from panoptic_ibs.metrics.statistics import (
    ConfusionStatistic,
    QualityStatistic,
    Statistic,
    ThingPixelStatistic,
    mean_where,
    quality,
)
from panoptic_ibs.segments import Prediction

from .bootstrap import Bootstrap, draws, intervals
from .instance_files import InstanceFile
from .panoptic_files import PredictionSet, RawPrediction
from .problems import Problems, raise_all

SWALLOWED_SHARE = 0.25  # of an instance: as the report's gallery shows confusion
Tables = list[ClassTablesOfImage]
AnySet = PredictionSet | InstanceFile


@dataclass(frozen=True, order=True)
class ImageError:
    """How wrong the predictions of an image are, worst last when sorted: the most true instances that one predicted
    segment swallows, those that all swallow, and 1 - PQ of the image. ``index`` is its position in the reader.
    """

    worst: int
    swallowed: int
    loss: float
    index: int


@dataclass(frozen=True)
class _Counts:
    """What one image adds for one set."""

    sums: dict[str, Array]
    tables: Tables | None
    error: tuple[int, int, float]


class Score:
    """The sums of one set of predictions.

    Attributes:
        bootstrap: resampled sums, or None.
    """

    def __init__(self, found: AnySet, statistics: Sequence[Statistic], bootstrap: Bootstrap | None) -> None:
        self.name, self.bootstrap, self.statistics = found.name, bootstrap, statistics
        self.classes = found.reader.classes
        self.instances = isinstance(found, InstanceFile)
        self._sums = {name: zero for s in statistics for name, zero in s.zeros().items()}
        self._tables: list[Tables] = []
        self.images = 0

    def add(self, counts: _Counts, position: int) -> None:
        """Add an image; ``position`` is its place in the draws of the bootstrap."""
        for name, value in counts.sums.items():
            self._sums[name] = self._sums[name] + value
        if counts.tables is not None:
            self._tables.append(counts.tables)
        if self.bootstrap is not None:
            self.bootstrap.add(position, counts.sums)
        self.images += 1

    def result(self, samples: dict[str, Any] | None = None) -> dict[str, Any]:
        """The metrics; ``samples`` describes the bootstrap and gets its ``intervals``."""
        result: dict[str, Any] = {}
        for statistic in self.statistics:
            result |= statistic.result({name: self._sums[name] for name in statistic.zeros()})
        if self.instances:
            result |= average_precision(self._tables, self.classes)
        elif self._tables:
            result["ap_from_panoptic"] = average_precision(self._tables, self.classes)
        if self.bootstrap is not None and samples is not None:
            result["confidence"] = {**samples, "intervals": intervals(self.values(), self.classes, samples["level"])}
        return result | {"num_images": self.images}

    def values(self) -> dict[str, Array]:
        """Resampled values, see :meth:`Bootstrap.values`."""
        return self.bootstrap.values() if self.bootstrap is not None else {}


class Scorer:
    """Scores sets of predictions for the same images side by side; the ground truth is decoded once for all.

    An image is judged if its annotation and the predictions of all sets are sound. The others are left out of every
    number, and are told in the ``problems`` of the sets and in the results.

    Args:
        reader: the split.
        sets: of one kind each, see :func:`panoptic_ibs.prediction_files.open_predictions`.
        indices: the images; those without a sound prediction are left out.
        ap: also the average precision of the panoptic results.
        boundary: also boundary PQ.
        samples: of the bootstrap; 0 for none.
        seed: of the bootstrap.
        worst: how many of the worst images are remembered.
        workers: threads; as many as there are usable cores when None.
    """

    def __init__(
        self,
        reader: PanopticReader,
        sets: Sequence[AnySet],
        indices: Sequence[int],
        *,
        ap: bool = False,
        boundary: bool = False,
        samples: int = 1000,
        seed: int = 0,
        worst: int = 16,
        workers: int | None = None,
    ) -> None:
        self.reader, self.sets, self.ap, self.boundary = reader, list(sets), ap, boundary
        self.wanted = len(indices)
        unusable = {i for found in self.sets for i in found.unusable}
        self.indices = [i for i in indices if i not in unusable]
        self.workers = workers or min(16, usable_cores())
        classes = reader.classes
        self.statistics: list[Statistic] = [
            QualityStatistic(classes),
            ThingPixelStatistic(classes),
            ConfusionStatistic(classes, DEFAULT_THRESHOLDS),
            SizeQualityStatistic(classes),
        ]
        self.boundary_statistic = BoundaryStatistic(classes) if boundary else None
        panoptic = [*self.statistics, *([self.boundary_statistic] if self.boundary_statistic else [])]
        judged = [s for s in self.sets if isinstance(s, PredictionSet)]
        usable = samples > 0 and len(self.indices) > 1 and judged
        weights = draws(len(self.indices), samples, seed) if usable else None
        self.samples = {"level": 0.95, "samples": samples, "seed": seed} if usable else None
        self.scores = [
            Score(s, panoptic, None if weights is None else Bootstrap(classes, DEFAULT_THRESHOLDS, weights))
            if isinstance(s, PredictionSet)
            else Score(s, [], None)
            for s in self.sets
        ]
        self.worst: list[ImageError] = []
        self._keep = worst
        self._canvases = Canvases()

    def run(self, progress: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> list[Score]:
        """Score all images.

        Args:
            progress: wraps the iterator over images, for a progress bar.

        Raises:
            DataError: a set is wrong as a whole (no image is read then), or no image can be judged; with all faults.
        """
        if any(found.problems.fatal for found in self.sets):
            raise_all(found.problems for found in self.sets)
        for position, (counted, problems) in enumerate(progress(self._in_order())):
            for found, more in zip(self.sets, problems, strict=True):
                found.problems.merge(more)
            if any(counts is None for counts in counted):
                continue
            for score, counts in zip(self.scores, counted, strict=True):
                score.add(counts, position)
            self._remember(counted, self.indices[position])
        if not self.scores[0].images:
            raise_all(found.problems for found in self.sets)
        return self.scores

    @property
    def complete(self) -> bool:
        """Whether nothing was wrong."""
        return not any(found.problems for found in self.sets)

    def faults(self) -> str:
        """Everything that is wrong, and how many images were judged all the same; empty where all is sound."""
        done = f"{self.scores[0].images} of {self.wanted} images were scored"
        return "\n".join(found.problems.message(done) for found in self.sets if found.problems)

    def _in_order(self) -> Iterator[tuple[list[_Counts | None], list[Problems]]]:
        """Images in their order, a few per thread under way."""
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[Future[Any]] = deque()
            try:
                for index in self.indices:
                    waiting.append(pool.submit(self._image, index))
                    if len(waiting) > 2 * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _image(self, index: int) -> tuple[list[_Counts | None], list[Problems]]:
        """Counts of all sets in one image, None where a set cannot be counted, and what is wrong."""
        problems = [Problems(found.source) for found in self.sets]
        record = self.reader.records[index]
        size = record.height, record.width
        try:
            truth = read_png_ids(self.reader.png_path(index), size, canvas=self._canvases.get("truth", size))
        except (PngError, OSError) as error:
            problems[0].add("truth", f"{self.reader.png_path(index)}: {error}")
            return [None] * len(self.sets), problems
        counted: list[_Counts | None] = []
        for found, own in zip(self.sets, problems, strict=True):
            if isinstance(found, InstanceFile):
                try:
                    counted.append(self._instances(found, index, record, truth))
                except DataError as error:
                    own.add("truth", str(error).rstrip("."))
                    counted.append(None)
                continue
            prediction = found.read(index, own, self._canvases.get("prediction", size))
            counted.append(None if prediction is None else self._panoptic(record, truth, prediction, own, index))
        return counted, problems

    def _instances(self, found: InstanceFile, index: int, record: Record, truth: Array) -> _Counts:
        dense, unlisted = dense_rows(truth, record.segments.ids)
        if unlisted.size:
            where = self.reader.json_path
            raise DataError(f"{where}: image {record.image_id}: its PNG holds the unlisted id {unlisted[0]}.")
        target = make_target(dense, self.reader, index, min_pixels=0)
        prediction = Prediction(target.id_map, torch.zeros(0), torch.zeros(0), instances=found.read(index))
        return _Counts({}, tables_of_instances(prediction, target, self.reader.classes), (0, 0, 0.0))

    def _panoptic(
        self, record: Record, truth: Array, prediction: RawPrediction, problems: Problems, index: int
    ) -> _Counts | None:
        name = f"image {record.image_id}"
        listed = record.segments.ids, prediction.segment_ids
        maps, ids = [torch.from_numpy(m) for m in (truth, prediction.ids)], [torch.from_numpy(i) for i in listed]
        try:
            table = joint_histogram_raw(maps[0], maps[1], ids[0], ids[1]).numpy()
        except ValueError:
            for kind, raw, known in zip(("truth", "unlisted"), (truth, prediction.ids), listed, strict=True):
                unlisted = np.setdiff1d(np.unique(raw), np.append(known, 0))
                if unlisted.size:
                    problems.add(kind, f"{name}: id {', '.join(map(str, unlisted[:5]))}{', ...' * (unlisted.size > 5)}")
            return None
        absent = prediction.segment_ids[table[:, 1:].sum(0) == 0]
        if absent.size:
            problems.add("absent", f"{name}: id {', '.join(map(str, absent[:5]))}{', ...' * (absent.size > 5)}")
            return None
        overlap = SegmentOverlap(table, record.segments.class_ids, record.segments.iscrowd, prediction.class_ids)
        sums = {name: value for s in self.statistics for name, value in s.counts(overlap).items()}
        tp, fp, fn = sums["tp"], sums["fp"], sums["fn"]
        pq = float(mean_where(quality(tp, fp, fn, sums["iou_sum"])["pq"], tp + fp + fn > 0))
        if self.boundary_statistic:
            dense = [dense_rows(raw, known)[0] for raw, known in zip((truth, prediction.ids), listed, strict=True)]
            zones = boundary_table(dense[0], dense[1], len(listed[0]), len(listed[1]), BOUNDARY_RATIO)
            sums |= self.boundary_statistic.counts(BoundaryOverlap(
                table, overlap.target_classes, overlap.target_crowd, overlap.predicted_classes, zones
            ))  # fmt: skip
        tables = tables_of_overlap(overlap, prediction.scores, self.reader.classes) if self.ap else None
        return _Counts(sums, tables, (*swallowed(overlap, np.array(self.reader.classes.is_thing)), 1 - pq))

    def _remember(self, counted: Sequence[_Counts | None], index: int) -> None:
        """Keep the worst images, by the worst of the sets."""
        error = ImageError(*max(c.error for c in counted if c is not None), index)
        heapq.heappush(self.worst, error)
        if len(self.worst) > self._keep:
            heapq.heappop(self.worst)

    def results(self) -> list[dict[str, Any]]:
        """The metrics of each set; where something was wrong, also ``complete`` (false) and its ``faults``."""
        found = [score.result(self.samples) for score in self.scores]
        if not self.complete:
            for result, one in zip(found, self.sets, strict=True):
                result |= {"complete": False, "faults": one.problems.listed()}
        return found


def swallowed(overlap: SegmentOverlap, is_thing: Array) -> tuple[int, int]:
    """True instances that one predicted thing covers by more than a quarter, beside another: the most, and all."""
    targets = is_thing[overlap.target_classes] & ~overlap.target_crowd
    things = is_thing[overlap.predicted_classes]
    covered = overlap.shared[targets][:, things] > SWALLOWED_SHARE * overlap.target_areas[targets][:, None]
    number = covered.sum(0)
    number = number[number >= 2]
    return int(number.max(initial=0)), int(number.sum())
