"""Settings of one head and data against each other: differences of runs with the same seed, and what runs cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .records import Run, number

COST = (("seconds_per_step", "s/step"), ("train_seconds", "training s"), ("peak_memory_mb", "peak MB"))

ALL_PAIRS = 6  # settings; of more, each is held against the first alone


class Runs(Protocol):
    """A setting, as far as it matters here."""

    runs: list[Run]

    @property
    def label(self) -> tuple[str, ...]:
        """Head and data come first."""


S = TypeVar("S", bound=Runs)


@dataclass(frozen=True)
class Difference:
    """Mean difference over ``pairs`` runs with the same seed; ``half`` is half its 95 % interval, None below two."""

    mean: float
    half: float | None
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def text(self) -> str:
        """``+1.2 [-0.3, +2.7]`` in percent points."""
        if self.half is None:
            return f"{100 * self.mean:+.1f}"
        return f"{100 * self.mean:+.1f} [{100 * (self.mean - self.half):+.1f}, {100 * (self.mean + self.half):+.1f}]"


def partners(settings: Sequence[S]) -> list[tuple[S, S]]:
    """(setting, the one it is held against) of the same head and data: every pair of up to six, else the first one."""
    pairs = []
    for label in dict.fromkeys(s.label[:2] for s in settings):
        group = [s for s in settings if s.label[:2] == label]
        earlier = len(group) if len(group) <= ALL_PAIRS else 1
        pairs += [(s, first) for i, first in enumerate(group[:earlier]) for s in group[i + 1 :]]
    return pairs


def difference(setting: Runs, first: Runs, key: str) -> Difference | None:
    """Paired over the seeds that both have, with Student's t interval of n - 1 degrees of freedom.

    None where no seed has the metric in both.
    """
    theirs = {r.seed: v for r in first.runs if (v := r.metric(key)) is not None}
    gaps = [v - theirs[r.seed] for r in setting.runs if r.seed in theirs and (v := r.metric(key)) is not None]
    if not gaps:
        return None
    half = None
    if len(gaps) > 1:
        from scipy.stats import t  # half a second to import

        half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(statistics.fmean(gaps), half, len(gaps))


def cost(setting: Runs, key: str) -> float | None:
    """Mean of an entry of ``timing.json`` over the runs that have it."""
    values = [v for r in setting.runs if (v := number(r.timing.get(key))) is not None]
    return statistics.fmean(values) if values else None
