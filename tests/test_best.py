"""The best checkpoint and early stopping, beside naive loops over the numbers, and in a run that is resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.trainer.states import TrainerFn

import panoptic_ibs
from cli_helpers import TINY, run
from panoptic_ibs.callbacks import KeepBest, SaveCheckpoints, StopEarly, best
from panoptic_ibs.checkpoints import read_checkpoint
from panoptic_ibs.errors import CheckpointError
from panoptic_ibs.report_pages.records import Run
from panoptic_ibs.report_pages.wording import best_sentence


def trainer_at(folder: Path, step: int, fn: TrainerFn = TrainerFn.FITTING) -> Any:
    saver = SaveCheckpoints()
    saver._saved = step
    return SimpleNamespace(
        default_root_dir=folder, global_step=step, callbacks=[saver], state=SimpleNamespace(fn=fn), should_stop=False,
        sanity_checking=False, is_global_zero=True, ckpt_path=None,
    )  # fmt: skip


def module_with(value: float, images: int = 10, monitor: str = "val/pq", **place: int) -> Any:
    return SimpleNamespace(
        left_out=False, place=place, results={"num_images": images}, logged_values=lambda: {monitor: value}
    )


def save(folder: Path, step: int) -> None:
    """A new last.ckpt, as a run writes it: another file under the old name."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    temporary = folder / "checkpoints" / "x"
    temporary.write_text(f"weights of step {step}")
    temporary.replace(folder / "checkpoints" / "last.ckpt")


def kept(folder: Path) -> tuple[str, int]:
    content = json.loads((folder / "checkpoints" / "best.json").read_text())
    return (folder / "checkpoints" / "best.ckpt").read_text(), content["step"]


@pytest.mark.parametrize("monitor", ["val/pq", "val/confusion@50"])
@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_is_that_of_a_naive_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: Any, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(best.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    values = [math.nan, *np.random.default_rng(0).integers(0, 6, 30).tolist(), math.nan]
    expected: int | None = None
    for i, value in enumerate(values):
        save(tmp_path, 10 * i)
        callback = KeepBest(monitor)  # anew each time: what it must remember lies in the folder
        callback.on_validation_end(trainer_at(tmp_path, 10 * i), module_with(float(value), monitor=monitor))
        for j in range(i + 1):  # the first of the best ones
            if math.isnan(values[j]) or (expected is not None and j <= expected and values[j] == values[expected]):
                continue
            if expected is None or (
                values[j] < values[expected] if "conf" in monitor else values[j] > values[expected]
            ):
                expected = j
        if expected is None:
            assert not (tmp_path / "checkpoints" / "best.ckpt").exists()
        else:
            assert kept(tmp_path) == (f"weights of step {10 * expected}", 10 * expected)


def test_validations_of_other_images_are_not_compared(tmp_path: Path) -> None:
    callback = KeepBest()
    save(tmp_path, 10)
    callback.on_train_start(trainer_at(tmp_path, 0), module_with(0.0))
    callback.on_validation_end(trainer_at(tmp_path, 10), module_with(0.5, images=10))
    save(tmp_path, 20)
    after = trainer_at(tmp_path, 20, TrainerFn.VALIDATING)
    callback.on_validation_end(after, module_with(0.9, images=50, step=20))
    assert kept(tmp_path)[1] == 10  # after training all images are evaluated, in it a part
    callback.on_validation_end(after, module_with(0.9, images=10, step=20))
    assert kept(tmp_path)[1] == 20
    save(tmp_path, 30)
    after.callbacks.append(SimpleNamespace(interrupted=True))
    callback.on_validation_end(after, module_with(0.95, images=10, step=30))
    callback.on_validation_end(trainer_at(tmp_path, 30), SimpleNamespace(left_out=True))
    assert kept(tmp_path)[1] == 20
    callback.on_validation_end(
        trainer_at(tmp_path, 30), module_with(0.1, images=12)
    )  # trainer.limit_val_batches changed
    assert kept(tmp_path)[1] == 30


def test_a_validation_that_is_made_up_keeps_the_resumed_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "elsewhere.ckpt"
    source.write_text("resumed")
    trainer = trainer_at(tmp_path, 0, TrainerFn.VALIDATING)
    trainer.ckpt_path = str(source)
    KeepBest().on_validation_end(trainer, module_with(0.5, step=40))
    assert kept(tmp_path) == ("resumed", 40)


def test_no_room_for_the_best_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / "best.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"best\.ckpt: cannot be written .*callbacks\.best=null"):
        KeepBest().on_validation_end(trainer_at(tmp_path, 10), module_with(0.5))


def stops_at(values: list[float], patience: int, least: float) -> int | None:
    """The first validation after which ``patience`` ones in a row were no better, by counting."""
    reference, waited = None, 0
    for i, value in enumerate(values):
        if not math.isnan(value) and (reference is None or value > reference + least):
            reference, waited = value, 0
        elif reference is not None or not math.isnan(value):
            waited += 1
        if reference is not None and waited >= patience:
            return i
    return None


@pytest.mark.parametrize("least", [0.0, 1.5])
@pytest.mark.parametrize("patience", [1, 2, 4])
def test_training_ends_where_a_naive_count_ends_it_also_when_resumed(
    tmp_path: Path, patience: int, least: float
) -> None:
    rng = np.random.default_rng(patience)
    ended = 0
    for _ in range(20):
        values = [float(v) for v in rng.integers(0, 8, 12)]
        if rng.random() < 0.3:
            values[int(rng.integers(1, 12))] = math.nan
        expected = stops_at(values, patience, least)
        ended += expected is not None
        callback, stopped = StopEarly("val/pq", patience, least), None
        for i, value in enumerate(values):
            trainer = trainer_at(tmp_path, i + 1)
            callback.on_validation_end(trainer, module_with(value))
            if trainer.should_stop:
                stopped = i
                break
            again = StopEarly("val/pq", patience, least)  # every step is one at which a run may be resumed
            again.load_state_dict(json.loads(json.dumps(callback.state_dict())))
            callback = again
        assert stopped == expected, values
    assert ended > 5


def test_without_patience_nothing_ends_it(tmp_path: Path) -> None:
    callback = StopEarly()
    for step in range(1, 50):
        trainer = trainer_at(tmp_path, step)
        callback.on_validation_end(trainer, module_with(0.0))
        assert not trainer.should_stop


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validations are all alike, and that may wait for one."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANOPTIC_IBS_CACHE", str(folder.parent / "cache"))
        result = run("train", *WORDS, "callbacks.early_stopping.patience=1", f"run_dir={folder}")
    assert result.code == 0, result.err
    assert "training ends after step 2: val/pq has not been better than" in result.out
    assert f"best checkpoint: {folder / 'checkpoints' / 'best.ckpt'} (val/pq" in result.out
    return folder


