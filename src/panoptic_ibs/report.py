"""Collect evaluated runs into one comparison: ``python -m panoptic_ibs.report runs=DIR``.

runs=DIR   reads every folder below DIR that holds a metrics.json, and writes
           DIR/report/index.html   settings with mean and deviation over seeds, confusion curves, pictures side by side
           DIR/summary.csv         one row a run, means and deviations
           DIR/summary.md          one row a setting
run=DIR    writes the page of a single run anew: DIR/report/index.html

logger=wandb            after runs=DIR: the same tables to Weights & Biases as well, offline without a key, as a run of
                        the runs' group; a sweep with logger=wandb does so at its end
logger.wandb.KEY=VALUE  its project, entity, mode (online, offline), group or name, in place of the runs' own
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .configuration.ending import reported
from .errors import ConfigError
from .streams import start_command

WANDB = "logger.wandb."
OPTIONS = {"project", "entity", "mode", "group", "name"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: writes the page, prints the table of many runs and the page's path; returns the exit code."""
    start_command()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or any(word in ("-h", "--help") for word in words):
        print((__doc__ or "").strip())
        return 0 if words else 2

    def job() -> int:
        key, folder, options = _parse(words)
        # Imported here so that --help answers at once.
        from .report_pages import print_settings, write_report, write_summary

        page = write_summary(folder) if key == "runs" else write_report(folder)
        if key == "runs":
            print_settings(folder)
        if options is not None:
            from .loggers import share_summary

            print(f"Weights & Biases: {share_summary(folder, options)}")
        print(page)
        return 0

    return int(reported(job, dict(word.partition("=")[::2] for word in words)))


def _parse(words: Sequence[str]) -> tuple[str, Path, dict[str, str] | None]:
    """``runs`` or ``run``, the folder, and the options for Weights & Biases: None without ``logger=wandb``."""
    values = dict(word.split("=", 1) for word in words if "=" in word)
    options = {k.removeprefix(WANDB): values.pop(k) for k in list(values) if k.startswith(WANDB)}
    logger = values.pop("logger", "wandb" if options else None)
    key, folder = next(iter(values.items()), ("", ""))
    once = len({word.split("=", 1)[0] for word in words}) == len(words) and all("=" in word for word in words)
    known = once and len(values) == 1 and key in ("runs", "run") and folder
    if not known or logger not in (None, "csv", "wandb") or not set(options) <= OPTIONS:
        raise ConfigError(
            f"'{' '.join(words)}' is not understood. Say runs=DIR (a folder of runs) or run=DIR (one run); after "
            f"runs=DIR logger=wandb, and logger.wandb.KEY=VALUE with a KEY of {', '.join(sorted(OPTIONS))}."
        )
    if logger == "wandb" and key == "run":
        raise ConfigError(
            "logger=wandb goes with runs=DIR. A single run's report goes there when it is trained or "
            "evaluated with logger=wandb."
        )
    return key, Path(folder).expanduser(), options if logger == "wandb" else None


if __name__ == "__main__":
    sys.exit(main())
