"""The one reader of panoptic annotations in JSON + id PNG (COCO, Cityscapes, Mapillary Vistas)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import DataError

from .cache import parse_cached
from .images import Window, dense_rows, read_ids, read_rgb
from .parsing import parse
from .records import Defect, Record, RecordTable, SegmentIndex, Segments, raise_defects, suspicious

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
        strict: raise if the JSON has defects. Otherwise gather them in ``defects``, leave the entries out and use no
            cache.
        allow_outside: take file names that lead out of the folders of images and id PNGs.

    Raises:
        DataError: if a folder or the JSON is missing, a value is not what the format says, the split is empty, an id
            occurs twice, a ``category_id`` is unknown, or a file name leads elsewhere; all faults are named.
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
        allow_outside: bool = False,
    ) -> None:
        self.image_dir, self.json_path, self.png_dir = Path(image_dir), Path(json_path), Path(png_dir)
        self.defects: list[Defect] = []
        self.allow_outside = allow_outside
        self._image_name = image_name
        for folder, what, needed in ((self.image_dir, "images", photographs), (self.png_dir, "id PNGs", True)):
            if needed and not folder.is_dir():
                text = f"{folder}: the folder of the {what} is missing. Check data.root and the split's name."
                self._report("missing folder", text, folder)
        if strict:
            raise_defects(self.json_path, self.defects)
            parsed = parse_cached(self.json_path, Path(cache_dir) if cache_dir else None)
        else:
            parsed = parse(self.json_path)
        self.defects += parsed.defects
        self.table, self.left_out = parsed.table, parsed.left_out
        self.classes = classes or self._class_table(json.loads(str(self.table.categories)))
        self._class_ids = self._to_contiguous(self.table, parsed.categories_left_out)
        self.outside = set() if allow_outside else self._find_outside()
        if strict:
            raise_defects(self.json_path, self.defects)
        self.records = Records(self)
        self._warn()

    def _report(self, kind: str, text: str, file: Path | None = None) -> None:
        self.defects.append(Defect(kind, str(file or self.json_path), text))

    def _class_table(self, categories: Sequence[Mapping[str, Any]]) -> ClassTable:
        """The class table; with an id or name twice the first one stays, and the fault is reported."""
        source = f"{self.json_path}: categories"
        if not categories and self.defects:  # none is sound
            raise_defects(self.json_path, self.defects)
        try:
            return ClassTable.from_coco(categories, source)
        except DataError as error:
            self._report("categories", str(error))
        first = {str(c["name"]): c for c in {c["id"]: c for c in reversed(categories)}.values()}
        return ClassTable.from_coco(first.values(), source)

    def _to_contiguous(self, table: RecordTable, left_out: Collection[int]) -> np.ndarray:
        """(S,) contiguous class ids; -1 for unknown categories, each reported once."""
        known = np.array([c.dataset_id for c in self.classes.classes], dtype=np.int64)
        order = np.argsort(known)
        place = np.minimum(np.searchsorted(known[order], table.category_ids), len(known) - 1)
        class_ids = order[place]
        unknown = known[class_ids] != table.category_ids
        values, first, counts = np.unique(table.category_ids[unknown], return_index=True, return_counts=True)
        for value, row, count in zip(values, np.flatnonzero(unknown)[first], counts, strict=True):
            if int(value) in left_out:
                continue  # its entry in 'categories' is faulty, and told
            image = table.image_ids[table.image_of_row[row]]
            others = f" ({count - 1} other segments, too)" if count > 1 else ""
            self._report(
                "unknown category",
                f"{self.json_path}: segment {table.segment_ids[row]} of image {image} has category_id {value}{others}, "
                "which 'categories' does not list. Add the category or correct the segment.",
            )
        return np.where(unknown, -1, class_ids)

    def _find_outside(self) -> set[int]:
        """Images whose files lie outside their folders, each reported. Links below them are the user's own."""
        found = set()
        for what, names, folder, path_of in (
            ("image", self.table.image_files, self.image_dir, self.image_path),
            ("id PNG", self.table.png_files, self.png_dir, self.png_path),
        ):
            root = os.path.join(os.path.abspath(folder), "")
            for i in suspicious(names):
                if not os.path.abspath(path_of(i)).startswith(root):
                    found.add(i)
                    self._report(
                        "outside",
                        f"{self._key(i)}: the file_name of its {what}, {names[i]}, leads out of {folder}. Correct it, "
                        "or allow it with data.allow_outside=true.",
                    )
        return found

    def _warn(self) -> None:
        table = self.table
        if len(table.unannotated):
            log.warning("%s: %d images have no annotation and are left out.", self.json_path, len(table.unannotated))
        empty = int((~table.iscrowd & (table.areas > 0) & ((table.boxes[:, 2] == 0) | (table.boxes[:, 3] == 0))).sum())
        if empty:
            text = "%s: %d segments have a bbox of width or height 0; crops are never drawn around them."
            log.warning(text, self.json_path, empty)

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
