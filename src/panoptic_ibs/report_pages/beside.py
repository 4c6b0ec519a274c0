"""What stands beside a run: the papers' tables on the same data, and other sets of predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from panoptic_ibs.metrics.names import columns

from .figures import Line
from .records import Run, confusion_curve, number

Own = tuple[str, Callable[[str], float | None]]

PAPERS = ("tables_ibs.json", "tables_ciae.json")
IMAGES = {("cityscapes", "val"): 500, ("vistas", "validation"): 2000, ("coco_panoptic", "val2017"): 5000}
HEADS = dict(columns(
    "pq", "sq", "rq", "pq_things", "sq_things", "rq_things", "pq_stuff", "sq_stuff", "rq_stuff", "acc_things",
    "prec_things", "miou", "ap", "ap_small", "ap_medium", "ap_large",
))  # fmt: skip
MAIN = {"1", "2", "4", "I"}  # shown at once; the ablations are folded


@cache
def papers() -> list[dict[str, Any]]:
    """The tables of the papers as in ``data/published``; values in percent, as printed."""
    folder = resources.files("panoptic_ibs.data") / "published"
    return [json.loads((folder / name).read_text(encoding="utf-8")) for name in PAPERS]


def place(run: Run) -> tuple[str, str]:
    """Data set and split that a run was scored on."""
    data = run.config.get("data")
    return run.choice("data"), str(data.get("val") if isinstance(data, dict) else None)


def published(runs: Sequence[Run], own: Sequence[Own]) -> dict[str, Any] | None:
    """The papers' tables on the data set and split of some runs, each with rows of ours; None where there are none.

    ``note`` says so where the runs were not scored on the whole split.

    Args:
        runs: all on one split.
        own: our rows: a label, and a function from a metric's name to its value.
    """
    split = place(runs[0])
    tables = [
        {**_table(table, own), "paper": paper["paper"], "folded": table["table"] not in MAIN}
        for paper in papers()
        for table in paper["tables"]
        if (table["data"], table["split"]) == split and any(value(_measure(table)) is not None for _, value in own)
    ]
    if not tables:
        return None
    scored, whole = {number(run.metrics.get("num_images")) for run in runs} - {None}, IMAGES.get(split)
    partly = [images for images in scored if images is not None and whole is not None and images != whole]
    note = (
        f"Scored on {min(partly):,.0f} images, the papers on all {whole:,}: the numbers do not compare."
        if partly
        else ""
    )
    return {
        "tables": [t for t in tables if not t["folded"]],
        "ablations": [t for t in tables if t["folded"]],
        "note": note,
    }


def _measure(table: dict[str, Any]) -> str:
    """What a table is about: AP, or PQ."""
    return "ap" if "ap" in table["rows"][0] else "pq"


def _table(table: dict[str, Any], own: Sequence[Own]) -> dict[str, Any]:
    """Columns that any row has, rows as label and values, theirs and ours, in percent."""
    keys = [k for k in HEADS if any(number(row.get(k)) is not None for row in table["rows"])]
    ours = [{"label": label, "values": [value(k) for k in keys]} for label, value in own]
    return {
        "number": table["table"],
        "title": table["title"],
        "remark": table.get("note", ""),
        "heads": [HEADS[k] for k in keys],
        "rows": [{"label": _label(row), "values": [number(row.get(k)) for k in keys]} for row in table["rows"]],
        "own": [{**row, "values": [None if v is None else 100 * v for v in row["values"]]} for row in ours],
    }


def _label(row: dict[str, Any]) -> str:
    """The method and what it was done with."""
    parts = [str(row["method"])]
    for key, value in row.items():
        if key in ("method", "device") or key in HEADS or value is None or value is False or key.endswith("_ms"):
            continue
        name = key.replace("_", " ")
        parts.append(name if value is True else (str(value) if isinstance(value, str) else f"{name} {value}"))
    if row.get("crops") is False:
        parts.append("full images")
    return ", ".join(parts)


def comparison(run: Run) -> dict[str, Any] | None:
    """Sets of predictions side by side: metrics and classes of the reference, and differences with intervals."""
    table = run.metrics.get("comparison")
    if not isinstance(table, dict) or not isinstance(table.get("differences"), dict):
        return None
    others = {str(name): rows for name, rows in table["differences"].items() if isinstance(rows, dict)}
    keys = [*HEADS.items(), *columns("confusion@25", "confusion@50", "confusion@75")]
    metrics = [_row(title, run.metric(key), others, key) for key, title in keys]
    per_class = run.metrics.get("per_class")
    classes = []
    for name, values in _object(per_class).items():
        found = {other: _object(rows.get("per_class")) for other, rows in others.items()}
        classes.append(_row(str(name), number(_object(values).get("pq")), found, name))
    classes = [row for row in classes if any(c["difference"] is not None for c in row["cells"])]
    classes.sort(key=lambda row: -max(abs(c["difference"] or 0) for c in row["cells"]))
    return {
        "reference": str(table.get("reference", "")),
        "others": list(others),
        "metrics": [row for row in metrics if row["value"] is not None],
        "classes": classes,
    }


def _row(title: str, value: float | None, others: dict[str, Any], key: str) -> dict[str, Any]:
    """A metric or class: the reference's value, and of each other set value, difference, interval and certainty."""
    cells = []
    for rows in others.values():
        entry = _object(rows.get(key))
        difference, low, high = (number(entry.get(k)) for k in ("value", "low", "high"))
        cells.append(
            {"value": None if value is None or difference is None else value + difference, "difference": difference,
             "low": low, "high": high, "certain": low is not None and high is not None and (low > 0 or high < 0)}
        )  # fmt: skip
    return {"title": title, "value": value, "cells": cells, "lower": key.startswith("confusion")}


def confusion_lines(run: Run) -> list[Line]:
    """Confusion curves of the other sets of predictions."""
    table = run.metrics.get("comparison")
    differences = _object(_object(table).get("differences"))
    thresholds, shares = confusion_curve(run.metrics.get("confusion"))
    lines = []
    for i, (name, rows) in enumerate(differences.items()):
        deltas = [number(_object(_object(rows).get(f"confusion@{t:g}")).get("value")) for t in thresholds]
        if deltas and all(d is not None for d in deltas):
            lines.append(
                Line(str(name), (thresholds, [s + (d or 0) for s, d in zip(shares, deltas, strict=True)]), i + 1)
            )
    return lines


def _object(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one in its place."""
    return value if isinstance(value, dict) else {}
