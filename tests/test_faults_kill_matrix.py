"""SIGKILL and SIGTERM at eight moments of a run and of a sweep: the same command finishes it, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_helpers import TINY
from panoptic_ibs import runs

pytestmark = pytest.mark.slow
MOMENTS = ("drawing", "set-up", "step", "saving", "validation", "evaluation", "baselines", "report")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
GRACEFUL = ("step", "saving", "validation")  # SIGTERM finds training under way, which ends with a short evaluation
RUN = (
    *TINY, "backbone=tiny", "sampling.epoch_length=6", "ibs.points=64", "head.inference.top_num=4", "callbacks=ema",
    "callbacks.pictures=null", "callbacks.progress=null", "evaluation.interrupted_images=1",
    "evaluation.baseline_images=1", "trainer.max_steps=4", "trainer.val_check_interval=2",
    "trainer.limit_val_batches=2", "callbacks.checkpoint.every_n_steps=1",
)  # fmt: skip
SWEEP = (*RUN, "experiment=none", "sweep=ibs_targets", "hydra.sweeper.params=null", "seed=0")


def named(moment: str, number: int, kind: str) -> str:
    return f"{kind}-{signal.Signals(number).name}-{moment}"


def plan(root: Path) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = []
    for kind, words in (("run", RUN), ("sweep", SWEEP)):
        for moment, number in [("", 0), *((m, n) for m in MOMENTS for n in SIGNALS)]:
            name = named(moment, number, kind) if moment else f"straight-{kind}"
            folder = root / name
            cache = root / (f"cache-{name}" if moment == "drawing" else "cache")
            first = "straight-run" if moment and moment != "drawing" else None  # which draws the data set
            job = {
                "name": name, "moment": moment, "signal": number, "resumes": None, "after": first, "cache": str(cache),
                "said": str(root / f"{name}.txt"), "arguments": [*words, f"run_dir={folder}"],
            }  # fmt: skip
            jobs.append(job)
            if moment:
                last = None if kind == "sweep" else str(folder / "checkpoints" / "last.ckpt")
                again = {"name": f"{name}-again", "moment": "", "after": name, "resumes": last}
                jobs.append({**job, **again, "said": str(root / f"{name}-again.txt"), "arguments": [*job["arguments"]]})
    short = str(root / "longer" / "checkpoints" / "last.ckpt")
    for name, steps, after, last in (("longer", 2, "straight-run", None), ("longer-again", 4, "longer", short)):
        more = [f"trainer.max_steps={steps}", f"run_dir={root / 'longer'}"]
        new = {"name": name, "after": after, "resumes": last, "said": str(root / f"{name}.txt"), "moment": ""}
        jobs.append({**jobs[0], **new, "arguments": [*RUN, *more]})
    return jobs


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    root = tmp_path_factory.mktemp("matrix")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
    }
    started = time.monotonic()
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(plan(root)), env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(f"{time.monotonic() - started:.0f} s")
    return root, json.loads(done.stdout)


def results(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = {k: v for k, v in metrics.items() if k not in ("config", "command", "versions")}
    return {**kept, "baselines": json.loads((folder / "baselines.json").read_text())}


def state(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


@pytest.mark.parametrize("kind", ["run", "sweep"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: signal.Signals(n).name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_command_finishes_it(matrix: Any, kind: str, number: int, moment: str) -> None:
    root, statuses = matrix
    name = named(moment, number, kind)
    said, again = ((root / f"{n}.txt").read_text() for n in (name, f"{name}-again"))
    assert statuses[name] == (-number if number == signal.SIGKILL else 128 + number), said
    assert statuses[f"{name}-again"] == 0, again
    assert "Traceback" not in said + again
    if number == signal.SIGTERM:
        assert said.count("stopped by SIGTERM") == 1
        assert ("a short evaluation follows" in said) == (moment in GRACEFUL)
    folder, straight = root / name, root / f"straight-{kind}"
    if kind == "sweep":
        folder, straight = folder / "panoptic_fcn_seed0", straight / "panoptic_fcn_seed0"
    assert runs.owed(folder, baselines=True) == []
    assert results(folder) == results(straight)
    assert (folder / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()
    ours, theirs = state(folder), state(straight)
    assert ours["global_step"] == theirs["global_step"] == 4
    for part in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(ours[part][k], v) for k, v in theirs[part].items())
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "best.json", "last.ckpt"]


def test_more_steps_go_on_with_the_longer_schedule_and_lack_no_validation(matrix: Any) -> None:
    root, statuses = matrix
    assert (statuses["longer"], statuses["longer-again"]) == (0, 0), (root / "longer-again.txt").read_text()

    def rows(folder: str) -> list[dict[str, str]]:
        with (root / folder / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    ours, theirs = rows("longer"), rows("straight-run")
    assert [r["train/lr"] for r in ours[2:]] == [r["train/lr"] for r in theirs[2:]]
    assert len({r["train/lr"] for r in theirs}) > 2
    for key in ("step", "epoch"):
        assert [r[key] for r in ours] == [r[key] for r in theirs]
    assert [bool(r["val/pq"]) for r in ours] == [bool(r["val/pq"]) for r in theirs]  # that of the short run's end, too
