"""Tables for people who look at a terminal. Names are printed as they are: no markup, no control characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panoptic_ibs.errors import printable
from panoptic_ibs.metrics.names import HEADLINE, columns, named

from .answer import answers
from .collection import COLUMNS, collect, mean_and_deviation, short_label
from .records import metric

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 120  # characters: room for the deviations
_PLAIN = str.maketrans({"–": "-", "\N{MINUS SIGN}": "-", "±": "+-", "×": "x", "…": "..."})


def print_rows(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None, **column: Any
) -> None:
    """Print a table of texts from anywhere, in letters that the terminal has.

    Args:
        title: stands over it.
        head: of the columns.
        rows: cells; the first column is on the left, the others on the right.
        console: where to print; the terminal when None.
        column: options of the first column, for ``rich.table.Table.add_column``.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()

    def text(words: str) -> Text:
        return Text(encodable(printable(words), console.encoding))

    table = Table(title=text(title), pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(text(name), justify="right" if i else "left", **(column if i == 0 else {"no_wrap": True}))
    for row in rows:
        table.add_row(*map(text, row))
    console.print(table)


def encodable(text: str, encoding: str) -> str:
    """A text in the letters of an encoding (ISO 8859-1, say): dashes in ASCII, ``?`` for what there is not."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    except LookupError:
        return text
    return text


def print_settings(runs: Path) -> None:
    """Print a row for every setting of the runs below a folder, means over the seeds in percent, and which is best.

    Their sample deviations, too, where the terminal is wide; ``summary.md`` always has them.

    Raises:
        DataError: see :func:`panoptic_ibs.report_pages.collect`.
    """
    from rich.console import Console

    collection, console = collect(runs), Console()
    shown = [(key, title) for key, title in COLUMNS if any(s.values(key) for s in collection.settings)]
    wide = console.width >= _WIDE
    measure = "mean ± deviation" if wide else "mean"
    rows = []
    for setting in collection.settings:
        values = (mean_and_deviation(setting, key) for key, _ in shown)
        cells = (value if wide else value.partition(" ")[0] for value in values)
        rows.append([short_label(setting, collection), setting.seeds, *cells])
    title = f"{collection.folder.resolve().name}: percent, {measure} over seeds"
    print_rows(title, ["", "seeds", *(title for _, title in shown)], rows, console, overflow="fold")
    found = answers(collection)
    for answer in found:
        which = f"{answer.title}: " if len(found) > 1 else ""
        print(encodable(printable(f"{which}{answer.headline}. {answer.said}"), console.encoding))


def print_table(title: str, rows: Mapping[str, dict[str, Any]]) -> None:
    """Print tables of metrics side by side, in percent; row name -> metrics."""
    keys = [*HEADLINE, "confusion@50"]
    if any(m.get("ap") is not None for m in rows.values()):
        keys.append("ap")
    lines = [
        [name, *(_percent(_judged(metrics, key)) for key in keys), str(metrics["num_images"])]
        for name, metrics in rows.items()
    ]
    print_rows(f"{title}, percent", ["", *(short for _, short in columns(*keys)), "images"], lines, overflow="fold")


def _judged(metrics: dict[str, Any], key: str) -> float | None:
    """A number, but no confusion where no thing was predicted: 0 would look like a success."""
    return None if named(key).lower and metric(metrics, "things.predicted") == 0 else metric(metrics, key)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
