"""The table of a folder of runs for people who look at a terminal."""

from __future__ import annotations

from pathlib import Path

from .summary import COLUMNS, collect, mean_and_deviation, short_label


def print_settings(runs: Path) -> None:
    """Print a row for every setting of the runs below a folder: mean and sample deviation over the seeds, in percent.

    Raises:
        DataError: see :func:`panoptic_ibs.reporting.collect`.
    """
    from rich.console import Console
    from rich.table import Table

    collection = collect(runs)
    shown = [(key, title) for key, title in COLUMNS if any(s.values(key) for s in collection.settings)]
    table = Table(title=f"{collection.folder.resolve().name}, percent, mean ± deviation over seeds", pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("seeds", *(title for _, title in shown)):
        table.add_column(name, justify="right")
    for setting in collection.settings:
        cells = (mean_and_deviation(setting, key) for key, _ in shown)
        table.add_row(short_label(setting, collection), setting.seeds, *cells)
    Console().print(table)
