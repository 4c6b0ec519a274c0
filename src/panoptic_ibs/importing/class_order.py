"""In which order a checkpoint's network tells classes, and its class tensors brought into the data set's order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from torch import Tensor
from typing_extensions import TypedDict

from panoptic_ibs.classes import ClassInfo
from panoptic_ibs.errors import CheckpointError
from panoptic_ibs.schemas import SHOWN, checked, read_json

CONFIG = "config.json"


@with_config(ConfigDict(strict=True))
class FolderConfig(TypedDict, total=False):
    """What is read of the ``config.json`` of a ``transformers`` model."""

    model_type: str
    architectures: list[str] | None
    id2label: dict[Annotated[str, Field(pattern=r"^\d+$")], str]


_SCHEMA: TypeAdapter[FolderConfig] = TypeAdapter(FolderConfig)


@dataclass(frozen=True)
class FolderModel:
    """A ``transformers`` model by its ``config.json``.

    Attributes:
        path: the JSON.
        model_type: its family, e.g. ``mask2former``; empty where it says none.
        kind: what it calls its network.
        classes: names in the order of the network's outputs; None where it names none.
    """

    path: Path
    model_type: str
    kind: str
    classes: tuple[str, ...] | None


def folder_model(source: Path) -> FolderModel | None:
    """The ``config.json`` in a folder, or beside a file of weights; None where there is none of ``transformers``.

    Raises:
        CheckpointError: it is no JSON or of another form; its classes are not numbered from 0 on.
    """
    path = (source if source.is_dir() else source.parent) / CONFIG
    if not path.is_file():
        return None
    content = read_json(path, "the model's configuration", "Fetch the folder again.", CheckpointError)
    if not source.is_dir() and not (isinstance(content, dict) and "model_type" in content):
        return None  # of something else
    config = checked(_SCHEMA, content, path, CheckpointError)
    model_type = config.get("model_type", "")
    kind = (config.get("architectures") or [model_type])[0]
    return FolderModel(path, model_type, kind, _classes(config.get("id2label"), path))


def _classes(labels: Mapping[str, str] | None, path: Path) -> tuple[str, ...] | None:
    if not labels:
        return None
    by_number = {int(number): name for number, name in labels.items()}
    if sorted(by_number) != list(range(len(labels))):
        raise CheckpointError(f"{path}: id2label must number its {len(labels)} classes from 0 on, without a gap.")
    names = tuple(by_number[i] for i in range(len(labels)))
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):  # what the program writes where nobody named them
        return None
    if len(set(map(_plain, names))) < len(names):
        twice = next(name for i, name in enumerate(names) if _plain(name) in map(_plain, names[:i]))
        raise CheckpointError(f"{path}: id2label gives two classes the name {twice!r}; give each its own.")
    return names


def _plain(name: str) -> str:
    """A name as it is compared: letters and digits, whatever their case."""
    return " ".join(re.sub(r"[\W_]+", " ", name).casefold().split())


@dataclass(frozen=True)
class ClassOrder:
    """For the k-th class, thing class and stuff class of the data set its position among those of the file."""

    classes: list[int]
    things: list[int]
    stuff: list[int]

    @property
    def same(self) -> bool:
        """Whether nothing has to be moved."""
        return all(part == sorted(part) for part in (self.classes, self.things, self.stuff))


def order_of(names: Sequence[str], classes: Sequence[ClassInfo], source: object) -> ClassOrder:
    """Where the file has the data set's classes.

    Args:
        names: of the file's classes in its order.
        classes: those that the network tells apart: the data set's, or its things alone.
        source: where the names stand, for messages.

    Raises:
        CheckpointError: they are not the same names; the message lists where the two orders differ.
    """
    table = {_plain(c.name): c for c in classes}
    file, own = [_plain(name) for name in names], [_plain(c.name) for c in classes]
    if sorted(file) != sorted(own):
        raise CheckpointError(_differences(names, [c.name for c in classes], source))
    kinds = [table[name].is_thing for name in file]
    file_things = [name for name, thing in zip(file, kinds, strict=True) if thing]
    file_stuff = [name for name, thing in zip(file, kinds, strict=True) if not thing]
    return ClassOrder(
        classes=[file.index(name) for name in own],
        things=[file_things.index(name) for name in own if table[name].is_thing],
        stuff=[file_stuff.index(name) for name in own if not table[name].is_thing],
    )


def _differences(names: Sequence[str], own: Sequence[str], source: object) -> str:
    pairs = enumerate(itertools.zip_longest(map(repr, names), map(repr, own), fillvalue="nothing"))
    rows = [f"{i}: {a} there, {b} in the data set" for i, (a, b) in pairs if _plain(a) != _plain(b)]
    rest = f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return (
        f"{source}: names other classes ({len(names)}) than the data set has ({len(own)}), so that nobody can tell "
        f"which output is which: {'; '.join(rows[:SHOWN])}{rest}. If they mean the same, give both the same names; "
        "else give the data set that the network was trained on (data=, data.root=)."
    )


def reordered(weights: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights with the rows of some tensors in another order.

    Args:
        weights: tensors by name.
        rows: names of those to move, and from which of its rows each row comes.
    """
    return {name: value[list(rows[name])] if name in rows else value for name, value in weights.items()}
