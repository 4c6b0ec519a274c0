"""The first screen of a folder of runs: which setting is best, by how much, with an interval."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from panoptic_ibs.report_pages import collect, print_settings, write_summary
from panoptic_ibs.report_pages.answer import answers
from run_folders import write_run

NONE, RANDOM, PAIRED = [0.30, 0.26, 0.28], [0.33, 0.36, 0.35], [0.34, 0.37, 0.355]


def sweep(folder: Path, **settings: list[float]) -> None:
    """Runs of each way of IBS with these PQs, seed by seed; confusion at 50 % is half of 1 - PQ."""
    for ibs, values in settings.items():
        for seed, pq in enumerate(values):
            file = write_run(folder / f"{ibs}{seed}", seed, pq, ibs=ibs) / "metrics.json"
            metrics = json.loads(file.read_text())
            metrics["confusion"]["50"] = (1 - pq) / 2
            file.write_text(json.dumps(metrics))


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)).split())


def test_the_best_leads_the_second_by_a_paired_difference(tmp_path: Path) -> None:
    sweep(tmp_path, none=NONE, random=RANDOM, paired=PAIRED)
    (answer,) = answers(collect(tmp_path))
    assert [lead.metric.key for lead in answer.leads] == ["pq", "pq_things", "confusion@50", "prec_things"]
    pq, _, confusion, _ = answer.leads
    assert pq.second is not None
    assert pq.first is not None
    assert [answer.label(s) for s in (pq.best, pq.second, pq.first)] == ["ibs paired", "ibs random", "ibs none"]
    for gap, other in ((pq.gap, RANDOM), (pq.over_first, NONE)):
        low, high = stats.ttest_rel(PAIRED, other).confidence_interval(0.95)
        assert gap is not None
        assert gap.half is not None
        assert (gap.mean, gap.mean - gap.half, gap.mean + gap.half) == pytest.approx(
            (np.subtract(PAIRED, other).mean(), low, high)
        )
    assert confusion.gap is not None
    assert pq.gap is not None
    assert answer.label(confusion.best) == "ibs paired"  # the lowest
    assert confusion.gap.mean == pytest.approx(-pq.gap.mean / 2)


def test_an_interval_that_leaves_out_zero_makes_a_best(tmp_path: Path) -> None:
    sweep(tmp_path, none=NONE, random=RANDOM, paired=PAIRED)
    low, high = (100 * v for v in stats.ttest_rel(PAIRED, RANDOM).confidence_interval(0.95))
    assert low > 0
    page = write_summary(tmp_path).read_text()
    first = page.split("<main>")[0]
    assert "<h1>Best is ibs paired: 35.5 ± 1.5 PQ</h1>" in first
    sentence = (
        f"ibs paired over ibs random: +0.8 points of PQ, 95 % interval {low:+.1f} to {high:+.1f} of 3 pairs of runs."
    )
    assert sentence in words(first)
    assert "Over ibs none: +7.5 points of PQ" in words(first)
    assert "not corrected for picking the best of 3 settings" in first
    assert first.count('class="tile"') == 4
    assert f'<span class="good">+0.8</span> [{low:+.1f}, {high:+.1f}] over ibs random' in first
    assert f'<span class="good">-0.4</span> [{-high / 2:+.1f}, {-low / 2:+.1f}] against ibs random' in first
    assert page.index('id="settings"') > page.index("<main>")  # tables come after the answer
    assert sentence in (tmp_path / "summary.md").read_text().splitlines()[0]


def test_an_interval_with_zero_makes_none(tmp_path: Path) -> None:
    sweep(tmp_path, none=NONE, paired=[0.27, 0.30, 0.285])
    first = words(write_summary(tmp_path).read_text().split("<main>")[0])
    assert "None is shown to be best; ibs paired leads with 28.5 ± 1.5 PQ" in first
    assert "of 3 pairs of runs; that holds zero, so it may be chance." in first
    assert "not corrected" not in first  # of two there is one difference


def test_one_seed_shows_nothing(tmp_path: Path) -> None:
    sweep(tmp_path, none=[0.3], paired=[0.4])
    first = words(write_summary(tmp_path).read_text().split("<main>")[0])
    assert "None is shown to be best; ibs paired leads with 40.0 PQ" in first
    assert (
        "ibs paired over ibs none: +10.0 points of PQ of one pair of runs; without an interval it may be chance."
        in first
    )


def test_without_a_common_seed_no_difference_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0, 0.3, ibs="none")
    write_run(tmp_path / "b", 1, 0.4)
    first = words(write_summary(tmp_path).read_text().split("<main>")[0])
    assert "a difference of PQ that is not known, as they share no seed" in first
    assert "no seed in common with ibs none" in first


def test_one_setting_and_no_run(tmp_path: Path) -> None:
    write_run(tmp_path / "one" / "a", 0, 0.3)
    first = words(write_summary(tmp_path / "one").read_text().split("<main>")[0])
    assert "One setting, 30.0 PQ" in first
    assert "There is no other setting to set it beside." in first
    broken = tmp_path / "none" / "bad"
    broken.mkdir(parents=True)
    (broken / "metrics.json").write_text("{")
    page = words(write_summary(tmp_path / "none").read_text())
    assert "No run here has a number to compare." in page
    assert page.index("Left out") < page.index("Settings")


def test_each_head_and_data_set_has_its_own(tmp_path: Path) -> None:
    sweep(tmp_path, none=[0.3, 0.31], paired=[0.4, 0.42])
    file = write_run(tmp_path / "other", 0, 0.9) / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["config"]["head"]["name"] = "ciae"
    file.write_text(json.dumps(metrics))
    page = write_summary(tmp_path).read_text()
    first = words(page.split("<main>")[0])
    assert f"<h1>5 runs in {tmp_path.name}</h1>" in page
    assert first.index("CIAE on the embedded synthetic street scenes One setting, 90.0 PQ.") < first.index(
        "Panoptic FCN on the embedded synthetic street scenes"
    )
    assert "90.0" not in first[first.index("Panoptic FCN on") :]


def test_instances_are_led_by_average_precision(tmp_path: Path) -> None:
    for name, ap in (("a", 0.3), ("b", 0.2)):
        file = write_run(tmp_path / name) / "metrics.json"
        config = json.loads(file.read_text())["config"] | {"predictions": f"{name}.json"}
        file.write_text(json.dumps({"ap": ap, "ap50": ap, "config": config, "step": None}))
    (answer,) = answers(collect(tmp_path))
    assert [lead.metric.key for lead in answer.leads] == ["ap", "ap50"]
    assert answer.leads[0].best.runs[0].name == "a"
    assert answer.title == "Predictions on the embedded synthetic street scenes"


def test_a_setting_that_differs_in_much_is_called_after_its_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", 0, 0.3)
    write_run(tmp_path / "elaborate", 0, 0.4, **{f"a_rather_long_option_{i}": f"value {i}" for i in range(5)})
    (answer,) = answers(collect(tmp_path))
    assert answer.headline == "None is shown to be best; elaborate leads with 40.0 PQ"


def test_the_terminal_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, none=NONE, random=RANDOM, paired=PAIRED)
    print_settings(tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "Best is ibs paired: 35.5 +- 1.5 PQ." in out.replace("±", "+-")
