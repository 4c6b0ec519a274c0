"""Names from files reach terminals, pages, tables and pictures as what they are: letters, and nothing else."""

from __future__ import annotations

import csv
import io
import json
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cli_helpers import run
from panoptic_ibs import fonts
from panoptic_ibs.classes import ClassInfo, ClassTable
from panoptic_ibs.report_pages import write_report
from panoptic_ibs.report_pages.summary import write_summary
from panoptic_ibs.report_pages.summary_files import harmless, text
from panoptic_ibs.report_pages.terminal import encodable, print_rows
from panoptic_ibs.visualize import overlay
from run_folders import add_gallery, write_run

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(1)//", "\"><img src=x onerror=alert(1)>",
    "javascript:alert(1)", "]]><svg onload=alert(1)>", "{{ 7 * 7 }}", "../../x", "a|b`c`", "[/red]x[old]", "=HYPERLINK(\"http://x\")",
    "line\nbreak", "\x1b[31mred", "'; drop", "[click](http://x)",
]  # fmt: skip


# --- terminals


def printed(encoding: str, *rows: list[str]) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_rows("title – [/x]", ["", "PQ"], rows, Console(file=stream, width=200, force_terminal=False))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252"])
def test_tables_are_printed_on_any_terminal(encoding: str) -> None:
    out = printed(encoding, ["[/red]x", "–"], ["[old] 汽车 :smile:", "1.0 ± 2"], ["\x1b[31mred\x07", "\u202ex"])
    for words in ("[/x]", "[/red]x", "[old]", ":smile:", "\\x1b[31mred\\x07", "\\u202ex"):
        assert words in out
    assert "\x1b" not in out
    assert ("汽车" if encoding == "utf-8" else "??") in out
    assert ("1.0 +- 2" if encoding == "ascii" else "1.0 ± 2") in out


def test_letters_of_an_encoding() -> None:
    assert encodable("– ü 汽", "latin-1") == "- ü ?"
    assert encodable("– ü 汽", "utf-8") == "– ü 汽"
    assert encodable("x", "no such encoding") == "x"


def test_report_of_runs_with_brackets_in_their_names(tmp_path: Path) -> None:
    for k, name in enumerate(("[/red]x", "b [old]")):
        folder = write_run(tmp_path / "runs [x]" / f"run{k}")
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["config"]["head"] = {"name": name}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    result = run("report", f"runs={tmp_path / 'runs [x]'}")
    assert result.code == 0, result.err
    assert "[/red]x" in result.out
    assert "b [old]" in result.out


# --- pages and tables


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.words += data


