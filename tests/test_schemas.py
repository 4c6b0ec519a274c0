"""The one way from values of outside to faults in plain words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from panoptic_ibs.errors import CheckpointError, DataError
from panoptic_ibs.files import read_bytes
from panoptic_ibs.schemas import SHOWN, checked, faults_in, read_json, shown, told


@with_config(ConfigDict(strict=True))
class Row(TypedDict):
    name: int | Annotated[str, Field(min_length=1)]
    flag: Literal[0, 1]


SCHEMA: TypeAdapter[Any] = TypeAdapter(dict[str, list[Row]])


@pytest.mark.parametrize(
    ("row", "path", "text"),
    [
        ({"name": 1, "flag": None}, "rows[1].flag", "is null; expected: 0 or 1"),
        ({"name": 1, "flag": float("nan")}, "rows[1].flag", "is nan; expected: 0 or 1"),
        ({"name": 1}, "rows[1].flag", "is missing"),
        ({"name": 1.5, "flag": 1}, "rows[1].name", "is 1.5; expected: a valid integer or text"),
        (None, "rows[1]", "is null; expected: an object"),
    ],
)
def test_a_fault_has_path_value_and_what_is_expected(row: Any, path: str, text: str) -> None:
    (fault,) = faults_in(SCHEMA, {"rows": [{"name": "a", "flag": 0}, row]})
    assert fault.path == path
    assert fault.text == text


def test_all_faults_in_one_message() -> None:
    value = {"rows": [{"name": k, "flag": 2} for k in range(SHOWN + 3)]}
    with pytest.raises(CheckpointError) as error:
        checked(SCHEMA, value, "file.json", CheckpointError)
    lines = str(error.value).splitlines()
    assert lines[0] == f"file.json: {SHOWN + 3} faults."
    assert lines[1].strip() == "rows[0].flag is 2; expected: 0 or 1"
    assert lines[-1].strip() == "and 3 more"
    assert len(lines) == SHOWN + 2


def test_a_single_fault_is_one_line() -> None:
    assert told("f", faults_in(SCHEMA, {"rows": [{"name": 1, "flag": 7}]}), "Mend it.") == (
        "f: rows[0].flag is 7; expected: 0 or 1. Mend it."
    )


def test_long_values_are_shortened() -> None:
    assert len(shown("x" * 1000)) == 60
    assert shown({1, 2}).startswith("{")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_text('{"ä": 1}', encoding=encoding)
    assert read_json(tmp_path / "a.json", "the JSON", "") == {"ä": 1}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udce4"])
def test_what_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"a\.json: the JSON is not a valid JSON"):
        read_json(tmp_path / "a.json", "the JSON", "")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "a pipe"), ("", "a folder"), ("no", "is missing"), ("x" * 300, "cannot be read")):
        with pytest.raises(DataError, match=said):
            read_bytes(tmp_path / name, "the file", "Write it.")
