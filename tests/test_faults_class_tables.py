"""Class tables: a value is what it says, or a fault with file, path, value and expectation; colours are decoration."""

from __future__ import annotations

import math
from typing import Any

import pytest

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import DataError

NAN, INF = math.nan, math.inf


def table(**changes: Any) -> ClassTable:
    entry = {"id": 7, "name": "road", "isthing": 0, "color": [128, 64, 127], **changes}
    return ClassTable.from_coco([{"id": 1, "name": "sky", "isthing": 1}, entry], "some.json: categories")


@pytest.mark.parametrize(("value", "expected"), [(0, False), (1, True), (False, False), (True, True), (1.0, True)])
def test_isthing_means_what_it_says(value: Any, expected: bool) -> None:
    assert table(isthing=value).is_thing == (True, expected)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        *[("isthing", v, s) for v, s in (("false", '"false"'), ("0", '"0"'), (None, "null"), (NAN, "nan"), (2, "2"))],
        *[("isthing", v, s) for v, s in ((0.5, "0.5"), (-1, "-1"), ([], "[]"), ({}, "{}"))],
        *[("id", v, s) for v, s in (("7", '"7"'), (None, "null"), (NAN, "nan"), (INF, "inf"), (True, "true"))],
        *[("id", v, s) for v, s in ((1.5, "1.5"), (10**30, "1000"), (2**63, "9223372036854775808"), (2.0**63, "9.22"))],
        *[("name", v, s) for v, s in (("", '""'), (None, "null"), (5, "5"), ([], "[]"), ("a\0", r'"a\u0000"'))],
        *[("color", v, s) for v, s in (("red", '"red"'), ("#12345", '"#12345"'), (5, "5"), ([1, 2], "[1, 2]"))],
        *[("color", v, s) for v, s in (([NAN, 0, 0], "[NaN"), ([300, -5, 7], "[300"), ([1, 2, 3, 4, 5], "[1, 2"))],
        *[("color", v, s) for v, s in (([0.5, 0, 0], "[0.5"), (["1", 2, 3], '["1"'), ([True, 0, 0], "[true"))],
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any, shown: str) -> None:
    with pytest.raises(DataError) as caught:
        table(**{key: value})
    assert f"some.json: categories: [1].{key} is {shown}" in str(caught.value)
    assert "expected: " in str(caught.value)


@pytest.mark.parametrize(
    ("color", "rgb"),
    [
        ("#80407f", (128, 64, 127)), ("#80407F", (128, 64, 127)), ("#84f", (136, 68, 255)), ([1, 2, 3], (1, 2, 3)),
        ([1, 2, 3, 255], (1, 2, 3)), ("#010203ff", (1, 2, 3)), ([1.0, 2.0, 3.0], (1, 2, 3)), ((1, 2, 3), (1, 2, 3)),
    ],
)  # fmt: skip
def test_colours_that_can_be_read_are(color: Any, rgb: tuple[int, int, int]) -> None:
    assert table(color=color).classes[1].color == rgb


def test_no_colour_gets_one_and_none_is_no_colour() -> None:
    assert table(color=None) == table(color=[*table(color=None).classes[1].color])
    assert table().classes[0].color != table(color=None).classes[1].color


@pytest.mark.parametrize("value", [-(2**63), -1, 0, 2**31, 2**53 + 1, 2**63 - 1, 12.0])
def test_ids_of_64_bits_are_kept(value: Any) -> None:
    classes = table(id=value)
    assert classes.classes[1].dataset_id == value
    assert isinstance(classes.classes[1].dataset_id, int)
    assert classes.to_coco()[1]["id"] == value


def test_all_faults_are_told_at_once_and_twos_by_name() -> None:
    with pytest.raises(DataError, match=r"x\.json: 3 faults") as caught:
        ClassTable.from_coco([{"id": "a", "name": "", "isthing": 0}, {"id": 1, "name": "b"}], "x.json")
    assert all(word in str(caught.value) for word in ("[0].id", "[0].name", "[1].isthing is missing"))
    with pytest.raises(DataError, match=r"some\.json: categories: the same id twice: 1; the same name twice: sky"):
        table(id=1, name="sky")
    with pytest.raises(DataError, match=r"x\.json: the list is empty"):
        ClassTable.from_coco([], "x.json")


def test_rows_of_checkpoints_are_read_through_a_schema_too() -> None:
    rows = table().to_list()
    assert ClassTable.from_list(rows) == table()
    for key, value in (("is_thing", "false"), ("dataset_id", "7"), ("name", None), ("color", [1, 2])):
        with pytest.raises(DataError, match=rf"a\.ckpt: \[1\]\.{key} is "):
            ClassTable.from_list([rows[0], {**rows[1], key: value}], "a.ckpt")


def test_tables_differ_in_what_counts_only() -> None:
    assert table().difference(table(color=None)) is None
    for changes, words in (
        ({"id": 8}, "id of class 1 is 7 and 8"), ({"name": "x"}, 'name of class 1 is "road" and "x"'),
        ({"isthing": 1}, "isthing of class 1 is false and true"),
    ):  # fmt: skip
        assert table().difference(table(**changes)) == words
    assert table().difference(ClassTable(table().classes[:1])) == "2 and 1 classes"
