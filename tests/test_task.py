"""Start-up checks, the guard against non-finite losses, logging, and the results files."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import class_table
from panoptic_ibs import signals
from panoptic_ibs.callbacks import StopOnInterrupt, image_of
from panoptic_ibs.coco_writer import PanopticWriter
from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.files import write_atomically
from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.image_files import file_stem, find_images, image_names
from panoptic_ibs.loggers import MetricsCSV, wandb_logger, wandb_mode
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Batch, ImageSize
from panoptic_ibs.task import LossGuard, NonFiniteLossError, check_supervision

# --- supervision


def test_supervision_needs_two_crops_and_pairs() -> None:
    check_supervision(None, 1, paired=False)
    check_supervision(IntraBatchSupervision(partners="random"), 2, paired=False)
    check_supervision(IntraBatchSupervision(partners="paired"), 2, paired=True)
    with pytest.raises(ConfigError, match=r"at least 2 crops a device, but sampling\.batch_size=1.*ibs=none"):
        check_supervision(IntraBatchSupervision(partners="random"), 1, paired=False)
    with pytest.raises(ConfigError, match="at least 4 crops a device"):
        check_supervision(IntraBatchSupervision(partners="random", num_targets=3), 3, paired=False)
    with pytest.raises(ConfigError, match="use sampling=paired_crop, or ibs=random"):
        check_supervision(IntraBatchSupervision(partners="paired"), 4, paired=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_loss_guard_names_step_images_and_terms(value: float) -> None:
    guard = LossGuard()
    guard.watch(torch.tensor(3.0), 6, ["a.png"], {"mask": torch.tensor(3.0)})
    terms = {"mask": torch.tensor(value), "ibs": torch.tensor(0.5)}
    with pytest.raises(NonFiniteLossError, match=r"step 7 .*mask (nan|inf|-inf), ibs 0\.5.*images b\.png, c\.png"):
        guard.watch(torch.tensor(value), 7, ["b.png", "c.png"], terms)


# --- metrics.csv


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_csv_merges_by_step_and_takes_new_columns(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, step=1)
    logger.log_metrics({"train/loss": 1.0, "epoch": 0}, step=2)
    logger.log_metrics({"val/pq": 0.5, "epoch": 0}, step=2)
    rows = rows_of(tmp_path / "metrics.csv")
    assert list(rows[0]) == ["step", "epoch", "train/loss", "val/pq"]
    assert [tuple(r.values()) for r in rows] == [("1", "0", "2.0", ""), ("2", "0", "1.0", "0.5")]


def test_csv_is_the_same_whether_rows_are_added_or_all_written(tmp_path: Path) -> None:
    """After every log the file is what a table of all rows gives, and old rows are not written again."""
    path, table, columns = tmp_path / "metrics.csv", {}, ["step", "epoch"]
    logger = MetricsCSV(path)
    logged = [
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (2, "b"),
        (3, "b"),
        (4, "c"),
        (4, "a"),
        (2, "c"),
        (5, "a"),
        (5, "a"),
        (9, "a"),
    ]
    for value, (step, name) in enumerate(logged):
        before = path.stat().st_ino if path.is_file() else None
        newest, new_column = step >= max(table, default=0), name not in columns
        columns += [name] * new_column
        table.setdefault(step, {})[name] = 10.0 ** (value % 3)  # shorter and longer numbers over each other
        logger.log_metrics({name: table[step][name]}, step)
        logger.save()  # Lightning does so after every log
        rows = [{"step": str(s), **{k: str(v) for k, v in row.items()}} for s, row in sorted(table.items())]
        assert rows_of(path) == [{k: row.get(k, "") for k in columns} for row in rows]
        assert (path.stat().st_ino == before) == (newest and not new_column)  # a whole table is another file
    path.unlink()
    logger.log_metrics({"a": 1.0}, step=10)
    assert len(rows_of(path)) == 7


def test_csv_of_a_resumed_run_continues(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path / "metrics.csv")
    for step in (5, 10, 15):
        first.log_metrics({"train/loss": float(step)}, step=step)
    resumed = MetricsCSV(tmp_path / "metrics.csv", resume_step=10)
    resumed.log_metrics({"train/loss": -1.0}, step=12)
    assert [r["train/loss"] for r in rows_of(tmp_path / "metrics.csv")] == ["5.0", "10.0", "-1.0"]
    fresh = MetricsCSV(tmp_path / "metrics.csv")
    fresh.log_metrics({"train/loss": 0.0}, step=1)
    assert len(rows_of(tmp_path / "metrics.csv")) == 1


def test_wandb_is_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    os.chmod(tmp_path / "netrc", 0o600)
    assert wandb_mode() == "online"
    assert wandb_mode("disabled") == "disabled"
    with pytest.raises(ConfigError, match=r"logger\.wandb\.mode is 'oflfine'"):
        wandb_mode("oflfine")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode() == "offline"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode() == "online"


# --- files


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, lambda p: p.write_text("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_writer_uses_dataset_ids_and_skips_empty_rows(tmp_path: Path) -> None:
    classes = class_table()  # stuff 7, 8; things 50, 51, 52
    id_map = torch.zeros(4, 300, dtype=torch.int32)
    id_map[1:3, 10:20] = 2
    id_map[:, 290:] = 260  # above one byte
    rows = torch.zeros(260, dtype=torch.int64)
    rows[1], rows[259] = 4, 1
    writer = PanopticWriter(tmp_path, classes, integer_ids=True)
    writer.add(Prediction(id_map, rows, torch.full((260,), 0.5), image_id="12"))
    content = json.loads(writer.close().read_text())
    [annotation] = content["annotations"]
    assert annotation["image_id"] == 12
    first = {"id": 2, "category_id": 52, "area": 20, "bbox": [10, 1, 10, 2], "iscrowd": 0, "score": 0.5}
    second = {"id": 260, "category_id": 8, "area": 40, "bbox": [290, 0, 10, 4], "iscrowd": 0, "score": 0.5}
    assert annotation["segments_info"] == [first, second]
    png = np.array(Image.open(tmp_path / "panoptic" / "12.png")).astype(int)
    assert np.array_equal(png @ [1, 256, 65536], id_map.numpy())


def test_names() -> None:
    assert file_stem("a_1.x-y") == "a_1.x-y"
    assert "/" not in file_stem("city/a")
    assert file_stem("city/a") != file_stem("city_a")
    assert image_names([Path("x/a.png"), Path("x/a.jpg"), Path("x/b.png")]) == ["a.png", "a.jpg", "b"]


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images(tmp_path)] == ["a.jpg", "b.PNG"]
    assert find_images(tmp_path / "a.jpg") == [tmp_path / "a.jpg"]
    with pytest.raises(DataError, match="no such image or folder"):
        find_images(tmp_path / "none")


def test_image_of_cuts_the_padding_and_restores_the_size() -> None:
    images = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    images[:, 1, :20, :40] = 200
    same = Batch(images, [], [ImageSize((20, 40), (20, 40))], torch.tensor([-1]))
    assert image_of(same, 0).shape == (20, 40, 3)
    assert (image_of(same, 0)[..., 1] == 200).all()
    double = Batch(images, [], [ImageSize((20, 40), (40, 80))], torch.tensor([-1]))
    assert image_of(double, 0).shape == (40, 80, 3)
    assert (image_of(double, 0)[..., 1] == 200).all()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_training_in_order_and_the_second_one_at_once(name: str) -> None:
    number = getattr(signal, name)
    former: Any = signal.getsignal(number)
    trainer: Any = SimpleNamespace(global_step=3)
    with StopOnInterrupt() as stop:
        with pytest.raises(signals.Stopped) as early:  # no step is under way, so there is nothing to wait for
            signal.raise_signal(number)
        stop.on_train_start(trainer, None)  # type: ignore[arg-type]
        assert (stop.interrupted, stop.status) == (False, 0)
        signal.raise_signal(number)
        assert (stop.interrupted, stop.status) == (True, 128 + number)
        with pytest.raises(signals.Stopped) as second:
            signal.raise_signal(number)
        assert early.value.code == second.value.code == 128 + number
    assert signal.getsignal(number) is former


def test_signals_that_others_see_to_stay_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    former = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))  # a cluster's launcher
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a background job of a shell
        with signals.handled():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            with StopOnInterrupt() as stop:
                stop.on_train_start(SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
                for number in former:
                    signal.raise_signal(number)
                assert (seen, stop.number) == ([signal.SIGTERM], signal.SIGINT)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_wandb_run_id_is_kept_for_the_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"project": "test", "entity": None, "mode": None, "group": "sweep", "name": "head-ibs", "tags": []}
    import wandb

    try:
        logger = wandb_logger(tmp_path / "a", options, {"seed": 3})
        logger.log_metrics({"train/loss": 1.0}, step=1)
        assert (wandb.run.group, wandb.run.name, wandb.run.config["seed"]) == ("sweep", "head-ibs", 3)  # type: ignore
    finally:
        wandb.finish()
    first = (tmp_path / "a" / "checkpoints" / "wandb_run_id.txt").read_text().strip()
    assert list((tmp_path / "a" / "wandb").glob(f"offline-run-*-{first}"))
    resumed = wandb_logger(tmp_path / "b", options, {}, tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert resumed._id == first
    assert wandb_logger(tmp_path / "c", options, {})._id != first
