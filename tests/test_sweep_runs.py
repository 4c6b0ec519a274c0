"""Sweeps in earnest, on tiny runs: what is left is finished with an equal result, by every launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cli_helpers import TINY, run
from panoptic_ibs.callbacks import TrainingCost
from panoptic_ibs.task import PanopticTask
from test_sweeps import compose, name, needs

# --- members, for real


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANOPTIC_IBS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


SWEEP = (
    *TINY, "experiment=none", "sweep=ibs_targets", "hydra.sweeper.params=null", "trainer.max_steps=2",
    "ibs.points=64", "sampling.epoch_length=12", "evaluation.baselines=false", "callbacks.pictures=null",
    "backbone=tiny", "trainer.val_check_interval=9", "trainer.limit_val_batches=1", "head.inference.top_num=4",
)  # fmt: skip
MEMBERS = ("panoptic_fcn_seed0", "panoptic_fcn_seed1")


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, _own_cache: Any) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    result = run("train", *SWEEP, "seed=0,1", f"run_dir={folder}")
    assert result.code == 0, result.err
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [*MEMBERS, "report"]
    assert "0, 1" in result.out  # the seeds in the table at the end
    assert f"table: {folder / 'report' / 'index.html'}" in result.out.replace("\n", "")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def results(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {k: v for k, v in metrics.items() if k not in ("config", "command", "versions")}


def fail_at(step: int, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    former = PanopticTask.training_step

    def training_step(self: PanopticTask, batch: Any, index: int) -> Any:
        if self.global_step == step - 1:
            if how == "crash":
                raise RuntimeError("the machine is gone")
            os.kill(os.getpid(), signal.SIGINT)
        return former(self, batch, index)

    monkeypatch.setattr(PanopticTask, "training_step", training_step)


@pytest.mark.parametrize("how", ["crash", pytest.param("Ctrl-C", marks=pytest.mark.slow)])
def test_the_same_command_finishes_with_an_equal_result(straight: Path, tmp_path: Path, how: str) -> None:
    command = (*SWEEP, "callbacks.checkpoint.every_n_steps=1", f"run_dir={tmp_path}")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(2 if how == "crash" else 1, patch, how)
        first = run("train", *command)
    assert first.code == (1 if how == "crash" else 130), first.err
    member = tmp_path / MEMBERS[0]  # named as in the sweep over two seeds
    assert torch.load(member / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    second = run("train", *command)
    assert second.code == 0, second.err
    assert second.out.count("resumed: ") == 1
    assert results(member) == results(straight / MEMBERS[0])
    ours, theirs = weights(member), weights(straight / MEMBERS[0])
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_finished_and_evaluated_only_in_part(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = results(straight / MEMBERS[1])
    (straight / MEMBERS[1] / "metrics.json").unlink()  # it was killed after its last step
    steps: list[int] = []
    monkeypatch.setattr(PanopticTask, "training_step", lambda self, *_: steps.append(self.global_step))
    result = run("train", *SWEEP, "seed=0,1", f"run_dir={straight}")
    assert result.code == 0, result.err
    assert (result.out.count("finished already"), result.out.count("resumed"), steps) == (1, 1, [])
    assert results(straight / MEMBERS[1]) == again
    refused = run("train", *SWEEP, "seed=0,1", "optim.lr=0.5", f"run_dir={straight}")
    assert refused.code == 2
    assert refused.err.count("error: ") == 2  # both members are refused, neither stops the other
    assert "optim.lr: 0.001 there, 0.5 here" in refused.err


def test_members_differ(straight: Path) -> None:
    first, second = (weights(straight / m) for m in MEMBERS)
    assert any(not torch.equal(first[k], second[k]) for k in first)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets its peak")
@pytest.mark.parametrize("block", [50_000_000, 2_500])
def test_peak_memory_is_that_of_this_run_alone(block: int) -> None:
    """Of 400 MB of an earlier run small blocks stay with the C library, which has to be asked for them."""
    memory, module = TrainingCost(), SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_step=0)
    memory.on_train_start(trainer, module)  # type: ignore[arg-type]  # without what the tests before this one left
    resident = resident_mb()
    before = [np.ones(block) for _ in range(50_000_000 // block)]
    kept = before[::500]  # so that the heap cannot shrink from its end
    del before
    if block > 2_500:
        kept.clear()
    memory.on_train_start(trainer, module)  # type: ignore[arg-type]
    ours = np.ones(25_000_000)
    del ours
    memory.on_train_end(trainer, module)  # type: ignore[arg-type]
    assert memory.megabytes is not None
    assert 100 < memory.megabytes - resident < 350


def test_cost_goes_on_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("panoptic_ibs.callbacks.steps.time.perf_counter", lambda: now[0])
    module: Any = SimpleNamespace(device=torch.device("cpu"))

    def go(cost: TrainingCost, step: int, to: int, seconds: float) -> dict[str, Any]:
        cost.on_train_start(trainer := SimpleNamespace(global_step=step), module)  # type: ignore[arg-type]
        trainer.global_step = to
        now[0] += seconds
        cost.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
        return cost.state_dict()

    saved = go(TrainingCost(), 0, 8, 4.0)
    assert (saved["seconds"], saved["steps"]) == (4.0, 8)
    now[0] += 50  # steps 8 to 11 are lost in a crash, and then nothing happens for a while
    second = TrainingCost()
    second.load_state_dict({**saved, "megabytes": 1e9})
    assert second.seconds == 4.0  # nothing left to train, for one
    assert go(second, 8, 12, 2.0) == {"seconds": 6.0, "steps": 12, "megabytes": 1e9}
    second.on_train_end(None, module)  # type: ignore[arg-type]
    now[0] += 5
    assert second.seconds == 6.0
    fresh = go(TrainingCost(), 8, 12, 2.0)  # from a checkpoint of an older version: its own part
    assert (fresh["seconds"], fresh["steps"]) == (2.0, 4)


# --- launchers and sweepers


@needs("JoblibLauncher")
def test_joblib_launcher() -> None:
    config = compose("sweep=table1_full_vs_crop", "launcher=joblib")
    assert config.hydra.launcher.n_jobs == 2


@needs("SlurmLauncher")
def test_slurm_launcher() -> None:
    launcher = compose("sweep=table1_full_vs_crop", "launcher=slurm", "hydra.launcher.partition=gpu").hydra.launcher
    assert (launcher.gpus_per_node, launcher.partition) == (1, "gpu")
    assert launcher._target_.endswith("SlurmLauncher")


@needs("OptunaSweeper")
def test_optuna_sweeper() -> None:
    config = compose("sweep=tune_ibs")
    assert (config.hydra.sweeper.n_trials, config.objective) == (20, "pq_things")
    assert str(config.hydra.sweeper.direction).endswith("maximize")  # a word or an enum, as the plugin's version has it
    assert (
        name("sweep=tune_ibs", "ibs.weight=0.5", "ibs.gamma=1.25") == "panoptic_fcn_ibs.weight-0.5_ibs.gamma-1.25_seed0"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(("launcher=joblib", "data.num_workers=1"), marks=needs("JoblibLauncher")),
        pytest.param(("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"), marks=needs("LocalLauncher")),
    ],
)
def test_launchers_run_members_in_their_own_processes(straight: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "panoptic_ibs.train", *SWEEP, "seed=0,1", f"run_dir={tmp_path}", *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [results(tmp_path / m) for m in MEMBERS] == [results(straight / m) for m in MEMBERS]
    if "launcher=joblib" not in extra:
        return  # what is said of a run that fails does not depend on the launcher, and each run starts a process
    failed = subprocess.run([*command, "optim.lr=0.5"], capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "the same command runs what is left" in failed.stderr


@pytest.mark.slow
@needs("OptunaSweeper")
def test_a_search_goes_on(tmp_path: Path) -> None:
    words = (*SWEEP[: len(TINY)], "experiment=none", "sweep=tune_ibs", "trainer.max_steps=1", "evaluation.limit=1",
             "evaluation.baselines=false", f"run_dir={tmp_path}")  # fmt: skip
    assert run("train", *words, "hydra.sweeper.n_trials=1").code == 0
    second = run("train", *words, "hydra.sweeper.n_trials=2")
    assert second.code == 0, second.err
    assert second.out.count("finished already") == 1
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2
