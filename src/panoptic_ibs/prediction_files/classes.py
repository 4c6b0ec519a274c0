"""Category ids of predictions against those of the data set."""

from __future__ import annotations

from typing import Any

from panoptic_ibs.classes import ClassTable

from .problems import Problems


def check_categories(used: set[int], classes: ClassTable, problems: Problems) -> None:
    """Where ids are unknown, tell whether all look like positions in the list of classes (contiguous ids)."""
    if used <= set(classes.contiguous):
        return
    for first in (0, 1):
        if used <= set(range(first, first + len(classes))):
            example = ", ".join(f"{first + i} -> {classes[i].dataset_id}" for i in range(min(3, len(classes))))
            problems.add(
                "classes",
                f"ids {min(used)} to {max(used)} are positions in the list of the {len(classes)} classes, counted from "
                f"{first} (contiguous ids); translate them to the data set's ({example}, ...)",
            )
            return


def check_names(categories: Any, classes: ClassTable, problems: Problems) -> None:
    """Where the predictions name their categories, a class must have the id that the data set gives it."""
    if not isinstance(categories, list):
        return
    ids = {c.name: c.dataset_id for c in classes.classes}
    for category in categories:
        name = category.get("name") if isinstance(category, dict) else None
        if isinstance(name, str) and name in ids and category.get("id") != ids[name]:
            text = f"'categories' gives '{name}' the id {category.get('id')}, the data set {ids[name]}"
            problems.add("classes", text)
