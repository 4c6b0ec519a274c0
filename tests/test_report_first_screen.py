"""The first screen of a run's page: what was trained, four numbers, the worst confusion; then the rest in order."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import class_table, random_target, target_from_map
from panoptic_ibs.classes import ClassInfo, ClassTable
from panoptic_ibs.metrics.names import named
from panoptic_ibs.report_pages import GalleryWriter, load_run, write_report
from panoptic_ibs.report_pages.first_screen import hero, tiles, worst_item
from panoptic_ibs.report_pages.gallery import read_gallery
from panoptic_ibs.report_pages.worst import _window, draw_worst
from panoptic_ibs.segments import Prediction
from panoptic_ibs.visualize import OUTLINES, find_confused
from run_folders import CLASSES, add_curves, add_gallery, write_run


class Recorder:
    """In place of the embedder: keeps the pictures."""

    def __init__(self) -> None:
        self.shown: list[Image.Image] = []

    def photographs(self, pictures: list[Image.Image]) -> list[str]:
        self.shown += pictures
        return ["data:" for _ in pictures]


def change(run: Path, **changes: Any) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | changes))


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)).split())


def shown(run: Path) -> tuple[dict[str, Any] | None, list[Image.Image]]:
    recorder = Recorder()
    found = hero(load_run(run), read_gallery(run), recorder)  # type: ignore[arg-type]
    return found, recorder.shown


def test_first_what_was_trained_then_four_numbers_then_the_picture_then_the_rest(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    add_curves(run)
    add_gallery(run, count=6)
    (run / "timing.json").write_text(json.dumps({"train_seconds": 200.4}))
    page = write_report(run).read_text()
    first, rest = page.split("<main>")
    places = [
        first.index(mark) for mark in ("<h1>", 'class="lead"', 'class="tiles"', 'class="hero"', "Worst confusion")
    ]
    assert places == sorted(places)
    assert first.count('class="tile"') == 4
    assert words(first).count("Panoptic FCN with Intra-Batch Supervision between paired crops was trained") == 1
    assert "for 600 steps in 3 min 20 s (seed 0). Scored on 12 full images." in words(first)
    assert re.findall(r'<h2 id="(\w+)"', rest) == ["results", "confusion", "gallery", "classes", "curves", "how"]
    assert {link[1:] for link in re.findall(r'<a href="(#\w+)">', rest)} <= set(re.findall(r'id="([\w-]+)"', rest))
    folded = rest.index("more numbers")
    assert rest.index("Confusion @ 50 %") < folded < rest.index("Confusion @ 25 %")
    pictures = rest[rest.index('id="gallery"') : rest.index('id="classes"')].split('class="more"')
    assert [part.count("<section") for part in pictures] == [3, 3]  # the others are folded


def test_a_number_has_its_meaning_and_the_best_that_it_beats(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    tables = {
        "untrained": {"pq": 0.01, "pq_things": 0.25, "confusion": {"50": 0.0}, "things": {"predicted": 0}},
        "other": {"pq": 0.2, "pq_things": 0.1, "confusion": {"50": 0.143}, "things": {"predicted": 9}},
    }
    (run / "baselines.json").write_text(json.dumps(tables))
    found = tiles(load_run(run))
    assert [t["label"] for t in found] == ["PQ", "PQ things", "Confusion @ 50 %", "Prec things"]
    for tile, key in zip(found, ("pq", "pq_things", "confusion@50", "prec_things"), strict=True):
        assert tile["meaning"].lower() == f"{named(key).help}.".lower()
    (pq,), (things,), (confusion, hint), precision = (tile["notes"] for tile in found)
    assert (pq["gain"], pq["good"], pq["text"]) == (pytest.approx(0.1125), True, "over other (20.0)")
    assert (things["gain"], things["good"], things["text"]) == (pytest.approx(-0.05), False, "over untrained (25.0)")
    # Who predicts no things confuses none: the untrained network is no yardstick of confusion.
    assert (confusion["gain"], confusion["good"]) == (pytest.approx(-0.1), True)
    assert confusion["text"] == "against other (14.3)"
    assert hint["text"] == "lower is better"
    assert precision == []  # no baseline has it
    change(run, confusion={"50": 0.0}, things={"predicted": 0, "true": 7})
    (said,) = tiles(load_run(run))[2]["notes"]
    assert (said["gain"], said["text"]) == (None, "no thing was predicted: nothing could be confused")


def test_without_baselines_nothing_is_beaten(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change(run, things={"predicted": 1234, "matched": 1, "true": 2})
    notes = [note for tile in tiles(load_run(run)) for note in tile["notes"]]
    assert [(n["gain"], n["text"]) for n in notes] == [(None, "lower is better; 1,234 things predicted")]


def test_things_are_not_asked_for_where_there_are_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change(run, pq_things=0.0, miou=0.6, prec_things=0.0, confusion={"25": 0.0, "50": 0.0},
           things={"predicted": 0, "matched": 0, "true": 0})  # fmt: skip
    classes = ClassTable([ClassInfo(f"stuff{i}", i, False, (9, 9, 9 * i)) for i in (1, 2)])
    writer = GalleryWriter(run, classes)
    target = target_from_map(torch.tensor([[1, 2]]).repeat(20, 20), [0, 1], classes)
    writer.add(np.zeros((20, 40, 3), np.uint8), Prediction(target.id_map, target.class_ids, torch.ones(2)), target)
    writer.close()
    assert [t["label"] for t in tiles(load_run(run))] == ["PQ", "mIoU", "SQ", "RQ"]
    found, _ = shown(run)
    assert found is not None
    assert found["title"] == "Nothing is confused"
    assert found["caption"].startswith("There are no things here")
    assert write_report(run).read_text().count('class="tile"') == 4


def test_of_instances_average_precision(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.json").write_text(
        json.dumps({"ap": 0.4, "ap50": 0.6, "ap75": 0.3, "ap_small": None, "ap_large": 0.5})
    )
    assert [t["label"] for t in tiles(load_run(run))] == ["AP", "AP at IoU 50", "AP at IoU 75", "AP, large"]
    (run / "metrics.json").write_text(json.dumps({"ap": None}))
    assert tiles(load_run(run)) == []
    assert "no AP" in write_report(run).read_text()


def test_predictions_of_any_program_and_what_they_are_compared_with(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    config = {k: v for k, v in metrics["config"].items() if k not in ("head", "ibs", "sampling")}
    differences = {
        "second": {"pq": {"value": -0.0512, "low": -0.08, "high": -0.02}, "confusion@50": {"value": 0.1},
                   "prec_things": {"value": 0.02, "low": -0.01, "high": 0.03}}
    }  # fmt: skip
    table = {"reference": "first", "sets": ["first", "second"], "differences": differences}
    change(run, step=None, config={**config, "predictions": ["a.json", "b.json"]}, comparison=table)
    first = words(write_report(run).read_text().split("<main>")[0])
    assert "Predictions · run" in first
    assert "which program made them is not known here. Scored on 12 full images." in first
    assert "The numbers are those of first." in first
    assert "+5.1 over second (26.1)" in first
    notes = {t["label"]: t["notes"][0]["good"] for t in tiles(load_run(run)) if t["notes"]}
    assert notes == {"PQ": True, "Confusion @ 50 %": None, "Prec things": None}  # only the first is certain
    change(run, config={**config, "predictions": "some/where/mine.json"}, comparison=None)
    first = words(write_report(run).read_text().split("<main>")[0])
    assert "Predictions in COCO panoptic format (mine.json) were scored; which program" in first


# --- the picture


def naive_worst(count: int, threshold: float = 0.25) -> tuple[str, int]:
    """Image and number of instances of the worst prediction of :func:`run_folders.add_gallery`, pixel by pixel."""
    best: tuple[int, int, int] = (0, 0, 0)
    for i in range(count):
        target, other = random_target(CLASSES, seed=i, image_index=i), random_target(CLASSES, seed=50 + i, segments=3)
        true, predicted = target.id_map.tolist(), other.id_map.tolist()
        area: dict[int, int] = {}
        both: dict[tuple[int, int], int] = {}
        for row_t, row_p in zip(true, predicted, strict=True):
            for t, p in zip(row_t, row_p, strict=True):
                area[t] = area.get(t, 0) + 1
                both[t, p] = both.get((t, p), 0) + 1
        for p in range(1, len(other) + 1):
            if not CLASSES[int(other.class_ids[p - 1])].is_thing:
                continue
            swallowed = [
                both[t, p]
                for t in range(1, len(target) + 1)
                if bool(target.is_thing[t - 1]) and not bool(target.is_crowd[t - 1])
                and both.get((t, p), 0) > threshold * area.get(t, 0)
            ]  # fmt: skip
            if len(swallowed) > 1:
                best = max(best, (len(swallowed), sum(swallowed), -i))
    return f"image{-best[2]}", best[0]


def test_the_picture_is_of_the_prediction_that_swallows_most(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    add_gallery(run, count=12, limit=12)
    image, swallowed = naive_worst(12)
    assert swallowed > 2
    index = json.loads((run / "gallery" / "index.json").read_text())
    assert [item["image_id"] for item in index if "worst" in item] == [image]
    found, (picture,) = shown(run)
    assert found is not None
    assert found["title"] == "Worst confusion"
    assert f"In image {image}, one predicted" in found["caption"]
    assert f"covers more than 25 % of {swallowed} true instances" in found["caption"]
    (item,) = (item for item in index if "worst" in item)
    with Image.open(run / "gallery" / item["worst"]) as kept:
        assert np.array_equal(np.asarray(picture), np.asarray(kept.convert("RGB")))
    page = write_report(run).read_text()
    assert page.index("Worst confusion") < page.index("<main>")


def test_a_gallery_of_before_shows_the_whole_image(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    add_gallery(run, count=12, limit=12)
    file = run / "gallery" / "index.json"
    file.write_text(
        json.dumps([{k: v for k, v in item.items() if k != "worst"} for item in json.loads(file.read_text())])
    )
    found, (picture,) = shown(run)
    assert found is not None
    assert naive_worst(12)[0] in found["caption"]
    assert picture.size == (128, 64)


def test_rows_of_any_shape_are_no_worst(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    add_gallery(run, count=2)
    file = run / "gallery" / "index.json"
    odd = [3, {}, {"swallowed": 1}, {"swallowed": [1, 2]}, {"swallowed": [{"share": "x"}]}]
    file.write_text(json.dumps([{**item, "rows": odd, "pq": "x"} for item in json.loads(file.read_text())]))
    gallery = read_gallery(run)
    assert gallery is not None
    assert worst_item(gallery) is None
    found, _ = shown(run)
    assert found is not None
    assert "PQ" not in found["caption"]
    assert hero(load_run(run), None, Recorder()) is None  # type: ignore[arg-type]


def test_the_worst_is_cut_out_enlarged_and_outlined() -> None:
    classes = class_table(things=1, stuff=1)  # stuff comes first
    true = torch.full((200, 300), 4)
    true[80:100, 100:120], true[80:100, 130:150], true[:20, :20] = 1, 2, 3
    target = target_from_map(true, [1, 1, 1, 0], classes)
    predicted = torch.full_like(true, 2)
    predicted[80:100, 100:150] = 1
    prediction = Prediction(predicted, torch.tensor([1, 0]), torch.tensor([0.9, 1.0]), "squares")
    (row,) = find_confused(prediction, target, classes)
    picture = draw_worst(np.full((200, 300, 3), 90, np.uint8), predicted.numpy(), true.numpy(), row)
    height, width = picture.shape[:2]
    assert (width, height) == (560, 320)  # 70 x 40 pixels around 50 x 20, eight times as large
    colors = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert {(255, 255, 255), OUTLINES[0], OUTLINES[1]} <= colors
    assert OUTLINES[2] not in colors
    between = picture[height // 2, width // 2]  # of the two: the prediction is in full light there
    assert tuple(between) == (90, 90, 90)


@pytest.mark.parametrize(
    ("box", "size"),
    [((0, 3, 0, 4), (50, 90)), ((10, 48, 20, 25), (50, 90)), ((0, 50, 0, 90), (50, 90)), ((20, 24, 2, 88), (50, 90)),
     ((60, 61, 8, 9), (300, 10)), ((5, 6, 5, 6), (2000, 3000))],
)  # fmt: skip
def test_the_window_holds_what_is_to_be_seen_and_stays_in_the_image(
    box: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    mask = np.zeros(size, bool)
    mask[box[0] : box[1], box[2] : box[3]] = True
    top, bottom, left, right = _window(mask)
    assert 0 <= top <= box[0] < box[1] <= bottom <= size[0]
    assert 0 <= left <= box[2] < box[3] <= right <= size[1]
    if bottom - top < size[0] and right - left < size[1]:
        assert 1.35 <= (right - left) / (bottom - top) <= 2.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"confusion": {"25": 0.0, "50": 0.0}}, "No predicted thing covers more than 25 % of two"),
     ({"confusion": {"25": 0.1, "50": 0.0}}, "On the images chosen for this page no predicted thing covers"),
     ({"things": {"predicted": 0, "true": 5}}, "No thing was predicted, so none is confused.")],
)  # fmt: skip
def test_where_nothing_is_confused_the_best_picture_is_shown(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    run = write_run(tmp_path / "run")
    change(run, **changes)
    writer = GalleryWriter(run, CLASSES)
    for i, missed in enumerate((4, 0, 6)):
        target = random_target(CLASSES, seed=3)
        id_map = torch.where(target.id_map > missed, target.id_map, 0)
        image = np.full((*id_map.shape, 3), 50 * i, np.uint8)
        prediction = Prediction(id_map, target.class_ids, torch.ones(len(target)), f"image{i}")
        assert not find_confused(prediction, target, CLASSES)
        writer.add(image, prediction, target)
    writer.close()
    found, (picture,) = shown(run)
    assert found is not None
    assert found["title"] == "Nothing is confused"
    assert found["caption"].startswith(sentence)
    assert "the prediction for image image1 with 100.0 PQ, the best of the pictures" in found["caption"]
    gallery = read_gallery(run)
    assert gallery is not None
    (item,) = (i for i in gallery.items if i["image_id"] == "image1")
    assert np.array_equal(np.asarray(picture), np.asarray(gallery.open(item, "prediction")))


def test_a_page_without_pictures_has_its_numbers(tmp_path: Path) -> None:
    first = write_report(write_run(tmp_path / "run")).read_text().split("<main>")[0]
    assert first.count('class="tile"') == 4
    assert 'class="hero"' not in first


@pytest.mark.parametrize(
    ("data", "label"),
    [
        ({"name": "coco_panoptic", "val": "val2017", "root": "/x/coco"}, "COCO panoptic"),
        ({"name": "coco_panoptic", "val": "mine", "root": "/x/leaves"}, "leaves (in COCO panoptic format)"),
        ({"name": "coco_panoptic", "val": "mine", "root": None}, "a data set in COCO panoptic format"),
        ({"name": "synthetic", "synthetic": {"scenes": "lots"}}, "the embedded synthetic car parks"),
        ({"name": "own"}, "own"),
    ],
)
def test_data_are_called_what_they_are(tmp_path: Path, data: dict[str, Any], label: str) -> None:
    from panoptic_ibs.report_pages.wording import headline

    run = write_run(tmp_path / "run")
    config = json.loads((run / "metrics.json").read_text())["config"]
    change(run, config={**config, "data": data})
    assert headline(load_run(run)) == f"Panoptic FCN reaches 31.2 PQ on {label}"
