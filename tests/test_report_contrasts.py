"""Differences between settings, paired by seed, against scipy's paired test; and what runs cost."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from panoptic_ibs.report_pages import collect, write_summary
from panoptic_ibs.report_pages.summary import confusion_panels
from run_folders import add_gallery, write_run

NONE, PAIRED = [0.30, 0.26, 0.28, 0.40], [0.31, 0.29, 0.33]  # the fourth seed has no partner


def write_sweep(folder: Path) -> None:
    for seed, pq in enumerate(NONE):
        run = write_run(folder / f"none{seed}", seed, pq, ibs="none")
        cost = {"seconds_per_step": 0.5 + seed, "train_seconds": 300, "peak_memory_mb": None}
        (run / "timing.json").write_text(json.dumps(cost))
    for seed, pq in reversed(list(enumerate(PAIRED))):
        write_run(folder / f"paired{seed}", seed, pq)


def test_differences_are_paired_and_their_interval_is_students(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    [(setting, first, found)] = collect(tmp_path).contrasts()
    assert (setting.label[3], first.label[3]) == ("paired", "none")
    gaps = np.subtract(PAIRED, NONE[:3])
    want = stats.ttest_rel(PAIRED, NONE[:3]).confidence_interval(0.95)
    pq = found[0]
    assert pq is not None
    assert pq.half is not None
    assert (pq.mean, pq.pairs) == (pytest.approx(gaps.mean()), 3)
    assert (pq.mean - pq.half, pq.mean + pq.half) == (pytest.approx(want.low), pytest.approx(want.high))
    assert pq.text == f"{100 * gaps.mean():+.1f} [{100 * want.low:+.1f}, {100 * want.high:+.1f}]"


def test_an_interval_without_zero_is_bold(tmp_path: Path) -> None:
    for seed, (none, paired) in enumerate([(0.30, 0.34), (0.31, 0.36), (0.33, 0.37)]):
        write_run(tmp_path / f"none{seed}", seed, none, "none")
        write_run(tmp_path / f"paired{seed}", seed, paired)
    page = write_summary(tmp_path).read_text()
    assert '<td class="own">+4.3 <span class="interval">[+2.9, +5.8]</span></td>' in page  # scipy.stats.ttest_rel
    assert '<td class="">+0.0 <span class="interval">[+0.0, +0.0]</span></td>' in page  # of a metric that never changes


def test_they_stand_in_all_three_files(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    page = write_summary(tmp_path).read_text()
    [(_, _, found)] = collect(tmp_path).contrasts()
    text = found[0].text  # type: ignore[union-attr]
    markdown = (tmp_path / "summary.md").read_text()
    assert f"| ibs paired | ibs none | 3 | {text} |" in markdown
    assert "| ibs none | 2 | 300 | – |" in markdown  # mean of 0.5, 1.5, 2.5, 3.5
    mean, _, interval = text.partition(" ")
    assert f'<td class="">{mean} <span class="interval">{interval}</span></td>' in page
    assert "<summary>Cost</summary>" in page
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    (mean,), (half,) = ([r for r in rows if r["kind"].startswith(kind)] for kind in ("difference", "half"))
    assert float(mean["pq"]) == pytest.approx(np.subtract(PAIRED, NONE[:3]).mean())
    assert float(half["pq"]) > 0
    assert mean["run"] == "minus ibs none"


def test_one_seed_has_no_interval_and_other_heads_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0, 0.3, ibs="none")
    write_run(tmp_path / "b", 0, 0.4)
    other = write_run(tmp_path / "c", 0, 0.9)
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["config"]["head"]["name"] = "ciae"
    (other / "metrics.json").write_text(json.dumps(metrics))
    [(_, _, found)] = collect(tmp_path).contrasts()
    assert found[0] is not None
    assert (found[0].half, found[0].text) == (None, "+10.0")


def test_up_to_six_settings_are_all_compared_more_to_the_first_alone(tmp_path: Path) -> None:
    for weight in range(6):
        write_run(tmp_path / f"run{weight}", 0, 0.1 * weight, weight=weight)
    found = {(s.runs[0].name, first.runs[0].name): d[0] for s, first, d in collect(tmp_path).contrasts()}
    assert len(found) == 15
    assert found["run5", "run3"].mean == pytest.approx(0.2)  # type: ignore[union-attr]
    write_run(tmp_path / "run6", 0, 0.6, weight=6)
    assert {first.runs[0].name for _, first, _ in collect(tmp_path).contrasts()} == {"run0"}


def test_thresholds_and_sizes_have_a_table_of_their_own(tmp_path: Path) -> None:
    """By hand: confusion of small things at 50 % is 0.02 + seed / 100 without IBS and one point less with it."""
    for seed in range(3):
        for ibs in ("none", "paired"):
            run = write_run(tmp_path / f"{ibs}{seed}", seed, ibs=ibs)
            metrics = json.loads((run / "metrics.json").read_text())
            metrics["confusion_by_size"]["small"]["50"] = 0.02 + seed / 100 - 0.01 * (ibs == "paired")
            metrics["pq_by_size"] = {"large": {"pq_things": 0.5}}
            (run / "metrics.json").write_text(json.dumps(metrics))
    page, text = write_summary(tmp_path).read_text(), (tmp_path / "summary.md").read_text()
    (names,) = [line for line in text.splitlines() if line.startswith("| head") and "Conf@50 small" in line]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| panoptic_fcn")]
    column = names.split(" | ").index("Conf@50 small")
    assert [row[column] for row in rows[2:]] == ["3.0 ± 1.0", "2.0 ± 1.0"]
    assert "-1.0 [-1.0, -1.0]" in text
    assert names.endswith("| PQ_th large |")
    assert rows[2][-1].startswith("50.0")
    assert "thresholds and sizes" in page
    with (tmp_path / "summary.csv").open() as stream:
        means = [r for r in csv.DictReader(stream) if r["kind"] == "mean"]
    assert [float(r["confusion_by_size.small.50"]) for r in means] == pytest.approx([0.03, 0.02])


def test_numbers_of_things_stand_beside_confusion(tmp_path: Path) -> None:
    for seed in range(2):
        for ibs, predicted in (("none", 40 + seed), ("paired", 31), ("random", 10)):
            run = write_run(tmp_path / f"{ibs}{seed}", seed, ibs=ibs)
            metrics = json.loads((run / "metrics.json").read_text())
            metrics["things"] = {"predicted": predicted, "matched": 20, "true": 50}
            (run / "metrics.json").write_text(json.dumps(metrics))
    write_run(tmp_path / "old", 2, ibs="random")  # of a version that did not count them: no mean of the other two alone
    page, text = write_summary(tmp_path).read_text(), (tmp_path / "summary.md").read_text()
    assert "| ibs none | 40 | 20 | 50 |" in text  # 40.5, to even
    assert "| ibs paired | 31 | 20 | 50 |" in text
    assert "| ibs random | –" not in text
    assert "| ibs random | 10" not in text
    assert "How much is predicted" in page
    with (tmp_path / "summary.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    found = [r["things.predicted"] for r in rows if r["kind"] == "run"]
    assert found == ["40.0", "41.0", "10.0", "10.0", "", "31.0", "31.0"]
    assert [float(r["things.predicted"]) for r in rows if r["kind"] == "mean"][::2] == [40.5, 31.0]


def test_settings_come_from_the_plain_to_the_elaborate_and_numbers_by_their_value(tmp_path: Path) -> None:
    conditions = [
        ("paired_crop", "paired", 1.0), ("random_crop", "random", 10.0), ("random_crop", "random", 3.0),
        ("paired_crop", "none", 1.0), ("ours", "none", 1.0), ("full_image", "none", 1.0), ("random_crop", "none", 1.0),
    ]  # fmt: skip
    for number, (sampling, ibs, weight) in enumerate(conditions):
        run = write_run(tmp_path / str(number), ibs=ibs, weight=weight)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["config"]["sampling"]["name"] = sampling
        (run / "metrics.json").write_text(json.dumps(metrics))
    found = [(*s.label[2:], s.runs[0].config["ibs"]["weight"]) for s in collect(tmp_path).settings]
    assert found == [conditions[i] for i in (5, 6, 2, 1, 3, 0, 4)]


def test_of_keys_that_follow_one_another_the_typed_one_names_a_setting(tmp_path: Path) -> None:
    for size, momentum in ((2, 0.9), (16, 0.99), (4, 0.9)):
        run = write_run(tmp_path / str(size), batch=size, layers=size // 4)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["config"].update(sampling={"name": "random_crop", "batch_size": size}, momentum=momentum)
        metrics["config"]["data"]["batch_size"] = size
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / ".hydra").mkdir()
        (run / ".hydra" / "overrides.yaml").write_text(f"- sampling.batch_size={size}\n- sampling=random_crop\n")
    assert [s.extra for s in collect(tmp_path).settings] == [
        "ibs.layers=0, momentum=0.9, sampling.batch_size=2",
        "ibs.layers=1, momentum=0.9, sampling.batch_size=4",
        "ibs.layers=4, momentum=0.99, sampling.batch_size=16",
    ]


def write_heads(folder: Path, heads: dict[str, list[str]]) -> None:
    for head, partners in heads.items():
        for ibs in partners:
            run = write_run(folder / head / ibs, ibs=ibs)
            metrics = json.loads((run / "metrics.json").read_text())
            metrics["config"]["head"]["name"] = head
            (run / "metrics.json").write_text(json.dumps(metrics))


def test_up_to_eight_confusion_curves_share_a_panel(tmp_path: Path) -> None:
    write_heads(tmp_path, {"ciae": ["none", "paired", "random", "same"], "mask2former": ["none", "paired", "random"]})
    write_heads(tmp_path, {"panoptic_fcn": ["none"]})
    [(title, lines)] = confusion_panels(collect(tmp_path))
    assert "ciae" not in title
    assert [line.color for line in lines] == list(range(8))
    assert lines[-1].label == "panoptic_fcn, ibs none"


def test_more_curves_have_a_panel_a_head_and_a_condition_its_colour(tmp_path: Path) -> None:
    partners = ["none", "random", "paired", "same"]
    heads = {"ciae": partners, "mask2former": partners[1:], "panoptic_fcn": ["paired"], "other": ["same"]}
    write_heads(tmp_path, heads)
    panels = confusion_panels(collect(tmp_path))
    assert [title.split(": ")[1] for title, _ in panels] == [
        f"{head}, synthetic" for head in ("ciae", "mask2former", "other", "panoptic_fcn")
    ]
    assert [[line.label for line in lines] for _, lines in panels] == [
        [f"ibs {p}" for p in some] for some in (partners, partners[1:], ["same"], ["paired"])
    ]
    assert [[line.color for line in lines] for _, lines in panels] == [[0, 1, 2, 3], [1, 2, 3], [3], [2]]
    assert all(line.curve[1] == [0.2, 0.091, 0.043, 0.01] for _, lines in panels for line in lines)
    write_summary(tmp_path)
    with Image.open(tmp_path / "report" / "confusion.png") as picture:
        assert picture.height > 4 * 300  # pixels; a panel for each


def test_every_setting_of_a_sweep_is_shown_on_the_same_image(tmp_path: Path) -> None:
    for ibs in ("none", "random", "paired"):
        for seed in (0, 1):
            run = write_run(tmp_path / f"{ibs}{seed}", seed, ibs=ibs)
            if (ibs, seed) != ("random", 0):  # of the setting with a run without pictures, the next run is shown
                add_gallery(run, count=2)
    report = tmp_path / "report"
    report.mkdir()
    (report / "pictures_of_a_former_report.png").write_bytes(b"")
    page = write_summary(tmp_path).read_text()
    files = sorted(p.name for p in report.glob("pictures_*.png"))
    assert files == ["pictures_panoptic_fcn_synthetic_1.png", "pictures_panoptic_fcn_synthetic_2.png"]
    assert page.count("<section") == 2
    assert "<script" not in page

    items = {i["image_id"]: i for i in json.loads((tmp_path / "random1" / "gallery" / "index.json").read_text())}
    first = min(items)
    with Image.open(tmp_path / "random1" / "gallery" / items[first]["prediction"]) as picture:
        tile = np.asarray(picture.convert("RGB"))
    with Image.open(report / files[0]) as picture:
        sheet = np.asarray(picture)
    height, width = tile.shape[:2]
    # Truth and none are in the first row, paired and random below: labels are sorted.
    assert sheet.shape == (2 * (height + 23), 2 * width + 4, 3)
    assert np.array_equal(sheet[height + 46 :, width + 4 :], tile)
    assert (sheet[:, width : width + 4] == 255).all()


def test_sheets_stay_in_the_reports_folder_whatever_the_data_is_called(tmp_path: Path) -> None:
    for ibs in ("none", "random", "paired"):
        run = write_run(tmp_path / ibs, ibs=ibs)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["config"]["data"]["name"] = "../../else/where"
        (run / "metrics.json").write_text(json.dumps(metrics))
        add_gallery(run, count=1)
    write_summary(tmp_path)
    files = [p.name for p in (tmp_path / "report").glob("pictures_*.png")]
    assert files == ["pictures_panoptic_fcn_.._.._else_where_1.png"]


def test_settings_without_a_common_image_have_no_sheet(tmp_path: Path) -> None:
    for ibs in ("none", "random", "paired"):
        write_run(tmp_path / ibs, ibs=ibs)
    add_gallery(tmp_path / "paired", count=1)
    page = write_summary(tmp_path).read_text()
    assert "Pictures" not in page
    assert not list((tmp_path / "report").glob("pictures_*"))
