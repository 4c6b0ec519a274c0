"""The annotation JSON as flat arrays: records of images, their segments, and the index from class to segments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.coco_format import MAX_ID
from panoptic_ibs.errors import DataError


@dataclass(frozen=True)
class Defect:
    """One fault of a data set: what kind, in which file, and a sentence with key and remedy."""

    kind: str
    file: str
    message: str


Report = Callable[[Defect], None]


def raise_defect(defect: Defect) -> None:
    """The strict report: the first defect ends the reading."""
    raise DataError(defect.message)


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
    usable rows (no crowd, box and area not empty) sorted by category, then image. ``without_annotation`` counts
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
    without_annotation: np.ndarray
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


def load_json(path: Path) -> dict[str, Any]:
    """Read a panoptic JSON and check that its three lists are there.

    Raises:
        DataError: if the file is missing, malformed or lacks ``images``, ``annotations`` or ``categories``.
    """
    try:
        with path.open("rb") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise DataError(f"{path}: the annotation JSON is missing. Check data.root and the split's name.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a valid JSON ({error}). Fetch or write the file again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, Mapping) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: the list '{key}' is missing. A panoptic JSON (COCO format) is expected.")
    if not all(isinstance(category, Mapping) for category in content["categories"]):
        raise DataError(f"{path}: every entry of 'categories' must be an object with id, name and isthing.")
    return dict(content)


def _has(entry: Any, name: str, *keys: str) -> bool:
    """Whether an entry of the JSON is an object with a proper name (number or text) and the other keys."""
    return isinstance(entry, Mapping) and isinstance(entry.get(name), (int, str)) and set(keys) <= set(entry)


class _Parser:
    """Turns a panoptic JSON into a RecordTable; what is wrong goes to ``report``, and the entry is left out."""

    def __init__(self, path: Path, report: Report) -> None:
        self.path = path
        self.report = report

    def defect(self, kind: str, text: str) -> None:
        self.report(Defect(kind, str(self.path), f"{self.path}: {text}"))

    def parse(self) -> RecordTable:
        content = load_json(self.path)
        images = self._images(content["images"])
        kept: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        parts: list[np.ndarray] = []
        seen: set[Any] = set()
        for i, annotation in enumerate(content["annotations"]):
            where = f"annotations[{i}]"
            if not _has(annotation, "image_id", "file_name", "segments_info"):
                self.defect("malformed", f"{where} lacks 'image_id', 'file_name' or 'segments_info'.")
            elif annotation["image_id"] not in images:
                name = annotation["image_id"]
                self.defect("unknown image", f"{where}.image_id {name} is not in 'images'. Add the image or drop it.")
            elif annotation["image_id"] in seen:
                name = annotation["image_id"]
                self.defect("duplicate id", f"{where}: a second annotation of image {name}. Keep one of the two.")
            else:
                seen.add(annotation["image_id"])
                kept.append((images[annotation["image_id"]], annotation))
                parts.append(self._segments(annotation["segments_info"], where))
        if not kept:
            self.defect("empty split", "the split is empty: 'annotations' holds no image. Check the split's name.")
        return self._table(kept, parts, len(images), content["categories"])

    def _images(self, entries: list[Any]) -> dict[Any, Mapping[str, Any]]:
        images: dict[Any, Mapping[str, Any]] = {}
        for i, entry in enumerate(entries):
            if not _has(entry, "id", "file_name", "height", "width"):
                self.defect("malformed", f"images[{i}] lacks 'id', 'file_name', 'height' or 'width'.")
            elif entry["id"] in images:
                self.defect("duplicate id", f"images[{i}]: the id {entry['id']} occurs twice. Ids must be unique.")
            else:
                images[entry["id"]] = entry
        return images

    def _segments(self, entries: Any, where: str) -> np.ndarray:
        """(N, 8): id, category, crowd, x, y, width, height, area. Float64 holds 24-bit ids exactly."""
        try:
            rows = [(s["id"], s["category_id"], s.get("iscrowd", 0), *s["bbox"], s["area"]) for s in entries]
            part = np.array(rows, dtype=np.float64).reshape(len(rows), 8)
        except (KeyError, TypeError, ValueError, AttributeError):
            text = f"{where}.segments_info is malformed: each segment needs numeric id, category_id, bbox (4) and area."
            self.defect("malformed", text)
            return np.zeros((0, 8))
        ids = part[:, 0]
        if len(np.unique(ids)) < len(ids):
            values, counts = np.unique(ids, return_counts=True)
            twice = int(values[counts > 1][0])
            self.defect("duplicate id", f"{where}.segments_info lists the id {twice} twice. Ids must be unique.")
            part = part[np.sort(np.unique(ids, return_index=True)[1])]
        wrong = (part[:, 0] < 1) | (part[:, 0] > MAX_ID) | (part[:, 0] % 1 != 0)
        if wrong.any():
            text = f"{where}.segments_info: id {part[wrong, 0][0]:g} is not from 1 to {MAX_ID}; 0 is void."
            self.defect("malformed", text)
            part = part[~wrong]
        return part

    def _table(
        self,
        kept: list[tuple[Mapping[str, Any], Mapping[str, Any]]],
        parts: list[np.ndarray],
        num_images: int,
        categories: list[Any],
    ) -> RecordTable:
        rows = np.concatenate(parts) if parts else np.zeros((0, 8))
        try:
            sizes = np.array([(image["height"], image["width"]) for image, _ in kept], dtype=np.int32).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            sizes = np.zeros((1, 2), dtype=np.int32)
        if (sizes < 1).any():
            raise DataError(f"{self.path}: 'height' and 'width' of every image must be whole numbers above 0.")
        category_ids = rows[:, 1].astype(np.int32)
        usable = (rows[:, 2] == 0) & (rows[:, 5] > 0) & (rows[:, 6] > 0) & (rows[:, 7] > 0)
        candidates = np.flatnonzero(usable).astype(np.int32)
        return RecordTable(
            image_ids=np.array([str(image["id"]) for image, _ in kept], dtype=np.str_),
            image_files=np.array([str(image["file_name"]) for image, _ in kept], dtype=np.str_),
            png_files=np.array([str(annotation["file_name"]) for _, annotation in kept], dtype=np.str_),
            sizes=sizes,
            offsets=np.cumsum([0, *(len(p) for p in parts)], dtype=np.int64),
            segment_ids=rows[:, 0].astype(np.int32),
            category_ids=category_ids,
            iscrowd=rows[:, 2] != 0,
            boxes=rows[:, 3:7].astype(np.float32),
            areas=rows[:, 7].astype(np.int32),
            index_rows=candidates[np.argsort(category_ids[candidates], kind="stable")],
            integer_ids=np.array(all(isinstance(image["id"], int) for image, _ in kept)),
            without_annotation=np.array(num_images - len(kept)),
            categories=np.array(json.dumps(categories)),
        )


def parse(path: Path, report: Report = raise_defect) -> RecordTable:
    """Read the annotation JSON into flat arrays.

    Args:
        path: the panoptic JSON.
        report: called with each defect; entries with defects are left out. The default raises at the first.

    Raises:
        DataError: if the file itself cannot be used, or from ``report``.
    """
    return _Parser(path, report).parse()


TABLE_FIELDS = tuple(f.name for f in fields(RecordTable))
