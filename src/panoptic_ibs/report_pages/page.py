"""The page of one run: one HTML file that holds everything, and its figures as PNG beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from shutil import copyfile
from typing import Any
from urllib.parse import quote

from panoptic_ibs.extras import lack, require
from panoptic_ibs.image_files import file_stem
from panoptic_ibs.metrics import names
from panoptic_ibs.metrics.names import HEADLINE

from .beside import comparison, published
from .embed import Embedder
from .figures import DARK, LIGHT, render
from .first_screen import hero, tiles
from .gallery import Gallery, read_gallery
from .records import Run, load_run, metric, number
from .run_figures import FigureSpec, figures_of, per_class
from .wording import (
    TERMS,
    caution_sentences,
    confusion_sentence,
    headline,
    origin_sentence,
    reference_set,
    result_sentences,
    scored_sentence,
)

METRICS = tuple(m for m in names.METRICS if m.share)
MAIN = (*HEADLINE, "confusion@50", "miou", "boundary_pq", "ap")  # shown at once; the other numbers are folded
CURVES = ("validation", "losses", "ibs", "learning_rate")
SHOWN = 3  # images of the gallery that are not folded
LIBRARIES = ("jinja2", "matplotlib")  # of the extra "report"
KIND_TITLES = {
    "input": "Input",
    "truth": "Ground truth",
    "prediction": "Prediction",
    "confused": "Confused segments",
}
VIEW_TITLES = {
    "proposals": "Proposals, and the pixels that the queries were read from",
    "embedding": "Embedding: three principal components as red, green, blue",
    "similarity": "Similarity to one query",
}


def write_report(run_dir: Path, title: str | None = None) -> Path:
    """Write ``run_dir/report/index.html`` (self-contained) and the figures and gallery pictures as PNG beside it.

    Args:
        run_dir: a run folder with ``metrics.json``; ``metrics.csv``, ``baselines.json``, ``timing.json``,
            ``gallery/`` and ``.hydra/`` are used where they are there, and a missing one is named in the page.
        title: the page's title; by default a sentence made from the run.

    Returns:
        The path of the page.

    Raises:
        DataError: if ``metrics.json`` is missing or broken.
        ConfigError: if a library of the extra "report" is not installed.
    """
    require("reports", *LIBRARIES)
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    embedder = Embedder()
    gallery = read_gallery(run_dir) or _reference_gallery(run)
    view = gallery_view(gallery, embedder, folder, {**KIND_TITLES, **VIEW_TITLES})
    table = _metric_table(run)
    figures = {spec.stem: write_figure(spec, folder, embedder) for spec in figures_of(run)}
    page = template("run.html.j2").render(
        title=title or headline(run),
        kind="Checkpoint"
        if run.evaluated_only and not run.foreign
        else "Predictions"
        if run.foreign
        else "Training run",
        lead=f"{origin_sentence(run)} {scored_sentence(run)}".strip(),
        cautions=[
            *caution_sentences(run),
            *([f"The numbers are those of {name}."] if (name := reference_set(run)) else []),
        ],
        tiles=tiles(run),
        hero=hero(run, gallery, embedder),
        sentences=result_sentences(run),
        terms=TERMS,
        tables=[[row for row in table if (row["key"] in MAIN) == main] for main in (True, False)],
        intervals=any(row["interval"] for row in table),
        baselines=list(run.baselines),
        baseline_note=_baseline_note(run),
        confusion_sentence=confusion_sentence(run),
        published=published([run], [("This run", run.metric)]),
        comparison=comparison(run),
        pair_page="../sets/report/index.html" if (run_dir / "sets" / "report" / "index.html").is_file() else "",
        figures=figures,
        curves=[stem for stem in CURVES if stem in figures],
        classes=_class_rows(run, gallery),
        precision=_class_precision(run),
        gallery=view,
        shown_at_once=SHOWN,
        gallery_notes=gallery.notes if gallery else [],
        **_appendix(run),
    )
    return _write(folder / "index.html", page)


def write_report_if_possible(run_dir: Path) -> None:
    """Write the page of a run; without the extra "report" say so: the run's results stand without it."""
    if can_be_written():
        write_report(run_dir)


def can_be_written() -> bool:
    """Whether the libraries of the extra "report" are installed; if not, that is said, once in a process."""
    lacking = lack(*LIBRARIES)
    if lacking:
        _say(f"note: no report is written, as {lacking}, then python -m panoptic_ibs.report run=DIR (or runs=DIR)")
    return not lacking


