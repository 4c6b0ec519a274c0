"""What the page of a run shows first: four numbers with their meaning, and a picture of the worst confusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from panoptic_ibs.metrics.names import Metric, named

from .beside import comparison
from .embed import Embedder
from .gallery import Gallery
from .records import Run, metric, number
from .worst import WORST, severity, swallowed_by

TILES = 4
_THINGS = ("pq", "pq_things", "confusion@50", "prec_things")
_STUFF = ("pq", "miou", "sq", "rq")  # where there are no things; PQ of stuff is PQ there
_INSTANCES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_SETS = 2  # other sets of predictions that a tile names


def tiles(run: Run) -> list[dict[str, Any]]:
    """Four numbers: name, value, meaning, and what they beat.

    Of panoptic results PQ, that of things, confusion and the precision of things, or what there is instead where there
    are no things; of instances AP.
    """
    if run.metric("pq") is None:
        keys: Sequence[str] = _INSTANCES
    else:
        keys = (*_STUFF, "acc_things") if without_things(run) else (*_THINGS, "pq_stuff", *_STUFF[1:])
    values = [(named(key), value) for key in keys if (value := run.metric(key)) is not None]
    return [
        {"label": what.name, "value": value, "meaning": f"{what.help[0].upper()}{what.help[1:]}.",
         "notes": _notes(run, what, value)}
        for what, value in values[:TILES]
    ]  # fmt: skip


def without_things(run: Run) -> bool:
    """Whether there is no thing, neither true nor predicted; False where the numbers do not say so."""
    return run.metric("things.true") == 0 and run.metric("things.predicted") == 0


def _notes(run: Run, what: Metric, value: float) -> list[dict[str, Any]]:
    """What stands under a number: the best baseline, other sets of predictions, how to read it."""
    notes, predicted = [], run.metric("things.predicted")
    if what.lower and predicted == 0:
        return [{"gain": None, "good": None, "text": "no thing was predicted: nothing could be confused"}]
    if (best := _baseline(run, what)) is not None:
        name, theirs = best
        gain = value - theirs
        notes.append(_note(gain, name, theirs, what.lower))
    compared = comparison(run)
    if compared is not None:
        rows = {row["title"]: row["cells"] for row in compared["metrics"]}
        notes += [
            _note(-cell["difference"], name, cell["value"], what.lower, cell["certain"])
            for name, cell in list(zip(compared["others"], rows.get(what.short, []), strict=False))[:_SETS]
            if cell["difference"] is not None
        ]
    if what.lower:
        text = "lower is better" + ("" if predicted is None else f"; {predicted:,.0f} things predicted")
        notes.append({"gain": None, "good": None, "text": text})
    return notes


def _note(gain: float, name: str, value: float, lower: bool, certain: bool = True) -> dict[str, Any]:
    """A difference to something else; it is coloured where it is certain."""
    good = None if abs(gain) < 0.0005 or not certain else (gain < 0) == lower
    return {"gain": gain, "good": good, "text": f"{'against' if lower else 'over'} {name} ({100 * value:.1f})"}


def _baseline(run: Run, what: Metric) -> tuple[str, float] | None:
    """The best baseline and its value. Where lower is better one that predicts nothing would be best: it is none."""
    found = [
        (value, metric(table, "pq") or 0.0, name)
        for name, table in run.baselines.items()
        if (value := metric(table, what.key)) is not None and (not what.lower or metric(table, "things.predicted"))
    ]
    if not found:
        return None
    best = min(found, key=lambda f: (f[0], -f[1])) if what.lower else max(found)
    return best[2], best[0]


def hero(run: Run, gallery: Gallery | None, embedder: Embedder) -> dict[str, Any] | None:
    """The picture of the first screen: the worst confusion, or the best image where nothing is confused.

    Returns:
        ``title``, ``caption`` (sentences), ``alt`` and ``data`` (an address to be inlined); None without a picture.
    """
    if gallery is None:
        return None
    worst = worst_item(gallery)
    if worst is None:
        return _best(run, gallery, embedder)
    item, row = worst
    kind = WORST if WORST in item else "confused"
    return {
        "title": "Worst confusion", "caption": _confused_words(item, row),
        "alt": f"The worst confusion, image {item.get('image_id', '')}",
        "data": _picture(gallery, item, kind, embedder),
    }  # fmt: skip


def worst_item(gallery: Gallery) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The image and row of the prediction that swallows most true instances, among images with a picture of it.

    Of several with as many the one that has a picture of its own, then the one that covers most pixels of them.
    """
    found = [
        (item, row)
        for item in gallery.items
        if WORST in item or "confused" in item
        for row in (item["rows"] if isinstance(item.get("rows"), list) else [])
        if isinstance(row, dict) and len(swallowed_by(row)) > 1
    ]
    return max(found, key=lambda f: (severity(f[1])[0], WORST in f[0], severity(f[1])[1]), default=None)


def _confused_words(item: dict[str, Any], row: dict[str, Any]) -> str:
    swallowed = swallowed_by(row)
    counts = Counter(str(s.get("class_name", "")) for s in swallowed)
    which = ", ".join(f"{n} × {name}" for name, n in counts.items())
    threshold = number(item.get("threshold"))
    halves = sum((number(s.get("share")) or 0.0) > 0.5 for s in swallowed)
    how_many = {0: "none", len(swallowed): "each"}.get(halves, str(halves))
    return (
        f"In image {item.get('image_id', '')}, one predicted “{row.get('class_name', '')}” (white outline) covers "
        f"{'' if threshold is None else f'more than {100 * threshold:.0f} % of '}{len(swallowed)} true instances "
        f"(coloured): {which}"
        f"{f'; more than half of {how_many}' if threshold is not None and threshold < 0.5 else ''}."
    )


def _best(run: Run, gallery: Gallery, embedder: Embedder) -> dict[str, Any] | None:
    """The image of the highest PQ, with a sentence that says why there is no confusion to be seen."""
    items = [item for item in gallery.items if "prediction" in item]
    if not items:
        return None
    item = max(items, key=lambda i: -1.0 if (pq := number(i.get("pq"))) is None else pq)
    pq = number(item.get("pq"))
    best = "" if pq is None else f" with {100 * pq:.1f} PQ, the best of the pictures"
    return {
        "title": "Nothing is confused", "alt": f"Prediction, image {item.get('image_id', '')}",
        "caption": f"{_why_nothing(run, gallery)} Shown: the prediction for image {item.get('image_id', '')}{best}.",
        "data": _picture(gallery, item, "prediction", embedder),
    }  # fmt: skip


def _why_nothing(run: Run, gallery: Gallery) -> str:
    if without_things(run) or (gallery.classes is not None and not any(c.is_thing for c in gallery.classes.classes)):
        return "There are no things here, and only things can be confused."
    if run.metric("things.predicted") == 0:
        return "No thing was predicted, so none is confused."
    threshold = next((t for i in gallery.items if (t := number(i.get("threshold"))) is not None), 0.25)
    measured = run.metric(f"confusion@{100 * threshold:g}")
    where = "" if measured == 0 else "On the images chosen for this page "
    sentence = f"no predicted thing covers more than {100 * threshold:.0f} % of two or more true instances."
    return where + sentence if where else sentence[0].upper() + sentence[1:]


def _picture(gallery: Gallery, item: dict[str, Any], kind: str, embedder: Embedder) -> str:
    return embedder.photographs([gallery.open(item, kind)])[0]
