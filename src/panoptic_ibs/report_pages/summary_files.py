"""A folder of runs as ``summary.csv`` and ``summary.md``."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from typing import Any

from panoptic_ibs.errors import printable

from .answer import answers
from .collection import COUNTS, COUNTS_NOTE, GROUPS, METRICS, Collection, mean_and_deviation, short_label
from .contrasts import COST

Columns = Sequence[tuple[str, str]]


def write_csv(collection: Collection) -> None:
    """One row a run; after the runs of a setting with several seeds their mean and sample standard deviation."""
    with (collection.folder / "summary.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = _Sheet(csv.writer(stream))
        writer.writerow(["kind", "run", *GROUPS, "differs_in", "seed", "steps", *(key for key, _ in METRICS)])
        for setting in collection.settings:
            fixed = [*setting.label, setting.extra]
            for run in setting.runs:
                values = [run.metric(key) for key, _ in METRICS]
                writer.writerow(
                    ["run", collection.place(run), *fixed, _blank(run.seed), _blank(run.step), *map(_blank, values)]
                )
            if len(setting.runs) > 1:
                for kind, value in (("mean", setting.mean), ("sd", setting.deviation)):
                    row = [_blank(value(key)) for key, _ in METRICS]
                    writer.writerow([kind, "", *fixed, setting.seeds, _blank(setting.runs[0].step), *row])
        for setting, first, found in collection.contrasts(METRICS):
            fixed = [*setting.label, setting.extra, "", ""]
            against = f"minus {short_label(first, collection)}"
            writer.writerow(["difference", against, *fixed, *(d.mean if d else "" for d in found)])
            halves = [d.half if d and d.half is not None else "" for d in found]
            writer.writerow(["half of 95 % interval", against, *fixed, *halves])


class _Sheet:
    """Rows for spreadsheets, which take text that begins with certain letters for a formula: it gets an apostrophe."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def writerow(self, cells: Sequence[Any]) -> None:
        self._writer.writerow([harmless(cell) for cell in cells])


def harmless(cell: Any) -> Any:
    """A cell of a CSV that no spreadsheet runs; numbers stay numbers."""
    if not isinstance(cell, str) or (cell.lstrip()[:1] not in tuple("=+-@") and cell[:1] not in tuple("\t\r\n")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _blank(value: Any) -> Any:
    return "" if value is None else value


def write_markdown(collection: Collection) -> None:
    """Tables of settings and of their differences, cost, and the papers' tables."""
    lines = _answer_lines(collection)
    for note, columns in collection.tables():
        lines += [note, ""] if note else []
        lines += [*_setting_lines(collection, columns), "", *_contrast_lines(collection, columns)]
    lines += _count_lines(collection) + _cost_lines(collection) + _published_lines(collection)
    if collection.broken:
        lines += ["", "Left out:", "", *(f"- {text(name)}: {text(reason)}" for name, reason in collection.broken)]
    (collection.folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _answer_lines(collection: Collection) -> list[str]:
    """Which setting is best, of every head and data set."""
    found = answers(collection)
    lines = [f"**{text(a.title)}.** {text(f'{a.headline}. {a.said}')}" for a in found]
    return [part for line in lines for part in (line, "")]


def _setting_lines(collection: Collection, columns: Columns) -> list[str]:
    several = any(s.extra for s in collection.settings)
    extra = ["differs in"] if several else []
    head = ["head", "data", "sampling", "IBS", *extra, "seeds", "steps", *(n for _, n in columns)]
    lines = ["Percent; mean ± sample standard deviation over the seeds.", "", _row(head), _row(["---"] * len(head))]
    for s in collection.settings:
        step = s.runs[0].step
        cells = [
            *map(text, s.label),
            *([text(s.extra)] if several else []),
            s.seeds,
            "–" if step is None else str(step),
        ]
        lines.append(_row([*cells, *(mean_and_deviation(s, key) for key, _ in columns)]))
    return lines


def _contrast_lines(collection: Collection, columns: Columns) -> list[str]:
    rows = [
        _row([*(text(short_label(one, collection)) for one in (s, first)), str(max(d.pairs for d in found if d)),
              *(d.text if d else "–" for d in found)])
        for s, first, found in collection.contrasts(columns)
    ]  # fmt: skip
    if not rows:
        return []
    head = ["setting", "minus", "pairs", *(name for _, name in columns)]
    title = (
        "Differences between settings of the same head and data, in percent points: mean over the runs with the same "
        "seed [95 % interval, Student's t over the seeds]. Not corrected for the number of differences."
    )
    return [title, "", _row(head), _row(["---"] * len(head)), *rows, ""]


def _count_lines(collection: Collection) -> list[str]:
    rows = [
        _row([text(short_label(setting, collection)), *("–" if v is None else f"{v:.0f}" for v in values)])
        for setting, values in collection.counts()
    ]
    head = ["setting", *(name for _, name in COUNTS)]
    return [COUNTS_NOTE, "", _row(head), _row(["---"] * len(head)), *rows, ""] if rows else []


def _cost_lines(collection: Collection) -> list[str]:
    rows = [
        _row([text(short_label(setting, collection)),
              *("–" if v is None else f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values)])
        for setting, values in collection.costs()
    ]  # fmt: skip
    head = ["setting", *(name for _, name in COST)]
    title = "Cost, mean over the runs (of a resumed run: all of its parts)."
    return [title, "", _row(head), _row(["---"] * len(head)), *rows] if rows else []


def _published_lines(collection: Collection) -> list[str]:
    lines = []
    for found in collection.published():
        lines += ["", *([found["note"], ""] if found["note"] else [])]
        for table in (*found["tables"], *found["ablations"]):
            paper = table["paper"]
            source = f"{paper['authors']}, {paper['year']}, table {table['number']}"
            lines += ["", f"{table['title']}: {source}; ours first.", ""]
            lines += [_row(["", *table["heads"]]), _row(["---"] * (len(table["heads"]) + 1))]
            lines += [_row([f"**{text(row['label'])}**", *map(_percent, row["values"])]) for row in table["own"]]
            lines += [_row([row["label"], *map(_percent, row["values"])]) for row in table["rows"]]
    return lines


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def text(words: str) -> str:
    """Words from anywhere as Markdown that shows just them: no markup, no HTML, no link, one line."""
    words = " ".join(printable(words).split())
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", words)
