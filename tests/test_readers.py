"""The reader, the layouts, the cache and the index, against naive loops; every defect has its message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panoptic_files import CATEGORIES, edit, paint, random_scene, write_coco
from panoptic_ibs.data.readers import LAYOUTS, PanopticReader, cityscapes, coco_panoptic, make_reader, vistas
from panoptic_ibs.data.readers.cache import cache_file
from panoptic_ibs.data.readers.images import dense_rows, read_ids, read_rgb
from panoptic_ibs.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_coco(tmp_path / "set")
    return tmp_path / "set"


def read(root: Path, **options: Any) -> PanopticReader:
    return coco_panoptic(root, "train2017", cache_dir=root.parent / "cache", **options)


def json_of(root: Path) -> Path:
    return root / "annotations/panoptic_train2017.json"


def test_dense_rows_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    for n in (0, 1, 5, 60):
        listed = rng.choice(np.arange(1, 1 << 24), n, replace=False)
        values = np.concatenate([listed, [0, 3, 1 << 23]])
        raw = values[rng.integers(0, len(values), (17, 23))].astype(np.uint32)
        dense, unlisted = dense_rows(raw, listed)
        expected = np.zeros(raw.shape, int)
        for k, sid in enumerate(listed):
            expected[raw == sid] = k + 1
        np.testing.assert_array_equal(dense, expected)
        assert dense.dtype == np.uint8
        assert set(unlisted) == set(np.unique(raw)) - set(listed) - {0}


@pytest.mark.parametrize(
    ("number", "dtype"), [(254, np.uint8), (255, np.int16), (32766, np.int16), (32767, np.int32), (40000, np.int32)]
)
def test_dense_rows_of_many_segments(number: int, dtype: type) -> None:
    listed = np.arange(1, number + 1) * 3
    raw = np.concatenate([[0], listed[::-1]]).astype(np.uint32)[None]
    dense, unlisted = dense_rows(raw, listed)
    assert dense.dtype == dtype
    assert dense[0].tolist() == [0, *range(number, 0, -1)]
    assert not len(unlisted)


def test_read_gives_image_dense_map_and_records(root: Path) -> None:
    reader = read(root)
    content = json.loads(json_of(root).read_text())
    assert len(reader) == len(reader.records) == 4
    assert reader.integer_ids
    assert reader.classes.names == ("road", "sky", "person", "car")
    for i, record in enumerate(reader.records):
        image, id_map = reader.read(i)
        np.testing.assert_array_equal(image, np.asarray(Image.open(root / f"train2017/{i:04d}.png")))
        rgb = np.asarray(Image.open(root / f"annotations/panoptic_train2017/{i:04d}.png")).astype(int)
        raw = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        assert record.image_id == str(10 + i)
        assert (record.height, record.width) == image.shape[:2] == id_map.shape
        listed = content["annotations"][i]["segments_info"]
        assert record.segments.ids.tolist() == [s["id"] for s in listed]
        assert record.segments.areas.tolist() == [s["area"] for s in listed]
        assert record.segments.boxes.tolist() == [s["bbox"] for s in listed]
        assert record.segments.iscrowd.tolist() == [bool(s["iscrowd"]) for s in listed]
        dataset_ids = [reader.classes[c].dataset_id for c in record.segments.class_ids]
        assert dataset_ids == [s["category_id"] for s in listed]
        np.testing.assert_array_equal(np.concatenate([[0], record.segments.ids])[id_map], raw)
        part, part_map = reader.read(i, (3, 5, 20, 11))
        np.testing.assert_array_equal(part, image[3:23, 5:16])
        np.testing.assert_array_equal(part_map, id_map[3:23, 5:16])


def test_index_against_a_loop(root: Path) -> None:
    reader = read(root)
    for c in range(len(reader.classes)):
        expected = {}
        for i, record in enumerate(reader.records):
            s = record.segments
            rows = [k for k in range(len(s)) if s.class_ids[k] == c and not s.iscrowd[k]]
            if rows:
                expected[i] = rows
        assert reader.index.images(c).tolist() == list(expected)
        assert reader.index.count(c) == sum(map(len, expected.values()))
        for i in range(len(reader)):
            assert reader.index.segments(c, i).tolist() == expected.get(i, [])
    assert any(r.segments.iscrowd.any() for r in reader.records), "the test set must hold a crowd"


def test_cache_is_used_refreshed_and_optional(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(root.rglob("*"))
    first = read(root)
    path = cache_file(json_of(root), root.parent / "cache")
    assert path.is_file()
    assert sorted(root.rglob("*")) == before, "nothing may be written into the data set's folder"

    def never(*_: Any) -> None:
        raise AssertionError("the JSON was parsed again")

    with monkeypatch.context() as patch:
        patch.setattr("panoptic_ibs.data.readers.cache.parse", never)
        again = read(root)
    for name, value in vars(first.table).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(again.table, name))
    edit(json_of(root), lambda c: c["annotations"].pop())
    assert len(read(root)) == 3, "a changed JSON must not come from the cache"
    path.write_bytes(b"PK damaged")
    assert len(read(root)) == 3
    assert len(list(path.parent.iterdir())) == 1
    blocked = root.parent / "a file"
    blocked.write_text("")
    assert len(coco_panoptic(root, "train2017", cache_dir=blocked / "below")) == 3


def test_given_classes_replace_the_categories(root: Path) -> None:
    table = read(root).classes
    edit(json_of(root), lambda c: c["categories"].reverse())
    assert read(root).classes.names[0] == "car"
    given = read(root, classes=table)
    assert given.classes == table
    assert set(given.records[0].segments.class_ids[:2]) == {0, 1}


def _other_layout(root: Path, layout: str) -> tuple[PanopticReader, np.ndarray]:
    image, ids, segments = random_scene(np.random.default_rng(1), (20, 24), 3)
    if layout == "cityscapes":
        name, folder = "ulm_000001_000019", root / "gtFine/cityscapes_panoptic_val"
        entry = {"id": name, "file_name": f"{name}_gtFine_leftImg8bit.png", "height": 20, "width": 24}
        png, photo = f"{name}_gtFine_panoptic.png", root / f"leftImg8bit/val/ulm/{name}_leftImg8bit.png"
        json_path = folder.with_suffix(".json")
    else:
        name, folder = "abc", root / "validation/panoptic"
        entry = {"id": name, "file_name": "abc.jpg", "height": 20, "width": 24}
        png, photo = "abc.png", root / "validation/images/abc.jpg"
        json_path = folder / "panoptic_2018.json"
    folder.mkdir(parents=True)
    photo.parent.mkdir(parents=True)
    Image.fromarray(image).save(photo)
    Image.fromarray(paint(ids)).save(folder / png)
    annotation = {"image_id": name, "file_name": png, "segments_info": segments}
    json_path.write_text(json.dumps({"images": [entry], "annotations": [annotation], "categories": CATEGORIES}))
    reader = (cityscapes if layout == "cityscapes" else vistas)(
        root, "val" if layout == "cityscapes" else "validation", cache_dir=root / "../cache"
    )
    return reader, ids


@pytest.mark.parametrize("layout", ["cityscapes", "vistas"])
def test_other_layouts(tmp_path: Path, layout: str) -> None:
    reader, ids = _other_layout(tmp_path / "set", layout)
    image, id_map = reader.read(0)
    assert image.shape == (20, 24, 3)
    np.testing.assert_array_equal(np.concatenate([[0], reader.records[0].segments.ids])[id_map], ids)
    assert not reader.integer_ids


def test_pngs_beside_the_annotations_folder(root: Path) -> None:
    shutil.move(root / "annotations/panoptic_train2017", root / "panoptic_train2017")
    assert read(root).read(0)[1].max() > 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    if mode == "I;16":
        values = rng.integers(0, 65536, (9, 7), dtype=np.uint16)
        Image.fromarray(values).save(path)
        expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, -1)
    else:
        picture = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode)
        picture.save(path)
        expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(read_rgb(path, (9, 7)), expected)


def test_alpha_is_dropped_and_exif_ignored(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png", (8, 6)), pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.jpg", exif=exif)
    assert read_rgb(tmp_path / "b.jpg", (8, 6)).shape == (8, 6, 3)


# ------------------------------------------------------------------------------------------------ bad input


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _resave(path: Path, mode: str = "RGB", size: tuple[int, int] = (56, 40)) -> None:
    Image.open(path).convert(mode).resize(size).save(path)


def _unlisted(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[0, 0] = (9, 9, 9)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: (r / "train2017/0001.png").unlink(), ["0001.png", "missing", "image 11", "Restore"]),
        (lambda r: _truncate(r / "train2017/0001.png"), ["0001.png", "decoded", "image 11", "Fetch"]),
        (lambda r: (r / "train2017/0001.png").write_text("no picture"), ["0001.png", "cannot be decoded"]),
        (lambda r: _resave(r / "train2017/0001.png"), ["0001.png", "40x56", "44x62", "image 11"]),
        (lambda r: (r / "annotations/panoptic_train2017/0001.png").unlink(), ["0001.png", "PNG is missing", "11"]),
        (lambda r: _truncate(r / "annotations/panoptic_train2017/0001.png"), ["0001.png", "decoded", "image 11"]),
        (lambda r: _resave(r / "annotations/panoptic_train2017/0001.png"), ["0001.png", "id PNG is 40x56", "44x62"]),
        (
            lambda r: _resave(r / "annotations/panoptic_train2017/0001.png", "L", (62, 44)),
            ["0001.png", "not RGB: grey, 8 bits", "image 11"],
        ),
        (
            lambda r: _unlisted(r / "annotations/panoptic_train2017/0001.png"),
            ["0001.png", str(9 * (1 + 256 + 65536)), "segments_info", "List the segment"],
        ),
    ],
)
def test_a_bad_file_is_named_when_read(root: Path, spoil: Any, words: list[str]) -> None:
    spoil(root)
    reader = read(root)
    reader.read(0)
    with pytest.raises(DataError) as caught:
        reader.read(1)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), ["categories is missing", "COCO format"]),
        (lambda c: c["annotations"].clear(), ["empty", "annotations"]),
        (lambda c: c["images"].append(c["images"][0]), ["images[4]", "twice"]),
        (lambda c: c["annotations"].append(c["annotations"][0]), ["annotations[4]", "second annotation", "10"]),
        (lambda c: c["images"].pop(0), ["annotations[0].image_id 10", "not in 'images'"]),
        (lambda c: c["images"][2].pop("height"), ["images[2].height (image 12) is missing"]),
        (
            lambda c: c["images"][2].update(height="tall"),
            ['images[2].height (image 12) is "tall"', "a whole number from 1"],
        ),
        (lambda c: c["images"][2].update(width=0), ["images[2].width (image 12) is 0", "a whole number from 1"]),
        (lambda c: c["images"][2].update(id=[1]), ["images[2].id is [1]"]),
        (lambda c: c["annotations"][2].update(image_id={}), ["annotations[2].image_id is {}"]),
        (
            lambda c: c["annotations"][2].update(segments_info=3),
            ["annotations[2].segments_info (image 12) is 3", "a list"],
        ),
        (lambda c: c["categories"].append(4), ["categories", "object"]),
        (lambda c: c["categories"][1].pop("isthing"), ["categories[1].isthing (category sky) is missing"]),
        (lambda c: c["annotations"][1].pop("segments_info"), ["annotations[1].segments_info (image 11) is missing"]),
        (lambda c: c["annotations"][1]["segments_info"][0].pop("bbox"), ["annotations[1].segments_info", "bbox"]),
        (lambda c: c["annotations"][1]["segments_info"][1].update(id=70_007), ["70007", "twice", "annotations[1]"]),
        (
            lambda c: c["annotations"][1]["segments_info"][0].update(id=0),
            ["segments_info[0].id (image 11) is 0", "void"],
        ),
        (
            lambda c: c["annotations"][1]["segments_info"][0].update(category_id=99),
            ["image 11", "category_id 99", "'categories'"],
        ),
        (lambda c: c["categories"].append(c["categories"][0]), ["same id twice"]),
    ],
)
def test_a_bad_json_is_named_at_once(root: Path, change: Any, words: list[str]) -> None:
    edit(json_of(root), change)
    for _ in range(2):  # a faulty JSON must fail again, cache or not
        with pytest.raises(DataError) as caught:
            read(root)
        for word in words:
            assert word in str(caught.value)


def test_missing_places_are_named(root: Path, tmp_path: Path) -> None:
    for name in LAYOUTS:
        with pytest.raises(DataError, match=r"nowhere: no such folder \(data.root\)"):
            make_reader(name, tmp_path / "nowhere", "train")
        with pytest.raises(ConfigError, match=r"data\.root is not set"):
            make_reader(name, None, "train")
        with pytest.raises(DataError, match="missing"):
            make_reader(name, tmp_path, "train")
    with pytest.raises(ConfigError, match=r"data=voc is unknown.*coco_panoptic"):
        make_reader("voc", tmp_path, "train")
    json_of(root).write_text('{"images": [')
    with pytest.raises(DataError, match="not a valid JSON"):
        read(root)
    json_of(root).unlink()
    with pytest.raises(DataError, match=r"panoptic_train2017.json: the annotation JSON is missing"):
        read(root)
    shutil.rmtree(root / "train2017")
    with pytest.raises(DataError, match="folder of the images is missing"):
        read(root)


def test_images_without_annotation_are_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(json_of(root), lambda c: c["annotations"].pop(0))
    assert len(read(root)) == 3
    assert "1 images have no annotation" in caplog.text


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_real_photographs(tmp_path: Path) -> None:
    reader = coco_panoptic(SHARED / "coco_sample", "val2017", cache_dir=tmp_path)
    for i, record in enumerate(reader.records):
        _, id_map = reader.read(i)
        np.testing.assert_array_equal(np.bincount(id_map.ravel())[1:], record.segments.areas)
    assert len(reader.classes) == 133


def test_read_ids_is_exact_over_24_bits(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 1 << 24, (30, 40))
    Image.fromarray(paint(ids)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_ids(tmp_path / "x.png", (30, 40)), ids)
    np.testing.assert_array_equal(read_ids(tmp_path / "x.png", (30, 40), (2, 3, 9, 8)), ids[2:11, 3:11])
