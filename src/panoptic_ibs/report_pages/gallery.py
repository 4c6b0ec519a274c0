"""The pictures of a run: chosen and drawn during evaluation, read back by the report."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.functional.embedding_views import PrincipalColors
from panoptic_ibs.metrics.overlap import segment_overlap
from panoptic_ibs.metrics.statistics import QualityStatistic
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target
from panoptic_ibs.visualize import Confused, IdMap, Picture, draw_confused, find_confused, overlay

from .embeddings import VIEW_KINDS, choose_query, describe, draw_view, fit_colors
from .worst import WORST, draw_worst, severity, worst_of

KINDS = ("input", "truth", "prediction", "confused")


@dataclass
class _Entry:
    """One chosen image, scaled down; ``rows`` and ``pq`` were found at full size."""

    order: int
    image_id: str
    image: Picture
    predicted: IdMap
    predicted_classes: list[int]
    true: IdMap
    true_classes: list[int]
    rows: list[Confused]
    pq: float

    views: dict[str, Picture] = field(default_factory=dict)
    view_note: str = ""
    first: bool = False
    worst: tuple[Confused, Picture] | None = None

    @property
    def error(self) -> tuple[int, int, float]:
        """The most instances that one prediction swallows, those that all swallow, 1 - PQ."""
        counts = [len(r.swallowed) for r in self.rows]
        return max(counts, default=0), sum(counts), 1 - self.pq


class GalleryWriter:
    """Chooses up to ``limit`` images of an evaluation and writes their pictures to ``run_dir/gallery``.

    The first half are the first images as they come, the same at every evaluation; the rest are the worst: those with
    the prediction that swallows most instances, so that the gallery shows both the ordinary and the errors. All are
    written in the order of their error, worst first. Only scaled-down copies of the chosen are kept in memory.

    Predictions with a ``view`` get pictures of their embeddings too, in colours that were fit to the first image. The
    prediction that swallows most true instances of all has a picture of its own, cut out at full resolution.

    Args:
        run_dir: the run folder.
        classes: the class table.
        limit: number of images.
        threshold: share of an instance that must be covered for it to count as swallowed.
        max_width: width in pixels that larger images are scaled down to.
        first: how many of the first images are kept whatever their error; half of ``limit`` when None.
    """

    def __init__(
        self,
        run_dir: Path,
        classes: ClassTable,
        limit: int = 8,
        threshold: float = 0.25,
        max_width: int = 1000,
        first: int | None = None,
    ) -> None:
        self.folder = Path(run_dir) / "gallery"
        self.classes, self.limit, self.threshold, self.max_width = classes, limit, threshold, max_width
        self.first = (limit + 1) // 2 if first is None else first
        self._entries: list[_Entry] = []
        self._seen = 0
        self._colors: PrincipalColors | None = None

    def add(self, image: Picture, prediction: Prediction, target: Target) -> None:
        """Offer an image: (H, W, 3) uint8 RGB, its prediction and ground truth at the same size.

        Raises:
            ValueError: if the sizes differ.
        """
        self._seen += 1
        if self.limit < 1:
            return
        rows = find_confused(prediction, target, self.classes, self.threshold)
        pq = self._pq(prediction, target)
        if len(self._entries) >= self.limit:
            others = [e for e in self._entries if not e.first]
            if not others:
                return
            weakest = min(others, key=lambda e: (e.error, -e.order))
            counts = [len(r.swallowed) for r in rows]
            if (max(counts, default=0), sum(counts), 1 - pq) <= weakest.error:
                return
            self._entries.remove(weakest)
        if image.shape[:2] != tuple(target.id_map.shape):
            raise ValueError(f"Image {image.shape} and ground truth {tuple(target.id_map.shape)}: sizes differ.")
        predicted, true = prediction.id_map.cpu().numpy(), target.id_map.cpu().numpy()
        entry = _Entry(
            order=self._seen - 1,
            image_id=str(prediction.image_id or target.image_id or self._seen - 1),
            image=_shrink(image, self.max_width, Image.Resampling.LANCZOS),
            predicted=_shrink(predicted.astype(np.int32), self.max_width, Image.Resampling.NEAREST),
            predicted_classes=prediction.class_ids.tolist(),
            true=_shrink(true.astype(np.int32), self.max_width, Image.Resampling.NEAREST),
            true_classes=target.class_ids.tolist(),
            rows=rows,
            pq=pq,
            first=self._seen <= self.first,
        )
        self._view(entry, prediction, target)
        if (row := worst_of(rows)) is not None:  # drawn at once, as only scaled-down maps are kept
            entry.worst = row, draw_worst(image, predicted, true, row)
        self._entries.append(entry)

    def _view(self, entry: _Entry, prediction: Prediction, target: Target) -> None:
        """Draw the embeddings at once: maps of full depth are too large to keep."""
        view = prediction.view() if prediction.view is not None else None
        if view is None:
            return
        self._colors = self._colors or fit_colors(view)
        chosen = choose_query(view, target)
        entry.views = draw_view(entry.image, view, self._colors, chosen, entry.true)
        entry.view_note = describe(view, chosen, self.classes, target)

    def _pq(self, prediction: Prediction, target: Target) -> float:
        """PQ of one image: the mean over the classes that occur in it."""
        statistic = QualityStatistic(self.classes)
        counts = statistic.counts(segment_overlap(prediction, target, len(self.classes)))
        return float(statistic.result(counts)["pq"])

    def close(self) -> Path | None:
        """Draw and write ``gallery/index.json``, ``classes.json`` and the PNGs; the folder, or None without images."""
        if not self._entries:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(self._entries, key=lambda e: (*(-v for v in e.error), e.order))
        confused = [e for e in self._entries if e.worst]
        worst = max(confused, key=lambda e: (severity(e.worst[0].to_dict()) if e.worst else (), -e.order), default=None)
        index = [self._write(i, entry, entry is worst) for i, entry in enumerate(ordered)]
        (self.folder / "classes.json").write_text(json.dumps(self.classes.to_list()), encoding="utf-8")
        # The index comes last: a folder with an index is complete.
        (self.folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        self._entries.clear()
        return self.folder

    def _write(self, position: int, entry: _Entry, worst: bool) -> dict[str, Any]:
        stem = f"{position:02d}_{re.sub(r'[^A-Za-z0-9._-]', '_', entry.image_id)[-60:]}"
        pictures = {
            "input": entry.image,
            "truth": overlay(entry.image, entry.true, entry.true_classes, self.classes),
            "prediction": overlay(entry.image, entry.predicted, entry.predicted_classes, self.classes),
            "confused": draw_confused(entry.image, entry.predicted, entry.true, entry.rows),
            **entry.views,
            **({WORST: entry.worst[1]} if worst and entry.worst else {}),
        }
        files = {kind: f"{stem}_{kind}.png" for kind in pictures}
        for kind, picture in pictures.items():
            # Quick rather than small: photographs hardly get smaller, and the page holds JPEGs of them.
            Image.fromarray(picture).save(self.folder / files[kind], compress_level=1)
        tables = ((entry.true, entry.true_classes), (entry.predicted, entry.predicted_classes))
        occurring = {ids[k - 1] for id_map, ids in tables for k in np.unique(id_map).tolist() if k}
        return {
            "image_id": entry.image_id,
            **files,
            "pq": entry.pq,
            "threshold": self.threshold,
            "selection": "first" if entry.first else "most confused",
            "class_ids": sorted(occurring),
            "rows": [r.to_dict() for r in entry.rows],
            **({"view_note": entry.view_note} if entry.views else {}),
        }


def _shrink(array: Any, max_width: int, method: Image.Resampling) -> Any:
    height, width = array.shape[:2]
    if width <= max_width:
        return array.copy()
    size = (max_width, max(1, round(height * max_width / width)))
    return np.asarray(Image.fromarray(array).resize(size, method))


@dataclass
class Gallery:
    """A gallery read back: ``items`` of its index with complete picture files, ``classes`` or none, ``notes``."""

    folder: Path
    items: list[dict[str, Any]]
    classes: ClassTable | None
    notes: list[str]

    def open(self, item: dict[str, Any], kind: str) -> Image.Image:
        """A picture as RGB."""
        return Image.open(self.folder / item[kind]).convert("RGB")


def read_gallery(run_dir: Path) -> Gallery | None:
    """Read ``run_dir/gallery``; None without one. Pictures that are missing, broken or outside it are left out."""
    folder = run_dir / "gallery"
    if not (folder / "index.json").is_file():
        return None
    notes: list[str] = []
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Gallery(folder, [], None, [f"gallery/index.json was left out: {error}"])
    items = []
    for item in index if isinstance(index, list) else []:
        if not isinstance(item, dict):
            continue
        kinds = (*KINDS, *VIEW_KINDS, WORST)
        good = {kind: item[kind] for kind in kinds if _usable(folder, item.get(kind), notes)}
        if good:
            items.append({**{k: v for k, v in item.items() if k not in kinds}, **good})
    return Gallery(folder, items, _read_classes(folder, notes), notes)


def _usable(folder: Path, name: Any, notes: list[str]) -> bool:
    if not isinstance(name, str) or not name:
        return False
    file = (folder / name).resolve()
    if folder.resolve() not in file.parents:
        notes.append(f"gallery/index.json names {name!r}, which is outside the gallery: left out.")
        return False
    try:
        with Image.open(file) as picture:
            picture.verify()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        notes.append(f"gallery/{name} is missing or broken: left out.")
        return False
    return True


def read_classes(run_dir: Path) -> ClassTable | None:
    """The classes of a run's gallery; None without any."""
    return _read_classes(run_dir / "gallery", [])


def _read_classes(folder: Path, notes: list[str]) -> ClassTable | None:
    if not (folder / "classes.json").is_file():
        return None
    try:
        return ClassTable.from_list(json.loads((folder / "classes.json").read_text(encoding="utf-8")))
    except Exception as error:  # any wrong shape of the JSON
        notes.append(f"gallery/classes.json was left out: {type(error).__name__}: {error}")
        return None
