"""Loggers beside metrics.csv: each has the very numbers of that file, also after a resume; none asks for anything."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli_helpers import TINY, compose, run
from panoptic_ibs import extras
from panoptic_ibs.configuration.checking import faults_in_configuration

needs_trackers = pytest.mark.skipif(
    bool(extras.missing("tensorboard", "mlflow", "sqlalchemy", "alembic")),
    reason='needs pip install "panoptic-ibs[tensorboard,mlflow]"',
)


def curve(folder: Path, name: str) -> dict[int, float]:
    """A column of metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as stream:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(stream) if row.get(name)}


def same(found: dict[int, float], wanted: dict[int, float]) -> bool:
    return found.keys() == wanted.keys() and all(math.isclose(found[k], wanted[k], rel_tol=1e-6) for k in wanted)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, gone on with to the fourth, with every logger that needs no account."""
    folder = tmp_path_factory.mktemp("runs") / "logged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANOPTIC_IBS_CACHE", str(folder.parent / "cache"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        words = [
            *TINY, f"run_dir={folder}", "logger=csv,tensorboard,mlflow", "evaluation.baselines=false",
            "+logger.mine._target_=lightning.pytorch.loggers.CSVLogger", f"+logger.mine.save_dir={folder}",
            "+logger.mine.name=mine", "+logger.mine.version=0", "callbacks.pictures.images=1",
            "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "sampling.epoch_length=16",
        ]  # fmt: skip
        first = run("train", *words, "trainer.max_steps=3")
        assert first.code == 0, first.err
        last = folder / "checkpoints" / "last.ckpt"
        second = run("train", *words, "trainer.max_steps=4", f"ckpt_path={last}")
        assert second.code == 0, second.err
    return folder


@needs_trackers
def test_tensorboard_has_the_numbers_of_the_file(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    for name in ("train/loss", "train/lr", "val/pq", "val/confusion@50"):
        found: dict[int, float] = {}
        for event in events.Scalars(name):
            assert event.step not in found, f"{name} stands twice at step {event.step}"
            found[event.step] = event.value
        assert same(found, curve(logged, name)), name
    assert set(curve(logged, "train/loss")) == {0, 1, 2, 3}
    assert "report/confusion" in tags["images"]
    (validated,) = {tag for tag in tags["images"] if tag.startswith("val/00_") and "_embedding" not in tag}
    picture = events.Images(validated)[0]
    assert (picture.width, picture.height) == (2 * 192, 96)  # ground truth and prediction side by side
    assert "report/metrics/text_summary" in tags["tensors"]


@needs_trackers
def test_mlflow_has_one_run_with_the_numbers_of_the_file(logged: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{logged}/mlflow.db")
    experiment = client.get_experiment_by_name("panoptic-ibs")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (logged / "checkpoints" / "mlflow_run_id.txt").read_text().strip()
    assert (found.info.run_name, found.info.status) == ("panoptic_fcn-paired_crop-paired-seed0", "FINISHED")
    assert found.data.params["head/channels"] == "16"
    for name, theirs in (("train/loss", "train/loss"), ("val/confusion@50", "val/confusion_50")):
        points = {m.step: m.value for m in client.get_metric_history(found.info.run_id, theirs)}
        wanted = curve(logged, name)
        assert same({step: value for step, value in points.items() if step in wanted}, wanted), name
        assert set(points) - set(wanted) == ({3} if name.startswith("val") else set())  # it forgets nothing on a resume
    report = {item.path for item in client.list_artifacts(found.info.run_id, "report")}
    assert "report/metrics.csv" in report
    table = client.download_artifacts(found.info.run_id, "report/metrics.csv", str(logged))
    assert Path(table).read_text().startswith("metric,value,low,high")
    assert any(path.startswith("report/confusion") and path.endswith(".png") for path in report)


@needs_trackers
def test_any_logger_of_lightning_gets_the_numbers(logged: Path) -> None:
    text = (logged / "mine" / "version_0" / "metrics.csv").read_text()
    assert "train/loss" in text.splitlines()[0]


@needs_trackers
def test_an_evaluation_gives_its_report_to_tensorboard(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("PANOPTIC_IBS_CACHE", str(logged.parent / "cache"))
    out = logged.parent / "evaluated"
    done = run("evaluate", "predictions=" + str(logged / "predictions" / "panoptic.json"), f"run_dir={out}",
               *(word for word in TINY if word.startswith("data.")), "evaluation.bootstrap=0",
               "logger=tensorboard", f"logger.tensorboard.folder={out}/elsewhere")  # fmt: skip
    assert done.code == 0, done.err
    tags = EventAccumulator(str(out / "elsewhere")).Reload().Tags()
    assert "report/metrics/text_summary" in tags["tensors"]


def test_tables_and_pictures_for_tensorboard_are_text_and_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from panoptic_ibs.trackers import TensorBoard

    logger = TensorBoard(tmp_path)
    logger.log_table("t", ["a", "b"], [["x|y", 0.5], [None, 2]], step=1)
    logger.log_image("p", [Image.new("RGB", (4, 2)), Image.new("L", (3, 2))], step=1)
    logger.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    (event,) = events.Tensors("t/text_summary")
    assert event.tensor_proto.string_val[0].decode().splitlines() == ["|a|b|", "|-|-|", "|x\\|y|0.5|", "||2|"]
    assert events.Images("p/1")[0].width == 3


def faults(*overrides: str) -> list[str]:
    from omegaconf import OmegaConf

    config = compose(*overrides)
    raw: Any = OmegaConf.to_container(config)
    return [str(f) for f in faults_in_configuration(OmegaConf.to_container(config, resolve=True), raw, "config")]


@pytest.mark.parametrize("name", list(extras.LOGGERS))
def test_a_logger_that_is_not_installed_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    (fault,) = faults("recipe=none", f"logger={name}", "trainer=cpu")
    assert fault.startswith(f"logger.{name} was asked for, but {name} ")
    assert fault.endswith(f'not installed: pip install "panoptic-ibs[{name}]"')


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("+logger.colour=red", "logger.colour is \"red\"; expected: a group of options with _target_"),
        ("+logger.mine._target_=lightning.pytorch.loggers.Nothing", "logger.mine._target_ is"),
        ("+logger.wandb={projekt: a}", "logger.wandb.projekt is unknown: this group has no such option; did you mean"),
    ],
)  # fmt: skip
def test_wrong_loggers_are_named(argument: str, message: str) -> None:
    assert any(fault.startswith(message) for fault in faults("recipe=none", argument, "trainer=cpu"))


def test_all_loggers_of_a_list_are_chosen_in_any_order() -> None:
    for order in ("logger=[wandb,csv,tensorboard]", "logger=[tensorboard,wandb]"):
        chosen = compose("recipe=none", order).logger
        assert chosen.wandb.project == "panoptic-ibs"
        assert chosen.tensorboard.folder is None
    assert compose("recipe=none", "logger=csv").logger == {"wandb": None}


def test_from_python_several_loggers_are_a_list() -> None:
    from panoptic_ibs.api import _arguments, _checked

    words = _arguments("fit", _checked("fit", "config", {"logger": ["csv", "tensorboard"]}))
    assert compose("recipe=none", *words).logger.tensorboard.folder is None
