"""Threads of the numerical libraries: as many as help, and asleep while they have nothing to do.

OpenMP's threads spin while they wait for work. On a machine that others use as well they take its cores from those who
would bring the work, and training slows down several times more than its share of the machine explains. What a user has
set in the environment stays.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # GNU's library; Intel's and LLVM's
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SMALL = 5_000_000  # parameters: up to these a step's operations are too short to be shared out


_ours: list[bool] = []  # filled in the process of a command, where nobody else has chosen threads


def start_command() -> None:
    """Let threads without work sleep at once: libraries read this when torch loads them, in child processes as well.

    Does nothing where torch is loaded already, as in a notebook.
    """
    if "torch" in sys.modules:
        return
    _ours[:] = [True]
    if not set(WAITING) & set(os.environ):
        os.environ.update(WAITING)


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those it is bound to, or fewer where its container has a share of time.

    Args:
        quota: file of the control group: microseconds of work allowed in a period (or ``max``), and the period.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text(encoding="ascii").split()
        return max(1, min(bound, math.ceil(int(allowed) / int(period))))
    except (OSError, ValueError):  # no control groups, or no limit
        return bound


def helpful(parameters: int, processes: int = 1) -> int:
    """Threads for training on the CPU.

    Args:
        parameters: of the network.
        processes: of this run on this machine.
    """
    return 1 if parameters <= SMALL else max(1, usable_cores() // processes)


@contextmanager
def fitted(network: nn.Module, on_cpu: bool, processes: int = 1) -> Iterator[None]:
    """Within its block torch has no more threads than help; what a user, or a program around this one, chose stays."""
    import torch

    before = torch.get_num_threads()
    if not (on_cpu and _ours) or set(CHOSEN) & set(os.environ):
        yield
        return
    torch.set_num_threads(min(before, helpful(sum(p.numel() for p in network.parameters()), processes)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
