"""The embedded data set: same bytes everywhere, labels that agree with the pixels, the layout of Cityscapes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panoptic_ibs.data.synthetic import CLASSES, MIN_PIXELS, SyntheticImage, render, write, write_dataset
from panoptic_ibs.data.synthetic.camera import Camera
from panoptic_ibs.data.synthetic.scene import plan
from panoptic_ibs.errors import DataError

THING = dict(zip(CLASSES.names, CLASSES.is_thing, strict=True))
SIZE = (128, 256)


def digest(picture: SyntheticImage) -> str:
    h = hashlib.sha256(picture.image.tobytes())
    h.update(picture.id_map.tobytes())
    h.update(repr(picture.segments).encode())
    return h.hexdigest()


def tree(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def pictures() -> list[SyntheticImage]:
    return [render(0, i, (256, 512)) for i in range(20)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set") / "deep" / "synthetic"
    write_dataset(root, 6, 3, SIZE, seed=5, progress=False, workers=1)
    return root


def test_class_table_is_cityscapes() -> None:
    ids = {c.name: c.dataset_id for c in CLASSES.classes}
    things = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert [c.name for c in CLASSES.classes if c.is_thing] == things
    assert [ids[n] for n in things] == [24, 25, 26, 27, 28, 31, 32, 33]
    assert len(CLASSES.stuff_ids) >= 6
    assert (ids["road"], ids["sky"]) == (7, 23)
    assert CLASSES[CLASSES.names.index("car")].color == (0, 0, 142)


def test_same_bytes_in_another_process(pictures: list[SyntheticImage]) -> None:
    code = (
        "import hashlib; from panoptic_ibs.data.synthetic import render; p = render(0, 3, (256, 512));"
        "h = hashlib.sha256(p.image.tobytes()); h.update(p.id_map.tobytes()); h.update(repr(p.segments).encode());"
        "print(h.hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == digest(pictures[3]) == digest(render(0, 3, (256, 512)))


def test_seed_index_and_size_matter(pictures: list[SyntheticImage]) -> None:
    assert len({digest(p) for p in pictures}) == len(pictures)
    assert digest(render(1, 0, (256, 512))) != digest(pictures[0])
    assert plan(3, 7).items == plan(3, 7).items
    assert plan(3, 7).items != plan(3, 7, attempt=1).items


def test_pictures_are_full_of_things(pictures: list[SyntheticImage]) -> None:
    counts = [p.num_things for p in pictures]
    assert all(20 <= n <= 60 for n in counts), counts
    assert 30 <= np.mean(counts) <= 45
    seen = {name for p in pictures for name, _ in p.segments}
    assert seen >= {n for n, thing in THING.items() if thing}
    assert len(seen - {n for n, thing in THING.items() if thing}) >= 6
    assert any(crowd for p in pictures for _, crowd in p.segments)
    assert not all(any(crowd for _, crowd in p.segments) for p in pictures)


def test_void_share(pictures: list[SyntheticImage]) -> None:
    shares = [float((p.id_map == 0).mean()) for p in pictures]
    assert all(0.01 <= s <= 0.12 for s in shares), shares


def test_rows_hold_look_alikes_from_tiny_to_large(pictures: list[SyntheticImage]) -> None:
    """In most pictures some class has eight instances or more, and things differ in area by a factor of 100."""
    rows = ranges = large = 0
    for p in pictures:
        names = [n for n, crowd in p.segments if THING[n] and not crowd]
        area = np.bincount(p.id_map.ravel(), minlength=len(p.segments) + 1)[1:]
        things = [a for a, (n, crowd) in zip(area, p.segments, strict=True) if THING[n] and not crowd]
        rows += max(names.count(n) for n in set(names)) >= 8
        ranges += max(things) > 100 * min(things)
        tall = [np.ptp(np.nonzero(p.id_map == k + 1)[0]) for k, (n, c) in enumerate(p.segments) if THING[n] and not c]
        large += max(tall) > 0.3 * p.id_map.shape[0]
    assert rows >= 15
    assert ranges >= 15
    assert large >= 12


@pytest.mark.parametrize("size", [(128, 256), (1024, 2048), (200, 144)])
def test_sizes(size: tuple[int, int]) -> None:
    p = render(2, 1, size)
    assert p.image.shape == (*size, 3)
    assert p.image.dtype == np.uint8
    assert p.id_map.shape == size
    assert p.id_map.dtype == np.int32
    area = np.bincount(p.id_map.ravel())
    assert len(area) == len(p.segments) + 1
    assert area[1:].min() >= MIN_PIXELS
    merged = [row for row in p.segments if row[1] or not THING[row[0]]]
    assert len(merged) == len(set(merged)), "stuff and crowd are one segment a class"
    assert p.image.std() > 20


def test_small_pictures_are_full_too() -> None:
    assert all(20 <= render(4, i, (128, 256)).num_things <= 60 for i in range(6))


def test_render_rejects_nonsense() -> None:
    with pytest.raises(ValueError, match="32 x 32"):
        render(0, 0, (16, 256))


def test_camera_by_hand() -> None:
    camera = Camera(focal=100.0, cx=50.0, horizon=40.0, height=2.0, near=1.0)
    assert camera.pixel((1.0, 0.0, 10.0)) == (60.0, 60.0)
    # The middle corner lies behind the camera: both its edges are cut at z = 1.
    clipped = camera.polygon([(0.0, 2.0, 2.0), (3.0, 2.0, -1.0), (3.0, 2.0, 2.0)])
    assert np.allclose(clipped, [(50.0, 40.0), (150.0, 40.0), (350.0, 40.0), (200.0, 40.0)])


def test_layout(dataset: Path) -> None:
    names = {
        split: sorted(p.name for p in (dataset / "leftImg8bit" / split / "synthville").iterdir())
        for split in ("train", "val")
    }
    assert names["train"] == [f"synthville_{i:06d}_000019_leftImg8bit.png" for i in range(6)]
    assert names["val"] == [f"synthville_{i:06d}_000019_leftImg8bit.png" for i in range(3)]
    assert "Synthetic" in (dataset / "README.txt").read_text()
    arguments = json.loads((dataset / "synthetic.json").read_text())
    assert arguments["synthetic"] is True
    assert (arguments["num_train"], arguments["num_val"], arguments["size"], arguments["seed"]) == (6, 3, [128, 256], 5)
    first = {s: dataset / "leftImg8bit" / s / "synthville" / names[s][0] for s in names}
    assert first["train"].read_bytes() != first["val"].read_bytes(), "no picture in both splits"


@pytest.mark.parametrize("split", ["train", "val"])
def test_json_agrees_with_pixels(dataset: Path, split: str) -> None:
    """Areas, boxes and ids recomputed pixel by pixel."""
    content = json.loads((dataset / "gtFine" / f"cityscapes_panoptic_{split}.json").read_text())
    categories = {c["id"]: c for c in content["categories"]}
    assert set(content["categories"][0]) == {"id", "name", "color", "supercategory", "isthing"}
    assert {i["id"] for i in content["images"]} == {a["image_id"] for a in content["annotations"]}
    for image, annotation in list(zip(content["images"], content["annotations"], strict=True))[:3]:
        assert image["file_name"] == f"{image['id']}_gtFine_leftImg8bit.png"
        assert annotation["file_name"] == f"{image['id']}_gtFine_panoptic.png"
        rgb = np.asarray(Image.open(dataset / "gtFine" / f"cityscapes_panoptic_{split}" / annotation["file_name"]))
        assert rgb.shape == (image["height"], image["width"], 3)
        found: dict[int, list[int]] = {}  # id -> area, left, top, right, bottom
        for y, line in enumerate(rgb.tolist()):
            for x, (r, g, b) in enumerate(line):
                row = found.setdefault(r + 256 * g + 65536 * b, [0, x, y, x, y])
                row[0] += 1
                row[1], row[3], row[4] = min(row[1], x), max(row[3], x), y
        void = found.pop(0)
        assert void[0] > 0
        assert set(found) == {s["id"] for s in annotation["segments_info"]}
        for s in annotation["segments_info"]:
            area, left, top, right, bottom = found[s["id"]]
            assert s["area"] == area
            assert s["bbox"] == [left, top, right - left + 1, bottom - top + 1]
            instance = categories[s["category_id"]]["isthing"] and not s["iscrowd"]
            assert s["category_id"] == (s["id"] // 1000 if instance else s["id"])


def test_ids_by_hand() -> None:
    ids = np.array([[0, 1, 1], [2, 3, 4]], np.int32)
    segments = [("road", False), ("car", False), ("car", False), ("person", True)]
    png, infos = write.panoptic_ids(SyntheticImage(np.zeros((2, 3, 3), np.uint8), ids, segments))
    assert [i["id"] for i in infos] == [7, 26000, 26001, 24]
    assert infos[0] == {"id": 7, "category_id": 7, "area": 2, "bbox": [1, 0, 2, 1], "iscrowd": 0}
    assert png[1, 1].tolist() == [26001 % 256, 26001 // 256, 0]
    assert infos[3]["iscrowd"] == 1


def test_bytes_do_not_depend_on_workers(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "two", 6, 3, SIZE, seed=5, progress=True, workers=2)
    assert tree(tmp_path / "two") == tree(dataset)
    assert [p.name for p in tmp_path.iterdir()] == ["two"], "no temporary folder left"


def test_complete_set_is_left_alone(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_write_one", lambda job: pytest.fail("rendered again"))
    write_dataset(dataset, 6, 3, SIZE, seed=5, progress=False)


def test_several_at_once_write_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a sweep that start together on a machine without the set."""
    fill, filled = write._fill, []

    def slow(*arguments: Any) -> None:
        filled.append(arguments)
        time.sleep(0.3)
        fill(*arguments)

    monkeypatch.setattr(write, "_fill", slow)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(write_dataset, tmp_path / "set", 1, 1, SIZE, progress=False, workers=1) for _ in range(4)]
        assert [run.result() for run in runs] == [None] * 4
    assert len(filled) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_other_arguments_raise(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"other arguments \(seed=5, now 6\).*Choose another root="):
        write_dataset(dataset, 6, 3, SIZE, seed=6, progress=False)


