"""Scoring whole folders of predictions: numbers, threads, confidence intervals, the worst images."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_helpers import run
from panoptic_files import edit
from panoptic_ibs.data.datamodule import PanopticDataModule
from panoptic_ibs.metrics import PanopticMetrics
from panoptic_ibs.prediction_files import PredictionSet, Scorer, compare, open_predictions
from panoptic_ibs.prediction_files.bootstrap import draws, interval
from panoptic_ibs.prediction_files.sets import ScoringOptions, evaluate_predictions
from panoptic_ibs.visualize import find_confused
from prediction_files import COUNT, close, disturb, expected, reader_of, score, targets_and_predictions, write_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_split(tmp_path)


@pytest.mark.parametrize("workers", [1, 3])
def test_numbers_are_those_of_the_metrics(root: Path, workers: int) -> None:
    reader, other = reader_of(root), disturb(root, "other", 2)
    results = score(reader, root / "mine.json", other, ap=True, boundary=True, workers=workers)
    for result, path in zip(results, (root / "mine.json", other), strict=True):
        wanted = expected(reader, path)
        close(result, wanted)
        assert 0.1 < wanted["pq"] < 0.9
        assert wanted["ap_from_panoptic"]["ap"] > 0
        assert set(result) == {*wanted, "confidence"}
    assert results[0]["pq"] != results[1]["pq"]


def test_only_the_chosen_images_count(root: Path) -> None:
    reader = reader_of(root)
    edit(root / "mine.json", lambda c: c["annotations"].pop(0))  # not asked for: no fault
    scorer = Scorer(reader, [open_predictions(root / "mine.json", reader, [2, 5])], [2, 5])
    (found,) = scorer.run()
    metric = PanopticMetrics(reader.classes)
    edit(root / "mine.json", lambda c: c["annotations"].insert(0, {**c["annotations"][0], "image_id": 10}))
    pairs = targets_and_predictions(reader, root / "mine.json")
    metric.update([pairs[i][0] for i in (2, 5)], [pairs[i][1] for i in (2, 5)])
    close(found.result(), metric.compute())


def test_confidence_intervals_equal_scoring_drawn_images(root: Path) -> None:
    """The same draws, but every drawn image given to the metrics as often as it was drawn."""
    reader, other = reader_of(root), disturb(root, "other", 2)
    scorer = Scorer(
        reader, [open_predictions(p, reader) for p in (root / "mine.json", other)], range(COUNT), samples=25
    )
    scorer.run()
    weights = draws(COUNT, 25, 0)
    assert (weights.sum(1) == COUNT).all()
    assert len({tuple(row) for row in weights}) > 20
    values = [s.values() for s in scorer.scores]
    for path, ours in zip((root / "mine.json", other), values, strict=True):
        pairs = targets_and_predictions(reader, path)
        for b, row in enumerate(weights):
            drawn = [pairs[i] for i, n in enumerate(row) for _ in range(n)]
            metric = PanopticMetrics(reader.classes)
            metric.update([p for p, _ in drawn], [t for _, t in drawn])
            wanted = metric.compute()
            for key in ours:
                if key == "per_class":
                    for i, table in enumerate(wanted["per_class"].values()):
                        occurs = table["tp"] + table["fp"] + table["fn"] > 0
                        assert ours[key][b, i] == pytest.approx(
                            table["pq"] if occurs else np.nan, nan_ok=True, abs=1e-9
                        )
                elif key.startswith("confusion@"):
                    assert ours[key][b] == pytest.approx(wanted["confusion"][key[10:]], abs=1e-9)
                else:
                    assert ours[key][b] == pytest.approx(wanted[key], abs=1e-9), key
    results = scorer.results()
    table = results[0]["confidence"]
    assert (table["level"], table["samples"], table["seed"]) == (0.95, 25, 0)
    assert table["intervals"]["pq"] == pytest.approx(np.quantile(values[0]["pq"], [0.025, 0.975]).tolist())
    assert table["intervals"]["pq"][0] < results[0]["pq"] < table["intervals"]["pq"][1]
    assert json.loads(json.dumps(results)) == results
    against = compare(["a", "b"], results, values)["differences"]["b"]
    assert against["pq"]["value"] == pytest.approx(results[1]["pq"] - results[0]["pq"])
    drawn_differences = values[1]["confusion@50"] - values[0]["confusion@50"]
    low_high = [against["confusion@50"][k] for k in ("low", "high")]
    assert low_high == pytest.approx(np.quantile(drawn_differences, [0.025, 0.975]).tolist())
    for name, row in against["per_class"].items():
        assert row["value"] == pytest.approx(results[1]["per_class"][name]["pq"] - results[0]["per_class"][name]["pq"])


def test_comparison_of_a_set_with_itself_is_nothing(root: Path) -> None:
    reader = reader_of(root)
    sets = [open_predictions(root / "mine.json", reader) for _ in range(2)]
    scorer = Scorer(reader, sets, range(COUNT), samples=50)
    scores = scorer.run()
    table = compare(["a", "b"], scorer.results(), [s.values() for s in scores])["differences"]["b"]
    for row in (*(v for k, v in table.items() if k != "per_class"), *table["per_class"].values()):
        assert row == {"value": 0, "low": 0, "high": 0}
    without = compare(["a", "b"], scorer.results(), [])
    assert without["differences"]["b"]["pq"] == {"value": 0, "low": None, "high": None}


def test_another_seed_draws_other_images_and_few_have_no_interval(root: Path) -> None:
    reader = reader_of(root)
    first, again, other = (score(reader, root / "mine.json", seed=s)[0]["confidence"] for s in (0, 0, 1))
    assert first == again
    assert first["intervals"]["pq"] != other["intervals"]["pq"]
    scorer = Scorer(reader, [open_predictions(root / "mine.json", reader, [3])], [3])
    scorer.run()
    assert "confidence" not in scorer.results()[0]
    assert interval(np.full(3, np.nan)) is None
    assert interval(np.array([np.nan, 2.0])) == [2.0, 2.0]


def test_the_worst_images_are_those_with_most_swallowed(root: Path) -> None:
    reader = reader_of(root)
    scorer = Scorer(reader, [open_predictions(root / "mine.json", reader)], range(COUNT), worst=3)
    scorer.run()
    errors = []
    for i, (prediction, target) in enumerate(targets_and_predictions(reader, root / "mine.json")):
        counts = [len(r.swallowed) for r in find_confused(prediction, target, reader.classes, 0.25)]
        metric = PanopticMetrics(reader.classes)
        metric.update([prediction], [target])
        errors.append((max(counts, default=0), sum(counts), 1 - metric.compute()["pq"], i))
    wanted = sorted(errors, reverse=True)[:3]
    assert wanted[0][0] >= 2
    for ours, theirs in zip(sorted(scorer.worst, reverse=True), wanted, strict=True):
        assert (ours.worst, ours.swallowed, ours.loss, ours.index) == pytest.approx(theirs)


def test_memory_keeps_to_sums(root: Path) -> None:
    """What is held after many images is what was held after few: sums, and the worst."""
    reader = reader_of(root)
    found = open_predictions(root / "mine.json", reader)
    assert isinstance(found, PredictionSet)
    sizes = []
    for repeat in (1, 30):
        scorer = Scorer(reader, [found], [*range(COUNT)] * repeat, samples=0, worst=4)
        (result,) = scorer.run()
        sizes.append((sum(v.nbytes for v in result._sums.values()), len(scorer.worst), len(result._tables)))
        assert result.images == COUNT * repeat
    assert sizes[0] == sizes[1]


def documented() -> dict[str, str]:
    """Keys of docs/metrics.md and when each is there."""
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return {key: when.strip() for keys, when in rows for key in re.findall(r"`(\w+)`", keys)}


def evaluate(root: Path, out: Path, *arguments: str) -> dict[str, Any]:
    data = ("data=coco_panoptic", f"data.root={root}", f"data.cache_dir={root / 'cache'}")
    result = run("evaluate", *data, f"run_dir={out}", *arguments)
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def test_metrics_json_is_as_documented(root: Path, tmp_path: Path) -> None:
    """Two sets with everything: exactly the documented keys, shares are fractions, and the comparison of the sets."""
    disturb(root, "other", 2)
    out = tmp_path / "out"
    both = evaluate(root, out, f"predictions=[{root / 'mine.json'},{root / 'other'}]", "evaluation.boundary=true",
                    "evaluation.ap_from_panoptic=true", "evaluation.bootstrap=50", "evaluation.gallery=2",
                    "logger=wandb", "logger.wandb.mode=offline")  # fmt: skip
    keys = documented()
    assert set(both) == {k for k, when in keys.items() if when not in ("instances", "training", "faults")}
    singles = {name: json.loads((out / "sets" / name / "metrics.json").read_text()) for name in ("mine", "other")}
    assert both["pq"] == singles["mine"]["pq"]
    assert both["comparison"]["sets"] == ["mine", "other"]
    difference = both["comparison"]["differences"]["other"]["acc_things"]["value"]
    assert difference == pytest.approx(singles["other"]["acc_things"] - singles["mine"]["acc_things"])
    assert set(singles["other"]) == set(both) - {"comparison"}
    assert (both["step"], both["num_images"]) == (None, COUNT)
    assert list(both["confusion"]) == [str(t) for t in range(5, 100, 5)]
    assert set(both["ap_from_panoptic"]) == {k for k, when in keys.items() if when == "instances"}
    assert set(both["pq_by_size"]["small"]) == {"pq", "sq", "rq", "pq_things", "pq_stuff", "tp", "fp", "fn"}
    assert both["versions"]["torch"] == importlib.metadata.version("torch")
    assert "predictions=[" in both["command"]
    assert fractions(both) > 300

    assert list((out / "wandb").glob("offline-run-*"))
    assert not (out / "checkpoints").exists()
    page = (out / "report" / "index.html").read_text()
    assert "mine and other side by side" in page
    assert "95 % interval" in page
    assert (out / "sets" / "report" / "index.html").is_file()
    for name in ("mine", "other"):
        index = json.loads((out / "sets" / name / "gallery" / "index.json").read_text())
        assert len(index) == 2


def fractions(value: Any, key: str = "") -> int:
    """How many numbers there are; all but counts and settings are shares, or differences of shares."""
    if isinstance(value, dict):
        skipped = ("config", "versions", "command", "num_images", "step", "things", "tp", "fp", "fn", "samples", "seed")
        return sum(fractions(v, k) for k, v in value.items() if k not in skipped)
    if isinstance(value, list):
        return sum(fractions(v, key) for v in value)
    assert value is None or isinstance(value, str) or -1 <= value <= 1, key
    return 1


def test_a_file_of_instances_has_the_documented_keys(root: Path, tmp_path: Path) -> None:
    polygon = [[2.0, 2.0, 30.0, 2.0, 30.0, 30.0, 2.0, 30.0]]
    path = root / "found.json"
    path.write_text(json.dumps([{"image_id": 10, "category_id": 26, "segmentation": polygon, "score": 0.5}]))
    metrics = evaluate(root, tmp_path / "out", f"predictions={path}")
    wanted = {k for k, when in documented().items() if when in ("instances", "always")}
    assert set(metrics) == wanted
    assert "AP on COCO panoptic" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_two_sets_of_one_name_are_numbered(root: Path, tmp_path: Path) -> None:
    data = PanopticDataModule("coco_panoptic", root, val="val2017", cache_dir=root / "cache")
    data.setup("validate")
    options = ScoringOptions(bootstrap=0, gallery=0, limit=3)
    paths = [root / "mine.json", root / "mine", root / "mine.json"]
    metrics = evaluate_predictions(paths, data, tmp_path, options)
    assert list(metrics) == ["mine", "mine_2", "mine_3"]
    assert metrics["mine"]["comparison"]["differences"]["mine_3"]["pq"] == {"value": 0, "low": None, "high": None}
    assert all(m["num_images"] == 3 and "confidence" not in m for m in metrics.values())
    assert not list(tmp_path.glob("**/gallery"))


def test_what_is_sound_is_scored_and_the_status_tells_the_rest(root: Path, tmp_path: Path) -> None:
    edit(root / "mine.json", lambda c: c["annotations"].pop())
    edit(root / "mine.json", lambda c: c["annotations"][0].update(file_name="x.png"))
    (root / "val2017/0002.png").unlink()  # photographs are for the gallery alone
    arguments = ("data=coco_panoptic", f"data.root={root}", f"data.cache_dir={root / 'cache'}")
    out = tmp_path / "o"
    with pytest.warns(UserWarning, match=r"0002\.png: the image is missing.*left out of the gallery"):
        result = run("evaluate", *arguments, f"run_dir={out}", f"predictions={root / 'mine.json'}")
    assert result.code == 2
    assert "2 faults; 5 of 7 images were scored." in result.err
    assert "Traceback" not in result.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["num_images"], metrics["complete"]) == (5, False)
    assert metrics["faults"] == ["image 16: no prediction", "image 10: x.png: PNG that is missing"]
    assert len(json.loads((out / "gallery/index.json").read_text())) == 4
    shutil.rmtree(root / "val2017")
    result = run("evaluate", *arguments, f"run_dir={out}", f"predictions={root / 'mine.json'}", "evaluation.gallery=0")
    assert "5 of 7 images were scored." in result.err

    edit(root / "mine.json", lambda c: c["annotations"].append(c["annotations"][0]))
    result = run("evaluate", *arguments, f"run_dir={tmp_path / 'p'}", f"predictions={root / 'mine.json'}")
    assert result.code == 2
    assert "nothing was scored." in result.err
    assert not (tmp_path / "p" / "metrics.json").exists()
