"""Plain tensors as predictions and ground truth, for metrics outside of this package's loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target, id_map_dtype

VOID = -1  # category of void pixels in maps of categories and instances
Table = Mapping[str, Tensor | Sequence[int]]
Predictions = Sequence[Prediction] | Sequence[Table] | Tensor
Targets = Sequence[Target] | Sequence[Table] | Tensor


def predictions_of(value: Predictions, classes: ClassTable) -> Sequence[Prediction]:
    """Predictions in any form that a metric takes; see :class:`panoptic_ibs.metrics.panoptic.SegmentMetric`.

    Raises:
        ValueError: another shape, a category that the class table lacks.
    """
    if _ready(value, Prediction):
        return value  # type: ignore[return-value]
    return [Prediction(m, c, torch.ones(len(c))) for m, c, _ in _tables(value, classes, "predictions")]


def targets_of(value: Targets, classes: ClassTable) -> Sequence[Target]:
    """Ground truth in any form that a metric takes; see :func:`predictions_of`."""
    if _ready(value, Target):
        return value  # type: ignore[return-value]
    things = torch.tensor(classes.is_thing, dtype=torch.bool)
    found = []
    for i, (id_map, class_ids, crowd) in enumerate(_tables(value, classes, "targets")):
        n = len(class_ids)
        is_thing = things[class_ids.clamp(0, len(classes) - 1)]  # the metrics refuse what lies outside
        areas = torch.bincount(id_map.cpu().long().ravel(), minlength=n + 1)[1:]
        found.append(Target(id_map, class_ids, is_thing, crowd, torch.zeros(n, 4), areas, torch.arange(1, n + 1), i))
    return found


def _ready(value: Any, kind: type) -> bool:
    return not isinstance(value, Tensor) and all(isinstance(v, kind) for v in value)


def _tables(value: Any, classes: ClassTable, what: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Id map, contiguous class ids and crowd flags of each image."""
    if isinstance(value, Tensor):
        if value.ndim != 4 or value.shape[-1] != 2 or value.is_floating_point():
            raise ValueError(
                f"{what}: a tensor must be (B, H, W, 2) integers, category and instance; got {tuple(value.shape)} "
                f"{value.dtype}."
            )
        return [_from_categories(pixels, classes, f"{what}[{i}]") for i, pixels in enumerate(value)]
    found = []
    for i, row in enumerate(value):
        if not isinstance(row, Mapping) or not {"id_map", "class_ids"} <= set(row):
            raise ValueError(f"{what}[{i}]: expected id_map (H, W) and class_ids (N,), in targets also is_crowd (N,).")
        class_ids = torch.as_tensor(row["class_ids"], dtype=torch.int64)
        crowd = torch.as_tensor(row.get("is_crowd", torch.zeros(len(class_ids))), dtype=torch.bool)
        if crowd.shape != class_ids.shape:
            raise ValueError(f"{what}[{i}]: is_crowd {tuple(crowd.shape)}, class_ids {tuple(class_ids.shape)}.")
        found.append((torch.as_tensor(row["id_map"]), class_ids, crowd))
    return found


def _from_categories(pixels: Tensor, classes: ClassTable, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """(H, W, 2) categories and instances; stuff of a category is one segment, whatever its instance ids."""
    pairs, inverse = pixels.cpu().long().reshape(-1, 2).unique(dim=0, return_inverse=True)
    table = {c.dataset_id: i for i, c in enumerate(classes.classes)} | {VOID: len(classes)}
    if unknown := [int(c) for c in pairs[:, 0].tolist() if c not in table]:
        raise ValueError(f"{what}: category {unknown[0]} is not in the class table; write {VOID} for void.")
    class_ids = torch.tensor([table[c] for c in pairs[:, 0].tolist()], dtype=torch.int64)
    thing = torch.tensor([*classes.is_thing, False])[class_ids]
    keys = torch.stack([class_ids, torch.where(thing, pairs[:, 1], 0)], 1)
    segments, rows = keys.unique(dim=0, return_inverse=True)  # sorted: void, the highest class, is the last
    number = len(segments) - int(bool((class_ids == len(classes)).any()))
    ids = torch.where(rows < number, rows + 1, 0).to(id_map_dtype(number))
    return ids[inverse].reshape(pixels.shape[:2]), segments[:number, 0], torch.zeros(number, dtype=torch.bool)
