"""Predictions of any program: their forms, and everything that can be wrong with them."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from panoptic_files import CATEGORIES, edit, paint
from panoptic_ibs.data.readers import PanopticReader
from panoptic_ibs.data.readers.png import PngError, SizeError, read_png_ids
from panoptic_ibs.errors import DataError
from panoptic_ibs.metrics import InstanceAP
from panoptic_ibs.prediction_files import InstanceFile, Problems, Scorer, open_predictions
from panoptic_ibs.prediction_files.naming import match_image
from panoptic_ibs.prediction_files.problems import FATAL, KINDS, SHOWN
from prediction_files import COUNT, close, disturb, reader_of, score, targets_and_predictions, write_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_split(tmp_path)


def test_every_form_is_found_and_gives_the_same(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    reader = reader_of(root)
    (wanted,) = score(reader, root / "mine.json")

    def same(path: Path, name: str) -> None:
        assert open_predictions(path, reader).name == name
        close(score(reader, path)[0], wanted)

    same(root / "mine", "mine")  # the JSON lies beside the folder
    other = tmp_path_factory.mktemp("forms")
    run = other / "run7"
    (run / "predictions").mkdir(parents=True)
    (root / "mine").rename(run / "predictions" / "panoptic")
    (run / "predictions" / "panoptic.json").write_text((root / "mine.json").read_text())
    same(run, "run7")  # a run folder, and what panoptic_ibs.predict writes
    same(run / "predictions", "run7")
    flat = other / "flat"
    (run / "predictions" / "panoptic").rename(flat)
    (flat / "all.json").write_text((root / "mine.json").read_text())
    same(flat, "flat")  # everything in one folder
    same(flat / "all.json", "all")
    (flat / "more.json").write_text("{}")
    with pytest.raises(DataError, match="holds 2 JSON files; name the one"):
        open_predictions(flat, reader)


def to_cityscapes(root: Path, folder: Path, names: Callable[[str], str], grey: bool) -> None:
    """PNGs whose ids say the class: class, or class * 1000 + number."""
    content = json.loads((root / "mine.json").read_text())
    for entry in content["annotations"]:
        ids = np.array(Image.open(root / "mine" / entry["file_name"])).astype(np.int64) @ [1, 256, 65536]
        new = np.zeros_like(ids)
        for k, s in enumerate(entry["segments_info"]):
            new[ids == s["id"]] = 1000 * s["category_id"] + k
        path = folder / names(str(entry["image_id"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(new.astype(np.uint16) if grey else paint(new)).save(path)


@pytest.mark.parametrize("grey", [False, True])
def test_a_folder_of_pngs_with_the_ids_of_cityscapes(root: Path, grey: bool) -> None:
    reader = reader_of(root)
    suffix = "instanceIds" if grey else "panoptic"
    to_cityscapes(root, root / "city", lambda i: f"ulm/{i}_gtFine_{suffix}.png", grey)
    Image.new("RGB", (5, 5)).save(root / "city" / "ulm" / "10_gtFine_color.png")  # stands beside them, and is none
    close(score(reader, root / "city", samples=0)[0], score(reader, root / "mine.json", samples=0)[0])
    Image.fromarray(np.full((60, 80, 3), 3, np.uint8)).save(root / "city" / "ulm" / f"10_gtFine_{suffix}.png")
    Image.new("RGB", (5, 5)).save(root / "city" / "elsewhere.png")
    (root / "city" / "ulm" / f"15_gtFine_{suffix}.png").unlink()
    scorer = run_scorer(reader, root / "city")
    assert scorer.scores[0].images == COUNT - 2
    for words in ("no prediction (1): image 15", "split does not have (1): elsewhere.png",
                  "class 197 (id = class, or class * 1000 + number)"):  # fmt: skip
        assert words in scorer.faults()
    Image.new("RGB", (5, 5)).save(root / "city" / f"12_gtFine_{suffix}.png")
    with pytest.raises(DataError, match=r"image predicted twice \(1\): image 12: 12_gtFine"):
        score(reader, root / "city")


def test_png_names_of_cityscapes_beside_a_json(root: Path) -> None:
    """The JSON names no file, or one that lies in a folder of its city under Cityscapes' name."""
    reader = reader_of(root)
    (wanted,) = score(reader, root / "mine.json")
    edit(root / "mine.json", lambda c: [a.update(file_name=f"{a['image_id']}.png") for a in c["annotations"]])
    for file in list((root / "mine").iterdir()):
        (root / "mine" / "ulm").mkdir(exist_ok=True)
        file.rename(root / "mine" / "ulm" / f"{10 + int(file.stem)}_gtFine_panoptic.png")
    close(score(reader, root / "mine.json")[0], wanted)
    edit(root / "mine.json", lambda c: [a.pop("file_name") for a in c["annotations"]])
    edit(root / "mine.json", lambda c: [a.update(image_id=f"0000{a['image_id']}") for a in c["annotations"]])
    close(score(reader, root / "mine.json")[0], wanted)


