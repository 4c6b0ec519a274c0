"""The tables and figures of a folder of runs for loggers that keep them, such as Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .collection import GROUPS, METRICS, Collection, collect, short_label
from .contrasts import COST

Table = tuple[list[str], list[list[Any]]]


def log_summary(runs: Path, loggers: Sequence[Any]) -> None:
    """Give the summary of a folder of runs to the loggers that have ``log_table`` and ``log_image``.

    All tables hold fractions: ``summary/runs`` a row a run, ``summary/settings`` means and sample standard deviations,
    ``summary/differences`` mean and 95 % interval of each metric, ``summary/confusion`` the mean curves,
    ``summary/cost`` time and memory, ``summary/published`` the papers' numbers beside ours where there are any; long
    rather than wide, so that charts can be made of them. The pictures of the folder's ``report`` follow.

    Args:
        runs: a folder of runs with its page written, see :func:`panoptic_ibs.report_pages.write_summary`.
        loggers: Lightning's; others are left alone.

    Raises:
        DataError: see :func:`panoptic_ibs.report_pages.collect`.
    """
    takers = [logger for logger in loggers if hasattr(logger, "log_table") and hasattr(logger, "log_image")]
    if not takers:
        return
    collection = collect(runs)
    tables = summary_tables(collection)
    for logger in takers:
        for name, (columns, rows) in tables.items():
            logger.log_table(f"summary/{name}", columns=columns, data=rows)
        for file in sorted((collection.folder / "report").glob("*.png")):
            logger.log_image(f"summary/{file.stem}", [Image.open(file)])


def summary_tables(collection: Collection) -> dict[str, Table]:
    """Name -> columns and rows; tables without a row are left out."""
    tables = {
        "runs": _runs(collection),
        "settings": _settings(collection),
        "differences": _differences(collection),
        "confusion": _curves(collection),
        "cost": _cost(collection),
        "published": _published(collection),
    }
    return {name: table for name, table in tables.items() if table[1]}


def _keys(collection: Collection) -> list[str]:
    """The metrics that any run has."""
    return [key for key, _ in METRICS if any(s.values(key) for s in collection.settings)]


def _runs(collection: Collection) -> Table:
    keys = _keys(collection)
    rows = [
        [collection.place(run), *setting.label, setting.extra, run.seed, run.step, *(run.metric(k) for k in keys)]
        for setting in collection.settings
        for run in setting.runs
    ]
    return ["run", *GROUPS, "differs_in", "seed", "steps", *keys], rows


def _settings(collection: Collection) -> Table:
    keys = _keys(collection)
    rows = [
        [short_label(s, collection), *s.label, s.extra, s.seeds, s.runs[0].step,
         *(value for k in keys for value in (s.mean(k), s.deviation(k)))]
        for s in collection.settings
    ]  # fmt: skip
    names = [name for k in keys for name in (k, f"{k}_sd")]
    return ["setting", *GROUPS, "differs_in", "seeds", "steps", *names], rows


def _differences(collection: Collection) -> Table:
    rows = []
    for setting, first, found in collection.contrasts(METRICS):
        names = [short_label(setting, collection), short_label(first, collection)]
        for (key, _), d in zip(METRICS, found, strict=True):
            if d is not None:
                ends = [None, None] if d.half is None else [d.mean - d.half, d.mean + d.half]
                rows.append([*names, key, d.pairs, d.mean, *ends])
    return ["setting", "minus", "metric", "pairs", "mean", "low", "high"], rows


def _curves(collection: Collection) -> Table:
    rows = [
        [short_label(s, collection), threshold, share]
        for s in collection.settings
        for threshold, share in zip(*s.curve(), strict=True)
    ]
    return ["setting", "threshold", "share"], rows


def _cost(collection: Collection) -> Table:
    rows = [[short_label(setting, collection), *values] for setting, values in collection.costs()]
    return ["setting", *(key for key, _ in COST)], rows


def _published(collection: Collection) -> Table:
    rows = []
    for found in collection.published():
        for table in (*found["tables"], *found["ablations"]):
            title = f"{table['title']}: {table['paper']['authors']}, {table['paper']['year']}, table {table['number']}"
            for kind in ("own", "rows"):
                for row in table[kind]:
                    rows += [
                        [title, row["label"], kind == "own", metric, value / 100]
                        for metric, value in zip(table["heads"], row["values"], strict=True)
                        if value is not None
                    ]
    return ["table", "row", "ours", "metric", "value"], rows
