"""Collect evaluated runs into one comparison: ``python -m panoptic_ibs.report runs=DIR``.

runs=DIR   reads every folder below DIR that holds a metrics.json, and writes
           DIR/report/index.html   settings with mean and deviation over seeds, confusion curves, pictures side by side
           DIR/summary.csv         one row a run, means and deviations
           DIR/summary.md          one row a setting
run=DIR    writes the page of a single run anew: DIR/report/index.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: writes the page, prints the table of many runs and the page's path; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or any(word in ("-h", "--help") for word in words):
        print((__doc__ or "").strip())
        return 0 if words else 2
    try:
        key, folder = _parse(words)
        # Imported here so that --help answers at once.
        from .reporting import print_settings, write_report, write_summary

        page = write_summary(folder) if key == "runs" else write_report(folder)
        if key == "runs":
            print_settings(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: the report could not be written: {error}", file=sys.stderr)
        return 1
    print(page)
    return 0


def _parse(words: Sequence[str]) -> tuple[str, Path]:
    if len(words) == 1:
        key, sign, value = words[0].partition("=")
        if sign and value and key in ("runs", "run"):
            return key, Path(value).expanduser()
    raise ConfigError(f"'{' '.join(words)}' is not understood. Say runs=DIR (a folder of runs) or run=DIR (one run).")


if __name__ == "__main__":
    sys.exit(main())