def test_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        write_dataset(tmp_path, 1, 1, SIZE, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("bad", [{"num_train": 0}, {"num_val": 0}, {"size": (16, 64)}, {"seed": -1}])
def test_bad_arguments(tmp_path: Path, bad: dict[str, object]) -> None:
    arguments = {"num_train": 1, "num_val": 1, "size": SIZE, "seed": 0, **bad}
    with pytest.raises(DataError, match="need at least one picture"):
        write_dataset(tmp_path / "x", progress=False, **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_dataset(tmp_path / "file" / "set", 1, 1, SIZE, progress=False)


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, done = write._write_one, []

    def interrupted(job: write.Job) -> dict[str, object]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return whole(job)

    monkeypatch.setattr(write, "_write_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "set", 3, 1, SIZE, progress=False, workers=1)
    assert len(done) == 2
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(write, "_write_one", whole)
    (tmp_path / "set").mkdir()  # an empty folder is no obstacle
    write_dataset(tmp_path / "set", 1, 1, SIZE, progress=False)
    assert (tmp_path / "set" / "synthetic.json").exists()


def test_dead_workers_are_replaced(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that breaks after three pictures: the rest is made without it, and the set is the same."""

    class Broken:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def map(self, function, jobs, chunksize):  # type: ignore[no-untyped-def]
            yield from map(function, jobs[:3])
            raise write.BrokenProcessPool

        def shutdown(self, **kwargs: object) -> None: ...

    monkeypatch.setattr(write, "ProcessPoolExecutor", Broken)
    write_dataset(tmp_path / "set", 6, 3, SIZE, seed=5, progress=False, workers=2)
    assert tree(tmp_path / "set") == tree(dataset)
