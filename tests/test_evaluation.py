"""Scoring whole folders of predictions: numbers, threads, confidence intervals, the worst images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from panoptic_files import edit
from panoptic_ibs.metrics import PanopticMetrics
from panoptic_ibs.scoring import PredictionSet, Scorer, compare, open_predictions
from panoptic_ibs.scoring.bootstrap import draws, interval
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
