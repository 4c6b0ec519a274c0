"""What stands beside a run in its report: the papers' tables, other sets of predictions, intervals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from panoptic_ibs.report_pages import collect, load_run, log_report, write_report, write_summary
from panoptic_ibs.report_pages.beside import HEADS, comparison, confusion_lines, papers
from panoptic_ibs.report_pages.wording import headline
from run_folders import add_gallery, write_run


def change_metrics(run: Path, **changes: Any) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | changes))


def on(data: str, split: str) -> dict[str, Any]:
    return {"data": {"name": data, "val": split}, "head": {"name": "ciae"}}


@pytest.mark.parametrize(
    ("data", "split", "images", "shown", "missing"),
    [
        ("cityscapes", "val", 500, ["Panoptic FCN + IBS", "60.8", "92.6", "Main results"], ["36.3", "CIAE-800"]),
        ("vistas", "validation", 2000, ["42.2", "Parts of IBS", "35.9"], ["60.8", "Instance segmentation"]),
        ("coco_panoptic", "val2017", 40, ["CIAE-800, ResNet-50-FPN", "40.2", "do not compare"], ["test-dev", "60.8"]),
        ("coco_panoptic", "other", 5000, [], ["Published on this data set"]),
        ("synthetic", "val", 500, [], ["Published on this data set"]),
    ],
)  # fmt: skip
def test_the_papers_tables_stand_beside_runs_on_their_data(
    tmp_path: Path, data: str, split: str, images: int, shown: list[str], missing: list[str]
) -> None:
    run = write_run(tmp_path / "run")
    change_metrics(run, config=on(data, split), num_images=images, pq=0.5432)
    page = write_report(run).read_text()
    for words in shown:
        assert words in page, words
    for words in missing:
        assert words not in page, words
    assert ("do not compare" in page) == (images == 40)
    assert page.count("54.3") >= (2 if shown else 1)


def test_the_papers_tables_stand_beside_the_means_of_a_sweep(tmp_path: Path) -> None:
    for seed, pq in ((0, 0.51), (1, 0.52)):
        run = write_run(tmp_path / f"seed{seed}")
        change_metrics(run, config=on("cityscapes", "val") | {"seed": seed}, num_images=500, pq=pq)
    other = write_run(tmp_path / "other")
    change_metrics(other, config=on("synthetic", "val"), num_images=16, pq=0.1)
    page, text = write_summary(tmp_path).read_text(), (tmp_path / "summary.md").read_text()
    assert "Published on this data set" in page
    assert "do not compare" not in page + text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| **")]
    assert {row[1].strip(" |") for row in rows} == {"51.5"}  # the mean; the other data set has no table
    assert all("cityscapes" in row[0] for row in rows)
    assert re.search(r"Panoptic FCN \+ IBS[^\n]* 60.8 ", text)


def test_the_papers_table_of_instances_stands_beside_ap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_metrics(run, config=on("vistas", "validation"), ap=0.181, ap_small=0.048)
    page = write_report(run).read_text()
    assert "Instance segmentation" in page
    assert "36.8" in page


def test_published_tables_are_those_of_the_papers() -> None:
    """Every printed number of the papers' tables, where their text is at hand."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "seeds"
    if not folder.is_dir():
        pytest.skip("the papers' text is not part of the repository")
    for paper, file, count in ((papers()[0], "000*.txt", 4), (papers()[1], "001*.txt", 10)):
        text = next(folder.glob(file)).read_text()
        assert len({t["table"] for t in paper["tables"]}) == count
        for table in paper["tables"]:
            for row in table["rows"]:
                values = [v for k, v in row.items() if k in HEADS and v is not None]
                printed = r"\s*[|\t]\s*(?:-\s*[|\t]\s*)*".join(re.escape(f"{v:.1f}") for v in values)
                assert re.search(printed, text), row


