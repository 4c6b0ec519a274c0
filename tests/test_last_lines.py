"""What training says at its end: where the report is, and commands that can be run as they stand."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from cli_helpers import compose
from panoptic_ibs import commands, train


def _said(
    typed: list[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    monkeypatch.setattr(commands, "job_overrides", lambda: typed)
    train.tell_next(compose(*typed), run_dir)
    return capsys.readouterr().out.splitlines()


def test_report_and_three_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "my runs" / "one"
    (run_dir / "report").mkdir(parents=True)
    (run_dir / "report" / "index.html").write_text("")
    monkeypatch.setattr(commands, "program", lambda: "python -m panoptic_ibs.")
    report, *lines = _said(
        ["experiment=lots", "head=ciae", "ibs=paired", f"run_dir={run_dir}"], run_dir, monkeypatch, capsys
    )
    assert report == f"report: {run_dir / 'report' / 'index.html'}"
    train_again, together, predict, prepare = (shlex.split(line)[2:] for line in lines if line.startswith("    python"))
    other = f"run_dir={run_dir}_without_ibs"
    assert train_again == ["panoptic_ibs.train", "experiment=lots", "head=ciae", "ibs=none", other]
    assert together == ["panoptic_ibs.report", f"runs={tmp_path / 'my runs'}"]
    assert predict[1] == f"ckpt_path={run_dir / 'checkpoints' / 'last.ckpt'}"
    assert predict[2].endswith("leftImg8bit/val")
    assert prepare[:3] == ["panoptic_ibs.prepare", "check", "data=coco_panoptic"]


def test_without_ibs_the_other_is_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _said(["data=lots", "ibs=none", "sampling=random_crop"], tmp_path, monkeypatch, capsys)
    assert lines[0] == "three things to try next:"  # there is no report
    (again,) = (line for line in lines if ".train " in line)
    assert again.endswith(f".train data=lots ibs=paired sampling=paired_crop run_dir={tmp_path}_with_ibs")


def test_a_head_without_embeddings_is_set_beside_one_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["data=lots", "head=upsnet", "head.channels=64", "recipe=small_upsnet", "ibs=none"]
    monkeypatch.setattr(commands, "job_overrides", lambda: typed)
    train.tell_next(compose("data=lots", "head=upsnet", "ibs=none"), tmp_path, embeds=False)
    (again,) = (line for line in capsys.readouterr().out.splitlines() if ".train " in line)
    wanted = f"data=lots head=panoptic_fcn ibs=paired sampling=paired_crop run_dir={tmp_path}_with_ibs"
    assert again.endswith(f".train {wanted}")


def test_other_data_need_no_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _said(["data=coco_panoptic", "data.root=DIR", "recipe=none"], tmp_path, monkeypatch, capsys) == []


def test_the_program_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", "")
    assert commands.program() == f"{python} -m panoptic_ibs."
    monkeypatch.chdir(tmp_path)
    assert commands.program() == "bin/python -m panoptic_ibs."
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert commands.program() == "python -m panoptic_ibs."
