"""Runs commands in forks of one process that has imported everything, and ends them with a signal at a moment.

Started by ``test_faults_kill_matrix.py`` with a plan on its standard input: a process of its own, with one thread and
without GPUs, as OpenMP's threads and those of the backward pass on GPUs do not survive a fork. A fork spares each run
the ten seconds of its imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from panoptic_ibs import baselines, train
from panoptic_ibs.callbacks import checkpoints
from panoptic_ibs.data.synthetic import write
from panoptic_ibs.report_pages import page
from panoptic_ibs.task import PanopticTask

AT_ONCE = 2


def before(place: Any, name: str, number: int, call: int = 1, only: Callable[..., bool] = lambda *_: True) -> None:
    """Send a signal to this process before the ``call``-th call of ``place.name`` of which ``only`` is true."""
    former, calls = getattr(place, name), [0]

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls[0] += only(*arguments)
        if calls[0] == call:
            calls[0] += 1
            os.kill(os.getpid(), number)
        return former(*arguments, **named)

    setattr(place, name, wrapped)


def in_training(task: PanopticTask, *_: Any) -> bool:
    return bool(task.trainer.state.fn == "fit")


def arm(moment: str, number: int) -> None:
    """Arrange for a signal at one of the moments of a run."""
    if moment == "drawing":
        before(write, "_write_one", number, call=3)
    elif moment == "set-up":
        before(train, "make_loggers", number)
    elif moment == "step":
        before(PanopticTask, "training_step", number, call=3)
    elif moment == "saving":
        before(checkpoints.os, "replace", number, call=2, only=lambda _, goal: Path(goal).name == "last.ckpt")
    elif moment == "validation":
        before(PanopticTask, "validation_step", number, call=2, only=in_training)
    elif moment == "evaluation":
        before(PanopticTask, "validation_step", number, only=lambda task, *_: not in_training(task))
    elif moment == "baselines":
        before(baselines, "baselines", number)
    elif moment == "report":
        before(page, "write_report", number)
    elif moment:
        raise ValueError(moment)


def perform(job: dict[str, Any]) -> int:
    """Run a command here, what it says goes to the job's file; returns its exit status."""
    streams = [os.dup(1), os.dup(2)]
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ["PANOPTIC_IBS_CACHE"] = job["cache"]
    sys.argv = [str(train.__file__), *job["arguments"]]
    try:
        arm(job["moment"], int(job["signal"]))
        return train.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(streams[0], 1)
        os.dup2(streams[1], 2)


def start(job: dict[str, Any]) -> int:
    """Run a command in a fork; returns its process id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            status = perform(job)
        finally:
            os._exit(status)
    return process


def main() -> None:
    """Run all jobs of the plan, a few at once; a job waits for the one that it names. Print their statuses.

    The first one is run here, so that the others find everything loaded that a run loads.
    """
    torch.set_num_threads(1)
    page.figures_of = lambda *_: []  # most of the time of these short runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first, *waiting = json.load(sys.stdin)
    statuses: dict[str, int] = {first["name"]: perform(first)}
    running: dict[int, str] = {}
    while waiting or running:
        ready = [job for job in waiting if job["after"] is None or job["after"] in statuses]
        while ready and len(running) < AT_ONCE:
            job = ready.pop(0)
            waiting.remove(job)
            last = Path(job["resumes"]) if job["resumes"] else None
            if last is not None and last.is_file():
                job["arguments"].append(f"ckpt_path={last}")
            running[start(job)] = job["name"]
        process, code, spent = os.wait4(-1, 0)
        statuses[running.pop(process)] = os.waitstatus_to_exitcode(code)
        print(f"{spent.ru_utime + spent.ru_stime:.1f} s", file=sys.stderr)
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