def test_sets_of_predictions_are_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    difference = {
        "pq": {"value": -0.0512, "low": -0.08, "high": -0.0213},
        "acc_things": {"value": 0.017, "low": -0.01, "high": 0.03},
        **{f"confusion@{t}": {"value": 0.1, "low": None, "high": None} for t in (5, 25, 50, 75)},
        "per_class": {
            "thing0": {"value": 0.25, "low": 0.1, "high": 0.4},
            "stuff0": {"value": -0.5, "low": None, "high": 1},
        },
    }
    table = {"reference": "first<b", "sets": ["first<b", "second"], "differences": {"second": difference}}
    change_metrics(run, comparison=table, confidence={"intervals": {"pq": [0.2876, 0.3333], "per_class": {}}})
    view = comparison(load_run(run))
    assert view is not None
    rows = {row["title"]: row for row in view["metrics"]}
    assert rows["PQ"]["cells"][0]["certain"]
    assert rows["PQ"]["cells"][0]["value"] == pytest.approx(0.2613)
    assert not rows["Acc_th"]["cells"][0]["certain"]
    assert [row["title"] for row in view["classes"]] == ["stuff0", "thing0"]
    (line,) = confusion_lines(load_run(run))
    assert line.curve == ([5, 25, 50, 75], pytest.approx([0.3, 0.191, 0.143, 0.11]))
    page = write_report(run).read_text()
    for words in (
        "first&lt;b and second side by side",
        "28.8 to 33.3",
        "\N{MINUS SIGN}5.1",
        "\N{MINUS SIGN}8.0 to",
        "26.1",
    ):
        assert words in page, words
    assert "first<b" not in page


def test_broken_comparisons_do_not_break_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for broken in (3, {}, {"differences": {"b": {"pq": 3}}, "sets": [], "reference": 4}, {"differences": {"b": 3}}):
        change_metrics(run, comparison=broken, confidence=[1], pq_by_size=3)
        loaded = load_run(run)
        view = comparison(loaded)
        assert view is None or all(c["difference"] is None for row in view["metrics"] for c in row["cells"])
        assert confusion_lines(loaded) == []
        assert headline(loaded).endswith("reaches 31.2 PQ on the embedded synthetic street scenes")
    assert "31.2" in write_report(run).read_text()


def test_compared_sets_are_collected_once(tmp_path: Path) -> None:
    for name in ("sets/a", "sets/b"):
        write_run(tmp_path / "both" / name)
    change = write_run(tmp_path / "top")
    (tmp_path / "both" / "metrics.json").write_text((change / "metrics.json").read_text())
    change_metrics(tmp_path / "both", comparison={"reference": "a"})
    found = collect(tmp_path / "both")
    assert sorted(run.name for run in found.runs) == ["a", "b"]


class Taker:
    """A logger with the two methods of Lightning's for Weights & Biases."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
        self.images: dict[str, tuple[list[Any], list[str]]] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        assert step == 600
        self.tables[key] = columns, data

    def log_image(self, key: str, images: list[Any], step: int, caption: list[str] | None = None) -> None:
        assert step == 600
        self.images[key] = images, caption or []


def test_tables_and_pictures_go_to_loggers_that_take_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    add_gallery(run, count=2)
    change_metrics(run, confidence={"intervals": {"pq": [0.25, 0.375]}})
    difference, of_class = {"value": 0.1, "low": -0.1, "high": 0.3}, {"value": 0.2, "low": None, "high": None}
    table = {
        "reference": "a",
        "sets": ["a", "b"],
        "differences": {"b": {"pq": difference, "per_class": {"car": of_class}}},
    }
    change_metrics(run, comparison=table)
    write_report(run)
    taker = Taker()
    log_report(run, [object(), taker], 600)
    columns, rows = taker.tables["report/metrics"]
    assert columns == ["metric", "value", "low", "high"]
    assert rows[0] == ["PQ", 0.3125, 0.25, 0.375]
    assert ["Confusion @ 50 %", 0.043, None, None] in rows
    columns, rows = taker.tables["report/classes"]
    assert [dict(zip(columns, row, strict=True))["pq"] for row in rows] == [0.5, 0.25]
    assert taker.tables["report/comparison"][1] == [["b", "a", "pq", 0.1, -0.1, 0.3]]
    assert taker.tables["report/comparison_classes"][1] == [["b", "a", "car", 0.2, None, None]]
    figures = ("report/confusion", "report/confusion_by_size", "report/per_class")
    assert set(taker.images) == {*figures, "report/gallery_00", "report/gallery_01"}
    assert all(taker.images[key][0][0].width > 500 for key in figures)
    images, captions = taker.images["report/gallery_00"]
    assert len({image.size for image in images}) == 1
    assert [c.partition(": ")[2] for c in captions] == ["input", "truth", "prediction", "confused"]
