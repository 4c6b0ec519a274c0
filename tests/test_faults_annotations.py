"""Annotation JSONs: the right table, or one message with file, path, value and expectation; check lists every fault."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panoptic_files import CATEGORIES, edit, write_coco
from panoptic_ibs.data.check import check
from panoptic_ibs.data.datamodule import PanopticDataModule
from panoptic_ibs.data.readers import PanopticReader, coco_panoptic
from panoptic_ibs.data.readers.cache import cache_file
from panoptic_ibs.errors import DataError
from panoptic_ibs.prediction_files import open_predictions
from panoptic_ibs.prepare import main as prepare

NAN, INF = math.nan, math.inf
GONE = object()  # the key is taken out


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_coco(tmp_path / "set", count=3, size=(16, 24), things=2)
    return tmp_path / "set"


def json_of(root: Path) -> Path:
    return root / "annotations/panoptic_train2017.json"


def read(root: Path, **options: Any) -> PanopticReader:
    return coco_panoptic(root, "train2017", cache_dir=root.parent / "cache", **options)


def segment(c: dict[str, Any], image: int = 1, row: int = 0) -> dict[str, Any]:
    return c["annotations"][image]["segments_info"][row]


def messages(root: Path) -> list[str]:
    return [d.message for d in check(read(root, strict=False), workers=1)]


# ------------------------------------------------------------------------------------ values that mean something else


@pytest.mark.parametrize("value", [GONE, 0, False, 0.0, 1, True, 1.0])
def test_iscrowd_means_what_it_says(root: Path, value: Any) -> None:
    def change(c: dict[str, Any]) -> None:
        for s in c["annotations"][1]["segments_info"]:
            s.pop("iscrowd") if value is GONE else s.update(iscrowd=value)

    edit(json_of(root), change)
    crowd = read(root).records[1].segments.iscrowd
    assert (crowd == (value is not GONE and value == 1)).all()
    assert messages(root) == []


SEGMENT = {
    "iscrowd": (None, NAN, "0", "false", 2, -1, 0.5, []),
    "id": (None, NAN, "5", 0, -1, 2**24, 2**31, 2**70, 1.5, True, []),
    "category_id": (None, NAN, INF, "7", 1.5, True, 2**63, 2**70, 1e300),
    "bbox": (GONE, None, [], [1, 2, 3], [1, 2, 3, 4, 5], [NAN, 0, 5, 5], [INF, 0, 5, 5], ["1", 2, 3, 4], [1, 2, -3, 4],
             [None, 0, 5, 5], [1e300, 0, 5, 5], [True, 0, 5, 5], 5, "1 2 3 4"),
    "area": (GONE, None, NAN, INF, "5", -1, True, [], 1e300),
}  # fmt: skip
ENTRIES = {
    ("images", "id"): (GONE, None, NAN, INF, "", True, [], {}, 1.5, 2**70),
    ("images", "height"): (GONE, None, NAN, "16", 0, -1, 1.5, True, 2**31, [16]),
    ("images", "width"): (GONE, None, INF, "24", 0, -1, 24.5, False, 2**70),
    ("images", "file_name"): (GONE, None, "", 5, [], "a\0", "x" * 2000),
    ("annotations", "image_id"): (GONE, None, NAN, "", True, [], {}),
    ("annotations", "file_name"): (GONE, None, "", 5, [], {}, "a\0"),
    ("annotations", "segments_info"): (GONE, None, 5, "x", {}, True),
}


def faulty() -> list[tuple[str, Callable[[Any], Any], Any]]:
    """Path in the JSON, how to find the entry, and a value that is none."""
    found: list[tuple[str, Callable[[Any], Any], Any]] = []
    for key, values in SEGMENT.items():
        found += [(f"annotations[1].segments_info[0].{key}", segment, v) for v in values]
    for (name, key), values in ENTRIES.items():
        found += [(f"{name}[1].{key}", lambda c, n=name: c[n][1], v) for v in values]
    return found


def test_every_wrong_value_is_named_by_reading_and_by_checking(root: Path) -> None:
    sound = json.loads(json_of(root).read_text())
    for path, entry, value in faulty():
        content = copy.deepcopy(sound)
        key = path.rpartition(".")[2]
        entry(content).pop(key) if value is GONE else entry(content).update({key: value})
        json_of(root).write_text(json.dumps(content))
        with pytest.raises(DataError) as caught:
            read(root)
        for message in (str(caught.value), *messages(root)[:1]):
            assert message.startswith(f"{json_of(root)}: "), (value, message)
            assert path in message, (value, message)
            assert "is missing." in message if value is GONE else "; expected: " in message, (value, message)


def test_the_message_names_image_segment_and_category(root: Path) -> None:
    edit(json_of(root), lambda c: segment(c).update(iscrowd=None))
    with pytest.raises(DataError, match=r"iscrowd \(image 11, segment 70007\) is null; expected: 0 or 1, or leave it"):
        read(root)
    edit(json_of(root), lambda c: (segment(c).update(iscrowd=0), c["categories"][2].update(color="red")))
    with pytest.raises(DataError, match=r"2017\.json: categories\[2\]\.color \(category person\) is \"red\"; expected"):
        read(root)


def test_all_faults_are_told_at_once_and_hide_no_others(root: Path) -> None:
    """An image of height -1 does not hide the missing photograph of another one."""

    def change(c: dict[str, Any]) -> None:
        c["images"][1].update(height=-1, width=-1)
        segment(c, 2).update(bbox=[NAN, 0, 5, 5])
        segment(c, 0, 1).update(iscrowd=None)
        c["categories"][0].update(isthing="false")
        c["annotations"].append({**c["annotations"][0], "segments_info": []})

    edit(json_of(root), change)
    (root / "train2017/0002.png").unlink()
    parts = [
        "images[1].height (image 11) is -1", "images[1].width (image 11) is -1",
        "annotations[0].segments_info[1].iscrowd (image 10, segment 23) is null",
        "annotations[2].segments_info[0].bbox (image 12, segment 70007) is [NaN, 0, 5, 5]",
        'categories[0].isthing (category road) is "false"', "annotations[3]: a second annotation of image 10",
    ]  # fmt: skip
    with pytest.raises(DataError) as caught:
        read(root)
    assert "6 faults" in str(caught.value)
    listed = messages(root)
    for part in parts:
        assert part in str(caught.value)
        assert sum(part in message for message in listed) == 1, part
    assert any("0002.png: the image is missing" in message for message in listed)
    assert len(listed) == 7, "a fault has no others in its train"


@pytest.mark.parametrize("ids", [("1", 1), (1, "1"), (1.0, 1.0), (1, 1.0), ("1", 1.0), ("a b", "a b"), (-5, "-5")])
def test_images_are_joined_by_value(root: Path, ids: tuple[Any, Any]) -> None:
    edit(json_of(root), lambda c: (c["images"][0].update(id=ids[0]), c["annotations"][0].update(image_id=ids[1])))
    reader = read(root)
    assert reader.records[0].image_id == str(int(ids[0]) if isinstance(ids[0], float) else ids[0])
    assert reader.integer_ids == (not isinstance(ids[0], str))
    assert len(reader) == 3


def test_ids_as_number_and_as_text_are_one_too_many(root: Path) -> None:
    edit(json_of(root), lambda c: c["images"].append({**c["images"][0], "id": "10"}))
    with pytest.raises(DataError, match=r"images\[3\]: the id 10 occurs twice, as a number and as text"):
        read(root)


@pytest.mark.parametrize("category", [2**31 + 5, 2**53 + 1, 2**63 - 1, -(2**63), -4])
def test_categories_of_64_bits(root: Path, category: int) -> None:
    def change(c: dict[str, Any]) -> None:
        c["categories"][0]["id"] = category
        for a in c["annotations"]:
            a["segments_info"][0]["category_id"] = category

    edit(json_of(root), change)
    for _ in range(2):  # parsed, then cached
        reader = read(root)
        assert reader.classes.contiguous[category] == 0
        assert [r.segments.class_ids[0] for r in reader.records] == [0, 0, 0]
        assert reader.index.count(0) == 3
    edit(json_of(root), lambda c: segment(c).update(category_id=2**62))
    with pytest.raises(DataError, match=f"segment 70007 of image 11 has category_id {2**62}, which 'categories'"):
        read(root)


def test_any_encoding_with_a_byte_order_mark(root: Path) -> None:
    text = json_of(root).read_text()
    expected = read(root).table.segment_ids
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        json_of(root).write_bytes(text.encode(encoding))
        np.testing.assert_array_equal(read(root).table.segment_ids, expected)
        assert messages(root) == []
    json_of(root).write_bytes(text.replace("road", "r\xf6ad").encode("latin-1"))
    with pytest.raises(DataError, match=r"2017\.json: the annotation JSON is not a valid JSON"):
        read(root)


def test_a_class_table_is_named_by_file_and_key(root: Path) -> None:
    edit(json_of(root), lambda c: c["categories"].clear())
    with pytest.raises(DataError, match=r"train2017\.json: categories: the list is empty"):
        read(root)
    edit(json_of(root), lambda c: c.update(categories=[*CATEGORIES, CATEGORIES[0]]))
    with pytest.raises(DataError, match=r"2017\.json: categories: the same id twice: 7; the same name twice: road"):
        read(root)
    assert [m for m in messages(root) if "the same id twice" in m] == messages(root)


# --------------------------------------------------------------------------------------------------- the cache


def test_a_json_rewritten_within_its_time_stamp_is_read_again(root: Path) -> None:
    assert not read(root).table.iscrowd.all()
    before = os.stat(json_of(root))
    text = json_of(root).read_text()
    changed = text.replace('"iscrowd": 0', '"iscrowd": 1')
    assert len(changed) == len(text)
    with json_of(root).open("r+") as file:  # the same inode, size and modification time
        file.write(changed)
    os.utime(json_of(root), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(json_of(root)).st_mtime_ns == before.st_mtime_ns
    assert read(root).table.iscrowd.all()


def test_content_alone_makes_a_difference_to_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where every time stamp is the same, as on file systems that keep seconds."""
    state = os.stat(json_of(root))
    real = os.stat
    monkeypatch.setattr(
        "panoptic_ibs.data.readers.cache.os.stat", lambda p, **k: state if Path(p) == json_of(root) else real(p, **k)
    )
    assert not read(root).table.iscrowd.all()
    json_of(root).write_text(json_of(root).read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    assert read(root).table.iscrowd.all()


def test_tables_of_another_format_are_not_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(root)
    path = cache_file(json_of(root), root.parent / "cache")
    first = path.stat().st_mtime_ns
    read(root)
    assert path.stat().st_mtime_ns == first
    monkeypatch.setattr("panoptic_ibs.data.readers.cache.FORMAT", 1)
    read(root)
    assert path.stat().st_mtime_ns != first


def test_a_damaged_cache_is_never_taken(root: Path) -> None:
    table = read(root).table
    path = cache_file(json_of(root), root.parent / "cache")
    good = path.read_bytes()
    for place in range(0, len(good), 61):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        np.testing.assert_array_equal(read(root).table.segment_ids, table.segment_ids)


def test_a_faulty_json_is_never_cached(root: Path) -> None:
    edit(json_of(root), lambda c: segment(c).update(iscrowd=None))
    for _ in range(2):
        with pytest.raises(DataError, match="iscrowd"):
            read(root)
    assert not cache_file(json_of(root), root.parent / "cache").exists()


# ------------------------------------------------------------------------------------------- splits, paths and files


def test_colours_of_the_splits_may_differ_and_check_agrees_with_training(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path, split, count=1, size=(16, 24), things=1)
    words = [
        "check",
        "data=coco_panoptic",
        f"data.root={tmp_path}",
        "data.train=train",
        "data.val=val",
        f"run_dir={tmp_path}",
    ]
    for changes, sound in (({"color": None}, True), ({"name": "street"}, False), ({"isthing": 1}, False)):
        edit(tmp_path / "annotations/panoptic_val.json", lambda c, new=changes: c["categories"][0].update(new))
        data = PanopticDataModule("coco_panoptic", tmp_path, "train", "val", cache_dir=tmp_path / "cache")
        data.reader("val")
        if sound:
            colours = data.reader("train").classes.classes[0].color
            assert (
                data.classes.classes[0].color
                == data.reader("val").classes.classes[0].color
                == colours
                == (128, 64, 128)
            )
        else:
            with pytest.raises(DataError, match=r"panoptic_val\.json.* of class 0 is "):
                data.reader("train")
        assert prepare(words) == (0 if sound else 1)
        edit(tmp_path / "annotations/panoptic_val.json", lambda c: c.update(categories=CATEGORIES))


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/hostname", "../set2/x.png", ".."])
@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_file_names_stay_below_their_folder(root: Path, name: str, kind: str) -> None:
    edit(json_of(root), lambda c: c[kind][1].update(file_name=name))
    with pytest.raises(DataError, match=r"image 11: the file_name of its .* leads out of .*data\.allow_outside=true"):
        read(root)
    assert sum("leads out of" in m for m in messages(root)) == len(messages(root)) == 1
    assert len(read(root, allow_outside=True)) == 3


def test_names_that_stay_inside_and_links_are_taken(root: Path) -> None:
    inside = os.path.join(os.path.abspath(root / "train2017"), "0001.png")
    (root / "elsewhere.png").write_bytes((root / "train2017/0001.png").read_bytes())
    (root / "train2017/link.png").symlink_to(root / "elsewhere.png")
    (root / "train2017/..odd").mkdir()
    (root / "train2017/..odd/a..png").write_bytes((root / "train2017/0001.png").read_bytes())
    for name in (inside, "a/../0001.png", "link.png", "..odd/a..png"):
        edit(json_of(root), lambda c, name=name: c["images"][1].update(file_name=name))
        assert read(root).outside == set()
        if "/../" not in name:
            assert read(root).read_image(1).shape == (20, 30, 3)


@pytest.mark.timeout(30)
def test_pipes_are_refused_wherever_a_file_is_read(root: Path) -> None:
    for path in (root / "train2017/0000.png", root / "annotations/panoptic_train2017/0001.png"):
        path.unlink()
        os.mkfifo(path)
    listed = messages(root)
    assert len(listed) == 2
    assert all("must be a regular file, this is a pipe" in message for message in listed)
    for read_one in (lambda: read(root).read(0), lambda: read(root).read(1)):
        with pytest.raises(DataError, match="a pipe"):
            read_one()
    json_of(root).unlink()
    os.mkfifo(json_of(root))
    for strict in (True, False):
        with pytest.raises(DataError, match=r"train2017\.json: the annotation JSON must be a regular file"):
            read(root, strict=strict)


def test_turned_photographs_are_warnings(root: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(root / "train2017/0001.png") as picture:
        picture.save(root / "train2017/0001.png", exif=exif)
    found = check(read(root, strict=False))
    assert [(d.kind, d.warning) for d in found] == [("orientation", True)]
    assert "EXIF orientation is 3" in found[0].message
    words = [
        "check",
        "data=coco_panoptic",
        f"data.root={root}",
        "data.train=train2017",
        "data.val=null",
        f"run_dir={tmp_path}",
    ]
    assert prepare(words) == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert (report["defects"], report["warnings"]) == (0, 1)


def test_boxes_without_extent_are_not_dropped_in_silence(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(json_of(root), lambda c: segment(c).update(bbox=[1, 2, 0, 5]))
    read(root)
    assert "1 segments have a bbox of width or height 0" in caplog.text


def test_ids_are_shown_as_whole_numbers(root: Path) -> None:
    edit(json_of(root), lambda c: segment(c).update(id=2**24))
    with pytest.raises(DataError, match=r"segments_info\[0\]\.id \(image 11\) is 16777216; expected"):
        read(root)
    edit(json_of(root), lambda c: segment(c).update(id=2**24 - 1, category_id=None))
    with pytest.raises(DataError, match=r"category_id \(image 11, segment 16777215\) is null"):
        read(root)


def test_names_from_a_file_do_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "[/x] [red]set"
    path = write_coco(root, "val", count=1, size=(16, 24), things=1)
    edit(path, lambda c: (c["categories"][0].update(name="[/y]\x1b[31m\x9b2J"), c["categories"][0].pop("isthing")))
    words = ["check", "data=coco_panoptic", f"data.root={root}", "data.train=null", "data.val=val", f"run_dir={root}"]
    assert prepare(words) == 1
    out = "".join(capsys.readouterr().out.split())
    assert "\x1b" not in out
    assert "\x9b" not in out
    with pytest.raises(DataError) as caught:
        coco_panoptic(root, "val", cache_dir=tmp_path)
    assert "[/x] [red]set" in str(caught.value)
    assert r"(category [/y]\x1b[31m\x9b2J) is missing" in str(caught.value)
    assert r"(category[/y]\x1b[31m\x9b2J)" in "".join(c for c in out if c not in "│┃|")


def test_a_folder_of_pngs_has_no_class_0(root: Path, tmp_path: Path) -> None:
    """In PNGs alone 0 is void; annotations by train ids have a class 0, which would be lost."""
    edit(json_of(root), lambda c: (c["categories"][0].update(id=0), [s.update(category_id=0) for a in c["annotations"]
                                   for s in a["segments_info"] if s["category_id"] == 7]))  # fmt: skip
    (tmp_path / "p").mkdir()
    Image.fromarray(np.zeros((16, 24), np.uint8)).save(tmp_path / "p/10.png")
    with pytest.raises(DataError, match=r"p: PNGs without a JSON.* 0 is void.*2017\.json has the class 'road' as 0"):
        open_predictions(tmp_path / "p", read(root))
