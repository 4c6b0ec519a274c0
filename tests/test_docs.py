"""README and documentation: short sentences, recipes as published and as composed, intervals around their values."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import panoptic_ibs
from cli_helpers import compose

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
LONGEST = 24  # words of a sentence
FOR_NEWCOMERS = (
    "index.md",
    "own_data.md",
    "train.md",
    "evaluate.md",
    "own_loop.md",
    "add_a_head.md",
    "recipes.md",
    "results.md",
)


def prose(markdown: str) -> str:
    """The text without code, tables, pictures and the targets of links."""
    text = re.sub(r"^```.*?^```", "\n\n", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def sentences(markdown: str) -> list[str]:
    """Sentences: to a full stop, or the end of a paragraph, heading or item of a list."""
    parts = re.split(r"\n\s*\n|\n(?=\s*[-*#>] |\s*\d+\. )|(?<=[.!?])[*_)\"]*\s+(?=[^a-z])", prose(markdown))
    return [" ".join(part.split()) for part in parts if part.strip()]


def test_sentences_are_counted() -> None:
    text = "One two. Three `a b c` [four five](x y z)?\n\n- six\n- **Seven.** Eight\n\n```\nno no\n```\n| no | no |\n"
    assert [len(s.split()) for s in sentences(text)] == [2, 4, 2, 2, 1]


def test_the_readme_is_short_and_plain() -> None:
    assert len(README.splitlines()) <= 110
    assert [s for s in sentences(README) if len(s.split()) > LONGEST] == []
    assert "make demo" in README
    assert "make test" in README
    assert "[" not in re.sub(r"\[[^\]]*\]\(|\[(all|sweeps)\]|!\[", "", prose(README))  # no intervals


@pytest.mark.parametrize("page", FOR_NEWCOMERS)
def test_pages_for_newcomers_are_plain(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert [s for s in sentences(text) if len(s.split()) > LONGEST] == []


def test_the_page_of_the_api_has_the_public_face() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [n for n in panoptic_ibs.__all__ if n != "__version__" and f"panoptic_ibs.{n}`" not in page] == []


def test_the_navigation_names_pages_once() -> None:
    pages = re.findall(r"^ +- .*: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(pages) > 25
    assert sorted(set(pages)) == sorted(pages)


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", t) for t in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)]
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    checked = 0
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)\s]*)\)", page.read_text(encoding="utf-8")):
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            assert path.exists(), f"{page.relative_to(ROOT)}: {link}"
            if anchor:
                assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page.relative_to(ROOT)}: {link}"
            checked += 1
    assert checked > 150


def table(markdown: str, first: str) -> list[dict[str, str]]:
    """The rows of the table whose head begins with ``first``."""
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([c.strip() for c in line.strip().strip("|").split("|")])
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def published(data: str, head: str, sampling: str, partners: str) -> float | None:
    """The paper's PQ of a recipe; None where the package's data have none."""
    tables: list[dict[str, Any]] = []
    for path in sorted((ROOT / "src" / "panoptic_ibs" / "data" / "published").glob("*.json")):
        tables += json.loads(path.read_text(encoding="utf-8"))["tables"]
    found = [(t, row) for t in tables if t["data"] == data for row in t["rows"]]
    if head not in ("panoptic_fcn", "mask2former"):  # Table I of the CIAE paper, which cites others
        method = {"ciae": "CIAE-800", "panoptic_fpn": "Panoptic FPN", "upsnet": "UPNet"}.get(head)
        rows = [r for t, r in found if t["table"] == "I" and (r["method"], r["backbone"]) == (method, "ResNet-50-FPN")]
    elif (sampling, partners) == ("instance_crop", "random"):  # IBS without the paired sampler
        rows = [r for t, r in found if t["table"] == "3" and (r["ibs"], r["sampling"]) == (True, "random")]
    else:
        name = {"panoptic_fcn": "Panoptic FCN", "mask2former": "Mask2Former"}[head]
        name += " + IBS" if partners != "none" else ""
        tables_of = ("2",) if sampling != "full_image" else ("1",)
        rows = [
            r for t, r in found
            if t["table"] in tables_of and (r["method"], r["crops"]) == (name, sampling != "full_image")
        ]  # fmt: skip
    assert len(rows) <= 1
    return float(rows[0]["pq"]) if rows else None


def ours(head: str, sampling: str, partners: str, steps: int) -> float:
    """Our mean PQ over the seeds, in percent, of the runs kept in docs/data."""
    with (ROOT / "docs" / "data" / "embedded_lots.csv").open(encoding="utf-8", newline="") as file:
        found = [
            float(row["pq"])
            for row in csv.DictReader(file)
            if (row["kind"], row["head"], row["sampling"], row["ibs"], row["steps"])
            == ("run", head, sampling, partners, str(steps))
        ]
    assert len(found) in (3, 5)  # seeds
    return 100 * float(np.mean(found))


@pytest.mark.parametrize("row", table(README, "data"), ids=lambda r: r["options"])
def test_a_recipe_of_the_readme(row: dict[str, str]) -> None:
    typed = row["options"].strip("`")
    data, head, sampling, partners = (word.partition("=")[2] for word in typed.split())
    assert head == row["head"].lower().replace(" ", "_")
    assert (sampling == "full_image", partners != "none") == (
        row["training"] == "whole images", row["training"].endswith("IBS")
    )  # fmt: skip
    if data == "lots":
        steps = compose(*typed.split()).trainer.max_steps
        assert float(row["ours"]) == pytest.approx(ours(head, sampling, partners, steps), abs=0.05 + 1e-9)
        assert row["published"] == "–"
    else:  # the page's rows are composed below
        (there,) = (r for r in table(RECIPES, "steps") if r["options"] == row["options"])
        assert (row["published"], row["ours"]) == (there["published PQ"], "–")
        assert float(row["published"]) == published(data, head, sampling, partners)


@pytest.mark.parametrize("row", table(RECIPES, "steps"), ids=lambda r: r["options"])
def test_a_published_recipe_of_the_page(row: dict[str, str]) -> None:
    typed = row["options"].strip("`").split()
    config = compose(*typed, "data.root=DIR")
    devices, crop = config.trainer.devices, config.sampling.sampler.get("crop_size")
    data, head, sampling, partners = (word.partition("=")[2] for word in typed)
    pq = published(data, head, sampling, partners)
    known = partners in (config.recipe.get("published") or {}).get(sampling, [])
    assert list(row.values())[:-1] == [
        str(config.trainer.max_steps), str(config.sampling.batch_size * devices),
        "x".join(map(str, crop)) if crop else "whole", str(devices),
        "ours" if not known else "–" if pq is None else str(pq),
    ]  # fmt: skip


def test_every_published_recipe_has_a_row() -> None:
    rows = {row["options"].strip("`") for row in table(RECIPES, "steps")}
    for path in sorted((ROOT / "conf" / "recipe").glob("*.yaml")):
        data = next((d for d in ("cityscapes", "vistas", "coco_panoptic") if path.stem.startswith(f"{d}_")), None)
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")).get("recipe") or {}
        for sampling, partners in (recipe.get("published") or {}).items() if data else ():
            for ibs in partners:
                options = f"data={data} head={path.stem.removeprefix(f'{data}_')} sampling={sampling} ibs={ibs}"
                assert options in rows, f"docs/recipes.md has no row for {options}"


def test_the_papers_numbers_of_the_page() -> None:
    path = ROOT / "src" / "panoptic_ibs" / "data" / "published" / "tables_ibs.json"
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
    rows = table(RECIPES, "data set")
    assert len(rows) == 10
    for row in rows:
        data = {"Cityscapes": "cityscapes", "Mapillary Vistas": "vistas"}[row["data set"]]
        name = row["network"] + (" + IBS" if row["training"] == "crops, IBS" else "")
        number = "1" if row["training"] == "whole images" else "2"
        paper = next(
            r for t in tables if (t["table"], t["data"]) == (number, data) for r in t["rows"]
            if (r["method"], r["crops"]) == (name, row["training"] != "whole images")
        )  # fmt: skip
        keys = ("pq", "pq_things", "pq_stuff", "acc_things", "prec_things")
        assert list(row.values())[3:] == [str(paper[key]) for key in keys]


def test_the_readme_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the README run as they stand, but for a smaller network and fewer pictures."""
    from test_public_face import DATA, TINY

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PANOPTIC_IBS_CACHE", str(tmp_path / "cache"))
    (block,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = block.replace('trainer={"max_steps": 200}', "**small")
    assert lines != block
    small = {k: v for k, v in TINY.items() if k != "head"} | {"data.synthetic": DATA["synthetic"]}
    small["head.channels"] = 16
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(lines, "README.md", "exec"), {"small": small, "panoptic_ibs": panoptic_ibs})
    assert (tmp_path / "overlay.png").is_file()
    assert (tmp_path / "predictions" / "panoptic" / "first.png").is_file()


def test_ibs_in_a_loop_of_your_own() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_loop.md").read_text("utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "own_loop.md", "exec"), names)
    assert names["loss"].item() > 0
    assert names["embeddings"].grad[2].abs().sum() == 0  # stuff
    assert (names["embeddings"].grad[[0, 1, 3, 4]].abs().sum(dim=1) > 0).all()


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    """Strictly: a link or anchor that leads nowhere fails. What a page needs lies in the site."""
    for package in ("mkdocs", "material", "mkdocstrings", "griffe"):
        pytest.importorskip(package, reason="pip install 'panoptic-ibs[docs]'")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    loaded = [re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"https?://[^\"]*", text) for text in pages.values()]
    assert not any(loaded)
    for key in ("sampling.batch_size", "ibs.weight", "evaluation.bootstrap", "optim.lr"):
        assert f"<code>{key}</code>" in pages["keys.html"]
    assert "embedding's mask is held against zero" in pages["api.html"].replace("&#39;", "'")
