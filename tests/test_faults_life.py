"""What happens to a run that is told to stop, started twice, resumed with other settings, or has no room to save."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cli_helpers import TINY, compose, run
from helpers import class_table
from panoptic_ibs import commands, instantiation, runs, signals
from panoptic_ibs.callbacks import CheckpointFiles, SaveCheckpoints, StopOnInterrupt, validation_owed
from panoptic_ibs.callbacks.checkpoints import validation_is_due
from panoptic_ibs.checkpoints import check_resume
from panoptic_ibs.construction import build_model
from panoptic_ibs.errors import CheckpointError, ConfigError
from panoptic_ibs.loggers import MetricsCSV
from panoptic_ibs.optim import Recipe, build_optimizer, set_rates
from panoptic_ibs.settings import decisive, differences
from panoptic_ibs.task import PanopticTask

# --- signals outside of training


def test_a_signal_ends_commands_without_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, place, words in (("prepare", "check", ["check"]), ("report", "write_report", ["run=x"])):
        target = f"panoptic_ibs.{command}" if command == "prepare" else "panoptic_ibs.report_pages"
        monkeypatch.setattr(f"{target}.{place}", lambda *_: signal.raise_signal(signal.SIGTERM))
        result = run(command, *words)
        assert (result.code, result.err.splitlines()) == (143, ["stopped by SIGTERM"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "convert"])
def test_a_signal_ends_a_command_with_its_status_and_one_line(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    needed = {
        "predict": ["ckpt_path=a", "input=b", "output=c"],
        "convert": ["data=cityscapes", "head=panoptic_fcn", "source=a", "out=b"],
    }.get(command, [f"run_dir={tmp_path / 'r'}"])
    monkeypatch.setattr("sys.argv", [command, *needed])
    former = [signal.getsignal(n) for n in signals.SIGNALS]
    config = "config" if command == "train" else command
    assert commands.run_command(config, lambda _: signal.raise_signal(number)) == 128 + number
    said = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert capsys.readouterr().err.splitlines() == [said]
    assert [signal.getsignal(n) for n in signals.SIGNALS] == former


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not say who sent a signal")
def test_a_loader_process_heeds_none_but_its_parent() -> None:
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        signals.let_first_pass()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.02)
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(7)
    assert os.read(reader, 1) == b"x"
    os.kill(process, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(reader)
    os.close(writer)


# --- folders


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def finished(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    (folder / "metrics.json").write_text("{}")
    (folder / "metrics.csv").write_text("step\r\n0\r\n")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("seed: 5\n")
    return folder


def test_a_new_run_does_not_touch_the_folder_of_another(tmp_path: Path) -> None:
    folder = finished(tmp_path / "r")
    before = tree(folder)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "last.ckpt").write_bytes(b"x")
    for more in ((), (f"ckpt_path={tmp_path / 'b' / 'last.ckpt'}",)):
        result = run("train", *TINY, *more, f"run_dir={folder}")
        assert result.code == 2
        assert f"{folder}: holds a run or evaluation already (checkpoints/last.ckpt, metrics.json)" in result.message
        assert f"ckpt_path={folder}/checkpoints/last.ckpt" in result.message
    result = run("evaluate", "predictions=x.json", f"run_dir={folder}")
    assert result.code == 2
    assert "holds a run of training" in result.message
    assert tree(folder) == before
    runs.check_unused(folder, folder / "checkpoints" / "last.ckpt")  # that run goes on
    runs.check_unused(tmp_path / "new")


def test_two_commands_in_one_folder(tmp_path: Path) -> None:
    with runs.claimed(tmp_path) as mine:
        assert mine
        for command, words in (("train", TINY), ("evaluate", ("predictions=x.json",))):
            result = run(command, *words, f"run_dir={tmp_path}")
            assert result.code == 2
            assert f"{tmp_path}: another command is at work in this folder. Choose another run_dir=." in result.message
        assert not (tmp_path / ".hydra").exists()
    with runs.claimed(tmp_path) as mine:
        assert mine


def test_a_helper_that_outlives_a_run_does_not_keep_its_folder(tmp_path: Path) -> None:
    told, tell = os.pipe()
    run_process = os.fork()
    if run_process == 0:
        lock = runs.claimed(tmp_path)  # kept: what is forgotten is left
        lock.__enter__()
        helper = os.fork()  # a loader process
        if helper == 0:
            os.write(tell, f"{os.getpid()}\n".encode())
            time.sleep(20)
        else:
            time.sleep(20)
        os._exit(0)
    helper = int(os.read(told, 20))
    try:
        with runs.claimed(tmp_path) as mine:
            assert not mine
        os.kill(run_process, signal.SIGKILL)
        os.waitpid(run_process, 0)
        os.kill(helper, 0)  # it is still there
        with runs.claimed(tmp_path) as mine:
            assert mine
    finally:
        os.kill(helper, signal.SIGKILL)


def test_what_a_run_owes(tmp_path: Path) -> None:
    everything = ["metrics.json", "timing.json", "baselines.json", "report/index.html"]
    assert runs.owed(tmp_path, baselines=True) == everything
    (tmp_path / "report").mkdir()
    for name in everything:
        (tmp_path / name).write_text("{}")
    assert runs.owed(tmp_path, baselines=True) == []
    (tmp_path / "metrics.json").write_text('{"interrupted": false, "step": 4}')
    assert runs.owed(tmp_path, step=4) == []
    assert runs.owed(tmp_path, step=8) == ["metrics.json"]  # killed before the evaluation of the longer run
    (tmp_path / "metrics.json").write_text('{"interrupted": true}')
    assert runs.owed(tmp_path) == ["metrics.json"]
    runs.clear_results(tmp_path)
    assert runs.owed(tmp_path, baselines=True) == everything


# --- settings of a resumed run

SETTINGS: dict[str, Any] = {
    "seed": 0, "run_dir": "runs/a", "data": {"name": "coco", "root": "/a", "num_workers": 2, "min_pixels": 2},
    "sampling": {"name": "random_crop", "batch_size": 4}, "backbone": {"name": "tiny", "weights": "/w"},
    "head": {"name": "panoptic_fcn", "depth": 1, "memory": {"steps": 100}}, "ibs": {"partners": "random"},
    "optim": {"lr": 0.1, "milestones": []}, "trainer": {"max_steps": 100, "devices": 1},
    "evaluation": {"limit": None}, "callbacks": {"ema": None, "progress": {"refresh_rate": 5}},
}  # fmt: skip


def changed(**values: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(SETTINGS))
    for key, value in values.items():
        node, *rest = settings, *key.split("__")
        for part in rest[:-1]:
            node = node[part]
        node[rest[-1]] = value
    return dict(settings)


def described(settings: dict[str, Any], ids: str = "abc") -> dict[str, Any]:
    model = {
        "pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3, "head": settings["head"], "backbone": settings["backbone"],
    }  # fmt: skip
    return {
        "model": model, "classes": [{"name": "a", "dataset_id": 1, "is_thing": True, "color": [0, 0, 0]}],
        "run": {"seed": settings["seed"], "ibs": settings["ibs"]["partners"]}, "settings": decisive(settings),
        "data": {"name": "coco", "train_images": 3, "train_ids": ids},
    }  # fmt: skip


def saved(path: Path, description: dict[str, Any], **more: Any) -> Path:
    state = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "loops": {}, "callbacks": {}}
    torch.save({**state, "global_step": 4, "panoptic_ibs": description, **more}, path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"sampling__batch_size": 2}, {"sampling__name": "full_image"}, {"ibs__partners": "paired"},
        {"head__depth": 2}, {"optim__lr": 0.2}, {"optim__milestones": [5]}, {"data__min_pixels": 1},
        {"callbacks__ema": {"decay": 0.9}}, {"seed": 1, "optim__lr": 0.2, "head__depth": 3},
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_their_keys(tmp_path: Path, change: dict[str, Any]) -> None:
    file = saved(tmp_path / "last.ckpt", described(SETTINGS))
    with pytest.raises(CheckpointError, match=r"last\.ckpt: its run had other settings.*init_from=") as error:
        check_resume(file, described(changed(**change)))
    for key, value in change.items():
        value = 0.9 if isinstance(value, dict) else value
        assert f"{key.replace('__', '.')}" in str(error.value)
        assert f"{value} here" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"trainer__max_steps": 200, "head__memory": {"steps": 200}}, {"trainer__devices": 8}, {"run_dir": "runs/b"},
        {"data__root": "/moved"}, {"data__num_workers": 0}, {"evaluation__limit": 5}, {"backbone__weights": None},
        {"callbacks__progress": None},
    ],
)  # fmt: skip
def test_what_may_differ_goes_on(tmp_path: Path, change: dict[str, Any]) -> None:
    file = saved(tmp_path / "last.ckpt", described(SETTINGS))
    assert check_resume(file, described(changed(**change)))["global_step"] == 4


def test_another_data_set_of_the_same_classes_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "last.ckpt", described(SETTINGS))
    with pytest.raises(CheckpointError, match=r"data\.train_ids: abc there, xyz here"):
        check_resume(file, described(SETTINGS, ids="xyz"))


def test_checkpoints_of_before_say_less_and_are_compared_in_that(tmp_path: Path) -> None:
    former = described(SETTINGS)
    del former["settings"], former["data"]
    file = saved(tmp_path / "last.ckpt", former)
    assert check_resume(file, described(changed(optim__lr=3.0, backbone__weights=None)))["global_step"] == 4
    with pytest.raises(CheckpointError, match=r"seed: 0 there, 1 here"):
        check_resume(file, described(changed(seed=1)))
    with pytest.raises(CheckpointError, match=r"head\.depth: 1 there, 2 here|depth: 1 there, 2 here"):
        check_resume(file, described(changed(head__depth=2)))


def test_differences_are_shown_up_to_twenty() -> None:
    assert differences({"a": 1, "b": 1.0}, {"a": 1, "b": 1}) == ""
    average = "callbacks.ema._target_"  # a class that has moved is the same class
    now = "panoptic_ibs.callbacks.averaging.MovingAverage"
    assert differences({average: "panoptic_ibs.optim.MovingAverage"}, {average: now}) == ""
    assert average in differences({average: "panoptic_ibs.optim.Other"}, {average: now})
    text = differences({f"k{i:02d}": i for i in range(30)}, {})
    assert text.count("there, nothing here") == 20
    assert text.endswith("; and 10 more")


def test_what_only_the_end_needs_is_checked_before_training(tmp_path: Path) -> None:
    for command in ("train", "evaluate"):
        words = TINY if command == "train" else ("predictions=x.json",)
        for wrong in ("data.presets.stuff_area=nan", "data.presets.resize.longest=inf", "evaluation.limit=-1",
                      "evaluation.limit=0", "evaluation.limit=all"):  # fmt: skip
            result = run(command, *words, wrong, f"run_dir={tmp_path / command}")
            assert result.code == 2
            assert wrong.partition("=")[0] in result.message
            assert "expected" in result.message
            assert not (tmp_path / command / "checkpoints").exists()


# --- checkpoints


def test_a_checkpoint_of_another_network_or_optimiser_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("panoptic_ibs.descriptions.check_run", lambda *_: None)  # the rest of a checkpoint
    config = compose(*TINY, "backbone=tiny")
    model = build_model(instantiation.model_config(config), class_table(things=2, stuff=1))
    task = PanopticTask(model, Recipe())
    optimizer, _ = build_optimizer(model, Recipe(), 1)
    groups = optimizer.state_dict()
    good: dict[str, Any] = {"state_dict": dict(task.state_dict()), "optimizer_states": [groups]}
    task.check_fits("a.ckpt", good)
    for damage in ([], [{}], [{"state": {}, "param_groups": None}], [{"param_groups": [{}]}]):
        with pytest.raises(CheckpointError, match=r"a\.ckpt: its optimiser's parameter groups are missing.*init_from="):
            task.check_fits("a.ckpt", {**good, "optimizer_states": damage})
    with pytest.raises(CheckpointError, match="what its optimiser had gathered is missing"):
        task.check_fits("a.ckpt", {**good, "global_step": 3})
    for other in (Recipe(no_decay=[]), Recipe(optimizer=torch.optim.AdamW)):
        states = [build_optimizer(model, other, 1)[0].state_dict()]
        with pytest.raises(CheckpointError, match="parameter groups are others than this run's"):
            task.check_fits("a.ckpt", {**good, "optimizer_states": states})
    name, value = next((k, v) for k, v in good["state_dict"].items() if v.ndim)
    for change in ({name: value[None]}, {"more": value}):
        with pytest.raises(CheckpointError, match=r"a\.ckpt: 1 tensors.*init_from="):
            task.check_fits("a.ckpt", {**good, "state_dict": {**good["state_dict"], **change}})


def test_without_room_the_former_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, files = tmp_path / "checkpoints" / "last.ckpt", CheckpointFiles()
    files.save_checkpoint({"step": 1}, path)

    def full(error: BaseException) -> Callable[..., None]:
        def save(content: Any, file: Any) -> None:
            file.write(b"half")
            raise error

        return save

    torn = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    for error, said in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (torn, "cut short"),
    ):
        monkeypatch.setattr(torch, "save", full(error))
        with pytest.raises(CheckpointError, match=f"last.ckpt: cannot be written .*{said}.*former checkpoint is kept"):
            files.save_checkpoint({"step": 2}, path)
        assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    for other in (RuntimeError("CUDA error"), signals.Stopped(signal.SIGTERM)):
        monkeypatch.setattr(torch, "save", full(other))
        with pytest.raises(type(other)):
            files.save_checkpoint({"step": 2}, path)
        assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written .*Make room"):
        files.save_checkpoint({}, tmp_path / "file" / "last.ckpt")


# --- schedule and curve


def test_a_longer_schedule_holds_from_the_first_step_on() -> None:
    def make(steps: int) -> Any:
        torch.manual_seed(0)
        return build_optimizer(nn.Linear(2, 2), Recipe(lr=0.1, warmup_steps=2, no_decay=["bias"]), steps)

    def go(optimizer: Any, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates

    straight = go(*make(8), 8)
    short, rates = make(4), make(8)
    go(*short, 4)
    rates[0].load_state_dict(short[0].state_dict())
    rates[1].load_state_dict(short[1].state_dict())
    assert rates[0].param_groups[0]["lr"] == 0.0  # the last rate of the short schedule
    set_rates(rates[1])
    assert go(*rates, 4) == straight[4:]
    same = make(8)
    set_rates(same[1])
    assert go(*same, 8) == straight


def test_a_torn_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss\r\n0,0,2.0\r\nx,0,2.0\r\n1,0,1.5\r\n2,0,1.2\r\n3,0,0.1", newline="")
    assert sorted(MetricsCSV(path, resume_step=9).rows) == [0, 1, 2]
    assert sorted(MetricsCSV(path, resume_step=1).rows) == [0, 1]


def test_a_curve_that_cannot_be_written_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"train/loss": 1.0}, step=0)
    before = (tmp_path / "metrics.csv").read_bytes()

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        logger.log_metrics({"val/pq": 1.0}, step=1)  # a new column: the whole table
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"metrics.csv": before}


@pytest.mark.parametrize(
    ("every", "interval", "batches", "epoch", "last", "due"),
    [
        (None, 5, 9, 0, False, True), (None, 5, 8, 0, False, False), (None, None, 9, 0, False, False),
        (2, 5, 4, 0, False, False), (2, 5, 4, 1, False, True), (1, float("inf"), 7, 0, True, True),
        (1, float("inf"), 7, 0, False, False),
    ],
)  # fmt: skip
def test_when_a_validation_is_due(every: Any, interval: Any, batches: int, epoch: int, last: bool, due: bool) -> None:
    trainer: Any = SimpleNamespace(
        check_val_every_n_epoch=every, val_check_batch=interval, current_epoch=epoch, is_last_batch=last,
        fit_loop=SimpleNamespace(total_batch_idx=batches, batch_idx=batches),
    )  # fmt: skip
    assert validation_is_due(trainer) is due


def test_a_validation_is_owed_if_its_row_lacks_it() -> None:
    checkpoint = {"global_step": 4, "callbacks": {"SaveCheckpoints": {"validation_due": True}}}
    rows: dict[int, dict[str, Any]] = {2: {"train/loss": 1}, 3: {"train/loss": 1}}
    assert validation_owed(checkpoint, rows)
    assert validation_owed(checkpoint, {2: rows[2]})  # logged more rarely
    assert not validation_owed(checkpoint, {3: {"val/pq": 0.0}})
    assert not validation_owed(checkpoint, {})  # the curve is in another folder
    assert not validation_owed({"global_step": 4, "callbacks": {}}, rows)  # a checkpoint of before
    assert SaveCheckpoints().state_dict()["validation_due"] is False


def test_nothing_is_saved_or_stopped_between_the_batches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = SimpleNamespace(
        enable_validation=True, accumulate_grad_batches=2, world_size=1, global_step=0, max_steps=9, should_stop=False,
        check_val_every_n_epoch=None, val_check_batch=3, current_epoch=0, log_every_n_steps=0, limit_val_batches=1.0,
        fit_loop=SimpleNamespace(total_batch_idx=-1),
    )  # fmt: skip
    module: Any = None
    saved: list[int] = []
    monkeypatch.setattr(SaveCheckpoints, "save", lambda self, trainer: saved.append(trainer.fit_loop.total_batch_idx))
    checkpoints, stop = SaveCheckpoints(every_n_steps=100), StopOnInterrupt()
    stopped = []
    with stop:
        for callback in (stop, checkpoints):
            callback.on_train_start(trainer, module)
        for batch in range(8):  # validations after batches 2 and 5, of which only the latter ends a step
            trainer.fit_loop.total_batch_idx, trainer.global_step = batch, (batch + 1) // 2
            if batch == 6:
                signal.raise_signal(signal.SIGTERM)
            for callback in (stop, checkpoints):
                callback.on_train_batch_end(trainer, module, None, None, 0)
            stopped.append(trainer.should_stop)
    assert saved == [5, 7]
    assert stopped == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("accumulated", "processes", "fits"),
    [(4, 2, True), (4, 1, True), (8, 1, True), (2, 4, True), (2, 2, False), (8, 2, False)],
)
def test_a_step_of_another_number_of_batches_is_refused(accumulated: int, processes: int, fits: bool) -> None:
    def start(callback: SaveCheckpoints, batches: int, world: int) -> None:
        trainer: Any = SimpleNamespace(
            enable_validation=False, accumulate_grad_batches=batches, world_size=world, global_step=0
        )
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]

    former, resumed = SaveCheckpoints(), SaveCheckpoints()
    start(former, 4, 2)
    resumed.load_state_dict(former.state_dict())
    if fits:  # other devices with the same setting, or a setting that makes up for them
        start(resumed, accumulated, processes)
        return
    with pytest.raises(ConfigError, match=r"trainer\.accumulate_grad_batches=\d: .*was of 8"):
        start(resumed, accumulated, processes)
