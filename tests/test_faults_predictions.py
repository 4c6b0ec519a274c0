"""Predictions with every kind of wrong value: a score or one error, never another exception, a hang or a crash."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from panoptic_files import edit
from panoptic_ibs.data.readers import PanopticReader
from panoptic_ibs.errors import DataError
from panoptic_ibs.prediction_files import Scorer, open_predictions
from panoptic_ibs.prediction_files.run_lengths import MaskError, check_compressed, from_counts, from_polygons
from prediction_files import reader_of, write_split

NAN, INF = float("nan"), float("inf")
MISSING = object()
VALUES = [
    MISSING, None, NAN, INF, -INF, "", "x", "7", "é\ud800", 7.0, 1.5, -1, 0, 2**31, 2**63, 10**400, 1e300, [], [1],
    [[]], {}, {"a": 1}, True, False, "../x.png", "/etc/passwd", "a\0b", "y" * 300, "9" * 5000, "²",
]  # fmt: skip
BOX = [2.0, 2.0, 30.0, 2.0, 30.0, 30.0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def reader(root: Path) -> PanopticReader:
    return reader_of(root)


def scored(reader: PanopticReader, path: Path) -> dict[str, Any] | str:
    """The metrics, or the error's message."""
    try:
        scorer = Scorer(reader, [open_predictions(path, reader)], range(len(reader)), samples=0, workers=1)
        scorer.run()
    except DataError as error:
        return str(error)
    return scorer.results()[0]


def instance(**change: Any) -> dict[str, Any]:
    return {"image_id": 10, "category_id": 24, "score": 0.5, "segmentation": [BOX], **change}


def write(path: Path, content: Any) -> Path:
    path.write_bytes(json.dumps(content).encode())
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": NAN}, "[0].score is nan; expected: a finite number"),
        ({"score": INF}, "[0].score is inf; expected: a finite number"),
        ({"score": None}, "[0].score is null; expected: a valid number"),
        ({"score": "0.5"}, '[0].score is "0.5"; expected: a valid number'),
        ({"score": True}, "[0].score is true; expected: a valid number"),
        ({"score": 1e300}, "[0].score is 1e+300; expected: less than or equal to"),
        ({"category_id": 24.5}, "[0].category_id is 24.5"),
        ({"segmentation": [2.0, 2.0, 30.0, 2.0, 30.0, 30.0]}, "[0].segmentation[0] is 2.0"),
        ({"segmentation": [[1, 1, 5, 5]]}, "[0].segmentation[0] is [1, 1, 5, 5]; expected: at least 6 values, not 4"),
        ({"segmentation": [[*BOX, 4]]}, "[0].segmentation[0] has 7 numbers; expected: x and y in turn"),
        ({"segmentation": [[1e9, 1, 5, 5, 4, 4]]}, "[0].segmentation[0] holds 1e+09, far outside of the image"),
        ({"segmentation": [[NAN, 1, 5, 5, 4, 4]]}, "[0].segmentation[0][0] is nan; expected: a finite number"),
        ({"segmentation": []}, "[0].segmentation is []"),
        ({"segmentation": {"size": [60, 80], "counts": [4790, 9]}}, "add up to 4799 pixels; expected: 60 x 80"),
        ({"segmentation": {"size": [60, 80], "counts": [4801, -1]}}, "[0].segmentation.counts[1] is -1"),
        ({"segmentation": {"size": [60, 80], "counts": [1.5, 4798.5]}}, "[0].segmentation.counts[0] is 1.5"),
        ({"segmentation": {"size": [60, 80], "counts": "zz"}}, "no text of compressed run lengths"),
        ({"segmentation": {"size": [60, 80], "counts": "P"}}, "ends in the middle of a number"),
        ({"segmentation": {"size": [60, 80], "counts": "O"}}, "holds a run of -1 pixels"),
        ({"segmentation": {"size": [60, 80], "counts": "PPPPPPPP0"}}, "a number of more than 35 bits"),
        ({"segmentation": {"size": [60, 80], "counts": "5"}}, "add up to 5 pixels; expected: 60 x 80"),
        ({"segmentation": {"size": [6, 8], "counts": "`1"}}, "[0]: 6x8, the image 60x80: prediction of another size"),
    ],
)
def test_a_malformed_instance_is_told_by_its_place(
    reader: PanopticReader, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    found = scored(reader, write(tmp_path / "p.json", [instance(**change)]))
    if "another size" in words:  # of one image; the others hold nothing
        assert isinstance(found, dict)
        assert (found["faults"], found["num_images"]) == ([words], len(reader) - 1)
        return
    assert isinstance(found, str)
    assert words in found
    assert "Each entry needs image_id, category_id, score and segmentation" in found
    assert "nothing was scored" in found.lower()


def test_numbers_of_programs_that_write_a_point_everywhere(reader: PanopticReader, tmp_path: Path) -> None:
    plain = scored(reader, write(tmp_path / "p.json", [instance()]))
    assert isinstance(plain, dict)
    assert plain == scored(reader, write(tmp_path / "q.json", [instance(image_id=10.0, category_id=24.0, extra=NAN)]))
    assert plain == scored(reader, write(tmp_path / "r.json", [instance(image_id="0010", score=1)]))
    (tmp_path / "s.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "p.json").read_bytes())
    assert plain == scored(reader, tmp_path / "s.json")


def test_masks_are_those_of_pycocotools() -> None:
    """Sound ones are taken as they are; empty runs, on which pycocotools stumbles, are joined."""
    rng = np.random.default_rng(0)
    texts, sizes, masks = [], [], []
    for _ in range(200):
        size = tuple(int(v) for v in rng.integers(1, 50, 2))
        masks.append((rng.random(size) < rng.random()).astype(np.uint8))
        texts.append(coco_mask.encode(np.asfortranarray(masks[-1]))["counts"].decode())
        sizes.append(size)
    assert check_compressed(texts, sizes) == [None] * 200
    for size, mask in zip(sizes, masks, strict=True):
        flat = mask.T.ravel()
        counts = [int(n) for value in flat for n in ((0, 1) if value else (1, 0))]  # a run of nothing after each pixel
        np.testing.assert_array_equal(coco_mask.decode(from_counts(counts, size)), mask)
    (runs,) = check_compressed(["1010"], [(1, 2)])  # 1, 0, 1, and 0 + 0
    assert isinstance(runs, np.ndarray)
    assert runs.tolist() == [1, 0, 1, 0]


def expanded(text: str) -> list[int]:
    """Run lengths character by character, as the format says."""
    runs: list[int] = []
    value = place = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << 5 * place
        place += 1
        if not bits & 32:
            value -= (1 << 5 * place) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = place = 0
    return runs


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(min_codepoint=48, max_codepoint=111), min_size=1, max_size=14), max_size=6))
def test_compressed_run_lengths_are_judged_as_character_by_character(texts: list[str]) -> None:
    for text, verdict in zip(texts, check_compressed(texts, [(3, 4)] * len(texts)), strict=True):
        ends = not (ord(text[-1]) - 48) & 32
        runs = expanded(text)
        sound = ends and min(runs) >= 0 and sum(runs) == 12
        assert (not isinstance(verdict, str)) == sound, text
        if isinstance(verdict, np.ndarray):
            assert verdict.tolist() == runs


