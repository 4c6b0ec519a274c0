"""The commands and their data from Python, for notebooks: everything in one process, so libraries are imported once.

>>> from panoptic_ibs.interactive import data_module, run
>>> run("train", "experiment=demo", "run_dir=runs/mine")                               # doctest: +SKIP
>>> data = data_module("experiment=demo", "sampling=random_crop")                      # doctest: +SKIP
"""

from __future__ import annotations

import html
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import commands, instantiation
from .configuration import resolvers
from .configuration.arguments import quote
from .configuration.ending import INTERRUPTED
from .errors import ConfigError, UserError
from .extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from omegaconf import DictConfig

    from .data.datamodule import PanopticDataModule

COMMANDS = ("train", "evaluate", "predict", "prepare", "convert", "export", "report")


class CommandError(UserError):
    """A command that did not end well; what is wrong was printed on stderr."""


def run(command: str, *arguments: str | Path) -> None:
    """``python -m panoptic_ibs.COMMAND ARGUMENTS`` in this process, with the output in the notebook.

    A path with spaces or commas is quoted as Hydra wants it: :func:`override`. One device at most: several would
    start further processes, which is the command line's business.

    Raises:
        ConfigError: there is no such command.
        CommandError: its exit status was not 0.
        KeyboardInterrupt: it was interrupted.
    """
    if command not in COMMANDS:
        raise ConfigError(f"There is no command {command!r}; there are {', '.join(COMMANDS)}.")
    module = importlib.import_module(f"panoptic_ibs.{command}")
    former = sys.argv
    sys.argv = [str(module.__file__), *map(str, arguments)]
    try:
        status = module.main()
    finally:
        sys.argv = former
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise CommandError(f"panoptic_ibs.{command} ended with status {status}; its message stands above.")


def override(key: str, value: Path | str) -> str:
    """``key='value'`` for any text, quoted for Hydra.

    >>> override("data.root", "/data/my set")
    "data.root='/data/my set'"
    """
    return f"{key}={quote(str(value))}"


def compose(*overrides: str) -> DictConfig:
    """The configuration that ``python -m panoptic_ibs.train OVERRIDES`` has; interpolations are resolved when read."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from .configuration.packages import as_list, named, searched
    from .configuration.recipes import with_own_data

    resolvers.register_resolvers()
    words = with_own_data(as_list(overrides))
    with searched(named(words)), initialize_config_dir(str(commands.conf_dir()), version_base="1.3"):
        return hydra_compose("config", words)


def data_module(*overrides: str) -> PanopticDataModule:
    """Readers and loaders of a configuration, without training: ``data_module("data=cityscapes", "data.root=DIR")``.

    Raises:
        UserError: what the data set lacks.
    """
    return instantiation.make_data(compose(*overrides))


def show(rows: Sequence[Mapping[str, Any]], width: float = 11.0, **options: Any) -> Figure:
    """A figure of rows of pictures under their titles.

    Args:
        rows: title -> (H, W, 3) or (H, W) array, for each row; rows may differ in length.
        width: of the figure, in inches.
        options: for ``imshow`` of the two-dimensional ones, e.g. ``vmin=0, vmax=1, cmap="magma"``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require("show", "matplotlib")
    from matplotlib import pyplot

    columns = max(len(row) for row in rows)
    cell = width / columns
    heights = [max(cell * min(p.shape[0] / p.shape[1], 1.6) for p in row.values()) for row in rows]  # strips get narrow
    lines = sum(max(title.count("\n") + 1 for title in row) for row in rows)
    size = (width, sum(heights) + 0.1 * len(rows) + 0.2 * lines)
    figure, grid = pyplot.subplots(
        len(rows), columns, figsize=size, squeeze=False, layout="constrained", height_ratios=heights
    )
    for axes, row in zip(grid, rows, strict=True):
        for place in axes:
            place.set_axis_off()
        for place, (title, picture) in zip(axes, row.items(), strict=False):
            place.imshow(picture, **(options if picture.ndim == 2 else {}))
            place.set_anchor("N")
            place.set_title(title, fontsize=9)
    return figure


class Table:
    """Rows with one set of columns, shown as a table by Jupyter and as text elsewhere; numbers with 3 decimals."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = [dict(row) for row in rows]
        self.columns = list(dict.fromkeys(key for row in rows for key in row))

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[_text(row.get(column)) for column in self.columns] for row in self.rows]

    def __repr__(self) -> str:
        lines = [self.columns, *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in self.cells()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
