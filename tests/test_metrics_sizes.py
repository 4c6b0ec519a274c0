"""Thousands of cases of PQ against the published algorithm; PQ by size, mIoU and boundary PQ against masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from helpers import class_table, target_from_map
from panoptic_ibs.metrics import BoundaryQuality, PanopticMetrics
from panoptic_ibs.metrics.boundary import boundary_table, boundary_width, boundary_zone
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

CLASSES = class_table(things=3, stuff=2)  # contiguous ids: stuff 0, 1; things 2, 3, 4
C = len(CLASSES)
Case = tuple[np.ndarray, list[int], tuple[int, ...], np.ndarray, list[int]]  # truth, classes, crowds, guess, classes


def as_pair(case: Case) -> tuple[Prediction, Target]:
    truth, truth_classes, crowd, guess, guess_classes = case
    prediction = Prediction(
        torch.from_numpy(guess.astype(np.int32)),
        torch.tensor(guess_classes, dtype=torch.long),
        torch.ones(len(guess_classes)),
    )
    return prediction, target_from_map(torch.from_numpy(truth.astype(np.int32)), truth_classes, CLASSES, crowd)


def random_case(rng: np.random.Generator, longest: int = 12) -> Case:
    """Boxes over boxes; the guess is a disturbed copy. Every listed id has a pixel."""
    h, w = rng.integers(1, longest, 2)

    def boxes(ids: np.ndarray, count: int, offset: int) -> None:
        for k in range(count):
            y, x = rng.integers(0, h), rng.integers(0, w)
            ids[y : y + rng.integers(1, h + 1), x : x + rng.integers(1, w + 1)] = offset + k

    truth = np.zeros((h, w), np.int64)
    boxes(truth, int(rng.integers(0, 7)), 1)
    guess = truth.copy()
    boxes(guess, int(rng.integers(0, 4)), 50)
    if rng.random() < 0.5:
        guess[rng.random((h, w)) < 0.15] = 0
    if rng.random() < 0.4 and len(np.unique(guess)) > 2:
        a, b = rng.choice(np.unique(guess), 2, replace=False)
        guess[guess == a] = b
    label = rng.integers(0, C, 100)
    listed = [np.unique(m[m > 0]) for m in (truth, guess)]
    guess_label = np.where(rng.random(100) < 0.8, label, rng.integers(0, C, 100))
    crowd = tuple(np.flatnonzero(rng.random(len(listed[0])) < 0.2).tolist())
    maps = [np.searchsorted(i, m) + 1 if len(i) else m for i, m in zip(listed, (truth, guess), strict=True)]
    dense = [np.where(m == 0, 0, d) for m, d in zip((truth, guess), maps, strict=True)]
    return dense[0], label[listed[0]].tolist(), crowd, dense[1], guess_label[listed[1]].tolist()


def adversarial() -> list[Case]:
    """All maps of three pixels with up to two true and two predicted segments, in several classes, with crowds."""
    cases = []
    classes = [(0, 0), (2, 2), (2, 3)]
    for truth, guess in itertools.product(itertools.product(range(3), repeat=3), repeat=2):
        if {1, 2} & set(truth) == {2} or {1, 2} & set(guess) == {2}:
            continue  # the same case with other numbers
        number = len(cases)
        n, m = max(truth), max(guess)
        crowd = ((), (), (0,), (1,), (0, 1))[number % 5]
        cases.append(
            (
                np.array([truth]),
                list(classes[number % 3][:n]),
                crowd,
                np.array([guess]),
                list(classes[number // 3 % 3][:m]),
            )
        )
    return cases


def published(
    cases: list[Case], iou_of: Callable[..., float] | None = None
) -> tuple[np.ndarray, list[tuple[str, int, int, float]]]:
    """The published algorithm with masks: (C, 4) tp fp fn and sum of IoUs; and every outcome with class and area.

    ``iou_of(truth, guess, i, j, iou)`` may put another IoU in the place of that of the masks.
    """
    outcomes: list[tuple[str, int, int, float]] = []
    for truth, truth_classes, crowd, guess, guess_classes in cases:
        void = truth == 0
        hit_truth, hit_guess = set(), set()
        for i, c in enumerate(truth_classes, 1):
            for j, d in enumerate(guess_classes, 1):
                a, b = truth == i, guess == j
                if c != d or i - 1 in crowd or not (a & b).any():
                    continue
                iou = (a & b).sum() / (a | (b & ~void)).sum()
                if iou_of is not None:
                    iou = iou_of(truth, guess, i, j, iou)
                if iou > 0.5:
                    hit_truth.add(i)
                    hit_guess.add(j)
                    outcomes.append(("tp", c, int(a.sum()), float(iou)))
        crowd_of_class: dict[int, int] = {}
        for i, c in enumerate(truth_classes, 1):
            if i - 1 in crowd:
                crowd_of_class[c] = i
            elif i not in hit_truth:
                outcomes.append(("fn", c, int((truth == i).sum()), 0.0))
        for j, d in enumerate(guess_classes, 1):
            b = guess == j
            if j not in hit_guess:
                excused = (b & void).sum() + (b & (truth == crowd_of_class.get(d, -1))).sum()
                if excused / b.sum() <= 0.5:
                    outcomes.append(("fp", d, int(b.sum()), 0.0))
    return table_of(outcomes), outcomes


def table_of(outcomes: list[tuple[str, int, int, float]]) -> np.ndarray:
    table = np.zeros((C, 4))
    for kind, c, _, iou in outcomes:
        table[c, ("tp", "fp", "fn").index(kind)] += 1
        table[c, 3] += iou
    return table


def means(table: np.ndarray, classes: tuple[int, ...]) -> dict[str, float]:
    """PQ, SQ and RQ over the given classes that occur."""
    rows = [table[c] for c in classes if table[c, :3].sum()]
    pq = [r[3] / (r[0] + r[1] / 2 + r[2] / 2) for r in rows]
    sq = [r[3] / r[0] if r[0] else 0.0 for r in rows]
    rq = [r[0] / (r[0] + r[1] / 2 + r[2] / 2) for r in rows]
    return {k: float(np.mean(v)) if v else 0.0 for k, v in (("pq", pq), ("sq", sq), ("rq", rq))}


@pytest.fixture(scope="module")
def many() -> list[Case]:
    rng = np.random.default_rng(0)
    return [*(random_case(rng) for _ in range(2500)), *adversarial()]


def test_equals_the_published_algorithm_on_thousands_of_cases(many: list[Case]) -> None:
    """Case by case from the states, which are compared to the sums of the reference, then all together."""
    assert len(many) > 2700
    metric = PanopticMetrics(CLASSES)
    former = np.zeros((C, 4))
    for case in many:
        prediction, target = as_pair(case)
        metric.update([prediction], [target])
        sums = np.stack([getattr(metric, k).numpy() for k in ("tp", "fp", "fn", "iou_sum")], 1)
        np.testing.assert_allclose(sums - former, published([case])[0], atol=1e-9)
        former = sums
    values, (table, _) = metric.compute(), published(many)
    assert (table[:, :3] > 100).all()
    for suffix, chosen in (("", range(C)), ("_things", CLASSES.thing_ids), ("_stuff", CLASSES.stuff_ids)):
        for key, value in means(table, tuple(chosen)).items():
            assert values[key + suffix] == pytest.approx(value, abs=1e-12)


def test_miou_is_over_the_classes_with_a_pixel(many: list[Case]) -> None:
    for cases in (many[:1], many[:3], many[:60]):
        metric = PanopticMetrics(CLASSES)
        shared, union = np.zeros(C), np.zeros(C)
        for truth, truth_classes, crowd, guess, guess_classes in cases:
            prediction, target = as_pair((truth, truth_classes, crowd, guess, guess_classes))
            metric.update([prediction], [target])
            a, b = np.array([-1, *truth_classes])[truth], np.array([-1, *guess_classes])[guess]
            for c in range(C):
                shared[c] += ((a == c) & (b == c)).sum()
                union[c] += ((a == c) | ((b == c) & (a >= 0))).sum()
        expected = np.mean([s / u for s, u in zip(shared, union, strict=True) if u]) if union.any() else 0.0
        assert metric.compute()["miou"] == pytest.approx(expected, abs=1e-12)


def blow_up(case: Case, factor: int) -> Case:
    """Every pixel a square, so that segments of all sizes occur."""
    truth, truth_classes, crowd, guess, guess_classes = case
    grown = [m.repeat(factor, 0).repeat(factor, 1) for m in (truth, guess)]
    return grown[0], truth_classes, crowd, grown[1], guess_classes


def test_pq_by_size_sorts_outcomes_by_the_area_of_their_segment(many: list[Case]) -> None:
    cases = [blow_up(c, f) for c, f in zip(many[:240], itertools.cycle((5, 16, 33)), strict=False)]
    metric = PanopticMetrics(CLASSES)
    for case in cases:
        metric.update(*([x] for x in as_pair(case)))
    outcomes = published(cases)[1]
    limits = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 10**9)}
    for size, row in metric.compute()["pq_by_size"].items():
        low, high = limits[size]
        chosen = [o for o in outcomes if low <= o[2] < high]
        table = table_of(chosen)
        assert {k: row[k] for k in ("tp", "fp", "fn")} == dict(
            zip(("tp", "fp", "fn"), table[:, :3].sum(0), strict=True)
        )
        assert all(table[:, :3].sum(0) > 3)
        expected = means(table, tuple(range(C)))
        expected |= {
            "pq_things": means(table, CLASSES.thing_ids)["pq"],
            "pq_stuff": means(table, CLASSES.stuff_ids)["pq"],
        }
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-12)


def test_a_swallowing_prediction_is_one_large_error_and_many_small_ones() -> None:
    truth = np.zeros((100, 100), np.int64)
    for k in range(4):
        truth[50 * (k // 2) : 50 * (k // 2) + 20, 50 * (k % 2) : 50 * (k % 2) + 20] = k + 1
    truth[truth == 0] = 5
    case = truth, [2, 2, 2, 2, 0], (), np.ones((100, 100), np.int64), [2]
    metric = PanopticMetrics(CLASSES)
    metric.update(*([x] for x in as_pair(case)))
    table = metric.compute()["pq_by_size"]
    assert [(table[s]["fp"], table[s]["fn"]) for s in ("small", "medium", "large")] == [(0, 4), (0, 1), (1, 0)]


def naive_zone(mask: np.ndarray, width: int) -> np.ndarray:
    """What a mask loses when it is eroded ``width`` times; outside the image there is no mask."""
    inside = mask.copy()
    for _ in range(width):
        padded = np.pad(inside, 1)
        h, w = inside.shape
        inside = np.array([[padded[y : y + 3, x : x + 3].all() for x in range(w)] for y in range(h)]).reshape(h, w)
    return mask & ~inside


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 7), (3, 3), (14, 17)])
def test_boundary_zone_is_what_erosion_removes(shape: tuple[int, int], width: int) -> None:
    rng = np.random.default_rng(width)
    ids = np.zeros(shape, np.int64)
    for k in range(1, 4):
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        ids[y : y + 9, x : x + 9] = k
    for dtype in (np.uint8, np.int32):
        zone = boundary_zone(ids.astype(dtype), width)
        for k in range(4):
            np.testing.assert_array_equal(zone & (ids == k), naive_zone(ids == k, width))


def test_boundary_pq_equals_masks_and_erosion(many: list[Case]) -> None:
    """Widths of 1 to 3 pixels on maps blown up twice; the same algorithm with the smaller of the two IoUs."""
    assert boundary_width((375, 500)) == 12  # 2 % of 625 is 12.5, which rounds to the even number
    ratio = 0.12

    def smaller(truth: np.ndarray, guess: np.ndarray, i: int, j: int, iou: float) -> float:
        width = boundary_width(truth.shape, ratio)
        a, b = naive_zone(truth == i, width), naive_zone(guess == j, width)
        return min(iou, (a & b).sum() / (a | (b & (truth > 0))).sum())

    cases = [blow_up(c, 2) for c in many[:150]]
    metric = BoundaryQuality(CLASSES, ratio)
    for case in cases:
        metric.update(*([x] for x in as_pair(case)))
    table, _ = published(cases, smaller)
    plain, _ = published(cases)
    values = metric.compute()
    for suffix, chosen in (("", range(C)), ("_things", CLASSES.thing_ids), ("_stuff", CLASSES.stuff_ids)):
        expected = {f"boundary_{k}{suffix}": v for k, v in means(table, tuple(chosen)).items()}
        assert {k: values[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    for c, name in enumerate(CLASSES.names):
        assert [values["boundary_per_class"][name][k] for k in ("tp", "fp", "fn")] == table[c, :3].tolist()
    assert 0 < values["boundary_pq"] < means(plain, tuple(range(C)))["pq"] - 0.005
    assert values["num_images"] == 150


def test_boundary_table_of_bytes_holds_255_segments() -> None:
    """The row of inner pixels comes after the segments': 256 does not fit in a byte."""
    true = np.repeat(np.arange(256, dtype=np.uint8), 9)[None].repeat(9, 0)
    wide = boundary_table(true.astype(np.int64), true.astype(np.int64), 255, 255, 0.001)
    assert wide[256].sum() > 0
    np.testing.assert_array_equal(boundary_table(true, true, 255, 255, 0.001), wide)