numbers = st.one_of(st.floats(-200, 200), st.integers(-99, 200), st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(numbers, min_size=6, max_size=12), min_size=1, max_size=3))
def test_polygons_end_in_a_mask_or_an_error(polygons: list[list[float]]) -> None:
    try:
        found = from_polygons(polygons, (30, 40))
    except MaskError:
        return
    assert found["size"] == [30, 40]
    assert coco_mask.decode(found).sum() == coco_mask.area(found)


def mutated(content: Any, pick: random.Random) -> Any:
    """One value of a JSON replaced, or taken away."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            places.append((value, key))
            walk(value[key])

    walk(content)
    owner, key = pick.choice(places)
    value = pick.choice(VALUES)
    if value is MISSING:
        del owner[key]
    else:
        owner[key] = copy.deepcopy(value)
    return content


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 3), st.booleans())
def test_mutated_files_end_in_a_score_or_one_error(
    root: Path, reader: PanopticReader, seed: int, changes: int, results: bool
) -> None:
    pick = random.Random(seed)
    rle = {"size": [60, 80], "counts": [4000, 300, 500]}
    content: Any = [instance(), instance(image_id=11), instance(segmentation=rle)]
    if not results:
        content = json.loads((root / "mine.json").read_text())
        content["annotations"] = content["annotations"][:3]
    for _ in range(changes):
        content = mutated(content, pick) if isinstance(content, dict | list) and content else content
    path = write(root / ("results.json" if results else "mutated.json"), content)
    folder = root / "mutated"
    if not folder.exists():
        folder.symlink_to(root / "mine")
    found = scored(reader, path)
    if isinstance(found, str):
        assert str(path) in found or str(folder) in found
    else:
        whole = found["num_images"] == len(reader)
        assert found["num_images"] >= 1
        assert whole or found["complete"] is False
        assert "nan" not in json.dumps({k: v for k, v in found.items() if k != "faults"}).lower()


def test_a_hostile_name_is_no_path(root: Path, reader: PanopticReader, tmp_path: Path) -> None:
    """What the JSON calls a PNG stays in its folder."""
    for name in ("../mine/0000.png", "/etc/passwd", "a/../../x.png", "..\\x.png"):
        content = json.loads((root / "mine.json").read_text())
        content["annotations"][0]["file_name"] = name
        (tmp_path / "p").mkdir(exist_ok=True)
        found = scored(reader, write(tmp_path / "p.json", content))
        assert isinstance(found, str), name
        assert f"image 10: {name}: PNG outside of the folder" in found
        assert "data.allow_outside=true" in found
    edit(tmp_path / "p.json", lambda c: c["annotations"][0].update(file_name="nothing..here.png"))
    assert "outside" not in str(scored(reader, tmp_path / "p.json"))
