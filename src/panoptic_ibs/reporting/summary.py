"""Many runs on one page: settings with mean and deviation over seeds, curves in one figure, two runs side by side."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panoptic_ibs.errors import DataError

from .beside import place, published
from .contrasts import COST, Difference, cost, difference, partners
from .embed import Embedder
from .figures import Line, Theme, line_chart
from .page import template, write_figure
from .pair import pair_classes, pair_gallery
from .records import Curve, Run, confusion_curve, load_run
from .run_figures import FigureSpec

COLUMNS = (
    ("pq", "PQ"),
    ("pq_things", "PQ th"),
    ("pq_stuff", "PQ st"),
    ("acc_things", "Acc"),
    ("prec_things", "Prec"),
    ("miou", "mIoU"),
    ("confusion@50", "Conf@50"),
)
GROUPS = ("head", "data", "sampling", "ibs")
# Where a run lies and how it is logged make no difference to its result; ``data.synthetic.seed`` does, and stays.
_IGNORED = {"run_dir", "paths", "logger", "sweep_name", "seed", "data.seed", "data.cache_dir"}


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

    def contrasts(self) -> list[tuple[Setting, Setting, list[Difference | None]]]:
        """Settings of one head and data against each other: both, and the difference in every column."""
        found = []
        for setting, first in partners(self.settings):
            row = [difference(setting, first, key) for key, _ in COLUMNS]
            if any(row):
                found.append((setting, first, row))
        return found

    def costs(self) -> list[tuple[Setting, list[float | None]]]:
        """What a run of each setting costs on average, where that is known."""
        rows = [(s, [cost(s, key) for key, _ in COST]) for s in self.settings]
        return [(s, row) for s, row in rows if any(v is not None for v in row)]

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
    settings.sort(key=lambda s: (s.label, s.runs[0].step or 0))
    _name_differences(settings)
    return Collection(folder, settings, broken)


def write_summary(runs: Path) -> Path:
    """Write ``report/index.html``, ``summary.csv`` and ``summary.md`` into the folder of the runs.

    Returns:
        The path of the page.

    Raises:
        DataError: see :func:`collect`.
    """
    collection = collect(runs)
    folder = collection.folder / "report"
    folder.mkdir(exist_ok=True)
    _write_csv(collection)
    _write_markdown(collection)
    embedder = Embedder()
    figures = {spec.stem: write_figure(spec, folder, embedder) for spec in _figures(collection)}
    pair = collection.runs if len(collection.runs) == 2 else []
    count = len(collection.runs)
    page = template("summary.html.j2").render(
        title=f"{count} {'run' if count == 1 else 'runs'} in {collection.folder.resolve().name}",
        collection=collection,
        columns=COLUMNS,
        published=_published(collection),
        groups=GROUPS,
        cost_columns=COST,
        short=lambda setting: short_label(setting, collection),
        figures=figures,
        reports={r.path: f"../{collection.place(r)}/report/index.html" for r in collection.runs
                 if r.path != collection.folder and (r.path / "report" / "index.html").is_file()},
        pair=[collection.place(r) for r in pair],
        pair_classes=pair_classes(*pair) if pair else [],
        pair_gallery=pair_gallery(*pair) if pair else None,
    )  # fmt: skip
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _published(collection: Collection) -> list[dict[str, Any]]:
    """The papers' tables beside the settings' means, for each data set and split on which there are both."""
    places: dict[tuple[str, str], list[Setting]] = {}
    for setting in collection.settings:
        places.setdefault(place(setting.runs[0]), []).append(setting)
    found = [
        published([r for s in settings for r in s.runs], [(short_label(s, collection), s.mean) for s in settings])
        for settings in places.values()
    ]
    return [tables for tables in found if tables]


def _signature(run: Run) -> str:
    """What must be equal for two runs to differ in the seed only; a run without configuration is on its own."""
    if not run.config:
        return str(run.path)
    return json.dumps([run.step, dict(_settings(run))], sort_keys=True, default=str)


def _settings(run: Run) -> Iterator[tuple[str, Any]]:
    """Flat configuration without places, logging and the seed; strings that name the run's folder are left out."""
    place = str(run.config.get("run_dir") or "")
    # A training run may have been resumed; an evaluation is of this checkpoint and no other.
    ignored = _IGNORED if run.evaluated_only else _IGNORED | {"ckpt_path"}

    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for key, value in node.items():
                name = f"{prefix}.{key}" if prefix else str(key)
                if name not in ignored:
                    yield from walk(name, value)
        elif not (place and isinstance(node, str) and place in node):
            yield prefix, node

    return walk("", run.config)


def _name_differences(settings: list[Setting]) -> None:
    """Where settings look alike in head, data, sampling and IBS, say in which keys they differ."""
    alike: dict[tuple[str, ...], list[Setting]] = {}
    for setting in settings:
        alike.setdefault(setting.label, []).append(setting)
    for group in alike.values():
        tables = [dict(_settings(s.runs[0])) for s in group]
        keys = sorted({k for t in tables for k in t})
        varying = [k for k in keys if len({json.dumps(t.get(k), default=str, sort_keys=True) for t in tables}) > 1]
        for setting, table in zip(group, tables, strict=True):
            setting.extra = ", ".join(f"{k}={table.get(k)}" for k in varying[:6] if setting.runs[0].config)


