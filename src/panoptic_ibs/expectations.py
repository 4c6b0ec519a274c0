"""What a value of a configuration may be, from the annotation of a parameter: pydantic checks it, in our words.

A number is finite, a whole number is no ``2.0`` and no ``true``, text is not empty. What only an object can be (a
network, a policy of sizes) is expected as a node with ``_target_``.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from panoptic_ibs.ranges import LARGEST, Bounds, Items, Like, OptionsOf
from panoptic_ibs.schemas import Fault, faults_in

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, set, frozenset)
_MAPPINGS = (dict, collections.abc.Mapping)
_NAMES = {bool: "true or false", str: "text that is not empty", type(None): "null"}


@functools.cache
def fields_of(described: Any) -> dict[str, Any]:
    """Parameters of a class or function, or entries of a ``TypedDict`` or dataclass: name -> annotation.

    A constructor with ``**options`` has those of its base class too. What cannot be looked up is ``Any``.
    """
    if typing.is_typeddict(described):
        return typing.get_type_hints(described, include_extras=True)
    fields: dict[str, Any] = {}
    classes = described.__mro__ if isinstance(described, type) else (described,)
    for owner in classes:
        function = owner.__dict__.get("__init__") if isinstance(owner, type) else owner
        if not callable(function) or function is object.__init__:
            continue
        parameters = list(inspect.signature(function).parameters.values())
        for parameter in parameters[1:] if isinstance(owner, type) else parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                fields.setdefault(parameter.name, _looked_up(parameter.annotation, function, owner))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return fields


def faults_in_options(described: Any, options: Mapping[str, Any], steps: tuple[str | int, ...] = ()) -> list[Fault]:
    """The faults of values that a class or function knows by name; what it does not know is left to it.

    Args:
        described: the class or function.
        options: its arguments, plain containers.
        steps: lead to them.
    """
    found: list[Fault] = []
    known = fields_of(described)
    for name, value in options.items():
        if name not in known:
            continue
        mark = options_of(known[name])
        if mark is not None and isinstance(value, Mapping):
            module, _, owner = mark.target.rpartition(".")
            inner = getattr(importlib.import_module(module), owner)
            found += faults_in_options(inner, value, (*steps, name))
        else:
            found += faults(known[name], value, (*steps, name))
    return found


def open_ended(described: Any) -> bool:
    """Whether a function or class takes keywords that its signature does not name."""
    try:
        parameters = inspect.signature(described).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.kind is p.VAR_KEYWORD for p in parameters) and not isinstance(described, type)


def _looked_up(annotation: Any, function: Any, owner: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    module = inspect.getmodule(owner)
    names = {**vars(typing), **getattr(inspect.unwrap(function), "__globals__", {}), **(vars(module) if module else {})}
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, globalns=names, include_extras=True)["value"]
    except Exception:  # a name that only a type checker imports
        return Any


def faults(annotation: Any, value: Any, steps: tuple[str | int, ...]) -> list[Fault]:
    """The faults of one value; ``steps`` lead to it."""
    return [Fault((*steps, *fault.steps), fault.text) for fault in faults_in(adapter(annotation), value)]


@functools.cache
def adapter(annotation: Any) -> TypeAdapter[Any]:
    """The checker of an annotation."""
    from pydantic import TypeAdapter

    return TypeAdapter(_translated(annotation))


def options_of(annotation: Any) -> OptionsOf | None:
    """The mark of a mapping that holds the parameters of something; also inside of a union."""
    if mark := next((m for m in _marks(annotation) if isinstance(m, OptionsOf)), None):
        return mark
    return next(filter(None, map(options_of, members(annotation))), None)


def takes_object(annotation: Any) -> bool:
    """Whether an annotation has room for what a node with ``_target_`` makes."""
    bare = _bare(annotation)
    if bare is Any or annotation in (inspect.Parameter.empty,):
        return True
    if found := members(annotation):
        return any(map(takes_object, found))
    return _kind(bare) == "object"


def takes_text(annotation: Any) -> bool:
    """Whether an annotation has room for any text: names and paths, no choices from a list."""
    if found := members(annotation):
        return any(map(takes_text, found))
    return _bare(annotation) in (str, Path) and not any(isinstance(m, Like) for m in _marks(annotation))


def allows_null(annotation: Any) -> bool:
    """Whether null is a value."""
    return any(m is type(None) for m in members(annotation))


def entry_annotation(annotation: Any) -> Any:
    """The annotation of a mapping's values."""
    for candidate in (annotation, *members(annotation)):
        arguments = typing.get_args(_bare(candidate))
        if _kind(_bare(candidate)) == "mapping" and len(arguments) == 2:
            return arguments[1]
    return Any


def _marks(annotation: Any) -> tuple[Any, ...]:
    return annotation.__metadata__ if typing.get_origin(annotation) is Annotated else ()


def _bare(annotation: Any) -> Any:
    return annotation.__origin__ if typing.get_origin(annotation) is Annotated else annotation


def members(annotation: Any) -> tuple[Any, ...]:
    """Members of a union; none of anything else."""
    bare = _bare(annotation)
    return typing.get_args(bare) if typing.get_origin(bare) in (Union, types.UnionType) else ()


