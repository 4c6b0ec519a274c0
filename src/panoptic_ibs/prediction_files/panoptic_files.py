"""Panoptic predictions of any program: COCO panoptic JSON + PNGs, or a folder of PNGs with Cityscapes' ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panoptic_ibs.data.readers import PanopticReader
from panoptic_ibs.data.readers.images import dense_rows
from panoptic_ibs.data.readers.png import PngError, SizeError, read_png_ids
from panoptic_ibs.errors import DataError
from panoptic_ibs.files import inside
from panoptic_ibs.metrics.overlap import Array
from panoptic_ibs.schemas import text_of
from panoptic_ibs.segments import Prediction

from .classes import check_categories, check_names
from .instance_files import InstanceFile
from .naming import match_image, pngs_by_image
from .problems import Problems
from .schema import PANOPTIC, Read, is_results, read_panoptic, read_results

INSTANCES_PER_CLASS = 1000  # Cityscapes: id = class, or class * 1000 + number


@dataclass(frozen=True)
class RawPrediction:
    """One prediction as read: ``ids`` (H, W) raw, and of its S segments raw ids, contiguous class ids and scores."""

    ids: Array
    segment_ids: Array
    class_ids: Array
    scores: Array

    def dense(self, image_id: str) -> Prediction:
        """As the package's own type."""
        id_map, _ = dense_rows(self.ids, self.segment_ids)
        return Prediction(
            torch.from_numpy(np.ascontiguousarray(id_map)), torch.from_numpy(self.class_ids),
            torch.from_numpy(self.scores.astype(np.float32)), image_id,
        )  # fmt: skip


