"""A sweep's tables for Weights & Biases."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import stats

from panoptic_ibs import report
from panoptic_ibs.loggers import RUN_ID, share_summary
from panoptic_ibs.report_pages import collect, log_summary, write_summary
from panoptic_ibs.report_pages.summary_media import summary_tables
from panoptic_ibs.sweep_table import TableAtTheEnd
from run_folders import write_run

PQ = {"none": [0.30, 0.34, 0.35], "paired": [0.36, 0.37, 0.41]}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two settings of three seeds, of a sweep that went to Weights & Biases."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for ibs, values in PQ.items():
        for seed, pq in enumerate(values):
            run = write_run(tmp_path / "runs" / f"{ibs}_{seed}", seed, pq, ibs)
            metrics = json.loads((run / "metrics.json").read_text())
            metrics["config"].update(sweep_name="mine", logger={"wandb": {"project": "study", "name": "member"}})
            (run / "metrics.json").write_text(json.dumps(metrics))
            (run / "timing.json").write_text(json.dumps({"seconds_per_step": 0.5 + seed, "train_seconds": 60}))
    return tmp_path / "runs"


def _as_dicts(table: tuple[list[str], list[list[Any]]]) -> list[dict[str, Any]]:
    return [dict(zip(table[0], row, strict=True)) for row in table[1]]


def test_tables_of_a_sweep(sweep: Path) -> None:
    tables = summary_tables(collect(sweep))
    assert set(tables) == {"runs", "settings", "differences", "confusion", "cost"}, "no paper on this data"
    runs = _as_dicts(tables["runs"])
    assert {(r["ibs"], r["seed"]): r["pq"] for r in runs} == {(i, s): v for i in PQ for s, v in enumerate(PQ[i])}
    settings = {s["ibs"]: s for s in _as_dicts(tables["settings"])}
    none = np.array(PQ["none"])
    assert [settings["none"][k] for k in ("pq", "pq_sd")] == pytest.approx([none.mean(), none.std(ddof=1)])
    assert settings["paired"]["seeds"] == "0, 1, 2"
    (row,) = [d for d in _as_dicts(tables["differences"]) if d["metric"] == "pq"]
    gaps = np.array(PQ["paired"]) - none
    low, high = stats.ttest_rel(PQ["paired"], PQ["none"]).confidence_interval(0.95)
    assert (row["setting"], row["minus"], row["pairs"]) == ("ibs paired", "ibs none", 3)
    assert [row[k] for k in ("mean", "low", "high")] == pytest.approx([gaps.mean(), low, high])
    curve = {c["threshold"]: c["share"] for c in _as_dicts(tables["confusion"]) if c["setting"] == "ibs none"}
    assert curve == pytest.approx({5: 0.2, 25: 0.091, 50: 0.043, 75: 0.01})
    assert [c["seconds_per_step"] for c in _as_dicts(tables["cost"])] == [1.5, 1.5]


def test_the_papers_numbers_stand_beside_ours(tmp_path: Path) -> None:
    for ibs in ("none", "paired"):
        run = write_run(tmp_path / ibs, 0, 0.5, ibs)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["config"]["data"] = {"name": "cityscapes", "val": "val"}
        (run / "metrics.json").write_text(json.dumps(metrics))
    rows = _as_dicts(summary_tables(collect(tmp_path))["published"])
    ours = [r["value"] for r in rows if r["ours"] and r["metric"] == "PQ" and r["row"] == "ibs none"]
    assert set(ours) == {0.5}
    theirs = [r["value"] for r in rows if not r["ours"]]
    assert len(theirs) > 10
    assert all(0 < v < 1 for v in theirs)


def test_loggers_without_tables_are_left_alone(tmp_path: Path) -> None:
    log_summary(tmp_path / "nothing", [object()])  # the folder is not even read


def _logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables in the files of the last offline run below a folder."""
    last = max((folder / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime_ns)
    found = {}
    for file in (last / "files" / "media" / "table" / "summary").glob("*.table.json"):
        table = json.loads(file.read_text())
        found[file.name.split("_")[0]] = _as_dicts((table["columns"], table["data"]))
    assert list((last / "files" / "media" / "images" / "summary").glob("confusion_*.png"))
    return found


def test_report_gives_the_summary_to_wandb(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([f"runs={sweep}", "logger=wandb"]) == 0
    out = capsys.readouterr().out
    place, page = out.strip().splitlines()[-2:]
    assert Path(page) == sweep / "report" / "index.html"
    kept = (sweep / "report" / RUN_ID).read_text().strip()
    assert Path(place.removeprefix("Weights & Biases: ")).name.endswith(kept)
    tables = _logged(sweep)
    with (sweep / "summary.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "run"]
    assert [(r["run"], r["pq"]) for r in tables["runs"]] == [(row["run"], float(row["pq"])) for row in rows]
    assert len(collect(sweep).runs) == 6, "the page of Weights & Biases is no run"


def test_the_summary_stays_one_run_of_the_sweeps_group(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from panoptic_ibs import loggers

    seen: list[dict[str, Any]] = []
    connect = loggers._connect

    def spy(folder: Path, options: dict[str, Any], config: Any, run_id: str) -> Any:
        seen.append({**options, "id": run_id})
        return connect(folder, options, config, run_id)

    monkeypatch.setattr(loggers, "_connect", spy)
    write_summary(sweep)
    share_summary(sweep)
    share_summary(sweep, {"project": "other", "name": "mine", "group": None})
    assert seen[0]["id"] == seen[1]["id"]
    assert [(s["project"], s["group"], s["name"], s["job_type"]) for s in seen] == [
        ("study", "mine", "mine summary", "summary"),
        ("other", "mine", "mine", "summary"),
    ]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_sweep_ends_with_its_table_in_wandb_if_asked(sweep: Path, wanted: bool) -> None:
    logger = {"wandb": {"project": "study"} if wanted else None}
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}, "logger": logger})
    TableAtTheEnd().on_multirun_end(config)
    assert (sweep / "summary.csv").is_file()
    assert (sweep / "wandb").is_dir() == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logger=wandb"], "is not understood"),
        (["runs=a", "logger=tensorboard"], "is not understood"),
        (["runs=a", "logger.wandb.colour=red"], "KEY of entity, group"),
        (["run=a", "logger=wandb"], "goes with runs=DIR"),
        (["runs=a", "b"], "is not understood"),
        (["runs=a", "run=b"], "is not understood"),
        (["runs=a", "runs=b"], "is not understood"),
    ],
)
def test_words_that_report_does_not_know(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_refusal_of_wandb_is_one_sentence(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    from panoptic_ibs import loggers

    def refuse(*_: Any) -> Any:
        raise wandb.Error("no such entity")

    monkeypatch.setattr(loggers, "_connect", refuse)
    assert report.main([f"runs={sweep}", "logger=wandb"]) == 2
    assert (sweep / "summary.md").is_file()
    error = capsys.readouterr().err
    assert error.startswith("error: Weights & Biases: no such entity. The same tables are in ")
    assert error.count("\n") == 1