@pytest.mark.parametrize(
    ("name", "image"),
    [("17", "17"), ("000017", "17"), ("17_gtFine_panoptic", "17"), ("a_000001_000002_leftImg8bit", "a_000001_000002"),
     ("a_000001", None), ("18", None), ("x", None), ("b_1", "b_1"),
     ("a/a_000001_000002_leftImg8bit", "a_000001_000002"), ("city/sub/17", "17"), ("17/x", None)],
)  # fmt: skip
def test_names_of_images(name: str, image: str | None) -> None:
    assert match_image(name, {"17", "a_000001_000002", "b_1", "b"}) == image


def break_png(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def run_scorer(reader: PanopticReader, path: Path) -> Scorer:
    scorer = Scorer(reader, [open_predictions(path, reader)], range(len(reader)))
    scorer.run()
    return scorer


def spoil(root: Path) -> None:
    """One fault of every kind that concerns single images, each in an image of its own where it can be."""

    def change(content: dict[str, Any]) -> None:
        entries = content["annotations"]
        entries[1]["segments_info"][0]["category_id"] = 999
        entries[2]["segments_info"].append(dict(entries[2]["segments_info"][0]))
        entries[3]["segments_info"][0]["id"] = 4242  # the PNG has another one
        entries[4]["segments_info"].append({"id": 77, "category_id": 7})
        del entries[0]
        entries.append({**entries[-1], "image_id": 4711})

    edit(root / "mine.json", change)
    break_png(root / "mine" / "0005.png")
    with Image.open(root / "mine" / "0006.png") as image:
        image.resize((9, 9)).save(root / "mine" / "0006.png")


FAULTS = (
    "no prediction (1): image 10. Predict every image of the split.",
    "image that the split does not have (1): image 4711",
    "unknown category (1): image 11: category_id 999",
    "segments_info lists an id twice (1): image 12",
    "id in the PNG that segments_info does not list (1): image 13: id",
    "id in segments_info that the PNG does not hold (1): image 14: id 77",
    "PNG that cannot be decoded (1): 0005.png: truncated",
    "prediction of another size (1): 0006.png: 9x9, the image 84x116",
)


def test_all_faults_are_told_at_once_and_without_a_sound_image_nothing_is_scored(root: Path) -> None:
    spoil(root)
    reader = reader_of(root)
    scorer = Scorer(reader, [open_predictions(root / "mine.json", reader)], range(len(reader)))
    with pytest.raises(DataError) as error:
        scorer.run()
    text = str(error.value)
    assert text.splitlines()[0] == f"{root / 'mine.json'}: 8 faults; nothing was scored."
    for words in FAULTS:
        assert words in text, words
    assert set(scorer.sets[0].problems.counts) == set(KINDS) - {*FATAL, "no file", "truth"}


def test_sound_images_are_scored_as_if_they_were_alone(root: Path) -> None:
    """PQ and AP of the judged images are theirs to the last bit, whatever is wrong with the others."""
    spoil(root)
    content = json.loads((root / "mine.json").read_text())
    truth = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    for entry in content["annotations"]:
        if entry["image_id"] == 13:
            entry["segments_info"] = truth["annotations"][3]["segments_info"]
            shutil.copy(root / "annotations/panoptic_val2017/0003.png", root / "mine" / entry["file_name"])
    (root / "mine.json").write_text(json.dumps(content))
    reader = reader_of(root)
    scorer = run_scorer(reader, root / "mine.json")
    (result,) = scorer.results()
    assert (result["num_images"], result["complete"], result["pq"]) == (1, False, 1.0)
    assert f"{root / 'mine.json'}: 7 faults; 1 of 7 images were scored." in scorer.faults()
    assert "0005.png: truncated: PNG that cannot be decoded" in result["faults"]
    alone = Scorer(reader, [open_predictions(root / "mine.json", reader, [3])], [3])
    alone.run()
    assert set(alone.sets[0].problems.counts) == {"extra"}
    (wanted,) = alone.results()
    del wanted["faults"]
    close(result, wanted)


def test_sets_are_compared_on_the_images_that_are_sound_in_all(root: Path) -> None:
    other = disturb(root, "other", 3)
    break_png(root / "mine" / "0002.png")
    break_png(other.with_suffix("") / "0004.png")
    reader, kept = reader_of(root), [0, 1, 3, 5, 6]
    scorer = Scorer(reader, [open_predictions(p, reader) for p in (root / "mine.json", other)], range(COUNT))
    scorer.run()
    alone = Scorer(reader, [open_predictions(p, reader, kept) for p in (root / "mine.json", other)], kept, samples=0)
    alone.run()
    for ours, wanted in zip(scorer.results(), alone.results(), strict=True):
        assert ours["num_images"] == 5
        close(ours, wanted)


def test_faults_of_the_whole_set_are_told_before_an_image_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"].append(content["annotations"][0])
        content["annotations"].append({"image_id": 16, "file_name": "x.png"})
        content["annotations"][1]["segments_info"][0]["score"] = float("nan")
        content["annotations"][2]["file_name"] = "../../secret.png"

    edit(root / "mine.json", change)
    monkeypatch.setattr(Scorer, "_image", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(DataError) as error:
        score(reader_of(root), root / "mine.json")
    for words in (
        "nothing was scored",
        "annotations[8].segments_info is missing",
        "annotations[1].segments_info[0].score is nan; expected: a finite number",
        "image predicted twice (1): image 10",
        "image 12: ../../secret.png",
    ):
        assert words in str(error.value), words


def test_one_fault_is_one_line(root: Path) -> None:
    edit(root / "mine.json", lambda c: c["annotations"][0].update(file_name="nowhere.png"))
    scorer = run_scorer(reader_of(root), root / "mine.json")
    assert scorer.faults().count("\n") == 0
    assert "image 10: nowhere.png: PNG that is missing." in scorer.faults()
    assert scorer.faults().endswith("6 of 7 images were scored.")


def test_faults_of_two_sets_and_many_of_a_kind(root: Path) -> None:
    other = disturb(root, "other", 3)
    edit(root / "mine.json", lambda c: c["annotations"].clear())
    edit(other, lambda c: c["annotations"].pop())
    with pytest.raises(DataError) as error:
        score(reader_of(root), root / "mine.json", other)
    assert f"{root / 'mine.json'}: 7 faults" in str(error.value)
    assert f"{other}: image 16: no prediction" in str(error.value)
    many = Problems("x")
    for i in range(500):
        more = Problems("x")
        more.add("missing", f"image {i}")
        many.merge(more)
    assert len(many) == 500
    assert f"image {SHOWN - 1}; and {500 - SHOWN} more." in many.message()
    assert f"image {SHOWN};" not in many.message()


@pytest.mark.parametrize("first", [0, 1])
def test_contiguous_category_ids_are_recognised(root: Path, first: int) -> None:
    position = {c["id"]: first + i for i, c in enumerate(CATEGORIES)}

    def change(content: dict[str, Any]) -> None:
        del content["categories"]
        for entry in content["annotations"]:
            for s in entry["segments_info"]:
                s["category_id"] = position[s["category_id"]]

    edit(root / "mine.json", change)
    with pytest.raises(DataError) as error:
        score(reader_of(root), root / "mine.json")
    assert f"counted from {first} (contiguous ids)" in str(error.value)
    assert f"{first} -> 7, {first + 1} -> 23" in str(error.value)


def test_categories_with_other_ids_are_told(root: Path) -> None:
    """All ids are known, and would be scored as other classes in silence."""

    def change(content: dict[str, Any]) -> None:
        content["categories"][0]["name"], content["categories"][1]["name"] = "sky", "road"

    edit(root / "mine.json", change)
    with pytest.raises(DataError, match="'categories' gives 'road' the id 23, the data set 7"):
        score(reader_of(root), root / "mine.json")


def test_a_broken_truth_is_told(root: Path) -> None:
    break_png(root / "annotations" / "panoptic_val2017" / "0003.png")
    edit(root / "annotations" / "panoptic_val2017.json", lambda c: c["annotations"][4]["segments_info"].pop())
    scorer = run_scorer(reader_of(root), root / "mine.json")
    assert "defect of the ground truth (2)" in scorer.faults()
    assert "0003.png: truncated; image 14: id" in scorer.faults()
    assert scorer.scores[0].images == COUNT - 2


def test_what_is_no_predictions(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    reader, empty = reader_of(root), tmp_path_factory.mktemp("empty")
    file = empty / "p.json"
    with pytest.raises(DataError, match="neither a JSON nor PNGs"):
        open_predictions(empty, reader)
    with pytest.raises(DataError, match=r"p\.json: the JSON of the predictions is missing"):
        open_predictions(file, reader)
    for text in ("{}", "3", '{"annotations": 3}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"p\.json: no predictions in COCO panoptic format"):
            open_predictions(file, reader)
    for text in ("{", "", "[1"):
        file.write_text(text)
        with pytest.raises(DataError, match=r"p\.json: the JSON of the predictions is not a valid JSON"):
            open_predictions(file, reader)
    file.write_text('{"annotations": []}')
    with pytest.raises(DataError, match="the folder with the id PNGs of"):
        open_predictions(file, reader)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(data: bytes, kind: int = 2, depth: int = 8) -> bytes:
    """A PNG of 20 x 30 pixels (height x width) around compressed data."""
    header = struct.pack(">IIBBBBB", 30, 20, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_pngs_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 1 << 24, (20, 30))
    pixels, path = paint(ids), tmp_path / "x.png"
    for mode in ("RGB", "RGBA"):
        Image.fromarray(pixels).convert(mode).save(path)
        read = read_png_ids(path, (20, 30))
        assert read.dtype == np.uint32
        np.testing.assert_array_equal(read, ids)
    good = path.read_bytes()
    with pytest.raises(SizeError, match="20x30, the image 30x20"):
        read_png_ids(path, (30, 20))
    rows = [b"\0" + row.tobytes() for row in pixels]
    for data, words in (
        (good[:-1], "truncated"),
        (good[: len(good) // 2], "truncated"),
        (b"", "no PNG file"),
        (b"hello" * 20, "no PNG file"),
        (good[:200] + bytes([good[200] ^ 1]) + good[201:], "damaged: check sum of IDAT"),
        (png(zlib.compress(b"".join(rows[:12]))), "cannot be decoded"),  # check sums are right, rows are missing
        (png(b"hello"), "cannot be decoded"),
    ):
        path.write_bytes(data)
        with pytest.raises(PngError, match=words):
            read_png_ids(path, (20, 30))
    for mode, words in (("L", "grey, 8 bits"), ("P", "not RGB: of a palette, 8 bits")):
        Image.fromarray(pixels).convert(mode).save(path)
        with pytest.raises(PngError, match=words):
            read_png_ids(path, (20, 30))
    for dtype in (np.uint8, np.uint16):
        Image.fromarray(ids.astype(dtype)).save(path)
        np.testing.assert_array_equal(read_png_ids(path, (20, 30), grey=True), ids.astype(dtype))
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(PngError, match="no PNG file"):
        read_png_ids(path, (20, 30))


def write_instances(root: Path, reader: PanopticReader) -> tuple[Path, InstanceAP]:
    """Things of the predictions in COCO's results format, in the three forms of masks; and the metric of the same."""
    results = []
    metric = InstanceAP(reader.classes, panoptic=True)
    for prediction, target in targets_and_predictions(reader, root / "mine.json"):
        metric.update([prediction], [target])
        for k in range(len(prediction)):
            c = int(prediction.class_ids[k])
            if not reader.classes[c].is_thing:
                continue
            mask = (prediction.id_map.numpy() == k + 1).astype(np.uint8)
            rle = coco_mask.encode(np.asfortranarray(mask))
            shape: Any = {"size": rle["size"], "counts": rle["counts"].decode()}
            if k % 2:  # uncompressed: lengths of the runs down the columns
                flat = mask.T.ravel()
                edges = np.flatnonzero(np.diff(flat)) + 1
                counts = np.diff([0, *edges, flat.size]).tolist()
                shape = {"size": rle["size"], "counts": ([0] if flat[0] else []) + counts}
            results.append(
                {"image_id": int(target.image_id), "category_id": reader.classes[c].dataset_id, "segmentation": shape,
                 "score": float(prediction.scores[k])}
            )  # fmt: skip
    path = root / "instances.json"
    path.write_text(json.dumps(results))
    return path, metric


def test_instances_in_the_results_format(root: Path) -> None:
    reader = reader_of(root)
    path, metric = write_instances(root, reader)
    found = open_predictions(path, reader)
    assert isinstance(found, InstanceFile)
    both = score(reader, path, root / "mine.json", ap=True)
    assert both[0]["num_images"] == COUNT
    assert "pq" not in both[0]
    close(both[0], metric.compute())
    close(both[1]["ap_from_panoptic"], metric.compute())
    assert both[0]["ap"] > 0


def test_a_polygon_is_a_mask(root: Path) -> None:
    reader = reader_of(root)
    path = root / "polygons.json"
    square = [[2.0, 2.0, 12.0, 2.0, 12.0, 9.0, 2.0, 9.0]]
    path.write_text(json.dumps([{"image_id": 10, "category_id": 26, "segmentation": square, "score": 0.5}]))
    found = open_predictions(path, reader)
    assert isinstance(found, InstanceFile)
    (rle,) = found.read(0).rles
    mask = np.zeros((60, 80), bool)
    mask[2:9, 2:12] = True
    np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask)
    assert len(found.read(1)) == 0


def test_faults_of_instances(root: Path) -> None:
    reader = reader_of(root)
    path, _ = write_instances(root, reader)
    results = json.loads(path.read_text())
    good = results[0]
    results += [
        {**good, "image_id": 99},
        {**good, "category_id": 7},
        {k: v for k, v in good.items() if k != "score"},
        {**good, "segmentation": {"size": [3, 4], "counts": [12]}},
        {**good, "segmentation": 5},
    ]
    path.write_text(json.dumps(results))
    with pytest.raises(DataError) as error:
        score(reader, path)
    n = len(results) - 5
    for words in ("5 faults", "does not have (1): image 99", "category_id 7, not a thing", "malformed entry (2)",
                  f"[{n + 2}].score is missing", f"[{n + 3}]: 3x4, the image",
                  "Each entry needs image_id, category_id, score and segmentation"):  # fmt: skip
        assert words in str(error.value), words
