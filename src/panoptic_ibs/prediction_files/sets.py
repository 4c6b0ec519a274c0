"""Sets of prediction files scored for the images of a data set, with pictures of the worst."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from panoptic_ibs.data.datamodule import PanopticDataModule
from panoptic_ibs.data.dataset import EvaluationDataset, make_target
from panoptic_ibs.errors import DataError
from panoptic_ibs.image_files import file_stem
from panoptic_ibs.report_pages import GalleryWriter

from .bootstrap import compare
from .instance_files import InstanceFile
from .panoptic_files import PredictionSet, open_predictions
from .problems import Problems
from .score import ImageError, Scorer


@dataclass(frozen=True)
class ScoringOptions:
    """What is counted of predictions in files, see :class:`panoptic_ibs.prediction_files.Scorer`.

    Attributes:
        limit: only so many images, taken evenly over the split.
        ap_from_panoptic: also the average precision of panoptic results.
        boundary: also boundary PQ.
        bootstrap: draws for confidence intervals; 0 for none.
        gallery: pictures of so many of the worst images.
        workers: threads; all usable cores when None.
        seed: of the bootstrap.
    """

    limit: int | None = None
    ap_from_panoptic: bool = False
    boundary: bool = False
    bootstrap: int = 1000
    gallery: int = 12
    workers: int | None = None
    seed: int = 0


def evaluate_predictions(
    paths: Sequence[Path | str],
    data: PanopticDataModule,
    run_dir: Path,
    options: ScoringOptions | None = None,
    tell: Callable[[str], object] = warnings.warn,
) -> dict[str, dict[str, Any]]:
    """Score sets of predictions of any program for the same images; pictures go to ``gallery/``.

    One set is scored into ``run_dir``; of several each has its own folder, ``run_dir/sets/NAME``. Images without a
    sound annotation and sound predictions of all sets are left out: ``tell`` gets a message of them, and the results
    say so.

    Returns:
        Metrics by the set's name. With several sets all but the first stand in the ``comparison`` of the first. Where
        something was wrong, ``complete`` is false and ``faults`` tells what.

    Raises:
        DataError: a set does not fit the data set or the format as a whole, or no image can be judged.
    """
    options = options or ScoringOptions()
    reader = data.reader("val")
    indices = list(EvaluationDataset(reader, None, options.limit or data.val_limit).indices)
    sets = [open_predictions(path, reader, indices) for path in paths]
    _name_apart(sets)
    scorer = Scorer(
        reader, sets, indices, ap=options.ap_from_panoptic, boundary=options.boundary, samples=options.bootstrap,
        seed=options.seed, worst=options.gallery, workers=options.workers,
    )  # fmt: skip
    total = len(scorer.indices)
    scores = scorer.run(lambda images: iter(track(images, description="scoring", total=total, transient=True)))
    if not scorer.complete:
        tell(scorer.faults())
    results = dict(zip((found.name for found in sets), scorer.results(), strict=True))
    folders = [run_dir] if len(sets) == 1 else [set_folder(run_dir, found.name) for found in sets]
    for found, folder in zip(sets, folders, strict=True):
        if isinstance(found, PredictionSet):
            _draw_worst(found, scorer.worst, folder)
    judged = [score for score in scores if not score.instances]
    if len(judged) > 1:
        names = [score.name for score in judged]
        values = [score.values() for score in judged] if scorer.samples else []
        results[names[0]]["comparison"] = compare(names, [results[name] for name in names], values)
    return results


def set_folder(run_dir: Path, name: str) -> Path:
    """Folder of one of several sets of predictions."""
    return run_dir / "sets" / file_stem(name)


def _name_apart(sets: Sequence[PredictionSet | InstanceFile]) -> None:
    """Number the names that occur twice."""
    seen: dict[str, int] = {}
    for found in sets:
        seen[found.name] = seen.get(found.name, 0) + 1
        if seen[found.name] > 1:
            found.name = f"{found.name}_{seen[found.name]}"


def _draw_worst(found: PredictionSet, worst: Sequence[ImageError], folder: Path) -> None:
    """Pictures of the worst images, which are read a second time."""
    reader = found.reader
    gallery = GalleryWriter(folder, reader.classes, limit=len(worst), first=0)
    for error in sorted(worst, reverse=True):
        try:
            image, id_map = reader.read(error.index)
        except DataError as reason:
            warnings.warn(f"{reason} It is left out of the gallery.", stacklevel=2)
            continue
        prediction = found.read(error.index, Problems(found.source))
        if prediction is not None:
            target = make_target(id_map, reader, error.index, min_pixels=0)
            gallery.add(image, prediction.dense(target.image_id), target)
    gallery.close()
