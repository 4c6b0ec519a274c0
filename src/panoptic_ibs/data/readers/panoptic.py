"""The one reader of panoptic annotations in JSON + id PNG (COCO, Cityscapes, Mapillary Vistas)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import DataError

from .cache import cached_table
from .images import Window, dense_rows, read_ids, read_rgb
from .records import Defect, Record, RecordTable, SegmentIndex, Segments, parse, raise_defect

log = logging.getLogger(__name__)


class PanopticReader:
    """Images, dense id maps and segment tables of one split.

    Args:
        image_dir: folder of the images.
        json_path: panoptic JSON in COCO format (``images``, ``annotations``, ``categories``).
        png_dir: folder of the id PNGs.
        classes: class table to use in place of the JSON's ``categories``.
        cache_dir: where the parsed JSON is kept; the user's cache folder when None.
        image_name: turns an image's ``file_name`` into its path under ``image_dir``.
        photographs: whether the images are needed; without them their folder may be missing (scoring of predictions).
        strict: raise at the first defect of the JSON. Otherwise gather all in ``defects``, leave the entries
            out and use no cache.

    Raises:
        DataError: if a folder or the JSON is missing, the JSON is malformed, the split is empty, an id occurs twice
            or a ``category_id`` is unknown.
    """

    def __init__(
        self,
        image_dir: Path | str,
        json_path: Path | str,
        png_dir: Path | str,
        classes: ClassTable | None = None,
        *,
        cache_dir: Path | str | None = None,
        image_name: Callable[[str], str] | None = None,
        strict: bool = True,
        photographs: bool = True,
    ) -> None:
        self.image_dir, self.json_path, self.png_dir = Path(image_dir), Path(json_path), Path(png_dir)
        self.defects: list[Defect] = []
        self.allow_outside = False
        self._image_name = image_name
        report = raise_defect if strict else self.defects.append
        for folder, what, needed in ((self.image_dir, "images", photographs), (self.png_dir, "id PNGs", True)):
            if needed and not folder.is_dir():
                text = f"{folder}: the folder of the {what} is missing. Check data.root and the split's name."
                report(Defect("missing folder", str(folder), text))
        if strict:
            self.table = cached_table(self.json_path, Path(cache_dir) if cache_dir else None)
        else:
            self.table = parse(self.json_path, report)
        self.classes = classes or ClassTable.from_coco(json.loads(str(self.table.categories)), str(self.json_path))
        self._class_ids = self._to_contiguous(self.table, report)
        self.records = Records(self)
        if self.table.without_annotation:
            missing = int(self.table.without_annotation)
            log.warning("%s: %d images have no annotation and are left out.", self.json_path, missing)

    def _to_contiguous(self, table: RecordTable, report: Callable[[Defect], None]) -> np.ndarray:
        """(S,) contiguous class ids; -1 for unknown categories, each reported once."""
        known = np.array([c.dataset_id for c in self.classes.classes], dtype=np.int64)
        order = np.argsort(known)
        place = np.minimum(np.searchsorted(known[order], table.category_ids), len(known) - 1)
        class_ids = order[place]
        unknown = known[class_ids] != table.category_ids
        values, first = np.unique(table.category_ids[unknown], return_index=True)
        for value, row in zip(values, np.flatnonzero(unknown)[first], strict=True):
            image = table.image_ids[table.image_of_row[row]]
            text = (
                f"{self.json_path}: segment {table.segment_ids[row]} of image {image} has category_id {value}, which "
                "'categories' does not list. Add the category or correct the segment."
            )
            report(Defect("unknown category", str(self.json_path), text))
        return np.where(unknown, -1, class_ids)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"PanopticReader({len(self)} images, {len(self.table.segment_ids)} segments, {self.json_path})"

    @property
    def integer_ids(self) -> bool:
        """Whether the JSON's image ids are numbers (COCO) rather than names (Cityscapes); writers keep the kind."""
        return bool(self.table.integer_ids)

    @cached_property
    def index(self) -> SegmentIndex:
        """Class -> images -> segments, from the JSON alone (cached on disk with the records)."""
        return SegmentIndex(self.table, self.classes)

    def image_path(self, i: int) -> Path:
        """Path of image ``i``."""
        name = self.table.image_files[i]
        return self.image_dir / (self._image_name(str(name)) if self._image_name else name)

    def png_path(self, i: int) -> Path:
        """Path of the id PNG of image ``i``."""
        return self.png_dir / self.table.png_files[i]

    def read_image(self, i: int, window: Window | None = None) -> np.ndarray:
        """Image ``i``, or the window (top, left, height, width) of it: (H, W, 3) uint8 RGB."""
        return read_rgb(self.image_path(i), self._size(i), window, self._key(i))

    def read_id_map(self, i: int, window: Window | None = None) -> np.ndarray:
        """Id map of image ``i`` or of a window of it: (H, W), 0 void, row + 1 of ``records[i].segments``.

        Raises:
            DataError: if the PNG is missing, truncated, of another size, or holds an id that the JSON does not list.
        """
        raw = read_ids(self.png_path(i), self._size(i), window, self._key(i))
        low, high = self.table.offsets[i], self.table.offsets[i + 1]
        dense, unlisted = dense_rows(raw, self.table.segment_ids[low:high])
        if len(unlisted):
            shown = ", ".join(map(str, unlisted[:5])) + (", ..." if len(unlisted) > 5 else "")
            raise DataError(
                f"{self.png_path(i)}: holds the id {shown}, which {self._key(i)}.segments_info does not list. "
                "List the segment or paint it void (0)."
            )
        return dense

    def read(self, i: int, window: Window | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Image and id map of image ``i`` (or of a window), as :meth:`read_image` and :meth:`read_id_map`."""
        return self.read_image(i, window), self.read_id_map(i, window)

    def _size(self, i: int) -> tuple[int, int]:
        height, width = self.table.sizes[i]
        return int(height), int(width)

    def _key(self, i: int) -> str:
        return f"{self.json_path}: image {self.table.image_ids[i]}"


class Records(Sequence[Record]):
    """The records of a reader; each is put together when asked for, from views of the flat arrays."""

    def __init__(self, reader: PanopticReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, i: int) -> Record:  # type: ignore[override]  # no slices
        table = self._reader.table
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        i = i % len(self)
        rows = slice(table.offsets[i], table.offsets[i + 1])
        return Record(
            image_id=str(table.image_ids[i]),
            image_file=str(table.image_files[i]),
            png_file=str(table.png_files[i]),
            height=int(table.sizes[i, 0]),
            width=int(table.sizes[i, 1]),
            segments=Segments(
                ids=table.segment_ids[rows].astype(np.int64),
                class_ids=self._reader._class_ids[rows].astype(np.int64),
                iscrowd=table.iscrowd[rows],
                boxes=table.boxes[rows],
                areas=table.areas[rows].astype(np.int64),
            ),
        )