@cache
def _say(text: str) -> None:
    print(text, flush=True)


def _reference_gallery(run: Run) -> Gallery | None:
    """Of several sets of predictions the pictures of the first."""
    table = run.metrics.get("comparison")
    name = table.get("reference") if isinstance(table, dict) else None
    folder = run.path / "sets" / file_stem(name) if isinstance(name, str) else None
    return read_gallery(folder) if folder is not None and folder.is_dir() else None


@cache
def template(name: str) -> Any:
    """A template of this package; everything inserted is escaped, undefined names raise."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("panoptic_ibs.report_pages"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"points": points, "signed": signed, "percent": percent, "fixed": fixed, "urlpath": quote}
    return environment.get_template(name)


def points(value: Any) -> str:
    """A fraction in percent points with one decimal; an en dash for none."""
    value = number(value)
    return "–" if value is None else f"{100 * value:.1f}"


def signed(value: Any) -> str:
    """A difference of fractions in percent points, with sign."""
    value = number(value)
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def percent(value: Any) -> str:
    """A share in whole percent."""
    value = number(value)
    return "–" if value is None else f"{100 * value:.0f} %"


def fixed(value: Any) -> str:
    """A number with two decimals; an en dash for none."""
    value = number(value)
    return "–" if value is None else f"{value:.2f}"


def write_figure(spec: FigureSpec, folder: Path, embedder: Embedder) -> dict[str, Any]:
    """Draw a figure for the light and the dark page; the light one is also written to ``folder`` as PNG."""
    light = render(spec.draw, LIGHT, spec.width, spec.height)
    (folder / f"{spec.stem}.png").write_bytes(light)
    if not spec.embedded:
        return {}
    dark = render(spec.draw, DARK, spec.width, spec.height)
    return {"light": embedder.png(light), "dark": embedder.png(dark), "alt": spec.alt, "caption": spec.caption}


def gallery_view(
    gallery: Gallery | None, embedder: Embedder, folder: Path | None, titles: Mapping[str, str] = KIND_TITLES
) -> dict[str, Any] | None:
    """Entries with inlined pictures and the legend of the classes that occur; PNG copies go to ``folder``.

    Pictures of embeddings, if ``titles`` names them, are the entries' ``views``.
    """
    if gallery is None or not gallery.items:
        return None
    pictures = [[(kind, gallery.open(item, kind)) for kind in titles if kind in item] for item in gallery.items]
    data = iter(embedder.photographs([picture for row in pictures for _, picture in row]))
    entries = []
    occurring: set[int] = set()
    for i, (item, row) in enumerate(zip(gallery.items, pictures, strict=True)):
        ids = item.get("class_ids")
        occurring |= {c for c in ids if isinstance(c, int)} if isinstance(ids, list) else set()
        if folder is not None:
            for kind, _ in row:
                copyfile(gallery.folder / item[kind], folder / f"gallery_{i:02d}_{kind}.png")
        shots = [{"kind": kind, "title": titles[kind], "data": next(data)} for kind, _ in row]
        entries.append(
            {
                "number": i + 1,
                "image_id": str(item.get("image_id", i)),
                "pq": number(item.get("pq")),
                "threshold": number(item.get("threshold")),
                "rows": _confused_rows(item),
                "tall": bool(row) and row[0][1].width <= 0.95 * row[0][1].height,
                "pictures": [shot for shot in shots if shot["kind"] in KIND_TITLES],
                "views": [shot for shot in shots if shot["kind"] in VIEW_TITLES],
                "view_note": str(item.get("view_note") or ""),
            }
        )
    return {"entries": entries, "legend": _legend(gallery, occurring), "selection": _selection(gallery)}


def _selection(gallery: Gallery) -> str:
    """How the images were chosen, in words."""
    chosen = [item.get("selection") for item in gallery.items]
    first, worst = chosen.count("first"), chosen.count("most confused")
    if first + worst < len(chosen):
        return ""
    ordinary = "the first image that was evaluated" if first == 1 else f"the first {first} images that were evaluated"
    wrong = f"{worst} of the worst"
    text = " and ".join(t for t, n in ((ordinary, first), (wrong, worst)) if n)
    return (
        f"{text[0].upper()}{text[1:]}. Sorted by error: the prediction that swallows most true instances comes first."
    )


def _confused_rows(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = item.get("rows")
    found = []
    for row in rows if isinstance(rows, list) else []:
        swallowed = row.get("swallowed") if isinstance(row, dict) else None
        if isinstance(swallowed, list):
            found.append({**row, "swallowed": [s for s in swallowed if isinstance(s, dict)]})
    return found


def _legend(gallery: Gallery, occurring: set[int]) -> list[dict[str, Any]]:
    classes = gallery.classes
    if classes is None:
        return []
    shown = [classes[c] for c in sorted(occurring) if 0 <= c < len(classes)] or list(classes.classes)
    shown.sort(key=lambda c: not c.is_thing)
    return [{"name": c.name, "color": css_color(c.color), "is_thing": c.is_thing} for c in shown]


def css_color(color: Sequence[Any]) -> str:
    """``#rrggbb`` of three numbers, clipped to 0 to 255."""
    return "#" + "".join(f"{max(0, min(255, int(c))):02x}" for c in list(color)[:3])


