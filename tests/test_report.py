from __future__ import annotations

import csv
import html
import json
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import random_target
from panoptic_ibs.classes import ClassInfo, ClassTable
from panoptic_ibs.errors import DataError
from panoptic_ibs.report import main
from panoptic_ibs.report_pages import GalleryWriter, collect, load_run, write_report, write_summary
from panoptic_ibs.report_pages.records import confusion_curve, read_curves
from panoptic_ibs.report_pages.terminal import print_table
from panoptic_ibs.segments import Prediction
from panoptic_ibs.visualize import find_confused
from run_folders import CLASSES, add_curves, add_gallery, write_run


class Links(HTMLParser):
    """All addresses that a browser would load or follow, and the names of all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "full")
    add_curves(run)
    add_gallery(run)
    baselines = {"untrained network": {"pq": 0.0025}, "stuff-only prediction": {"pq": 0.2, "acc_things": 0.0}}
    (run / "baselines.json").write_text(json.dumps(baselines))
    (run / "timing.json").write_text(json.dumps({"train_seconds": 200.4}))
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text("- ibs=paired\n- data.root=a b\n")
    write_report(run)
    return run


def test_page_is_self_contained_and_small(full: Path) -> None:
    page = (full / "report" / "index.html").read_text()
    links = Links(page)
    assert len(links.addresses) > 15
    assert all(a.startswith(("data:", "#")) for a in links.addresses)
    assert not {"script", "iframe", "object", "embed"} & set(links.tags)
    assert "@import" not in page
    assert not re.search(r"url\((?!data:)", page)
    assert len(page) < 10_000_000


def test_page_holds_the_numbers_and_the_words(full: Path) -> None:
    page = (full / "report" / "index.html").read_text()
    text = " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)).split())
    assert "Panoptic FCN reaches 31.2 PQ on the embedded synthetic street scenes" in text
    assert "for 600 steps in 3 min 20 s (seed 0)" in text
    assert "On 12 full images" in text
    assert "61.3 % of the true thing pixels" in text
    assert "4.3 % of the predicted things are confused" in text
    for expected in (
        "Confusion @ 25 % ↓ 9.1",
        "untrained network",
        "+31.0",
        "+11.2",
        "'data.root=a b'",
        "panoptic_ibs 0.1.0",
    ):
        assert expected in text, expected
    assert "thing0" in text
    assert "thing2" not in text.split("Classes")[1].split("How it was made")[0]  # did not occur


def test_figures_lie_beside_the_page_as_png(full: Path) -> None:
    names = {f.stem for f in (full / "report").glob("*.png")}
    assert {"losses", "validation", "learning_rate", "confusion", "confusion_by_size", "per_class"} <= names
    assert {f"gallery_00_{kind}" for kind in ("input", "truth", "prediction", "confused")} <= names
    for file in (full / "report").glob("*.png"):
        with Image.open(file) as picture:
            picture.verify()


def test_both_colour_schemes_have_figures(full: Path) -> None:
    page = (full / "report" / "index.html").read_text()
    pairs = re.findall(r'prefers-color-scheme: dark\)" srcset="([^"]+)"><img src="([^"]+)"', page)
    assert len(pairs) == 6
    assert all(dark != light for dark, light in pairs)


def test_names_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["per_class"]["<b>"] = {"pq": 0.1, "sq": 0.1, "rq": 0.1, "tp": 1, "fp": 0, "fn": 0, "iou": 0.1}
    metrics["per_class"]["$x_"] = metrics["per_class"]["<b>"]
    metrics["config"]["data"]["name"] = "<script>alert(1)</script>"
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "baselines.json").write_text(json.dumps({"<i>none</i>": {"pq": 0.1}}))
    rows = [ClassInfo("<b>", 1, True, (9, 9, 9)), ClassInfo('"><u>', 2, False, (99, 9, 9))]
    add_gallery(run, ClassTable(rows), count=1)
    page = write_report(run, title="A <em> title").read_text()
    tags = Links(page).tags
    assert not {"script", "i", "u", "em"} & set(tags)
    assert "&lt;b&gt;" in page
    assert "&lt;script&gt;" in page
    assert "A &lt;em&gt; title" in page


def test_missing_pieces_become_sentences(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.json").write_text(json.dumps({"pq": 0.5, "config": None, "step": None}))
    page = write_report(run).read_text()
    for sentence in (
        "No learning curves",
        "No gallery",
        "No baselines.json",
        "no confusion curve",
        "no configuration",
        "no class that occurs",
    ):
        assert sentence in page, sentence
    assert "These predictions reach 50.0 PQ" in page
    assert "Predictions in COCO panoptic format were scored" in page


def test_broken_optional_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    add_gallery(run, count=2)
    (run / "baselines.json").write_text("{")
    (run / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    (run / ".hydra").mkdir()
    (run / ".hydra" / "hydra.yaml").write_text("a: [")
    next((run / "gallery").glob("00_*_truth.png")).write_bytes(b"no picture")
    index = json.loads((run / "gallery" / "index.json").read_text())
    index[1]["input"] = "../metrics.json"
    (run / "gallery" / "index.json").write_text(json.dumps([*index, "nonsense"]))
    page = write_report(run).read_text()
    for words in (
        "baselines.json was left out",
        "metrics.csv was left out",
        ".hydra/hydra.yaml was left out",
        "missing or broken",
        "outside the gallery",
    ):
        assert words in page, words
    assert page.count("<section") == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is missing"), ("{", "not readable"), ("[1]", "no number 'pq'"), ('{"pq": "x"}', "'pq'")],
)
def test_unusable_metrics_are_one_clear_error(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        write_report(tmp_path)
    assert "metrics.json" in str(caught.value)


def test_curves_skip_empty_cells_and_what_is_not_finite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    add_curves(run)
    curves = read_curves(run / "metrics.csv")
    assert curves["val/pq"] == ([9, 19, 29, 39], [0.09, 0.19, 0.29, 0.39])
    assert curves["val/acc_things"][0] == [19, 29, 39]
    assert len(curves["train/loss"][0]) == 40
    assert "epoch" not in curves


def test_confusion_is_ordered_by_number() -> None:
    assert confusion_curve({"100": 0.0, "5": 0.2, "50": 0.1, "x": 1, "7": None}) == ([5, 50, 100], [0.2, 0.1, 0.0])


def test_choices_come_from_the_config_or_from_hydra(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert [load_run(run).choice(g) for g in ("head", "data", "sampling", "ibs", "x")] == [
        "panoptic_fcn",
        "synthetic",
        "paired_crop",
        "paired",
        "–",
    ]
    (run / "metrics.json").write_text(json.dumps({"pq": 0.1, "config": {"head": {"_target_": "a.b.Own"}, "ibs": None}}))
    assert [load_run(run).choice(g) for g in ("head", "ibs")] == ["Own", "none"]
    (run / ".hydra").mkdir()
    (run / ".hydra" / "hydra.yaml").write_text("hydra:\n  runtime:\n    choices:\n      head: ciae\n      x: ${y}\n")
    assert load_run(run).choice("head") == "ciae"


def errors_of(count: int) -> dict[str, tuple[int, int]]:
    """Of the images of :func:`add_gallery`: instances that the worst prediction swallows, and that all do."""
    errors = {}
    for i in range(count):
        target, other = random_target(CLASSES, seed=i), random_target(CLASSES, seed=50 + i, segments=3)
        p = Prediction(other.id_map, other.class_ids, torch.full((len(other),), 0.5))
        counts = [len(r.swallowed) for r in find_confused(p, target, CLASSES)]
        errors[f"image{i}"] = (max(counts, default=0), sum(counts))
    return errors


def test_gallery_keeps_the_first_and_the_most_confused_worst_first(tmp_path: Path) -> None:
    add_gallery(tmp_path, count=12, limit=4)
    index = json.loads((tmp_path / "gallery" / "index.json").read_text())
    assert {i["image_id"] for i in index if i["selection"] == "first"} == {"image0", "image1"}
    errors = errors_of(12)
    assert [errors[i["image_id"]] for i in index] == sorted((errors[i["image_id"]] for i in index), reverse=True)
    best = sorted((n for k, n in errors.items() if k not in ("image0", "image1")), reverse=True)[:2]
    assert [errors[i["image_id"]] for i in index if i["selection"] == "most confused"] == best
    assert best[0] > (0, 0)
    assert all(sum(len(r["swallowed"]) for r in i["rows"]) == errors[i["image_id"]][1] for i in index)


def test_gallery_shrinks_wide_images_and_keeps_the_rest(tmp_path: Path) -> None:
    writer = GalleryWriter(tmp_path, CLASSES, max_width=100)
    target = random_target(CLASSES)
    p = Prediction(target.id_map, target.class_ids, torch.ones(len(target)), "a/b c")
    writer.add(np.zeros((64, 128, 3), np.uint8), p, target)
    writer.close()
    (item,) = json.loads((tmp_path / "gallery" / "index.json").read_text())
    assert item["pq"] == pytest.approx(1.0)
    with Image.open(tmp_path / "gallery" / item["prediction"]) as picture:
        assert picture.size == (100, 50)


def test_gallery_without_images_writes_nothing(tmp_path: Path) -> None:
    assert GalleryWriter(tmp_path, CLASSES).close() is None
    assert not (tmp_path / "gallery").exists()


def test_seeds_are_averaged_and_other_settings_kept_apart(tmp_path: Path) -> None:
    values = [0.30, 0.34, 0.35]
    for seed, pq in enumerate(values):
        write_run(tmp_path / f"paired{seed}", seed, pq)
    write_run(tmp_path / "sub" / "heavy", 0, 0.28, weight=5.0)
    write_run(tmp_path / "none", 0, 0.25, ibs="none")
    collection = collect(tmp_path)
    assert sorted(len(s.runs) for s in collection.settings) == [1, 1, 3]
    setting = max(collection.settings, key=lambda s: len(s.runs))
    assert setting.seeds == "0, 1, 2"
    assert setting.mean("pq") == pytest.approx(statistics.mean(values))
    assert setting.deviation("pq") == pytest.approx(statistics.stdev(values))
    assert next(s for s in collection.settings if s.runs[0].name == "heavy").extra == "ibs.weight=5.0"

    page = write_summary(tmp_path).read_text()
    assert (tmp_path / "report" / "confusion.png").is_file()
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [r["kind"] for r in rows].count("run") == 5
    (mean,), (sd,) = ([r for r in rows if r["kind"] == kind] for kind in ("mean", "sd"))
    assert float(mean["pq"]) == pytest.approx(0.33)
    assert float(sd["pq"]) == pytest.approx(statistics.stdev(values))
    markdown = (tmp_path / "summary.md").read_text()
    assert "33.0 ± 2.6" in markdown
    assert "| 0, 1, 2 | 600 |" in markdown
    assert "33.0" in page
    assert "Side by side" not in page


def test_evaluations_of_two_checkpoints_are_two_settings(tmp_path: Path) -> None:
    for name in ("a", "b"):
        file = write_run(tmp_path / name) / "metrics.json"
        metrics = json.loads(file.read_text())
        metrics["config"] |= {"predictions": None, "ckpt_path": f"{name}.ckpt"}
        file.write_text(json.dumps(metrics))
    assert [s.extra for s in collect(tmp_path).settings] == ["ckpt_path=a.ckpt", "ckpt_path=b.ckpt"]
    page = write_report(tmp_path / "a").read_text()
    assert "A checkpoint of Panoptic FCN with" in page
    assert "was trained on" not in page


def test_data_of_another_seed_is_another_setting(tmp_path: Path) -> None:
    for seed in (0, 1):
        file = write_run(tmp_path / f"run{seed}") / "metrics.json"
        metrics = json.loads(file.read_text())
        metrics["config"]["data"]["synthetic"] = {"seed": seed}
        file.write_text(json.dumps(metrics))
    assert [s.extra for s in collect(tmp_path).settings] == ["data.synthetic.seed=0", "data.synthetic.seed=1"]


def test_what_computed_a_run_is_no_setting(tmp_path: Path) -> None:
    """Seeds on a GPU and on a CPU are seeds of one setting; another precision is another."""
    for seed, (accelerator, precision) in enumerate((("gpu", "32-true"), ("cpu", "32-true"), ("gpu", "bf16-mixed"))):
        run = write_run(tmp_path / str(seed), seed=seed)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["config"]["trainer"] = {"accelerator": accelerator, "precision": precision, "val_check_interval": seed}
        metrics["config"]["data"] |= {"num_workers": seed, "memory_mb": 100 * seed, "root": f"/{seed}/cache/set"}
        metrics["config"]["paths"] = {"cache": f"/{seed}/cache"}
        (run / "metrics.json").write_text(json.dumps(metrics))
    assert sorted(s.seeds for s in collect(tmp_path).settings) == ["0, 1", "2"]


def test_interruption_and_fewer_baseline_images_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"interrupted": True, "command": "typed <this>"}))
    (run / "baselines.json").write_text(json.dumps({"stuff only": {"pq": 0.1, "num_images": 5}}))
    page = write_report(run).read_text()
    assert "Training was interrupted" in page
    assert "scored on 12 images, the baselines on 5 of them" in page
    assert "typed &lt;this&gt;" in page


def test_two_runs_are_set_side_by_side(tmp_path: Path) -> None:
    for name, pq in (("a", 0.3), ("b", 0.35)):
        add_gallery(write_run(tmp_path / name, pq=pq, ibs="none" if name == "a" else "paired"), count=2)
    write_report(tmp_path / "a")
    page = write_summary(tmp_path).read_text()
    assert "Side by side" in page
    assert page.count("<section") == 2
    assert "A: Prediction" in page
    assert "B: Confused segments" in page
    assert "+5.0" in page
    links = Links(page)
    outside = [a for a in links.addresses if not a.startswith(("data:", "#"))]
    assert outside == ["../a/report/index.html"]  # a link to follow, nothing to load
    assert (tmp_path / "report" / outside[0]).resolve().is_file()
    assert "script" not in links.tags


def test_broken_runs_are_listed_not_fatal(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    (tmp_path / "<bad>").mkdir()
    (tmp_path / "<bad>" / "metrics.json").write_text('{"pq": ')
    page = write_summary(tmp_path).read_text()
    assert "&lt;bad&gt;" in page
    assert "not readable as JSON" in page
    assert "not readable as JSON" in (tmp_path / "summary.md").read_text()
    assert len(collect(tmp_path).runs) == 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "one")
    assert main([f"runs={tmp_path / 'runs'}"]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert last == str(tmp_path / "runs" / "report" / "index.html")
    assert any("PQ_th" in line for line in table)
    assert main([f"run={tmp_path / 'runs' / 'one'}"]) == 0
    assert (tmp_path / "runs" / "one" / "report" / "index.html").is_file()
    capsys.readouterr()
    for arguments, words in (
        ([f"runs={tmp_path / 'nowhere'}"], "is not a folder"),
        ([f"runs={tmp_path / 'runs' / 'one' / 'report'}"], "No metrics.json below"),
        (["folder=x"], "runs=DIR"),
        (["runs="], "runs=DIR"),
        ([str(tmp_path)], "runs=DIR"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error


def test_the_terminals_table_has_confusion(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"pq": 0.5, "pq_things": 0.25, "prec_things": None, "confusion": {"50": 0.125}, "num_images": 7}
    print_table("validation", {"mine": row})
    *_, head, _, cells, _ = capsys.readouterr().out.strip().splitlines()
    shown = {
        k.strip(" ┃|"): v.strip(" │|") for k, v in zip(re.split("[┃|]", head), re.split("[│|]", cells), strict=True)
    }
    assert (shown["PQ"], shown["PQ_th"], shown["Prec_th"], shown["Conf@50"]) == ("50.0", "25.0", "", "12.5")
    assert shown["images"] == "7"
    print_table("validation", {"mine": row | {"things": {"predicted": 0}}})
    assert "12.5" not in capsys.readouterr().out  # who predicts nothing confuses nothing: that is no result


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from panoptic_ibs.report import main; main(['--help']); "
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'jinja2', 'PIL') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "runs=DIR" in out
    assert out.strip().endswith("[]")
