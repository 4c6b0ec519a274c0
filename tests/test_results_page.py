"""Tables of ``docs/results.md`` against the runs' rows in ``docs/data``, computed anew by scipy."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
# Page, section: rows, head, steps of its tables of conditions, and how many lines these have.
TABLES = {
    ("docs/results.md", "Car parks: Panoptic FCN, trained to convergence"): ("embedded_lots", "panoptic_fcn", 2400, 18),
    ("docs/results.md", "Car parks: Mask2Former"): ("embedded_lots", "mask2former", 2400, 18),
    ("docs/results.md", "With 4800 steps"): ("embedded_lots_longer", "mask2former", 4800, 18),
    ("docs/results.md", "Car parks: CIAE"): ("embedded_lots", "ciae", 2400, 18),
    ("docs/results.md", "Nuclei: CIAE, on photographs"): ("nuclei_ciae", "ciae", 1200, 18),
    ("docs/results.md", "Full size: Panoptic FCN"): ("embedded_benchmark_gpu", "panoptic_fcn", 1200, 18),
}
KEYS = {
    "PQ": "pq", "PQ_th": "pq_things", "PQ_st": "pq_stuff", "SQ_th": "sq_things", "RQ_th": "rq_things",
    "Acc_th": "acc_things", "Prec_th": "prec_things", "mIoU": "miou",
    **{f"conf. {t} %": f"confusion@{t}" for t in (5, 25, 50, 75)},
    **{f"conf. 50 %, {s}": f"confusion_by_size.{s}.50" for s in ("small", "medium", "large")},
    **{f"PQ_th, {s}": f"pq_by_size.{s}.pq_things" for s in ("small", "medium", "large")},
}  # fmt: skip
CONDITION = re.compile(r"`(\w+)`( − `(\w+)`)?")


def _section(page: str, title: str) -> list[list[str]]:
    """The cells of all table rows of a section."""
    text = (ROOT / page).read_text(encoding="utf-8")
    body = re.split(rf"^#+ {re.escape(title)}$", text, flags=re.M)[1]
    lines = re.split(r"^#+ ", body, flags=re.M)[0].splitlines()
    return [[c.strip() for c in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]


def _runs(name: str, head: str, steps: int) -> dict[str, dict[int, dict[str, str]]]:
    """Condition -> seed -> row."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    with (ROOT / "docs" / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if (row["kind"], row["head"], row["steps"]) == ("run", head, str(steps)):
                condition = row["sampling"] + ("" if row["ibs"] == "none" else "_ibs")
                assert int(row["seed"]) not in found.setdefault(condition, {}), "one run twice"
                found[condition][int(row["seed"])] = row
    return found


def _mean(runs: dict[int, dict[str, str]], key: str) -> list[float]:
    """Mean and sample standard deviation."""
    values = 100 * np.array([float(runs[s][key]) for s in sorted(runs)])
    return [values.mean(), values.std(ddof=1)]


def _difference(a: dict[int, dict[str, str]], b: dict[int, dict[str, str]], key: str) -> list[float]:
    """Mean and both ends of the 95 % interval of a - b."""
    values = 100 * np.array([float(a[s][key]) - float(b[s][key]) for s in sorted(a.keys() & b.keys())])
    return [values.mean(), *stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))]


@pytest.mark.parametrize(("page", "section"), TABLES)
def test_a_table_says_what_its_runs_say(page: str, section: str) -> None:
    name, head, steps, lines = TABLES[page, section]
    runs = _runs(name, head, steps)
    columns: list[str] = []
    checked = 0
    for first, *cells in _section(page, section):
        match = CONDITION.fullmatch(first)
        if cells[0] in ("seeds", "steps"):
            plain = not first and all(c in KEYS for c in cells[1:])  # else a table of something else
            columns = [KEYS[c] for c in cells[1:]] if plain else []
        elif columns and match:
            one, other = runs[match[1]], runs[match[3] or match[1]]
            seeds = ", ".join(map(str, sorted(one.keys() & other.keys())))
            assert cells[0] == seeds or (match[3] and not cells[0]), first
            for text, key in zip(cells[1:], columns, strict=True):
                printed = [float(n) for n in re.findall(r"[-+]?\d+\.\d", text)]
                expected = _difference(one, other, key) if match[3] else _mean(one, key)
                assert printed == pytest.approx(expected, rel=0, abs=0.05 + 1e-9), (first, key)  # of a decimal
            checked += 1
    assert checked == lines  # 18: five conditions and four contrasts, in two tables
