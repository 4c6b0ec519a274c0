"""Evaluation of whole images: metrics.json, predictions, baselines and the report of a run folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import distributed

from .callbacks import WritePredictions
from .classes import ClassTable
from .data.datamodule import PanopticDataModule
from .data.dataset import EvaluationDataset, make_target
from .data.readers import PanopticReader
from .errors import DataError, told
from .files import write_json
from .metrics import PanopticMetrics
from .model import PanopticModel, build_model
from .reporting import GalleryWriter
from .results import file_stem
from .scoring import ImageError, InstanceFile, PredictionSet, Problems, Scorer, compare, open_predictions
from .structures import Batch, Prediction, id_map_dtype
from .task import PanopticTask

Predictor = Callable[[Batch], Sequence[Prediction]]
GRID = (16, 32)  # cells of the stuff-only baseline, height x width


def evaluate(trainer: Trainer, task: PanopticTask, data: PanopticDataModule, run_dir: Path) -> dict[str, Any]:
    """Evaluate all of ``data``'s validation images: writes ``predictions/`` and ``gallery/``, returns the metrics.

    Images with broken files are left out: the metrics tell them as ``complete`` (false) and ``faults``.

    Raises:
        DataError: no image can be evaluated.
    """
    reader = data.reader("val")
    writer = WritePredictions(run_dir, reader.classes, reader.integer_ids)
    trainer.limit_val_batches = 1.0
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    try:
        trainer.validate(task, datamodule=data, verbose=False)
    finally:
        trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    faults = task.results.get("faults", [])
    if faults and not task.results["num_images"]:
        raise DataError(told("No image could be evaluated:", faults))
    return task.results


def incomplete(results: dict[str, Any]) -> str:
    """A message of what :func:`evaluate` left out; empty where that is nothing."""
    faults = results.get("faults", [])
    if not faults:
        return ""
    count = len(faults) + results["num_images"]
    return told(f"{len(faults)} of {count} images could not be evaluated; the others were:", faults)


def complete(
    results: dict[str, Any], data: PanopticDataModule, run_dir: Path, options: ScoringOptions
) -> dict[str, Any]:
    """Add to a network's results what only its files in ``predictions/`` give: confidence intervals and, where asked
    for, boundary PQ and the average precision of panoptic results.
    """
    if not (options.bootstrap or options.boundary or options.ap_from_panoptic):
        return results
    file = run_dir / "predictions" / "panoptic.json"
    (scored,) = evaluate_predictions([file], data, run_dir, replace(options, gallery=0), tell=lambda _: None).values()
    return {**scored, **results}  # what the network's own evaluation says, wins


def write_metrics(run_dir: Path, results: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Write ``metrics.json``: results first, then what they depend on; returns all of it."""
    metrics = {**results, **extra}
    write_json(run_dir / "metrics.json", metrics)
    return metrics


def score(
    predict: Predictor,
    data: PanopticDataModule,
    images: int | None,
    title: str,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Metrics of any predictor on (some of) the validation images.

    With several processes each takes its share, so all must call it; all get the numbers of one process. They add
    their sums on ``device``.
    """
    former, data.val_limit = data.val_limit, min((n for n in (images, data.val_limit) if n), default=None)
    try:
        loader = data.val_dataloader()
    finally:
        data.val_limit = former
    metrics = PanopticMetrics(data.classes)
    if distributed.is_available() and distributed.is_initialized():
        metrics.to(device)
    hidden = rank_zero_only.rank != 0  # type: ignore[attr-defined]
    with torch.inference_mode():
        for batch in track(loader, description=title, total=len(loader), transient=True, disable=hidden):
            metrics.update([p.cpu() for p in predict(batch)], batch.targets)
    return metrics.compute()


def baselines(
    data: PanopticDataModule,
    config: dict[str, Any],
    images: int,
    seed: int,
    device: torch.device | str = "cpu",
    packages: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Metrics of what any training must beat: the untrained network, and stuff alone. All processes call it.

    Args:
        data: the data.
        config: the network, see :func:`panoptic_ibs.model.build_model`.
        images: at most so many images.
        seed: of the untrained network's weights.
        device: where the networks compute.
        packages: see :func:`panoptic_ibs.model.build_model`.
    """
    seed_everything(seed, verbose=False)
    untrained = build_model(config, data.classes, packages).to(device).eval()
    return {
        "untrained network": score(network(untrained, device), data, images, "untrained network", device),
        "stuff only": score(StuffOnly(data.reader("train")), data, images, "stuff only", device),
    }


def network(model: PanopticModel, device: torch.device | str) -> Predictor:
    """A network as a predictor of batches from the CPU."""
    return lambda batch: model.predict_batch(batch.to(device))


class StuffOnly:
    """Predicts at each place of an image the stuff class that is most frequent there in training, and no things.

    Args:
        reader: the training split.
        images: how many of its images are counted, taken evenly.
    """

    def __init__(self, reader: PanopticReader, images: int = 100) -> None:
        self.classes: ClassTable = reader.classes
        stuff = np.array(self.classes.stuff_ids, dtype=np.int64)
        counts = np.zeros((*GRID, len(self.classes) + 1), np.int64)
        for i in np.unique(np.linspace(0, len(reader) - 1, images).round().astype(int)):
            class_of = np.concatenate([[len(self.classes)], reader.records[int(i)].segments.class_ids])
            try:
                labels = class_of[reader.read_id_map(int(i))]
            except DataError:  # a baseline is not worth the loss of a run's evaluation
                continue
            rows = np.linspace(0, labels.shape[0] - 1, 4 * GRID[0]).round().astype(int)
            columns = np.linspace(0, labels.shape[1] - 1, 4 * GRID[1]).round().astype(int)
            sampled = labels[rows][:, columns].reshape(GRID[0], 4, GRID[1], 4)
            for y in range(4):
                for x in range(4):
                    np.add.at(counts, (*np.indices(GRID), sampled[:, y, :, x]), 1)
        self.grid = stuff[counts[..., stuff].argmax(-1)] if len(stuff) else None

    def __call__(self, batch: Batch) -> list[Prediction]:
        """One prediction an image, the same everywhere but for its size."""
        return [self._predict(size.original, t.image_id) for size, t in zip(batch.sizes, batch.targets, strict=True)]

    def _predict(self, size: tuple[int, int], image_id: str) -> Prediction:
        if self.grid is None:
            nothing = torch.zeros(0)
            return Prediction(torch.zeros(size, dtype=id_map_dtype(0)), nothing.long(), nothing, image_id)
        rows = np.arange(size[0]) * GRID[0] // size[0]
        columns = np.arange(size[1]) * GRID[1] // size[1]
        present, dense = np.unique(self.grid, return_inverse=True)
        coarse = torch.from_numpy(dense.reshape(GRID) + 1).to(id_map_dtype(len(present)))
        id_map = coarse[torch.from_numpy(rows)][:, torch.from_numpy(columns)]
        return Prediction(id_map, torch.from_numpy(present), torch.ones(len(present)), image_id)


@dataclass(frozen=True)
class ScoringOptions:
    """What is counted of predictions in files, see :class:`panoptic_ibs.scoring.Scorer`.

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
