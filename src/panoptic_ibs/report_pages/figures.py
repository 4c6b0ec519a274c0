"""The report's figures: matplotlib's object-oriented interface on Agg, imported when the first figure is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from panoptic_ibs.fonts import figure_families, plottable

from .records import Curve

# Okabe and Ito's colour-blind-safe order (yellow left out: too light on white).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A6BB5", "#8C8C8C")


# Inches; the page shows either at about 100 pixels an inch, so that all text has one size.
FULL_WIDTH, HALF_WIDTH = 11.2, 5.3


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: the page's surface, ink, and quiet lines."""

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    palette: tuple[str, ...] = PALETTE


LIGHT = Theme("light", "#ffffff", "#1a1d23", "#666d7a", "#e6e8ec")
DARK = Theme(
    "dark", "#191c22", "#e7e9ee", "#9aa1ad", "#2c313a",
    ("#4BA3DB", "#F0803C", "#2FC79B", "#E09BC4", "#8CCBF2", "#F2B93B", "#A99BE0", "#A8A8A8"),
)  # fmt: skip

Draw = Callable[[Any, Theme], None]


@dataclass(frozen=True)
class Line:
    """One labelled line of a chart; ``dashed`` marks a baseline."""

    label: str
    curve: Curve
    color: int = 0
    dashed: bool = False
    markers: bool = False
    smooth: bool = False


def render(draw: Draw, theme: Theme, width: float = FULL_WIDTH, height: float = 3.4) -> bytes:
    """PNG of a figure of ``width`` x ``height`` inches at 160 dots per inch, drawn by ``draw(figure, theme)``."""
    with _style(theme):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), facecolor=theme.surface, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=160, facecolor=theme.surface, metadata={"Software": None})
        return buffer.getvalue()


def _style(theme: Theme) -> AbstractContextManager[None]:
    import matplotlib

    style: AbstractContextManager[None] = matplotlib.rc_context(
        {
            "font.family": figure_families(),
            "font.size": 9,
            "axes.facecolor": theme.surface,
            "axes.edgecolor": theme.grid,
            "axes.labelcolor": theme.muted,
            "axes.titlecolor": theme.ink,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme.grid,
            "grid.linewidth": 0.8,
            "text.color": theme.ink,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "xtick.minor.size": 0,
            "ytick.minor.size": 0,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
            # Class names are data: a dollar sign in one is no formula.
            "text.parse_math": False,
        }
    )
    return style


def line_chart(
    axes: Any,
    lines: Sequence[Line],
    theme: Theme,
    title: str,
    x_label: str = "",
    percent: bool = False,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Lines with their names at their right ends, in order of height, instead of a legend box."""
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.grid(axis="x", visible=False)
    factor = 100.0 if percent else 1.0
    ends = []
    for line in lines:
        xs, ys = line.curve[0], [factor * y for y in line.curve[1]]
        if not xs:
            continue
        color = theme.muted if line.dashed else theme.palette[line.color % len(theme.palette)]
        if line.smooth and len(xs) > 30:
            axes.plot(xs, ys, color=color, alpha=0.22, linewidth=0.9)
            ys = _smooth(ys)
        single = len(xs) == 1
        axes.plot(
            xs, ys, color=color, linestyle=(0, (4, 3)) if line.dashed else "-", linewidth=1.3 if line.dashed else 1.8,
            marker="o" if line.markers or single else None, markersize=3.5,
        )  # fmt: skip
        ends.append((ys[-1], xs[-1], line.label, color))
    if log and ends and all(y > 0 for line in lines for y in line.curve[1]):
        _log_scale(axes)
    else:
        bottom, top = axes.get_ylim()
        axes.set_ylim(*(limits or ((0.0, top) if bottom > 0 or percent else (bottom, top))))
    _label_ends(axes, ends)


def _log_scale(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _label_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write names beside the line ends, pushed apart so that none overlap."""
    if not ends:
        return
    to_axes = axes.transAxes.inverted()
    placed = sorted(
        (float(to_axes.transform(axes.transData.transform((x, y)))[1]), label, color) for y, x, label, color in ends
    )
    figure = axes.figure
    height = axes.get_position().height * figure.get_figheight() * 72 * 0.8
    gap = 11.0 / max(height, 1.0)
    ys = [p[0] for p in placed]
    for _ in range(60):
        for i in range(len(ys) - 1):
            overlap = gap - (ys[i + 1] - ys[i])
            if overlap > 0:
                ys[i] -= overlap / 2
                ys[i + 1] += overlap / 2
        if ys and ys[0] < 0:
            ys[0] = 0.0
    for y, (_, label, color) in zip(ys, placed, strict=True):
        axes.annotate(
            plottable(label),
            (1.015, y),
            xycoords="axes fraction",
            color=color,
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over about 1/25 of the curve."""
    half = max(1, len(values) // 50)
    out = []
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        out.append(sum(part) / len(part))
    return out


def bars(
    axes: Any, names: Sequence[str], values: Sequence[float], colors: Sequence[int], theme: Theme, title: str
) -> None:
    """Horizontal bars of fractions in percent, values written beside them, first name on top."""
    axes.set_title(title)
    axes.grid(visible=False)
    rows = range(len(names))
    axes.barh(rows, [100 * v for v in values], color=[theme.palette[c] for c in colors], height=0.68)
    axes.set_yticks(list(rows), [plottable(name) for name in names], color=theme.ink)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(10.0, 112 * max(values, default=1.0)))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            f"{100 * value:.1f}",
            (100 * value, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=theme.muted,
        )
