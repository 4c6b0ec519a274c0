"""The class table: names, dataset ids, thing flags and colours. The one source of class counts."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from .errors import DataError
from .schemas import checked, shown


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

    Args:
        classes: the rows.
        source: file and key of the rows, for messages.

    Raises:
        DataError: if the table is empty, or a dataset id or a name occurs twice.
    """

    def __init__(self, classes: Iterable[ClassInfo], source: object = "the class table") -> None:
        self.classes = tuple(classes)
        if not self.classes:
            raise DataError(f"{source}: the list is empty. List at least one class.")
        faults = []
        for what, values in (
            ("id", [c.dataset_id for c in self.classes]), ("name", [c.name for c in self.classes])
        ):  # fmt: skip
            twice = [str(value) for value, count in Counter(values).items() if count > 1]
            if twice:
                faults.append(f"the same {what} twice: {', '.join(twice)}")
        if faults:
            raise DataError(f"{source}: {'; '.join(faults)}. Ids and names must differ.")

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
    def from_coco(cls, categories: Iterable[Mapping[str, Any]], source: object = "categories") -> ClassTable:
        """Build from the ``categories`` of a COCO panoptic JSON; missing colours get distinct ones.

        Args:
            categories: the entries, as JSON has them.
            source: file and key, for messages.

        Raises:
            DataError: values that are not what :class:`panoptic_ibs.coco_format.Category` says (all of them are
                named), no entry, or an id or a name that occurs twice.
        """
        from .coco_format import CATEGORIES, rgb_of

        rows = checked(CATEGORIES, list(categories), source)
        return cls(
            (
                ClassInfo(c["name"], c["id"], bool(c["isthing"]), rgb_of(c.get("color")) or _distinct_color(i))
                for i, c in enumerate(rows)
            ),
            source,
        )

    def difference(self, other: ClassTable) -> str | None:
        """What differs first between two tables (colours may), as a sentence part; None if nothing does."""
        if len(self) != len(other):
            return f"{len(self)} and {len(other)} classes"
        for i, (a, b) in enumerate(zip(self.classes, other.classes, strict=True)):
            for what, ours, theirs in (
                ("id", a.dataset_id, b.dataset_id), ("name", a.name, b.name), ("isthing", a.is_thing, b.is_thing)
            ):  # fmt: skip
                if ours != theirs:
                    return f"{what} of class {i} is {shown(ours)} and {shown(theirs)}"
        return None

    def to_list(self) -> list[dict[str, Any]]:
        """Plain containers, for checkpoints and JSON; ``from_list`` reads them back."""
        return [{**asdict(c), "color": list(c.color)} for c in self.classes]

    @classmethod
    def from_list(cls, rows: Iterable[Mapping[str, Any]], source: object = "the class table") -> ClassTable:
        """Inverse of ``to_list``.

        Raises:
            DataError: as :meth:`from_coco`; the message names ``source``.
        """
        from .coco_format import CLASS_ROWS, rgb_of

        found = checked(CLASS_ROWS, list(rows), source)
        return cls(
            (
                ClassInfo(r["name"], r["dataset_id"], bool(r["is_thing"]), rgb_of(r["color"]) or _distinct_color(i))
                for i, r in enumerate(found)
            ),
            source,
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
