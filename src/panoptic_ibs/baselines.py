"""What any training must beat: an untrained network, and stuff alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import distributed

from .classes import ClassTable
from .construction import build_model
from .data.datamodule import PanopticDataModule
from .data.readers import PanopticReader
from .errors import DataError
from .metrics import PanopticMetrics
from .model import PanopticModel
from .segments import Prediction
from .structures import Batch, id_map_dtype

Predictor = Callable[[Batch], Sequence[Prediction]]
GRID = (16, 32)  # cells of the stuff-only baseline, height x width


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
        config: the network, see :func:`panoptic_ibs.construction.build_model`.
        images: at most so many images.
        seed: of the untrained network's weights.
        device: where the networks compute.
        packages: see :func:`panoptic_ibs.construction.build_model`.
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