WORDS = (
    *TINY, "evaluation.baselines=false", "callbacks.pictures=null", "trainer.max_steps=4", "optim.lr=1e-12",
    "trainer.val_check_interval=1", "sampling.epoch_length=16", "trainer.log_every_n_steps=1",
)  # fmt: skip


def test_a_run_that_stopped_early(stopped: Path) -> None:
    metrics = json.loads((stopped / "metrics.json").read_text())
    assert (metrics["step"], metrics["interrupted"]) == (2, False)
    assert metrics["best"]["step"] == 1
    assert metrics["best"] == json.loads((stopped / "checkpoints" / "best.json").read_text())
    first = read_checkpoint(stopped / "checkpoints" / "best.ckpt")
    assert (first["global_step"], read_checkpoint(stopped / "checkpoints" / "last.ckpt")["global_step"]) == (1, 2)
    assert panoptic_ibs.load(stopped / "checkpoints" / "best.ckpt").classes
    assert "the one after step 1 is best by PQ" in best_sentence(Run(stopped, metrics))


def test_a_run_that_stopped_early_goes_on_only_if_it_may(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANOPTIC_IBS_CACHE", str(stopped.parent / "cache"))
    last = f"ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}"
    before = (stopped / "metrics.csv").read_text()
    result = run("train", *WORDS, "callbacks.early_stopping.patience=1", f"run_dir={stopped}", last)
    assert result.code == 0, result.err
    assert "training ends after step 2" in result.out
    assert json.loads((stopped / "metrics.json").read_text())["step"] == 2
    assert (stopped / "metrics.csv").read_text() == before
    result = run("train", *WORDS, "callbacks.early_stopping.patience=null", f"run_dir={stopped}", last)
    assert result.code == 0, result.err
    metrics = json.loads((stopped / "metrics.json").read_text())
    assert (metrics["step"], metrics["best"]["step"]) == (4, 1)
    assert read_checkpoint(stopped / "checkpoints" / "best.ckpt")["global_step"] == 1