def _figures(collection: Collection) -> list[FigureSpec]:
    lines = []
    for i, setting in enumerate(collection.settings):
        curve = setting.curve()
        if curve[0]:
            lines.append(Line(short_label(setting, collection), curve, i))
    if not lines:
        return []

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), lines, theme, "Confused predicted thing segments, percent",
                   "covers more than so many percent of two or more true instances", percent=True)  # fmt: skip

    caption = "One line a setting, mean over its seeds. Lower is better."
    return [FigureSpec("confusion", "Confusion curves of all settings", caption, draw, max(3.6, 0.2 * len(lines)))]


def short_label(setting: Setting, collection: Collection) -> str:
    """A setting in few words: the parts of the label in which the settings differ."""
    labels = [s.label for s in collection.settings]
    parts = [
        (f"ibs {part}" if group == "ibs" else part)
        for i, (group, part) in enumerate(zip(GROUPS, setting.label, strict=True))
        if len({label[i] for label in labels}) > 1
    ]
    text = ", ".join([*parts, *([setting.extra] if setting.extra else [])])
    return text or collection.place(setting.runs[0])


def _write_csv(collection: Collection) -> None:
    """One row a run; after the runs of a setting with several seeds their mean and sample standard deviation."""
    with (collection.folder / "summary.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["kind", "run", *GROUPS, "differs_in", "seed", "steps", *(key for key, _ in COLUMNS)])
        for setting in collection.settings:
            fixed = [*setting.label, setting.extra]
            for run in setting.runs:
                values = [run.metric(key) for key, _ in COLUMNS]
                writer.writerow(
                    ["run", collection.place(run), *fixed, _blank(run.seed), _blank(run.step), *map(_blank, values)]
                )
            if len(setting.runs) > 1:
                for kind, value in (("mean", setting.mean), ("sd", setting.deviation)):
                    row = [_blank(value(key)) for key, _ in COLUMNS]
                    writer.writerow([kind, "", *fixed, setting.seeds, _blank(setting.runs[0].step), *row])
        for setting, first, found in collection.contrasts():
            fixed = [*setting.label, setting.extra, "", ""]
            against = f"minus {short_label(first, collection)}"
            writer.writerow(["difference", against, *fixed, *(d.mean if d else "" for d in found)])
            halves = [d.half if d and d.half is not None else "" for d in found]
            writer.writerow(["half of 95 % interval", against, *fixed, *halves])


def _blank(value: Any) -> Any:
    return "" if value is None else value


def _write_markdown(collection: Collection) -> None:
    several = any(s.extra for s in collection.settings)
    head = [
        "head",
        "data",
        "sampling",
        "IBS",
        *(["differs in"] if several else []),
        "seeds",
        "steps",
        *(n for _, n in COLUMNS),
    ]
    lines = ["Percent; mean ± sample standard deviation over the seeds.", "", _row(head), _row(["---"] * len(head))]
    for s in collection.settings:
        step = s.runs[0].step
        cells = [*s.label, *([s.extra] if several else []), s.seeds, "–" if step is None else str(step)]
        lines.append(_row([*cells, *(mean_and_deviation(s, key) for key, _ in COLUMNS)]))
    lines += _contrast_lines(collection) + _cost_lines(collection) + _published_lines(collection)
    if collection.broken:
        lines += ["", "Left out:", "", *(f"- {name}: {reason}" for name, reason in collection.broken)]
    (collection.folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _contrast_lines(collection: Collection) -> list[str]:
    rows = [
        _row([short_label(s, collection), short_label(first, collection), str(max(d.pairs for d in found if d)),
              *(d.text if d else "–" for d in found)])
        for s, first, found in collection.contrasts()
    ]  # fmt: skip
    if not rows:
        return []
    head = ["setting", "minus", "pairs", *(name for _, name in COLUMNS)]
    title = (
        "Differences between settings of the same head and data, in percent points: mean over the runs with the same "
        "seed [95 % interval, Student's t over the seeds]. Not corrected for the number of differences."
    )
    return ["", title, "", _row(head), _row(["---"] * len(head)), *rows]


def _cost_lines(collection: Collection) -> list[str]:
    rows = [
        _row([short_label(setting, collection),
              *("–" if v is None else f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values)])
        for setting, values in collection.costs()
    ]  # fmt: skip
    head = ["setting", *(name for _, name in COST)]
    title = "Cost, mean over the runs (of a resumed run: its last part)."
    return ["", title, "", _row(head), _row(["---"] * len(head)), *rows] if rows else []


def _published_lines(collection: Collection) -> list[str]:
    lines = []
    for found in _published(collection):
        lines += ["", *([found["note"], ""] if found["note"] else [])]
        for table in (*found["tables"], *found["ablations"]):
            paper = table["paper"]
            source = f"{paper['authors']}, {paper['year']}, table {table['number']}"
            lines += ["", f"{table['title']}: {source}; ours first.", ""]
            lines += [_row(["", *table["heads"]]), _row(["---"] * (len(table["heads"]) + 1))]
            lines += [_row([f"**{row['label']}**", *map(_percent, row["values"])]) for row in table["own"]]
            lines += [_row([row["label"], *map(_percent, row["values"])]) for row in table["rows"]]
    return lines


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def mean_and_deviation(setting: Setting, key: str) -> str:
    """``34.1 ± 0.3`` in percent points; without deviation for one run, an en dash for none."""
    mean, deviation = setting.mean(key), setting.deviation(key)
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
