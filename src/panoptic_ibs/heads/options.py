"""Groups of options: a mapping from a configuration as the frozen dataclass that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from panoptic_ibs.errors import ConfigError

T = TypeVar("T")


def grouped(kind: type[T], values: Mapping[str, Any] | None, group: str) -> T:
    """``kind`` with some of its fields replaced; lists become tuples.

    Args:
        kind: a dataclass.
        values: by name; None for the defaults.
        group: what the group is called, for messages.

    Raises:
        ConfigError: a name that is no field.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(values or {}) - set(known))
    if unknown:
        raise ConfigError(f"{group} has no option {', '.join(unknown)}; the options are {', '.join(known)}.")
    return kind(**{name: _frozen(value) for name, value in (values or {}).items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
