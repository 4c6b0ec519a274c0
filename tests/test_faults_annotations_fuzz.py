"""Annotation JSONs with anything in any place: a sound table or one DataError with the file, never another one."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_files import write_coco
from panoptic_ibs.data.check import check
from panoptic_ibs.data.readers import PanopticReader, coco_panoptic
from panoptic_ibs.errors import DataError

NAN, INF = math.nan, math.inf
GONE = object()  # the key is taken out
VALUES = (
    GONE, None, NAN, INF, -INF, "", "x", "0", "1", "7", "false", "a\0", 0, 1, 2, -1, 7, 10, 11, 0.5, 1.0, 11.0, -3.5,
    2**31, 2**63, 2**70, 1e30, 1e300, [], [0], [1, 2, 3, 4], [NAN, 1, 2, 3], {}, {"id": 1}, True, False,
)  # fmt: skip
Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def json_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("fuzz"), count=2, size=(8, 12), things=1)


@pytest.fixture(scope="module")
def content(json_path: Path) -> Any:
    return json.loads(json_path.read_text())


def read(json_path: Path, **options: Any) -> PanopticReader:
    root = json_path.parents[1]
    return coco_panoptic(root, "train2017", cache_dir=root / "cache", **options)


def places_in(value: Any, path: Place = ()) -> list[Place]:
    """Every place of a JSON value."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, below in steps for p in places_in(below, (*path, key)))]


def spoiled(content: Any, path: Place, value: Any) -> Any:
    if not path:
        return None if value is GONE else value
    content = copy.deepcopy(content)
    at = content
    for step in path[:-1]:
        at = at[step]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return content


def refused(json_path: Path, **options: Any) -> bool:
    """Whether a DataError with the file's name says no; any other exception fails the test."""
    try:
        read(json_path, **options)
    except DataError as error:
        return str(json_path) in str(error) or pytest.fail(f"no file in {error}")
    return False


def sound_or_refused(json_path: Path, content: Any) -> None:
    """A sound table, or a DataError; the check says the same."""
    json_path.write_text(json.dumps(content))
    if refused(json_path):
        assert refused(json_path, strict=False) or read(json_path, strict=False).defects
        return
    table = read(json_path).table
    assert ((table.segment_ids >= 1) & (table.segment_ids < 2**24)).all()
    assert np.isfinite(table.boxes).all()
    assert (table.areas >= 0).all()
    assert (table.sizes >= 1).all()
    assert len(set(table.image_ids.tolist())) == len(table.image_ids)
    assert read(json_path, strict=False).defects == []
    assert all(defect.message for defect in check(read(json_path, strict=False), workers=1))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_gives_a_sound_table_or_one_error(json_path: Path, content: Any, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places_in(content)))
        content = spoiled(content, place, data.draw(st.sampled_from(VALUES)))
    sound_or_refused(json_path, content)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_sound_table_or_one_error(json_path: Path, content: Any, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(content).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    json_path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw))
    refused(json_path)
