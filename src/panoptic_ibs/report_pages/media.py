"""The report's tables and pictures for loggers that keep them, such as Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .embeddings import VIEW_KINDS
from .gallery import KINDS, read_gallery
from .page import METRICS, interval_of
from .records import Run, load_run, number
from .run_figures import per_class


def log_report(run_dir: Path, loggers: Sequence[Any], step: int | None = None) -> None:
    """Give the report of a run to the loggers that have ``log_table`` and ``log_image``; others are left alone.

    ``report/metrics`` and ``report/classes`` are tables of fractions, ``report/comparison`` and
    ``report/comparison_classes`` those of sets of predictions side by side; ``report/confusion`` and the like are
    the figures, ``report/gallery_00`` and on the pictures of an image each, with those of its embeddings where the
    head has them, worst images first.

    Args:
        run_dir: a run folder with its report written.
        loggers: Lightning's.
        step: the step that they are logged at.
    """
    takers = [logger for logger in loggers if hasattr(logger, "log_table") and hasattr(logger, "log_image")]
    if not takers:
        return
    run = load_run(run_dir)
    metrics = [
        [m.name, run.metric(m.key), *(interval_of(run, m.key) or (None, None))]
        for m in METRICS
        if run.metric(m.key) is not None
    ]
    columns = ("pq", "sq", "rq", "iou", "tp", "fp", "fn")
    classes = [[name, *(number(values.get(k)) for k in columns)] for name, values in per_class(run)]
    figures = [f for f in sorted((run_dir / "report").glob("*.png")) if not f.name.startswith("gallery_")]
    gallery = read_gallery(run_dir)
    for logger in takers:
        logger.log_table("report/metrics", columns=["metric", "value", "low", "high"], data=metrics, step=step)
        if classes:
            logger.log_table("report/classes", columns=["class", *columns], data=classes, step=step)
        for name, rows in _comparison(run).items():
            logger.log_table(name, columns=["set", "minus", "metric", "value", "low", "high"], data=rows, step=step)
        for file in figures:
            logger.log_image(f"report/{file.stem}", [Image.open(file)], step=step)
        for i, item in enumerate(gallery.items if gallery else []):
            kinds = [kind for kind in (*KINDS, *VIEW_KINDS) if kind in item]
            captions = [f"{item.get('image_id', '')}: {kind}" for kind in kinds]
            if "similarity" in kinds:
                captions[kinds.index("similarity")] += f". {item.get('view_note', '')}"
            pictures = [gallery.open(item, kind) for kind in kinds] if gallery else []
            logger.log_image(f"report/gallery_{i:02d}", pictures, step=step, caption=captions)


def _comparison(run: Run) -> dict[str, list[list[Any]]]:
    """Rows of the differences between sets of predictions, and of those of the classes' PQ; nothing for one set."""
    table = run.metrics.get("comparison")
    if not isinstance(table, dict):
        return {}
    tables: dict[str, list[list[Any]]] = {"report/comparison": [], "report/comparison_classes": []}
    for name, found in table.get("differences", {}).items():
        by_class = found.get("per_class", {})
        for key, rows in zip(tables, ({k: v for k, v in found.items() if k != "per_class"}, by_class), strict=True):
            pair = [name, table.get("reference")]
            tables[key] += [
                [*pair, metric, *(v.get(k) for k in ("value", "low", "high"))] for metric, v in rows.items()
            ]
    return tables
