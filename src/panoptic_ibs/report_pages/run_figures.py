"""Which figures a run has: learning curves, learning rate, validation metrics, confusion, classes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from panoptic_ibs.fonts import plottable
from panoptic_ibs.metrics.names import HEADLINE, named

from .beside import confusion_lines
from .figures import FULL_WIDTH, HALF_WIDTH, Draw, Line, Theme, bars, line_chart
from .gallery import read_classes
from .records import Curve, Run, confusion_curve, metric, number

_VALIDATION = tuple((f"val/{key}", named(key).name) for key in HEADLINE)


@dataclass(frozen=True)
class FigureSpec:
    """A figure to draw: file stem, alternative text, caption, size in inches; ``embedded`` ones are on the page."""

    stem: str
    alt: str
    caption: str
    draw: Draw
    height: float = 3.4
    width: float = FULL_WIDTH
    embedded: bool = True


def figures_of(run: Run) -> list[FigureSpec]:
    """The figures that the run's files allow, in the page's order."""
    made = (
        _losses(run),
        _ibs(run),
        _validation(run),
        _learning_rate(run),
        _confusion(run),
        _confusion_by_size(run),
        _classes(run),
    )
    return [figure for figure in made if figure is not None]


def loss_terms(run: Run) -> tuple[list[Line], Line | None]:
    """The curves of the loss (total first, then the terms by size) and that of IBS."""
    found = {}
    for name, curve in run.curves.items():
        match = re.fullmatch(r"train/(loss\w*?)(_step)?", name)
        if match and not name.endswith("_epoch"):
            found[match[1]] = curve
    ibs = found.pop("loss_ibs", None)
    terms = sorted((k for k in found if k != "loss"), key=lambda k: -_mean(found[k][1]))
    order = (["loss"] if "loss" in found else []) + terms
    lines = [
        Line("total" if k == "loss" else k.removeprefix("loss_").replace("_", " "), found[k], i, smooth=True)
        for i, k in enumerate(order)
    ]
    return lines, None if ibs is None else Line("", ibs, 1, smooth=True)


def _losses(run: Run) -> FigureSpec | None:
    lines, _ = loss_terms(run)
    if not lines:
        return None

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), lines, theme, "Loss and its terms (log scale)", "step", log=True)

    caption = "Training losses after weighting. Thin: every logged value; thick: running mean."
    return FigureSpec("losses", "Training loss terms over the steps", caption, draw, 3.4, HALF_WIDTH)


def _ibs(run: Run) -> FigureSpec | None:
    _, line = loss_terms(run)
    if line is None:
        return None

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), [line], theme, "Loss of Intra-Batch Supervision", "step")

    return FigureSpec(
        "ibs", "Loss of Intra-Batch Supervision over the steps", "After weighting.", draw, 2.4, HALF_WIDTH
    )


def _validation(run: Run) -> FigureSpec | None:
    lines = [
        Line(label, run.curves[key], i, markers=True) for i, (key, label) in enumerate(_VALIDATION) if key in run.curves
    ]
    if not lines:
        return None
    few = max(len(line.curve[0]) for line in lines)

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), lines, theme, "Validation, percent", "step", percent=True)

    caption = "On full validation images during training." + (" Only one evaluation took place." if few == 1 else "")
    return FigureSpec("validation", "Validation metrics over the steps", caption, draw, 3.4, HALF_WIDTH)


def _learning_rate(run: Run) -> FigureSpec | None:
    rates = {k: v for k, v in run.curves.items() if re.match(r"(lr\b|lr[-_/]|train/lr|.*/lr$)", k)}
    distinct: dict[str, Curve] = {}
    for name, curve in rates.items():
        if curve not in distinct.values():
            distinct[name] = curve
    if not distinct:
        return None
    lines = [Line(name if len(distinct) > 1 else "", curve, i) for i, (name, curve) in enumerate(distinct.items())]

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), lines, theme, "Learning rate", "step")

    return FigureSpec(
        "learning_rate",
        "Learning rate over the steps",
        "Learning rate, one line a distinct parameter group.",
        draw,
        2.4,
        HALF_WIDTH,
    )


def _confusion(run: Run) -> FigureSpec | None:
    curve = confusion_curve(run.metrics.get("confusion"))
    if not curve[0]:
        return None
    others = confusion_lines(run)
    reference = (run.metrics.get("comparison") or {}).get("reference") if others else "this run"
    lines = [Line(str(reference), curve), *others]
    for name, table in run.baselines.items():
        other = confusion_curve(table.get("confusion"))
        if other[0] and metric(table, "things.predicted") != 0:  # who predicts nothing confuses nothing
            lines.append(Line(name, other, 7, dashed=True))

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), lines, theme, "Confused predicted thing segments, percent",
                   "covers more than so many percent of two or more true instances", percent=True)  # fmt: skip

    if len(lines) == 1:
        lines = [Line("", curve)]
    caption = "Share of the predicted thing segments that swallow at least two true instances. Lower is better."
    return FigureSpec("confusion", "Confusion curve", caption, draw, 3.1, HALF_WIDTH)


def _confusion_by_size(run: Run) -> FigureSpec | None:
    table = run.metrics.get("confusion_by_size")
    curves = {str(k): confusion_curve(v) for k, v in table.items()} if isinstance(table, dict) else {}
    lines = [Line(name, curve, i) for i, (name, curve) in enumerate(curves.items()) if curve[0]]
    if not lines:
        return None

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), lines, theme, "Confused segments by their size, percent",
                   "covers more than so many percent of two or more true instances", percent=True)  # fmt: skip

    caption = "The same by the predicted segment's area: small below 32² pixels, medium below 96²."
    return FigureSpec("confusion_by_size", "Confusion by size", caption, draw, 3.1, HALF_WIDTH)


def per_class(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Rows of ``per_class`` that occur (tp + fp + fn > 0), best PQ first."""
    table = run.metrics.get("per_class")
    rows = [(str(k), v) for k, v in table.items() if isinstance(v, dict)] if isinstance(table, dict) else []
    rows = [
        (k, v)
        for k, v in rows
        if number(v.get("pq")) is not None and sum(number(v.get(c)) or 0 for c in ("tp", "fp", "fn")) > 0
    ]
    return sorted(rows, key=lambda row: -(number(row[1].get("pq")) or 0.0))


def _classes(run: Run) -> FigureSpec | None:
    rows = per_class(run)[:60]
    if not rows:
        return None
    classes = read_classes(run.path)
    numbers = {c.name: c.dataset_id for c in classes.classes} if classes else {}

    def draw(figure: Any, theme: Theme) -> None:
        bars(
            figure.subplots(),
            [plottable(name, numbers.get(name, place)) for place, (name, _) in enumerate(rows)],
            [v["pq"] for _, v in rows],
            [0] * len(rows),
            theme,
            "PQ per class, percent",
        )

    return FigureSpec("per_class", "PQ per class", "", draw, 0.8 + 0.23 * len(rows), 7.4, False)


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
