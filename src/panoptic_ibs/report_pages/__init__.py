"""Reports of runs: one self-contained HTML page for a run, one for a folder of runs. No Lightning, no Hydra."""

from __future__ import annotations

from .collection import Collection, Setting, collect
from .gallery import GalleryWriter
from .media import log_report
from .page import write_report, write_report_if_possible
from .records import Run, load_run
from .summary import write_summary
from .summary_media import log_summary
from .terminal import print_settings

__all__ = [
    "Collection",
    "GalleryWriter",
    "Run",
    "Setting",
    "collect",
    "load_run",
    "log_report",
    "log_summary",
    "print_settings",
    "write_report",
    "write_report_if_possible",
    "write_summary",
]
