"""Many runs on one page: settings with mean and deviation over seeds, curves in one figure, pictures side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .collection import COLUMNS, GROUPS, Collection, collect, short_label
from .contrasts import COST
from .embed import Embedder
from .figures import Line, Theme, line_chart
from .page import template, write_figure
from .pair import pair_classes, pair_gallery
from .run_figures import FigureSpec
from .sheets import write_sheets
from .summary_files import write_csv, write_markdown


def write_summary(runs: Path) -> Path:
    """Write ``report/index.html``, ``summary.csv`` and ``summary.md`` into the folder of the runs.

    Returns:
        The path of the page.

    Raises:
        DataError: see :func:`collect`.
    """
    collection = collect(runs)
    folder = collection.folder / "report"
    folder.mkdir(exist_ok=True)
    write_csv(collection)
    write_markdown(collection)
    embedder = Embedder()
    figures = {spec.stem: write_figure(spec, folder, embedder) for spec in _figures(collection)}
    pair = collection.runs if len(collection.runs) == 2 else []
    count = len(collection.runs)
    page = template("summary.html.j2").render(
        title=f"{count} {'run' if count == 1 else 'runs'} in {collection.folder.resolve().name}",
        collection=collection,
        columns=COLUMNS,
        published=collection.published(),
        groups=GROUPS,
        cost_columns=COST,
        short=lambda setting: short_label(setting, collection),
        figures=figures,
        reports={r.path: f"../{collection.place(r)}/report/index.html" for r in collection.runs
                 if r.path != collection.folder and (r.path / "report" / "index.html").is_file()},
        pair=[collection.place(r) for r in pair],
        pair_classes=pair_classes(*pair) if pair else [],
        pair_gallery=pair_gallery(*pair) if pair else None,
        sheets=[] if pair else write_sheets(collection, folder),
    )  # fmt: skip
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figures(collection: Collection) -> list[FigureSpec]:
    lines = []
    for i, setting in enumerate(collection.settings):
        curve = setting.curve()
        if curve[0]:
            lines.append(Line(short_label(setting, collection), curve, i))
    if not lines:
        return []

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), lines, theme, "Confused predicted thing segments, percent",
                   "covers more than so many percent of two or more true instances", percent=True)  # fmt: skip

    caption = "One line a setting, mean over its seeds. Lower is better."
    return [FigureSpec("confusion", "Confusion curves of all settings", caption, draw, max(3.6, 0.2 * len(lines)))]
