"""The table of a folder of runs for people who look at a terminal."""

from __future__ import annotations

from pathlib import Path

from .collection import COLUMNS, collect, mean_and_deviation, short_label

_WIDE = 120  # characters: room for the deviations


def print_settings(runs: Path) -> None:
    """Print a row for every setting of the runs below a folder: means over the seeds, in percent.

    Their sample deviations, too, where the terminal is wide; ``summary.md`` always has them.

    Raises:
        DataError: see :func:`panoptic_ibs.reporting.collect`.
    """
    from rich.console import Console
    from rich.table import Table

    collection, console = collect(runs), Console()
    shown = [(key, title) for key, title in COLUMNS if any(s.values(key) for s in collection.settings)]
    wide = console.width >= _WIDE
    measure = "mean ± deviation" if wide else "mean"
    table = Table(title=f"{collection.folder.resolve().name}: percent, {measure} over seeds", pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("seeds", *(title for _, title in shown)):
        table.add_column(name, justify="right", no_wrap=True)
    for setting in collection.settings:
        values = (mean_and_deviation(setting, key) for key, _ in shown)
        cells = (value if wide else value.partition(" ")[0] for value in values)
        table.add_row(short_label(setting, collection), setting.seeds, *cells)
    console.print(table)
