"""Annotations as flat arrays: records of images, their segments, and the index from class to segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import DataError
from panoptic_ibs.schemas import SHOWN


@dataclass(frozen=True)
class Defect:
    """One fault of a data set: what kind, in which file, and a sentence with key and remedy.

    A ``warning`` is worth a look, but may be as it should.
    """

    kind: str
    file: str
    message: str
    warning: bool = False


def raise_defects(source: Path, defects: Sequence[Defect]) -> None:
    """One error for all defects, if there are any.

    Raises:
        DataError: with the first :data:`SHOWN` of them.
    """
    if not defects:
        return
    if len(defects) == 1:
        raise DataError(defects[0].message)
    lines = [d.message.removeprefix(f"{source}: ") for d in defects[:SHOWN]]
    rest = f"\n  and {len(defects) - SHOWN} more" if len(defects) > SHOWN else ""
    raise DataError(f"{source}: {len(defects)} faults.\n  " + "\n  ".join(lines) + rest)


def suspicious(names: np.ndarray) -> list[int]:
    """Positions of the file names (an array of text) that may lead out of their folder: with ``..`` or absolute."""
    if not len(names):
        return []
    letters = np.ascontiguousarray(names).view(np.uint32).reshape(len(names), -1)
    dots = letters == ord(".")
    found = (letters[:, 0] == ord("/")) | (dots[:, 1:] & dots[:, :-1]).any(axis=1)
    return [int(i) for i in np.flatnonzero(found)]


@dataclass(frozen=True)
class Segments:
    """The N segments of one image, as the JSON lists them.

    Attributes:
        ids: (N,) int64 ids in the PNG.
        class_ids: (N,) int64 contiguous class ids.
        iscrowd: (N,) bool.
        boxes: (N, 4) float32 x y width height in pixels of the stored image.
        areas: (N,) int64 pixels.
    """

    ids: np.ndarray
    class_ids: np.ndarray
    iscrowd: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Record:
    """One annotated image; file names are as the JSON gives them."""

    image_id: str
    image_file: str
    png_file: str
    height: int
    width: int
    segments: Segments


@dataclass(frozen=True)
class RecordTable:
    """All records of a split as flat arrays: quick to cache, to share between processes and to search.

    ``offsets`` (I + 1,) gives the rows of image i: ``offsets[i]`` to ``offsets[i + 1]``. ``index_rows`` holds the
    usable rows (no crowd, box and area not empty) sorted by category, then image. ``unannotated`` are the ids of
    images that the JSON lists but does not annotate. ``categories`` is JSON text.
    """

    image_ids: np.ndarray
    image_files: np.ndarray
    png_files: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    segment_ids: np.ndarray
    category_ids: np.ndarray
    iscrowd: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    index_rows: np.ndarray
    integer_ids: np.ndarray
    unannotated: np.ndarray
    categories: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def image_of_row(self) -> np.ndarray:
        """(S,) position of the image that a row belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.offsets))


class SegmentIndex:
    """Class -> images -> segments, crowds and empty boxes left out; no pixel was read for it.

    ``occurring`` lists the contiguous ids of the classes that have at least one usable segment.
    """

    def __init__(self, table: RecordTable, classes: ClassTable) -> None:
        self._table = table
        self._classes = classes
        categories = table.category_ids[table.index_rows]
        wanted = np.array([c.dataset_id for c in classes.classes])
        self._low = np.searchsorted(categories, wanted, "left")
        self._high = np.searchsorted(categories, wanted, "right")
        self._found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.occurring: tuple[int, ...] = tuple(int(c) for c in np.flatnonzero(self._high > self._low))

    def count(self, class_id: int) -> int:
        """Number of usable segments of the class."""
        return int(self._high[class_id] - self._low[class_id])

    def images(self, class_id: int) -> np.ndarray:
        """Positions of the images that hold a usable segment of the class, ascending."""
        return self._of_class(class_id)[0]

    def segments(self, class_id: int, image_index: int) -> np.ndarray:
        """Rows, in the image's own table, of the usable segments of the class."""
        images, starts, rows = self._of_class(class_id)
        k = int(np.searchsorted(images, image_index))
        if k == len(images) or images[k] != image_index:
            return rows[:0]
        return rows[starts[k] : starts[k + 1]] - self._table.offsets[image_index]

    def _of_class(self, class_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if class_id not in self._found:
            rows = self._table.index_rows[self._low[class_id] : self._high[class_id]].astype(np.int64)
            images, starts = np.unique(self._table.image_of_row[rows], return_index=True)
            self._found[class_id] = (images, np.append(starts, len(rows)), rows)
        return self._found[class_id]


TABLE_FIELDS = tuple(f.name for f in fields(RecordTable))