class PredictionSet:
    """Predictions for the images of a reader: what each image has, and all that is wrong with it.

    Args:
        name: shown in tables.
        source: the JSON, or the folder of PNGs.
        folder: where the PNGs are.
        reader: the split.
        content: the JSON's annotations; None for a folder of PNGs with Cityscapes' ids.
        indices: the images of the reader that are judged; all when None.

    Attributes:
        problems: what was found so far.
        unusable: those of ``indices`` that have no sound prediction, as far as is known without the PNGs.
    """

    def __init__(
        self,
        name: str,
        source: Path,
        folder: Path,
        reader: PanopticReader,
        content: Read | None,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.name, self.source, self.folder, self.reader = name, source, folder, reader
        self.problems = Problems(source, {"malformed": PANOPTIC})
        self.indices = list(range(len(reader)) if indices is None else indices)
        ids = [str(i) for i in reader.table.image_ids]
        self._position = {image: i for i, image in enumerate(ids)}
        self._entries: dict[int, tuple[Path, Array, Array, Array] | None] = {}
        self.from_ids = content is None
        if content is None:
            self._take_folder()
        else:
            self._take(content)
            check_names(content.categories, reader.classes, self.problems)
        self.unusable = {i for i in self.indices if self._entries.get(i) is None}
        for i in self.indices:
            if i not in self._entries:
                self.problems.add("missing", f"image {ids[i]}")

    def _take(self, content: Read) -> None:
        """Sort out the annotations of a JSON."""
        used: set[int] = set()
        wanted = set(self.indices)
        for text in content.faults:
            self.problems.add("malformed", text)
        for _, entry in content.entries:
            name, segments = str(entry["image_id"]), entry["segments_info"]
            image = match_image(name, self._position)
            if image is None:
                self.problems.add("extra", f"image {name}")
                continue
            i = self._position[image]
            if i in self._entries:
                self.problems.add("duplicate", f"image {name}")
                continue
            categories = [s["category_id"] for s in segments]
            used.update(categories)
            self._entries[i] = self._entry(name, entry, categories) if i in wanted else None
        check_categories(used, self.reader.classes, self.problems)

    def _entry(
        self, name: str, entry: Mapping[str, Any], categories: Sequence[int]
    ) -> tuple[Path, Array, Array, Array] | None:
        """PNG, ids, classes and scores of an image; None where they are not sound."""
        segments = entry["segments_info"]
        png = str(entry.get("file_name") or f"{name}.png")
        if not (self.reader.allow_outside or inside(png)):
            self.problems.add("outside", f"image {name}: {png}")
            return None
        ids = np.array([s["id"] for s in segments], dtype=np.int64)
        if len(np.unique(ids)) < len(ids):
            self.problems.add("twice", f"image {name}")
            return None
        contiguous = self.reader.classes.contiguous
        class_ids = np.array([contiguous.get(c, -1) for c in categories], dtype=np.int64)
        if (class_ids < 0).any():
            bad = sorted({c for c, k in zip(categories, class_ids, strict=True) if k < 0})
            self.problems.add("unknown class", f"image {name}: category_id {', '.join(map(str, bad[:5]))}")
            return None
        return self.folder / png, ids, class_ids, np.array([s.get("score", 1.0) for s in segments], dtype=np.float64)

    def _take_folder(self) -> None:
        """PNGs by their names; their ids say the classes."""
        nothing = np.zeros(0, np.int64)
        found, strangers = pngs_by_image(_pngs(self.folder), self._position)
        for file in strangers:
            self.problems.add("extra", file.name)
        for image, files in found.items():
            if len(files) > 1:
                self.problems.add("duplicate", f"image {image}: {', '.join(f.name for f in files[:3])}")
            self._entries[self._position[image]] = (files[0], nothing, nothing, np.zeros(0))

    @cached_property
    def _by_image(self) -> dict[str, list[Path]]:
        return pngs_by_image(_pngs(self.folder), self._position)[0]

    def read(self, index: int, problems: Problems, canvas: Array | None = None) -> RawPrediction | None:
        """The prediction for image ``index``; None where it cannot be used, with the reason added to ``problems``.

        ``canvas`` as in :func:`read_png_ids`.
        """
        entry = self._entries.get(index)
        if entry is None:
            return None  # told when the set was opened
        path, ids, class_ids, scores = entry
        record = self.reader.records[index]
        if not _is_file(path):  # a folder per city, another ending of the same image's name
            ours = match_image(path.stem, self._position) == record.image_id
            others = self._by_image.get(record.image_id, []) if ours else []
            if len(others) != 1:
                problems.add("no file", f"image {record.image_id}: {path.name}")
                return None
            path = others[0]
        raw = _read_png(path, (record.height, record.width), problems, self.from_ids, canvas)
        if raw is None or not self.from_ids:
            return None if raw is None else RawPrediction(raw, ids, class_ids, scores)
        return self._classes_from_ids(raw, path, problems)

    def _classes_from_ids(self, raw: Array, path: Path, problems: Problems) -> RawPrediction | None:
        flat = raw.ravel()
        changes = np.flatnonzero(flat[1:] != flat[:-1])
        ids = np.unique(np.concatenate((flat[:1], flat[changes + 1]))).astype(np.int64)
        ids = ids[ids > 0]
        categories = np.where(ids < INSTANCES_PER_CLASS, ids, ids // INSTANCES_PER_CLASS)
        class_ids = np.array([self.reader.classes.contiguous.get(int(c), -1) for c in categories], dtype=np.int64)
        if (class_ids < 0).any():
            unknown = ", ".join(str(c) for c in categories[class_ids < 0][:5])
            problems.add("unknown class", f"{path.name}: class {unknown} (id = class, or class * 1000 + number)")
            return None
        return RawPrediction(raw, ids, class_ids, np.ones(len(ids)))


def _is_file(path: Path) -> bool:
    """Whether a regular file is there; no pipe, which would be waited for."""
    try:
        return path.is_file()
    except OSError:  # too long a name, no permission
        return False


def _read_png(path: Path, size: tuple[int, int], problems: Problems, grey: bool, canvas: Array | None) -> Array | None:
    """(H, W) uint32 ids; None with the reason in ``problems``."""
    try:
        return read_png_ids(path, size, grey, canvas)
    except SizeError as error:
        problems.add("size", f"{path.name}: {error}")
    except PngError as error:
        problems.add("broken file", f"{path.name}: {error}")
    except OSError as error:
        problems.add("broken file", f"{path.name}: {error.strerror}")
    return None


def open_predictions(
    path: Path | str, reader: PanopticReader, indices: Sequence[int] | None = None
) -> PredictionSet | InstanceFile:
    """Predictions for the images of a reader, in whatever of these forms they are.

    - ``FILE.json`` in COCO panoptic format; the PNGs lie in the folder ``FILE``, or beside the JSON.
    - a folder ``FOLDER`` with such a JSON in it (as ``panoptic_ibs.predict`` writes it) or beside it (``FOLDER.json``),
      or a run folder with ``predictions/``.
    - a folder of PNGs without any JSON: Cityscapes' ids (class, or class * 1000 + number; RGB or 16-bit grey), named
      after their image.
    - ``FILE.json`` in COCO's results format, a list of instances.

    Faults of entries and images are in ``problems``; they are not raised here.

    Raises:
        DataError: nothing there, or a JSON of none of these formats.
    """
    path = Path(path).expanduser()
    file = _find_json(path)
    if file is None:
        if not any(_pngs(path)):
            raise DataError(f"{path}: the folder holds no predictions: neither a JSON nor PNGs (predictions=).")
        _check_no_class_0(path, reader)
        return PredictionSet(_name(path), path, path, reader, None, indices)
    text = text_of(file, "the JSON of the predictions", "Check predictions=.")
    if is_results(text):
        return InstanceFile(_name(path), file, reader, read_results(text, file), indices)
    content = read_panoptic(text, file)
    if content is None:
        raise DataError(
            f"{file}: no predictions in COCO panoptic format: expected a JSON object with 'annotations', each with "
            "image_id, file_name and segments_info (or a list of instances in COCO's results format)."
        )
    folder = next((f for f in (file.with_suffix(""), path) if f.is_dir()), file.parent)
    if folder == file.parent and not any(folder.glob("*.png")):
        raise DataError(f"{file.with_suffix('')}: the folder with the id PNGs of {file} is missing.")
    return PredictionSet(_name(path), file, folder, reader, content, indices)


def _check_no_class_0(path: Path, reader: PanopticReader) -> None:
    """In a folder of PNGs the ids say the classes, and 0 is void."""
    if 0 in reader.classes.contiguous:
        name = reader.classes[reader.classes.contiguous[0]].name
        raise DataError(
            f"{path}: PNGs without a JSON say classes by their ids, of which 0 is void, but {reader.json_path} has the "
            f"class {name!r} as 0 (as train ids do): its pixels would be lost. Write a panoptic JSON to the PNGs, or "
            "score against annotations whose categories count from 1."
        )


def _pngs(folder: Path) -> Iterator[Path]:
    """PNGs below a folder, but for hidden ones (macOS writes ``._a.png``) and those in hidden folders."""
    for path in folder.rglob("*.png"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _find_json(path: Path) -> Path | None:
    """The JSON that a path of the command line means; None for a folder of PNGs alone."""
    if not path.is_dir():
        return path
    for candidate in (
        path / "panoptic.json",
        path / "predictions" / "panoptic.json",
        path.with_name(path.name + ".json"),
    ):
        if candidate.is_file():
            return candidate
    found = sorted(p for p in path.glob("*.json") if not p.name.startswith("."))
    if len(found) > 1:
        raise DataError(f"{path}: holds {len(found)} JSON files; name the one: predictions={found[0]}.")
    return found[0] if found else None


def _name(path: Path) -> str:
    """A short name: the file's or folder's, but that of its parents where it says nothing."""
    parts = [path.stem if path.suffix == ".json" else path.name]
    for parent in path.resolve().parents:
        if parts[-1] not in ("panoptic", "predictions"):
            break
        parts.append(parent.name)
    return parts[-1] or path.name