def _kind(bare: Any) -> str:
    """``leaf``, ``list``, ``mapping``, ``literal``, or ``object`` for what only code can make."""
    origin = typing.get_origin(bare) or bare
    if origin is Literal:
        return "literal"
    if origin in (int, float, bool, str, Path, type(None)):
        return "leaf"
    if origin in _LISTS:
        return "list"
    return "mapping" if origin in _MAPPINGS or typing.is_typeddict(bare) else "object"


def _translated(annotation: Any) -> Any:
    """An annotation that pydantic can check, with strict leaves and our words."""
    if annotation is Any or _bare(annotation) is Any or isinstance(annotation, typing.TypeVar):
        return Any
    if found := members(annotation):
        return _union(found)
    bare, marks = _bare(annotation), _marks(annotation)
    kind = _kind(bare)
    if kind == "literal":
        choices = list(typing.get_args(bare))
        return _worded(bare, _choice(choices))
    if kind == "leaf":
        return _leaf(bare, next((m for m in marks if isinstance(m, Bounds | Like)), Bounds()))
    if kind == "list":
        return _list(bare, next((m for m in marks if isinstance(m, Items)), None))
    if kind == "mapping":
        arguments = typing.get_args(bare)
        entry: Any = _translated(arguments[1]) if len(arguments) == 2 else Any
        return _typed(dict[str, entry], dict, "an object")
    return _typed(Any, _Node, "an object with _target_")


def _union(found: Sequence[Any]) -> Any:
    members_once = dict.fromkeys(_OBJECT if _kind(_bare(m)) == "object" else m for m in found)
    translated = tuple(_translated(m) for m in members_once)
    return Union[translated]  # noqa: UP007 (built at run time)


class _Node:
    """Stands for an object with ``_target_`` in ``isinstance``."""


_OBJECT = Callable[..., Any]


def _choice(choices: Sequence[Any]) -> str:
    *first, last = dict.fromkeys(map(str, choices))
    return f"{', '.join(first)} or {last}" if first else last


def _leaf(bare: Any, bounds: Bounds | Like) -> Any:
    from pydantic import Field

    if isinstance(bounds, Like):
        return _worded(Annotated[str, Field(strict=True, pattern=f"^(?:{bounds.pattern})$")], bounds.words)
    limits: dict[str, Any] = {"ge": bounds.least, "gt": bounds.above, "le": bounds.most, "lt": bounds.below}
    limits = {key: limit for key, limit in limits.items() if limit is not None}
    if bare is int:
        limits = {"le": LARGEST, **({} if "ge" in limits or "gt" in limits else {"ge": -LARGEST}), **limits}
        words = f"{bounds}" if bounds.least is not None and bounds.least == bounds.most else f"a whole number {bounds}"
        return _worded(Annotated[int, Field(strict=True, **limits)], words.strip())
    if bare is float:
        return _worded(
            Annotated[float, Field(strict=True, allow_inf_nan=False, **limits)], f"a number {bounds}".strip()
        )
    if bare is Path:
        bare = str
    if bare is str:
        return _worded(Annotated[str, Field(strict=True, min_length=1)], _NAMES[str])
    return _worded(Annotated[bare, Field(strict=True)] if bare is bool else bare, _NAMES[bare])


def _list(bare: Any, items: Items | None) -> Any:
    from pydantic import Field

    arguments = [a for a in typing.get_args(bare) if a is not Ellipsis]
    fixed = typing.get_origin(bare) is tuple and Ellipsis not in typing.get_args(bare) and arguments
    if fixed:
        inner: Any = tuple[tuple(_translated(a) for a in arguments)]  # type: ignore[misc]
        return _typed(inner, list, f"a list of {len(arguments)} values")
    element = _translated(arguments[0]) if arguments else Any
    if items is None:
        return _typed(list[element], list, "a list")  # type: ignore[valid-type]
    least, most = (items.exactly, items.exactly) if items.exactly is not None else (items.least, None)
    inner = Annotated[list[element], Field(min_length=least, max_length=most)]  # type: ignore[valid-type]
    return _typed(inner, list, f"a list {items}")


def _worded(annotation: Any, words: str) -> Any:
    """The same check; whatever it finds is told in ``words``."""
    from pydantic import WrapValidator
    from pydantic_core import PydanticCustomError, ValidationError

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", words) from None

    return Annotated[annotation, WrapValidator(check)]


def _typed(annotation: Any, kind: type, words: str) -> Any:
    """``words`` for a value of another type or length; faults of what is inside keep their places."""
    from pydantic import WrapValidator
    from pydantic_core import PydanticCustomError, ValidationError

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        kinds = (list, tuple) if kind is list else (Mapping,)
        if not isinstance(value, kinds) or (kind is _Node and "_target_" not in value):
            raise PydanticCustomError("expected", words)
        try:
            return handler(value)
        except ValidationError as error:
            rows = error.errors(include_url=False, include_context=False, include_input=False)
            if any(not row["loc"] or row["type"] == "missing" for row in rows):
                raise PydanticCustomError("expected", words) from None
            raise

    return Annotated[annotation, WrapValidator(check)]
