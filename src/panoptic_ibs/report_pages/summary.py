"""Many runs on one page: settings with mean and deviation over seeds, curves in one figure, pictures side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .answer import answers
from .collection import COLUMNS, COUNTS, COUNTS_NOTE, GROUPS, Collection, collect, short_label
from .contrasts import COST
from .embed import Embedder
from .figures import PALETTE, Line, Theme, line_chart
from .page import can_be_written, template, write_figure
from .pair import pair_classes, pair_gallery
from .run_figures import FigureSpec
from .sheets import write_sheets
from .summary_files import write_csv, write_markdown


def write_summary(runs: Path) -> Path:
    """Write ``report/index.html``, ``summary.csv`` and ``summary.md`` into the folder of the runs.

    Returns:
        The path of the page; without the extra "report", which is said, that of ``summary.md``.

    Raises:
        DataError: see :func:`collect`.
    """
    collection = collect(runs)
    write_csv(collection)
    write_markdown(collection)
    if not can_be_written():
        return collection.folder / "summary.md"
    folder = collection.folder / "report"
    folder.mkdir(exist_ok=True)
    embedder = Embedder()
    figures = {spec.stem: write_figure(spec, folder, embedder) for spec in _figures(collection)}
    pair = collection.runs if len(collection.runs) == 2 else []
    count, found = len(collection.runs), answers(collection)
    title = f"{count} {'run' if count == 1 else 'runs'} in {collection.folder.resolve().name}"
    page = template("summary.html.j2").render(
        title=title,
        headline=found[0].headline if len(found) == 1 else title,
        answers=found,
        collection=collection,
        columns=COLUMNS,
        published=collection.published(),
        groups=GROUPS,
        count_columns=COUNTS,
        counts_note=COUNTS_NOTE,
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


def confusion_panels(collection: Collection) -> list[tuple[str, list[Line]]]:
    """Titles and lines of the confusion chart: one panel, or one for each head and data set if colours do not suffice.

    A setting has the same colour in all panels.
    """
    title, colors = "Confused predicted thing segments, percent", dict[str, int]()
    groups = collection.groups() if sum(1 for s in collection.settings if s.curve()[0]) > len(PALETTE) else {}
    panels = []
    for label, group in groups.items() if len(groups) > 1 else [((), collection)]:
        lines = []
        for setting in group.settings:  # a panel's title names head and data set
            curve, name = setting.curve(), short_label(setting, collection, GROUPS[2:] if label else GROUPS)
            if curve[0]:
                lines.append(Line(name, curve, colors.setdefault(name, len(colors))))
        if lines:
            panels.append((": ".join([title, *([", ".join(label)] if label else [])]), lines))
    return panels


def _figures(collection: Collection) -> list[FigureSpec]:
    panels = confusion_panels(collection)
    if not panels:
        return []
    top = 105 * max(y for _, lines in panels for line in lines for y in line.curve[1])

    def draw(figure: Any, theme: Theme) -> None:
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (title, lines) in zip(rows, panels, strict=True):
            line_chart(axes, lines, theme, title, percent=True, limits=(0.0, max(top, 1.0)))
        rows[-1].set_xlabel("covers more than so many percent of two or more true instances")

    caption = "One line a setting, mean over its seeds. Lower is better."
    height = sum(max(3.6 if len(panels) == 1 else 2.4, 0.2 * len(lines)) for _, lines in panels)
    return [FigureSpec("confusion", "Confusion curves of all settings", caption, draw, height)]
