"""The results pages: tables against the runs' rows in ``docs/data``, computed anew by scipy, and against each other."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LOTS_FCN, LOTS_M2F, LOTS_CIAE = (f"results/car_parks_{h}.md" for h in ("panoptic_fcn", "mask2former", "ciae"))
STREET = "results/street_scenes.md"
# Page, section (its anchor; all of the page when empty): rows, head, steps, and how many lines its tables have.
TABLES = {
    (LOTS_FCN, ""): ("embedded_lots", "panoptic_fcn", 2400, 27),
    (LOTS_M2F, "2400-steps"): ("embedded_lots", "mask2former", 2400, 27),
    (LOTS_M2F, "4800-steps"): ("embedded_lots_longer", "mask2former", 4800, 27),
    (LOTS_M2F, "9600-steps"): ("embedded_lots_longer", "mask2former", 9600, 3),
    (LOTS_CIAE, "what-does-ibs-do-to-ciae-on-car-parks"): ("embedded_lots", "ciae", 2400, 27),
    (LOTS_CIAE, "the-same-runs-on-another-machine"): ("embedded_lots_repeat", "ciae", 2400, 1),
    (LOTS_CIAE, "4800-steps"): ("embedded_lots_longer", "ciae", 4800, 3),
    ("results/car_parks_panoptic_fpn.md", ""): ("embedded_lots_two_branch", "panoptic_fpn", 360, 9),
    ("results/nuclei.md", "ciae"): ("nuclei_ciae", "ciae", 1200, 18),
    (STREET, "panoptic-fcn-full-size-1200-steps"): ("embedded_benchmark_gpu", "panoptic_fcn", 1200, 18),
}
SIZES = ("small", "medium", "large")
KEYS = {
    "PQ": "pq", "PQ_th": "pq_things", "PQ_st": "pq_stuff", "SQ_th": "sq_things", "RQ_th": "rq_things",
    "Acc_th": "acc_things", "Prec_th": "prec_things", "mIoU": "miou",
    **{f"conf. {t} %": f"confusion@{t}" for t in (5, 25, 50, 75)},
    **{f"conf. 50 %, {s}": f"confusion_by_size.{s}.50" for s in SIZES},
    **{f"PQ_th, {s}": f"pq_by_size.{s}.pq_things" for s in SIZES},
}  # fmt: skip
CONDITION = re.compile(r"`(\w+)`( − `(\w+)`)?")
CROPS, RANDOM, PAIRED, PAIRS = (
    f"`{a}` − `{b}`"
    for a, b in (
        ("random_crop", "full_image"), ("random_crop_ibs", "random_crop"), ("paired_crop_ibs", "paired_crop"),
        ("paired_crop_ibs", "random_crop_ibs"),
    )
)  # fmt: skip
INTERVAL = re.compile(r"([-+−]?\d+(?:\.\d+)?)(?: points| %)? \[([-+−]?\d+(?:\.\d+)?), ([-+−]?\d+(?:\.\d+)?)\]")


def _section(page: str, anchor: str) -> list[list[str]]:
    """The cells of all table rows of a section."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if anchor:
        parts = re.split(r"^#+ (.*)$", text, flags=re.M)
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in parts[1::2]]
        text = parts[2::2][slugs.index(anchor)]
    rows = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in row.removeprefix("|").removesuffix("|").split("|")] for row in rows]


def _runs(name: str, head: str, steps: int) -> dict[str, dict[int, dict[str, str]]]:
    """Condition -> seed -> row."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    with (DOCS / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
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
    assert checked == lines  # 18: five conditions and four contrasts, in two tables; 27 in three


def _cell(page: str, anchor: str, row: str, column: str) -> str | None:
    """The cell of the first table of a section that has the row and the column; None where none has."""
    head: list[str] = []
    for cells in _section(page, anchor):
        head = cells if not cells[0] else head
        if cells[0] == row and column in head:
            return cells[head.index(column)]
    return None


def _claims() -> list[tuple[str, str, str, str, str]]:
    """What pages say of other pages' tables: page, link, contrast, column, cell."""
    found = []
    for page in ("results.md", "results/crops.md", "results/ibs.md", "results/pairs.md", "results/sizes.md"):
        head: list[str] = []
        for cells in _section(page, ""):
            link = re.fullmatch(r"\[.*\]\((.*)\)", cells[0])
            head = cells if cells[0] == "runs" else head
            if not link or not head:
                continue
            named = dict(zip(head, cells, strict=False))
            said = named.get("IBS") or named.get("contrast") or ""
            contrast = PAIRED if "paired" in said else RANDOM if "random" in said else CROPS
            contrast = PAIRS if page.endswith("pairs.md") else contrast
            columns = {
                "crops over whole images": CROPS, "IBS, random partners": RANDOM, "IBS, paired crops": PAIRED,
            }  # fmt: skip
            target = link[1] if page == "results.md" else f"results/{link[1]}"
            for title, text in named.items():
                if title in columns:
                    found.append((page, target, columns[title], "conf. 50 %", text))
                elif title in KEYS:
                    found.append((page, target, contrast, title, text))
    return found


def test_pages_agree_with_the_pages_of_the_runs() -> None:
    claims = _claims()
    assert len(claims) > 200
    for page, target, contrast, column, text in claims:
        there = _cell(*target.partition("#")[::2], contrast, column)
        if there is None:
            assert text in ("not run", "–"), (page, target, contrast, column)
            continue
        assert text.strip("*") == there, (page, target, contrast, column)
        if page != "results/sizes.md":
            match = INTERVAL.fullmatch(there)
            assert match
            shown = column in ("conf. 50 %", "Prec_th") and match[2][0] == match[3][0]  # +0.0 is above zero
            assert text.startswith("**") == shown, (page, target, contrast, column)


def test_values_lie_in_their_intervals() -> None:
    found = 0
    for page in [ROOT / "README.md", *PAGES]:
        for match in INTERVAL.finditer(page.read_text(encoding="utf-8")):
            value, low, high = (float(n.replace("−", "-")) for n in match.groups())
            assert low <= value <= high, f"{page.name}: {match[0]}"
            found += 1
    assert found > 1000


def test_intervals_stand_in_tables() -> None:
    for page in (ROOT / "README.md", DOCS / "index.md", DOCS / "results.md", DOCS / "ciae.md", *DOCS.glob("results/*")):
        lines = page.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if not line.startswith("|") and INTERVAL.search(line)] == [], page.name
