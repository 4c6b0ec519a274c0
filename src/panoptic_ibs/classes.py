"""The class table: names, dataset ids, thing flags and colours. The one source of class counts."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from .errors import DataError


@dataclass(frozen=True)
class ClassInfo:
    """One class: ``dataset_id`` is the ``category_id`` in the annotations, ``color`` is RGB, 0 to 255."""

    name: str
    dataset_id: int
    is_thing: bool
    color: tuple[int, int, int]


class ClassTable:
    """Ordered classes; the position in the table is the contiguous id used everywhere in the package.

    ``thing_ids`` and ``stuff_ids`` are the contiguous ids of either kind, in table order.

    Raises:
        DataError: if the table is empty, or a dataset id or a name occurs twice.
    """

    def __init__(self, classes: Iterable[ClassInfo]) -> None:
        self.classes = tuple(classes)
        if not self.classes:
            raise DataError("The class table is empty: the annotations list no 'categories'.")
        for what, values in (
            ("id", [str(c.dataset_id) for c in self.classes]),
            ("name", [c.name for c in self.classes]),
        ):
            twice = {v for v in values if values.count(v) > 1}
            if twice:
                raise DataError(f"'categories' holds the same {what} twice: {', '.join(sorted(twice))}.")

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, contiguous_id: int) -> ClassInfo:
        return self.classes[contiguous_id]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassTable) and self.classes == other.classes

    def __hash__(self) -> int:
        return hash(self.classes)

    def __repr__(self) -> str:
        return f"ClassTable({len(self)} classes: {len(self.thing_ids)} thing, {len(self.stuff_ids)} stuff)"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Class names in contiguous order."""
        return tuple(c.name for c in self.classes)

    @cached_property
    def is_thing(self) -> tuple[bool, ...]:
        """Thing flag per contiguous id."""
        return tuple(c.is_thing for c in self.classes)

    @cached_property
    def thing_ids(self) -> tuple[int, ...]:
        """Contiguous ids of the thing classes."""
        return tuple(i for i, c in enumerate(self.classes) if c.is_thing)

    @cached_property
    def stuff_ids(self) -> tuple[int, ...]:
        """Contiguous ids of the stuff classes."""
        return tuple(i for i, c in enumerate(self.classes) if not c.is_thing)

    @cached_property
    def contiguous(self) -> Mapping[int, int]:
        """Dataset id to contiguous id."""
        return {c.dataset_id: i for i, c in enumerate(self.classes)}

    @classmethod
    def from_coco(cls, categories: Iterable[Mapping[str, Any]], source: str = "categories") -> ClassTable:
        """Build from the ``categories`` of a COCO panoptic JSON; missing colours get distinct ones.

        Raises:
            DataError: if an entry lacks ``id``, ``name`` or ``isthing``; the message names ``source``.
        """
        classes = []
        for i, category in enumerate(categories):
            missing = {"id", "name", "isthing"} - set(category)
            if missing:
                raise DataError(f"{source}: category {i} lacks {', '.join(sorted(missing))}.")
            r, g, b = category.get("color") or _distinct_color(i)
            classes.append(
                ClassInfo(
                    str(category["name"]),
                    int(category["id"]),
                    bool(category["isthing"]),
                    (int(r), int(g), int(b)),
                )
            )
        return cls(classes)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain containers, for checkpoints and JSON; ``from_list`` reads them back."""
        return [{**asdict(c), "color": list(c.color)} for c in self.classes]

    @classmethod
    def from_list(cls, rows: Iterable[Mapping[str, Any]]) -> ClassTable:
        """Inverse of ``to_list``."""
        return cls(
            ClassInfo(str(r["name"]), int(r["dataset_id"]), bool(r["is_thing"]), tuple(r["color"])) for r in rows
        )

    def to_coco(self) -> list[dict[str, Any]]:
        """``categories`` of a COCO panoptic JSON."""
        return [
            {"id": c.dataset_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
            for c in self.classes
        ]


def _distinct_color(index: int) -> tuple[int, int, int]:
    """Golden-ratio hues: any number of classes, neighbours far apart."""
    r, g, b = colorsys.hsv_to_rgb((index * 0.618034) % 1.0, 0.55 + 0.3 * (index % 2), 0.95 - 0.2 * (index % 3))
    return round(r * 255), round(g * 255), round(b * 255)
