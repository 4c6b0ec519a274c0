"""The class tables of the published data sets, for when their annotations are not at hand."""

from __future__ import annotations

import csv
from importlib.resources import files

from panoptic_ibs.classes import ClassInfo, ClassTable


def published_classes(name: str) -> ClassTable | None:
    """Classes of ``cityscapes``, ``coco_panoptic`` or ``vistas``, in the order of their ids; else None."""
    table = files(__package__) / f"{name}.csv"
    if not table.is_file():
        return None
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    return ClassTable(
        ClassInfo(r["name"], int(r["id"]), r["isthing"] == "1", (int(r["red"]), int(r["green"]), int(r["blue"])))
        for r in rows
    )