def _baseline_note(run: Run) -> str:
    """A sentence where the baselines were scored on fewer images than the run."""
    own = number(run.metrics.get("num_images"))
    counts = {n for table in run.baselines.values() if (n := number(table.get("num_images"))) is not None}
    if own is None or not counts - {own}:
        return ""
    return f"The run was scored on {own:.0f} images, the baselines on {min(counts):.0f} of them."


def _metric_table(run: Run) -> list[dict[str, Any]]:
    rows = []
    for what in METRICS:
        value = run.metric(what.key)
        tables = run.baselines.values()
        others = [metric(table, what.key) for table in tables]
        if value is None and all(o is None for o in others):
            continue
        # Who predicts nothing confuses nothing: no yardstick.
        nothing = [
            what.lower and 0 in (metric(t, "things.predicted") for t in (run.metrics, table)) for table in tables
        ]
        gaps = [None if o is None or value is None or n else value - o for o, n in zip(others, nothing, strict=True)]
        cells = [{"value": o, "difference": gap} for o, gap in zip(others, gaps, strict=True)]
        rows.append({"key": what.key, "label": what.name, "help": what.help, "value": value, "cells": cells,
                     "lower": what.lower, "first": what.first, "interval": interval_of(run, what.key)})  # fmt: skip
    return rows


def interval_of(run: Run, key: str) -> list[float] | None:
    """The confidence interval of a metric, where the run has one."""
    confidence = run.metrics.get("confidence")
    table = confidence.get("intervals") if isinstance(confidence, dict) else None
    found = table.get(key) if isinstance(table, dict) else None
    ends = [number(v) for v in found] if isinstance(found, list) else []
    return [v for v in ends if v is not None] if len(ends) == 2 and None not in ends else None


def _class_precision(run: Run) -> list[tuple[str, float]]:
    """AP of the classes that have one, best first."""
    table = run.metrics.get("ap_per_class")
    found = [(str(k), number(v)) for k, v in table.items()] if isinstance(table, dict) else []
    return sorted(((k, v) for k, v in found if v is not None), key=lambda row: -row[1])


def _class_rows(run: Run, gallery: Gallery | None) -> list[dict[str, Any]]:
    table = {c.name: c for c in gallery.classes.classes} if gallery and gallery.classes else {}
    rows = []
    for name, values in per_class(run):
        info = table.get(name)
        rows.append(
            {"name": name, "color": css_color(info.color) if info else None,
             "kind": "" if info is None else ("thing" if info.is_thing else "stuff"),
             "values": [number(values.get(k)) for k in ("sq", "rq", "iou")], "pq": number(values.get("pq")),
             "counts": [values.get(k) for k in ("tp", "fp", "fn")]}
        )  # fmt: skip
    return rows


def _appendix(run: Run) -> dict[str, Any]:
    versions = run.metrics.get("versions")
    typed = shlex.join(["python", "-m", "panoptic_ibs.train", *run.overrides]) if run.overrides else ""
    command = run.metrics.get("command")
    return {
        "notes": run.notes,
        "timing": {k.replace("_", " "): _plain(v) for k, v in run.timing.items()},
        "config": json.dumps(run.config, indent=2, ensure_ascii=False, default=str) if run.config else "",
        "versions": versions if isinstance(versions, dict) else {},
        "command": command if isinstance(command, str) else typed,
        "run_name": run.path.resolve().name,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _plain(value: Any) -> str:
    as_number = number(value)
    return f"{as_number:,.6g}" if as_number is not None else str(value)


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
