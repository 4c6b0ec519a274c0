"""Evaluation of whole images: metrics.json, predictions, baselines and the report of a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer, seed_everything
from rich.progress import track

from .callbacks import WritePredictions, image_of
from .classes import ClassTable
from .data.datamodule import PanopticDataModule
from .data.readers import PanopticReader
from .metrics import PanopticMetrics
from .model import PanopticModel, build_model
from .reporting import GalleryWriter
from .results import PredictionFile, write_json
from .structures import Batch, Prediction
from .task import PanopticTask

Predictor = Callable[[Batch], Sequence[Prediction]]
GRID = (16, 32)  # cells of the stuff-only baseline, height x width


def evaluate(trainer: Trainer, task: PanopticTask, data: PanopticDataModule, run_dir: Path) -> dict[str, Any]:
    """Evaluate all of ``data``'s validation images: writes ``predictions/`` and ``gallery/``, returns the metrics."""
    reader = data.reader("val")
    writer = WritePredictions(run_dir, reader.classes, reader.integer_ids)
    trainer.limit_val_batches = 1.0
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    try:
        trainer.validate(task, datamodule=data, verbose=False)
    finally:
        trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    return task.results


def write_metrics(run_dir: Path, results: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Write ``metrics.json``: results first, then what they depend on; returns all of it."""
    metrics = {**results, **extra}
    write_json(run_dir / "metrics.json", metrics)
    return metrics


def score(predict: Predictor, data: PanopticDataModule, images: int | None, title: str) -> dict[str, Any]:
    """Metrics of any predictor on (some of) the validation images, in this process."""
    former, data.val_limit = data.val_limit, min((n for n in (images, data.val_limit) if n), default=None)
    try:
        loader = data.val_dataloader()
    finally:
        data.val_limit = former
    metrics = PanopticMetrics(data.classes)
    with torch.inference_mode():
        for batch in track(loader, description=title, total=len(loader), transient=True):
            metrics.update([p.cpu() for p in predict(batch)], batch.targets)
    return metrics.compute()


def baselines(
    data: PanopticDataModule, config: dict[str, Any], images: int, seed: int, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Metrics of what any training must beat: the untrained network, and stuff alone.

    Args:
        data: the data.
        config: the network, see :func:`panoptic_ibs.model.build_model`.
        images: at most so many images.
        seed: of the untrained network's weights.
    """
    seed_everything(seed, verbose=False)
    untrained = build_model(config, data.classes).to(device).eval()
    return {
        "untrained network": score(network(untrained, device), data, images, "untrained network"),
        "stuff only": score(StuffOnly(data.reader("train")), data, images, "stuff only"),
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
            labels = class_of[reader.read_id_map(int(i))]
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
            return Prediction(torch.zeros(size, dtype=torch.int32), nothing.long(), nothing, image_id)
        rows = np.arange(size[0]) * GRID[0] // size[0]
        columns = np.arange(size[1]) * GRID[1] // size[1]
        present, dense = np.unique(self.grid, return_inverse=True)
        id_map = torch.from_numpy((dense.reshape(GRID) + 1).astype(np.int32)[rows][:, columns])
        return Prediction(id_map, torch.from_numpy(present), torch.ones(len(present)), image_id)


def evaluate_predictions(path: Path, data: PanopticDataModule, run_dir: Path) -> dict[str, Any]:
    """Score predictions of any program; pictures go to ``gallery/``.

    Raises:
        DataError: predictions that are incomplete or do not fit the data set.
    """
    reader = data.reader("val")
    predictions = PredictionFile(path, reader)
    gallery = GalleryWriter(run_dir, reader.classes)

    def predict(batch: Batch) -> list[Prediction]:
        found = [predictions.read(t.image_index) for t in batch.targets]
        for i, (prediction, target) in enumerate(zip(found, batch.targets, strict=True)):
            gallery.add(image_of(batch, i), prediction, target)
        return found

    data.eval_resize = None  # nothing goes through a network
    results = score(predict, data, None, "scoring")
    gallery.close()
    return results
