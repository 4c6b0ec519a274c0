"""Every configuration key as Markdown: from the yaml files, their comments, and the constructors that take the values.

Nothing is typed twice: the default and the comment stand in the yaml, what a value may be in the constructor's
signature (in the words of the messages that a wrong value gets), and what it does, where the yaml does not say, in the
constructor's docstring.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe
import yaml

from panoptic_ibs.configuration import options, schema
from panoptic_ibs.expectations import faults, fields_of, takes_object

COMMANDS = {"config": "train", "evaluate": "evaluate", "predict": "predict", "convert": "convert"}
HIDDEN = ("_target_", "_partial_", "defaults", "hydra")
Row = tuple[str, str, str, str]  # key, default, what it may be, what it does


def page() -> str:
    """The page's generated part."""
    parts = []
    for name, command in COMMANDS.items():
        file = f"{name}.yaml"
        parts += [f"## {command}", f"`conf/{file}`", table(rows(options.conf_dir() / file, "", schema.COMMANDS[name]))]
    for group in options.groups():
        if group != "recipe":
            parts += [f"## {group}=", *_group(group)]
    return "\n\n".join(parts) + "\n"


def _group(group: str) -> Iterator[str]:
    """The options of a group, then the keys of each option that has a file."""
    root = options.conf_dir()
    listed = "| option | what |\n|---|---|\n"
    entries = root / "options" / f"{group}.yaml"
    if entries.is_file():
        notes = comments(entries)
        yield opening(entries)
        listed += "\n".join(f"| `{name}` | {cell(notes.get(name, ''))} |" for name in options.tables()[group])
        yield listed
    for path in sorted((root / group).glob("*.yaml")):
        yield f"### {group}={path.stem}"
        yield opening(path)
        found = rows(path, group, None)
        if found:
            yield table(found)


def table(found: Iterable[Row]) -> str:
    """The rows as a table."""
    head = "| key | default | may be | what |\n|---|---|---|---|\n"
    return head + "\n".join(
        f"| `{key}` | {code(value)} | {cell(may)} | {cell(what)} |" for key, value, may, what in found
    )


def code(value: str) -> str:
    """A value in a cell."""
    return f"`{value}`" if value else ""


def cell(text: str) -> str:
    """A comment's text in Markdown, on one line, also of a table."""
    return re.sub(r"([|\[\]*_])", r"\\\1", " ".join(text.split()).replace("<", "&lt;"))


def opening(path: Path) -> str:
    """The comment that a file begins with."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() != "# @package _global_"]
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return cell(" ".join(line.lstrip("# ") for line in lines[:count]))


def rows(path: Path, prefix: str, described: Any) -> list[Row]:
    """The keys of a file.

    Args:
        path: the file.
        prefix: of the keys, the group's name.
        described: what knows the keys at the top, where no ``_target_`` does.
    """
    text = path.read_text(encoding="utf-8")
    return list(_walk(yaml.compose(text), prefix, comments(path), described)) if text.strip() else []


def _walk(node: Any, prefix: str, notes: Mapping[str, str], described: Any, inner: str = "") -> Iterator[Row]:
    if not isinstance(node, yaml.MappingNode):
        return
    found = {key.value: value for key, value in node.value}
    if "_target_" in found:
        described = _looked_up(found["_target_"].value)
    known = _fields(described)
    helps = _helps(described)
    for name, value in found.items():
        if name in HIDDEN or name.startswith("override "):
            continue
        key, place = ".".join(filter(None, (prefix, name))), ".".join(filter(None, (inner, name)))
        note = notes.get(place, "")
        if isinstance(value, yaml.MappingNode) and value.value:
            annotation = known.get(name)
            holder = getattr(next(iter(getattr(annotation, "__metadata__", ())), None), "target", None)
            if note:
                yield key, "", "", note
            yield from _walk(value, key, notes, _looked_up(holder) if holder else annotation, place)
        else:
            may = expected(known[name]) if name in known else ""
            yield key, _shown(value), may, note or helps.get(name, "")


def _fields(described: Any) -> Mapping[str, Any]:
    if described is None:
        return {}
    try:
        known = dict(fields_of(described))
    except (TypeError, ValueError):
        return {}
    name = f"{getattr(described, '__module__', '')}.{getattr(described, '__qualname__', '')}"
    if name == "lightning.pytorch.trainer.trainer.Trainer":
        known |= schema.trainer_options()
    return known


def _looked_up(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name) if module else None


def _helps(described: Any) -> dict[str, str]:
    """Parameter -> what the docstring says of it."""
    if not isinstance(described, type) or not described.__module__.startswith("panoptic_ibs"):
        return {}
    found: dict[str, str] = {}
    for owner in reversed(described.__mro__):
        sections = griffe.parse_google(griffe.Docstring(owner.__doc__ or ""), warnings=False)
        for section in sections:
            if section.kind.value in ("parameters", "attributes"):
                found |= {item.name: _plain(item.description) for item in section.value}
    return found


def _plain(text: str) -> str:
    """A docstring's marks as Markdown."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("`", "")


class _Nothing:
    """Fits no annotation."""


def expected(annotation: Any) -> str:
    """What a value may be, in the words of the message about one that is not; nothing where all are taken."""
    words = [fault.text.partition("expected: ")[2] for fault in faults(annotation, _Nothing(), ())]
    text = "; ".join(filter(None, words))
    return "a group of options" if takes_object(annotation) and text == "an object with _target_" else text


def _shown(node: Any) -> str:
    """A value as it is written, on one line."""
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.value else '""'
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(map(_shown, node.value)) + "]"
    return "{" + ", ".join(f"{k.value}: {_shown(v)}" for k, v in node.value) + "}"


def comments(path: Path) -> dict[str, str]:
    """Dotted key -> the comment behind it and, where a blank line or another comment stands before, above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    steps: list[tuple[int, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.startswith("#") or line.strip().startswith("#"):
            above = [*above, line.strip("# ")] if number else above
            continue
        match = re.match(r"( *)([\w/@.-]+):(?: |$)(.*)", line)
        if match:
            indent, name = len(match[1]), match[2]
            steps = [*(s for s in steps if s[0] < indent), (indent, name)]
            behind = re.search(r"(?:^|\s)# (.*)$", match[3])
            text = " ".join([*(above if number else ()), behind[1] if behind else ""]).strip()
            if text:
                found[".".join(s[1] for s in steps)] = text
        above = []
    return found
