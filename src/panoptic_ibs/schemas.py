"""Values from outside against a schema (pydantic's): every fault at once, each with path, value and what is expected.

A schema is a ``TypeAdapter``, best of a ``TypedDict`` in strict mode: JSON is then checked while it is parsed, in the
time that parsing alone takes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DataError, UserError
from .files import read_bytes

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
SHOWN = 20  # faults in one message
_PLAIN = {"a valid dictionary": "an object", "a valid list": "a list", "a valid string": "text"}
_BOMS = (("utf-32", b"\xff\xfe\0\0"), ("utf-8-sig", b"\xef\xbb\xbf"), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff"))
_LENGTH = re.compile(r"\w+ should have at (least|most) (\d+) items? after validation, not (\d+)")
Step = str | int


@dataclass(frozen=True)
class Fault:
    """One value that a schema refuses.

    Attributes:
        steps: the way to it, keys and positions.
        text: a sentence part: the value and what is expected.
    """

    steps: tuple[Step, ...]
    text: str

    @property
    def path(self) -> str:
        """``annotations[3].segments_info[0].iscrowd``."""
        shown = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.steps)
        return shown.removeprefix(".")

    def __str__(self) -> str:
        return f"{self.path or 'the value'} {self.text}"


def faults_of(error: ValidationError, value: Any) -> list[Fault]:
    """What a validation found, one fault a place (a union reports each of its members).

    Args:
        error: pydantic's.
        value: what was validated.
    """
    found: dict[tuple[Step, ...], list[str]] = {}
    inputs: dict[tuple[Step, ...], Any] = {}
    for row in error.errors(include_url=False, include_context=False):
        missing = row["type"] == "missing"
        steps = _existing(row["loc"], value) + (row["loc"][-1:] if missing else ())
        inputs.setdefault(steps, row["input"])
        texts = found.setdefault(steps, [])
        text = "is missing" if missing else _words(row["msg"])
        if text not in texts:
            texts.append(text)
    deeper = {steps[:n] for steps in found for n in range(len(steps))}  # another member of a union got further there
    return [Fault(steps, _joined(texts, inputs[steps])) for steps, texts in found.items() if steps not in deeper]


def _existing(steps: Sequence[Step], value: Any) -> tuple[Step, ...]:
    """The steps that lead through ``value``; pydantic puts names of union members and functions between them."""
    taken: list[Step] = []
    for step in steps:
        if isinstance(value, dict) and (step in value or str(step) in value):
            key = step if step in value else str(step)
            value = value[key]
        elif isinstance(value, list | tuple) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            continue
        taken.append(step)
    return tuple(taken)


def _words(message: str) -> str:
    for ours in ("Input should be", "Value error,", "Assertion failed,"):
        message = message.removeprefix(ours).strip()
    message = _LENGTH.sub(r"at \1 \2 values, not \3", message)
    for theirs, json_word in (
        ("a valid dictionary", "an object"),
        ("a valid list", "a list"),
        ("a valid string", "text"),
    ):
        message = message.replace(theirs, json_word)
    return message[:1].lower() + message[1:].removesuffix(".")


def _joined(texts: Sequence[str], value: Any) -> str:
    if texts[0] == "is missing":
        return texts[0]
    return f"is {shown(value)}; expected: {' or '.join(texts)}"


def shown(value: Any, longest: int = 60) -> str:
    """A value as JSON has it, shortened; also what JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def faults_in(schema: TypeAdapter[Any], value: Any) -> list[Fault]:
    """The faults of a value; an empty list when it is sound."""
    from pydantic import ValidationError

    try:
        schema.validate_python(value)
    except ValidationError as error:
        return faults_of(error, value)
    return []


def checked(schema: TypeAdapter[T], value: Any, source: object, kind: type[UserError] = DataError) -> T:
    """The value as the schema gives it.

    Args:
        schema: what is expected.
        value: plain containers.
        source: file or key, for the message.
        kind: the error that is raised.

    Raises:
        UserError: of ``kind``, with all faults.
    """
    from pydantic import ValidationError

    try:
        return schema.validate_python(value)
    except ValidationError as error:
        raise kind(told(source, faults_of(error, value))) from None


def told(source: object, faults: Sequence[Fault], remedy: str = "") -> str:
    """One message of all faults: a line for one, else a line each (the first :data:`SHOWN`)."""
    end = f" {remedy}" if remedy else ""
    if len(faults) == 1:
        return f"{source}: {faults[0]}.{end}"
    rest = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return f"{source}: {len(faults)} faults.{end}" + "".join(f"\n  {f}" for f in faults[:SHOWN]) + rest


def read_json(path: Path, what: str, remedy: str, kind: type[UserError] = DataError) -> Any:
    """A JSON file as plain containers, unchecked; see :func:`text_of` and :func:`decode`."""
    return decode(text_of(path, what, remedy, kind), path, what, kind)


def text_of(path: Path, what: str, remedy: str, kind: type[UserError] = DataError) -> bytes:
    """The bytes of a JSON in UTF-8 without a byte order mark; arguments and errors as ``files.read_bytes``."""
    raw = read_bytes(path, what, remedy, kind)
    for encoding, mark in _BOMS:
        if raw.startswith(mark):
            try:
                return raw.decode(encoding).encode()
            except UnicodeError as error:
                raise kind(f"{path}: {what} is no {encoding} text ({error}). Write it as UTF-8.") from None
    return raw


def decode(text: bytes, path: Path, what: str, kind: type[UserError] = DataError) -> Any:
    """Plain containers of a JSON.

    Raises:
        UserError: of ``kind``: no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: {what} is not a valid JSON ({error}). Fetch or write the file again.") from None
