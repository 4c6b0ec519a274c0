"""Names and paths on the command line are taken as they are typed, whatever Hydra's grammar makes of them.

Hydra reads ``2024_05`` as a number, ``IMG (1).jpg`` as a mistake and ``null`` as nothing. An argument KEY=VALUE whose
key holds text is therefore quoted for Hydra where its grammar would not give back the very text. What a user has quoted
already stays; so do ``null``, interpolations (``${...}``), lists where a key takes them, and the commas of a sweep. A
file that is called ``null`` is ``./null``.
"""

from __future__ import annotations

import functools
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from panoptic_ibs import expectations
from panoptic_ibs.errors import ConfigError

from . import schema

# Text in nodes with _target_, by key. Their constructors' signatures say so, but importing those takes seconds; a test
# compares.
TEXT_IN_COMPONENTS = (
    "data.name", "data.root", "data.train", "data.val", "data.cache_dir", "backbone.name", "backbone.weights",
)  # fmt: skip
HYDRAS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_WITH_VALUE = {"--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp", "--cfg", "-c", "--package", "-p",
               "--info", "-i"}  # fmt: skip
_AS_IT_IS = ("", "null", "???")
_QUOTED = re.compile(r"""(['"]).*\1""", re.DOTALL)
_FUNCTION = re.compile(r"(choice|range|interval|glob|tag|sort|shuffle|extend_list)\(.*\)", re.DOTALL)


@functools.cache
def text_keys(command: str) -> dict[str, bool]:
    """Keys of a command that hold any text -> whether they take a list of texts too."""
    found = dict(_text_in(schema.COMMANDS[command], ""))
    found |= {key: False for key in TEXT_IN_COMPONENTS if key.partition(".")[0] in typing.get_type_hints(
        schema.COMMANDS[command])}  # fmt: skip
    return found | dict.fromkeys(HYDRAS, False)


def _text_in(described: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    for key, annotation in expectations.fields_of(described).items():
        for candidate in (annotation, *expectations.members(annotation)):
            if typing.is_typeddict(candidate):
                yield from _text_in(candidate, f"{prefix}{key}.")
        lists = list[str] in (annotation, *expectations.members(annotation))
        if lists or expectations.takes_text(annotation):
            yield f"{prefix}{key}", lists


def quote(text: str) -> str:
    """A text such that Hydra gives back the very same.

    >>> quote("it's (1).jpg")
    "'it\\\\'s (1).jpg'"
    """
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return "'" + escaped + "\\" * trailing + "'"


def prepared(arguments: Sequence[str], command: str, groups: Callable[[str], Sequence[str]]) -> list[str]:
    """The arguments for Hydra.

    Args:
        arguments: as typed.
        command: name of the configuration.
        groups: a configuration group's options; none for what is no group.

    Raises:
        ConfigError: an argument that is not understood; the message names it.
    """
    multirun = _multirun(arguments)
    made: dict[bool, list[str]] = {True: [], False: []}
    for word, is_value in zip(arguments, _option_values(arguments), strict=True):
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            shown = word.encode(errors="replace").decode()
            raise ConfigError(f"{shown!r} holds bytes that are no text in UTF-8. Rename the file, or link to it.")
        option = is_value or word.startswith("-")
        made[option].append(word if option else _argument(word, command, groups, multirun))
    return made[True] + made[False]  # options may stand anywhere


def _option_values(arguments: Sequence[str]) -> list[bool]:
    """Which words are values of Hydra's own options, such as ``job`` of ``--cfg job``."""
    return [i > 0 and arguments[i - 1] in _WITH_VALUE for i in range(len(arguments))]


def _multirun(arguments: Sequence[str]) -> bool:
    values = dict(word.lstrip("+").partition("=")[::2] for word in arguments)
    if "hydra.mode" in values:
        return values["hydra.mode"].upper() == "MULTIRUN"
    return bool({"-m", "--multirun"} & set(arguments)) or values.get("sweep", "null") != "null"


def _argument(word: str, command: str, groups: Callable[[str], Sequence[str]], multirun: bool) -> str:
    if word.startswith("~"):
        return word
    key, sign, value = word.partition("=")
    bare = key.lstrip("+")
    if not sign or not bare:
        raise ConfigError(f"'{word}' is not understood: an argument is KEY=VALUE; --help lists the keys.")
    if bare == "experiment_head":
        raise ConfigError(f"experiment_head={value} is now: recipe={value.replace('demo_', 'small_')}")
    keys = text_keys(command)
    if bare in keys:
        return f"{key}={_text(value, keys[bare], multirun)}"
    if bare == "logger" and "," in value and value[:1] not in "['\"":  # all of them, not a sweep over them
        word, value = f"{key}=[{value}]", f"[{value}]"
    parsed = _parsed(value)
    if groups(bare.partition("@")[0]) and parsed is not None and _is_plain(parsed) and value not in _AS_IT_IS:
        return word if isinstance(parsed.value(), str | list) else f"{key}={quote(value)}"
    if parsed is None or _parsed_whole(word) is None:
        raise ConfigError(
            f"'{word}' is not understood: Hydra cannot read it. Lists are [1,2], and text with special characters "
            f"stands in quotes of its own: \"{key}='...'\"."
        )
    return word


def _text(value: str, lists: bool, multirun: bool) -> str:
    """The value of a text key for Hydra."""
    if value in _AS_IT_IS:
        return value
    parsed = _parsed(value)
    if _QUOTED.fullmatch(value) and parsed is not None and _is_plain(parsed):
        return value
    if lists and value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_text(part.strip(), False, False) for part in _split(value[1:-1]))}]"
    if multirun and _FUNCTION.fullmatch(value) and parsed is not None:
        return value
    if multirun and len(parts := _split(value)) > 1:
        return ",".join(_text(part, lists, False) for part in parts)
    value = os.path.expanduser(value)
    parsed = _parsed(value)
    if parsed is not None and _is_plain(parsed):
        read = parsed.value()
        if isinstance(read, str) and (read == value or "\\" in value):  # Hydra's own way to quote: IMG\ \(1\).jpg
            return value
    return quote(value)


def _split(text: str) -> list[str]:
    """At the commas that stand outside of quotes and brackets."""
    parts, depth, quotation = [""], 0, ""
    for letter in text:
        if quotation:
            quotation = "" if letter == quotation else quotation
        elif letter in "'\"" and not parts[-1].strip():
            quotation = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and not quotation and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _parsed(value: str) -> Any:
    """Hydra's reading of a value; None where it cannot be read."""
    return _parsed_whole(f"key={value}")


def _parsed_whole(word: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return _parser(OverridesParser).parse_override(word)
    except HydraException:
        return None


@functools.cache
def _parser(kind: type[Any]) -> Any:
    return kind.create()


def _is_plain(override: Any) -> bool:
    return not override.is_sweep_override()
