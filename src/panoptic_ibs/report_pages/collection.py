"""Runs below a folder, grouped into settings that differ in more than the seed."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panoptic_ibs.errors import DataError
from panoptic_ibs.metrics.names import SIZES, columns
from panoptic_ibs.settings import alike

from .beside import place, published
from .contrasts import COST, Difference, cost, difference, partners
from .records import Curve, Run, confusion_curve, load_run

COLUMNS = columns("pq", "pq_things", "pq_stuff", "acc_things", "prec_things", "miou", "confusion@50")
DETAILS = columns(
    "sq_things", "rq_things", "confusion@5", "confusion@25", "confusion@75",
    *(f"confusion_by_size.{size}.50" for size in SIZES), *(f"pq_by_size.{size}.pq_things" for size in SIZES),
)  # fmt: skip
DETAILS_NOTE = (
    "The factors of PQ of things, confusion at other thresholds and by the area of the predicted thing, and PQ of "
    "things by size: small is below 32², large from 96² pixels on."
)
COUNTS = columns("things.predicted", "things.matched", "things.true")
COUNTS_NOTE = (
    "Thing segments of all images, mean over the seeds. A setting that predicts fewer can be confused less for that "
    "alone."
)
METRICS = (*COLUMNS, *DETAILS, *COUNTS)
GROUPS = ("head", "data", "sampling", "ibs")
# Differences are of a later setting over an earlier one.
_PLAIN_FIRST = ("full_image", "random_crop", "instance_crop", "paired_crop", "none", "random", "paired")
# Where a run lies, what computed it and how it is watched make no setting; ``data.synthetic.seed`` does, and stays.
_IGNORED = {
    "run_dir", "paths", "logger", "callbacks.progress", "callbacks.pictures", "callbacks.best", "sweep_name", "seed",
    "data.seed", "data.cache_dir", "data.num_workers", "data.memory_mb", "trainer.accelerator",
    "trainer.val_check_interval", "trainer.log_every_n_steps",
}  # fmt: skip


@dataclass
class Setting:
    """Runs that differ in nothing but their seed. ``extra`` names what else tells it from settings like it."""

    runs: list[Run]
    extra: str = ""

    @property
    def label(self) -> tuple[str, ...]:
        """Head, data, sampling and IBS."""
        return tuple(self.runs[0].choice(g) for g in GROUPS)

    @property
    def seeds(self) -> str:
        """The seeds, in order."""
        return ", ".join("–" if r.seed is None else str(r.seed) for r in self.runs)

    def values(self, key: str) -> list[float]:
        """A metric of all runs that have it."""
        return [v for r in self.runs if (v := r.metric(key)) is not None]

    def mean(self, key: str) -> float | None:
        """Mean over the seeds, None without a value."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def deviation(self, key: str) -> float | None:
        """Sample standard deviation (n - 1) over the seeds, None below two values."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None

    def curve(self) -> Curve:
        """Mean confusion curve, over the thresholds that all runs have."""
        tables = [dict(zip(*confusion_curve(r.metrics.get("confusion")), strict=True)) for r in self.runs]
        shared = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
        return shared, [statistics.fmean(t[x] for t in tables) for x in shared]


@dataclass
class Collection:
    """The runs below a folder, grouped into settings, and the folders that could not be read, with the reason."""

    folder: Path
    settings: list[Setting]
    broken: list[tuple[str, str]]

    @property
    def runs(self) -> list[Run]:
        """All runs in the order of the settings."""
        return [r for s in self.settings for r in s.runs]

    def groups(self) -> dict[tuple[str, ...], Collection]:
        """The settings of each head and data set, a collection of their own."""
        labels = dict.fromkeys(s.label[:2] for s in self.settings)
        return {k: Collection(self.folder, [s for s in self.settings if s.label[:2] == k], []) for k in labels}

    def contrasts(
        self, columns: Sequence[tuple[str, str]] = COLUMNS
    ) -> list[tuple[Setting, Setting, list[Difference | None]]]:
        """Settings of one head and data against each other: both, and the difference in every column."""
        found = []
        for setting, first in partners(self.settings):
            row = [difference(setting, first, key) for key, _ in columns]
            if any(row):
                found.append((setting, first, row))
        return found

    def tables(self) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
        """Notes and columns of the tables: the main one, and that of details where a run has any of them."""
        details = any(s.values(key) for s in self.settings for key, _ in DETAILS)
        return [("", COLUMNS), *([(DETAILS_NOTE, DETAILS)] if details else [])]

    def counts(self) -> list[tuple[Setting, list[float | None]]]:
        """How many things each setting predicts, matches and should find, where all of its runs say so."""
        rows = [
            (s, [s.mean(key) if len(s.values(key)) == len(s.runs) else None for key, _ in COUNTS])
            for s in self.settings
        ]
        return [(s, row) for s, row in rows if any(v is not None for v in row)]

    def costs(self) -> list[tuple[Setting, list[float | None]]]:
        """What a run of each setting costs on average, where that is known."""
        rows = [(s, [cost(s, key) for key, _ in COST]) for s in self.settings]
        return [(s, row) for s, row in rows if any(v is not None for v in row)]

    def published(self) -> list[dict[str, Any]]:
        """The papers' tables beside the settings' means, for each data set and split on which there are both."""
        places: dict[tuple[str, str], list[Setting]] = {}
        for setting in self.settings:
            places.setdefault(place(setting.runs[0]), []).append(setting)
        found = [
            published([r for s in settings for r in s.runs], [(short_label(s, self), s.mean) for s in settings])
            for settings in places.values()
        ]
        return [tables for tables in found if tables]

    def place(self, run: Run) -> str:
        """The run's folder, relative to the collection's."""
        return run.path.relative_to(self.folder).as_posix()


def collect(runs: Path) -> Collection:
    """Read every folder below ``runs`` (itself included) that holds a ``metrics.json``.

    Runs with the same configuration but for the seed, and the same number of steps done, make one setting. Broken
    folders are listed with the reason.

    Raises:
        DataError: if ``runs`` is no folder, or nothing below it holds a ``metrics.json``.
    """
    folder = Path(runs)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder that holds the runs: runs=DIR.")
    found, broken = [], []
    for file in sorted(folder.rglob("metrics.json")):
        try:
            run = load_run(file.parent)
            if "comparison" in run.metrics and (file.parent / "sets").is_dir():
                continue  # its sets of predictions are runs of their own, and the first would be there twice
            found.append(run)
        except DataError as error:
            broken.append((file.parent.relative_to(folder).as_posix(), str(error)))
    if not found and not broken:
        raise DataError(f"No metrics.json below {folder}: no run there was evaluated yet.")
    groups: dict[str, Setting] = {}
    for run in found:
        groups.setdefault(_signature(run), Setting([])).runs.append(run)
    settings = list(groups.values())
    for setting in settings:
        setting.runs.sort(key=lambda r: (r.seed is None, r.seed or 0, r.name))
    _name_differences(settings)
    settings.sort(key=_order)
    return Collection(folder, settings, broken)


def _order(setting: Setting) -> tuple[Any, ...]:
    """By head and data, then from the plain to the elaborate, then by steps; numbers in what differs by their value."""
    head, data, *chosen = setting.label
    known = [(_PLAIN_FIRST.index(c) if c in _PLAIN_FIRST else len(_PLAIN_FIRST), c) for c in chosen]
    words = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", setting.extra)
    return head, data, known, setting.runs[0].step or 0, [float(w) if i % 2 else w for i, w in enumerate(words)]


def _signature(run: Run) -> str:
    """What must be equal for two runs to differ in the seed only; a run without configuration is on its own."""
    if not run.config:
        return str(run.path)
    return json.dumps([run.step, dict(_settings(run))], sort_keys=True, default=str)


def _settings(run: Run) -> Iterator[tuple[str, Any]]:
    """Flat configuration without places, logging and the seed; strings that name the run's folder are left out, and
    the cache folder may lie anywhere.
    """
    place = str(run.config.get("run_dir") or "")
    paths = run.config.get("paths")
    cache = str(paths.get("cache") or "") if isinstance(paths, dict) else ""
    # A training run may have been resumed; an evaluation is of this checkpoint and no other.
    ignored = _IGNORED if run.evaluated_only else _IGNORED | {"ckpt_path"}

    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for key, value in node.items():
                name = f"{prefix}.{key}" if prefix else str(key)
                if name not in ignored:
                    yield from walk(name, value)
        elif not (place and isinstance(node, str) and place in node):
            yield prefix, node.replace(cache, "<cache>") if cache and isinstance(node, str) else node

    yield from alike(dict(walk("", run.config))).items()


def _name_differences(settings: list[Setting]) -> None:
    """Where settings look alike in head, data, sampling and IBS, say in which keys they differ."""
    alike: dict[tuple[str, ...], list[Setting]] = {}
    for setting in settings:
        alike.setdefault(setting.label, []).append(setting)
    for group in alike.values():
        tables = [dict(_settings(s.runs[0])) for s in group]
        keys = sorted({k for t in tables for k in t})
        values = {k: tuple(json.dumps(t.get(k), default=str, sort_keys=True) for t in tables) for k in keys}
        typed = {o.lstrip("+").partition("=")[0] for s in group for o in s.runs[0].overrides}
        # Of keys that always say the same, such as one that was typed and those derived from it, one is enough.
        names: dict[tuple[str, ...], str] = {}
        for key in sorted(keys, key=lambda k: (k not in typed, k)):
            if len(set(values[key])) > 1:
                names.setdefault(values[key], key)
        for setting, table in zip(group, tables, strict=True):
            varying = sorted(names.values())[:6] if setting.runs[0].config else []
            setting.extra = ", ".join(f"{k}={table.get(k)}" for k in varying)


def short_label(setting: Setting, collection: Collection, groups: Sequence[str] = GROUPS) -> str:
    """A setting in few words: the parts of its label, among ``groups``, in which the settings differ."""
    labels = [s.label for s in collection.settings]
    parts = [
        (f"ibs {part}" if group == "ibs" else part)
        for i, (group, part) in enumerate(zip(GROUPS, setting.label, strict=True))
        if group in groups and len({label[i] for label in labels}) > 1
    ]
    text = ", ".join([*parts, *([setting.extra] if setting.extra else [])])
    return text or collection.place(setting.runs[0])


def mean_and_deviation(setting: Setting, key: str) -> str:
    """``34.1 ± 0.3`` in percent points; without deviation for one run, an en dash for none."""
    mean, deviation = setting.mean(key), setting.deviation(key)
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")