def hostile_run(folder: Path, name: str, other: str) -> Path:
    write_run(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = metrics["per_class"]
    metrics["per_class"] = {**rows, **dict.fromkeys(HOSTILE, rows["thing0"])}
    metrics["config"]["head"] = {"name": name}
    metrics["config"]["data"]["name"] = other
    metrics |= {"command": name, "versions": {name: name}, "complete": False, "faults": [other]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "baselines.json").write_text(json.dumps({other: metrics}))
    classes = ClassTable(
        ClassInfo(hostile, 10 + k, k > 1, (k, 90, 200)) for k, hostile in enumerate(HOSTILE[k] for k in range(5))
    )
    add_gallery(folder, classes, count=2)
    index = json.loads((folder / "gallery/index.json").read_text())
    for item, image_id in zip(index, HOSTILE, strict=False):
        item["image_id"] = image_id
    (folder / "gallery/index.json").write_text(json.dumps(index))
    return folder


def plain_page(page: Page) -> None:
    """Nothing that runs, and no address but pictures of its own and pages beside it."""
    assert "script" not in page.tags
    assert "svg" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on"), (name, value)
        if name in ("href", "src", "srcset"):
            assert value.startswith(("data:", "#", "../", "index.html")), value
            assert "javascript:" not in value


@pytest.mark.filterwarnings("ignore:.*letters")
def test_pages_show_hostile_names_as_letters(tmp_path: Path) -> None:
    for k, (name, other) in enumerate(zip(HOSTILE, reversed(HOSTILE), strict=True)):
        if k % 7:
            continue
        page = Page(write_report(hostile_run(tmp_path / f"run{k}", name, other)).read_text())
        plain_page(page)
        for hostile in (name, other, *HOSTILE[:4]):
            assert " ".join(hostile.split()) in " ".join(page.words.split()), hostile
    page = Page(write_summary(tmp_path).read_text())
    plain_page(page)
    lines = (tmp_path / "summary.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in tables[:4]}) == 1
    assert not any("<script" in line or "<img" in line for line in lines)


def test_a_report_of_damaged_numbers(tmp_path: Path) -> None:
    """What is no number is left out; numbers of hundreds of digits are none."""
    for k, paths in enumerate((True, "x")):
        folder = write_run(tmp_path / f"run{k}", seed=k)
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics |= {"miou": 10**400, "sq": float("nan"), "rq": [1], "confusion": {"50": "x"}, "num_images": -1}
        metrics["config"]["paths"] = paths
        (folder / "metrics.json").write_text(json.dumps(metrics))
    add_gallery(folder, count=1)
    index = json.loads((folder / "gallery/index.json").read_text())
    (folder / "gallery/index.json").write_text(json.dumps([{**index[0], "class_ids": 1.5, "pq": 10**400}, 7]))
    assert "nan" not in Page(write_report(folder).read_text()).words
    write_summary(tmp_path)
    with (tmp_path / "summary.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert [row[rows[0].index("miou")] for row in rows[1:3]] == ["", ""]


def test_markdown_shows_the_words() -> None:
    assert text("a|b`c` <b> [x](y) *z*\nd\\") == "a\\|b\\`c\\` &lt;b&gt; \\[x\\](y) \\*z\\* d\\\\"
    assert text("panoptic_fcn, 34.1 ± 0.3") == "panoptic_fcn, 34.1 ± 0.3"
    assert text("\x1b[0m") == "\\\\x1b\\[0m"


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [("=1+1", "'=1+1"), ("+x", "'+x"), ("-x", "'-x"), ("@x", "'@x"), ("\tx", "'\tx"), ("\rx", "'\rx"),
     ("  =x", "'  =x"), ("-1.5", "-1.5"), (-1.5, -1.5), ("", ""), ("x=1", "x=1"), (None, None), ("–", "–"),
     ("-", "'-")],
)  # fmt: skip
def test_no_cell_is_a_formula(cell: Any, wanted: Any) -> None:
    assert harmless(cell) == wanted


def test_a_summary_holds_no_formula(tmp_path: Path) -> None:
    names = ('=HYPERLINK("http:x")', "@SUM(1)", "b")
    for k, name in enumerate(names):
        write_run(tmp_path / name, seed=k, pq=0.3 + k / 100)
    write_summary(tmp_path)
    with (tmp_path / "summary.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert {row[1] for row in rows[1:4]} == {f"'{names[0]}", f"'{names[1]}", "b"}
    assert [float(row[rows[0].index("pq")]) for row in rows[1:4]] == [0.3, 0.31, 0.32]


# --- letters on pictures


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_told", [])


def test_names_are_written_in_the_letters_that_a_font_has(fresh: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("car", "Straße", "машина", "δέντρο", "سيارة", "רכב", "thing\nof two lines"):
            assert fonts.legible(name, 7) == name.replace("\n", " ")
        assert fonts.plottable("машина", 7) == "машина"
    with pytest.warns(UserWarning, match=r"letters of the class name '汽车', so its number 7 .*PANOPTIC_IBS_FONT"):
        assert fonts.legible("汽车", 7) == "7"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a process
        assert fonts.legible("रास्ता", 8) == "8"
        assert fonts.plottable("汽车 1") == "?? 1"
        assert fonts.plottable("سيارة", 9) == "9"  # matplotlib would set it from left to right


def test_overlays_and_figures_of_any_script(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    plain = fonts.font_for
    monkeypatch.setattr("panoptic_ibs.visualize.font_for", lambda t, s: (drawn.append(t), plain(t, s))[1])
    names = ("汽车", "машина", "سيارة", "two\nlines", "")
    classes = ClassTable(ClassInfo(name, 11 + k, True, (k, 90, 200)) for k, name in enumerate(names))
    ids = np.repeat(np.arange(1, 6), 40)[:, None].repeat(200, 1)
    with pytest.warns(UserWarning, match="its number 11 stands"):
        overlay(np.zeros((200, 200, 3), np.uint8), ids, range(5), classes, labels=True)
    assert sorted(set(drawn)) == sorted(["11", "машина", "سيارة", "two lines", ""])
    folder = write_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    row = metrics["per_class"]["thing0"]
    metrics["per_class"] = {"汽车": row, "машина": row, "سيارة": row}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no glyph is missing
        write_report(folder)
    assert "汽车" in (folder / "report/index.html").read_text()


def test_a_font_of_the_users(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cached in (fonts.font_files, fonts._all_letters):
        cached.cache_clear()
    (tmp_path / "x.ttf").write_bytes(b"no font")
    monkeypatch.setenv(fonts.VARIABLE, str(tmp_path / "x.ttf"))
    with pytest.warns(UserWarning, match=r"PANOPTIC_IBS_FONT=.*x\.ttf: this font cannot be read"):
        assert len(fonts.font_files()) == 1
    fonts.font_files.cache_clear()
    monkeypatch.setenv(fonts.VARIABLE, fonts.font_files.__wrapped__()[0][0])
    fonts.font_files.cache_clear()
    assert len(fonts.font_files()) == 2
    assert fonts.figure_families() == ["DejaVu Sans", "DejaVu Sans"]
    for cached in (fonts.font_files, fonts._all_letters):
        cached.cache_clear()
