"""A network evaluated on whole images: metrics.json and predictions of a run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import Trainer

from .callbacks import WritePredictions
from .data.datamodule import PanopticDataModule
from .errors import DataError, told
from .files import write_json
from .prediction_files.sets import ScoringOptions, evaluate_predictions
from .task import PanopticTask

REFINED, UNREFINED = "refined", "without_refine"  # sets of predictions side by side


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


def beside_unrefined(
    results: dict[str, Any], unrefined: dict[str, Any], data: PanopticDataModule, run_dir: Path, options: ScoringOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """:func:`complete` for a network evaluated with its refine steps, in ``run_dir``, and without, in ``sets/``.

    Returns both; the first has the differences of the second, with their intervals, as ``comparison``.
    """
    files = [folder / "predictions" / "panoptic.json" for folder in (run_dir, run_dir / "sets" / UNREFINED)]
    scored = evaluate_predictions(files, data, run_dir, replace(options, gallery=0), tell=lambda _: None)
    first, second = scored.values()
    (difference,) = first["comparison"]["differences"].values()
    names = [REFINED, UNREFINED]
    first["comparison"] = {"reference": REFINED, "sets": names, "differences": {UNREFINED: difference}}
    return {**first, **results}, {**second, **unrefined}


def write_metrics(run_dir: Path, results: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Write ``metrics.json``: results first, then what they depend on; returns all of it."""
    metrics = {**results, **extra}
    write_json(run_dir / "metrics.json", metrics)
    return metrics
