"""Metrics against the published definitions, written as naive loops over pixels and segments."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from helpers import class_table, target_from_map
from panoptic_ibs.functional.overlap import joint_histogram, joint_histogram_raw
from panoptic_ibs.metrics import ConfusionCurve, PanopticMetrics, PanopticQuality, ThingPixelQuality
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

CLASSES = class_table(things=3, stuff=2)  # contiguous ids: stuff 0, 1; things 2, 3, 4
MAP_TYPES = (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64)
THRESHOLDS = (0, 5, 33.3, 50, 75, 95)


def prediction(id_map: Any, class_ids: list[int]) -> Prediction:
    id_map = torch.as_tensor(id_map, dtype=torch.int32)
    return Prediction(id_map, torch.tensor(class_ids, dtype=torch.long), torch.ones(len(class_ids)), "image")


def target(id_map: Any, class_ids: list[int], crowd: tuple[int, ...] = ()) -> Target:
    return target_from_map(torch.as_tensor(id_map), class_ids, CLASSES, crowd)


def random_pair(seed: int) -> tuple[Prediction, Target]:
    """Boxes over boxes; the prediction is a disturbed copy, so that hits, misses, void and crowds all occur."""
    rng = np.random.default_rng(seed)
    h, w = rng.integers(4, 24, 2)
    g = int(rng.integers(0, 9))
    truth = np.zeros((h, w), np.int64)
    for k in range(1, g + 1):
        y, x = rng.integers(0, h), rng.integers(0, w)
        truth[y : y + rng.integers(1, h + 1), x : x + rng.integers(1, w + 1)] = k
    present = rng.permutation(len(CLASSES))[: rng.integers(1, len(CLASSES) + 1)]  # other classes are absent
    truth_classes = rng.choice(present, g)
    crowd = tuple(np.flatnonzero(rng.random(g) < 0.3).tolist())

    guess = truth.copy()
    guess_classes = np.where(rng.random(g) < 0.8, truth_classes, rng.choice(present, g))
    for _ in range(rng.integers(0, 3) if g else 0):  # two truths become one guess
        a, b = rng.integers(1, g + 1, 2)
        guess[guess == a] = b
    for _ in range(rng.integers(0, 4)):  # new segments and void
        guess_classes = np.append(guess_classes, rng.choice(present))
        y, x = rng.integers(0, h), rng.integers(0, w)
        box = np.s_[y : y + rng.integers(1, h // 2 + 1), x : x + rng.integers(1, w // 2 + 1)]
        guess[box] = rng.choice([0, len(guess_classes)])
    guess[rng.random((h, w)) < rng.choice([0, 0.1])] = 0
    order = rng.permutation(len(guess_classes))
    shuffled = np.concatenate(([0], np.argsort(order) + 1))[guess]
    return prediction(shuffled, guess_classes[order].tolist()), target(truth, truth_classes.tolist(), crowd)


def naive(pairs: list[tuple[Prediction, Target]]) -> dict[str, Any]:
    """All metrics from their definitions: sets of pixels, loops over segments."""
    rows = {c: {"tp": 0, "fp": 0, "fn": 0, "iou_sum": 0.0, "inter": 0, "union": 0} for c in range(len(CLASSES))}
    px_tp = px_fp = px_n = things = 0
    confused = dict.fromkeys(THRESHOLDS, 0)
    for p, t in pairs:
        cells = [(y, x) for y in range(t.id_map.shape[0]) for x in range(t.id_map.shape[1])]
        truth = {c: int(t.id_map[c]) for c in cells}
        guess = {c: int(p.id_map[c]) for c in cells}
        gts = {k: {c for c in cells if truth[c] == k} for k in range(len(t) + 1)}
        prs = {k: {c for c in cells if guess[c] == k} for k in range(1, len(p) + 1)}
        prs = {k: v for k, v in prs.items() if v}
        g_class = {k: int(t.class_ids[k - 1]) for k in gts if k}
        p_class = {k: int(p.class_ids[k - 1]) for k in prs}
        match = {}
        for i in g_class:
            for j in prs:
                if not t.is_crowd[i - 1] and g_class[i] == p_class[j] and gts[i] & prs[j]:
                    iou = len(gts[i] & prs[j]) / len((gts[i] | prs[j]) - gts[0])
                    if iou > 0.5:
                        match[j] = i
                        rows[g_class[i]]["tp"] += 1
                        rows[g_class[i]]["iou_sum"] += iou
        last_crowd = {g_class[i]: i for i in g_class if t.is_crowd[i - 1]}
        for i in g_class:
            rows[g_class[i]]["fn"] += not t.is_crowd[i - 1] and i not in match.values()
            thing = CLASSES[g_class[i]].is_thing and not t.is_crowd[i - 1]
            px_n += len(gts[i]) if thing else 0
        for j, c in p_class.items():
            excuse = gts[0] | (gts[last_crowd[c]] if c in last_crowd else set())
            ignored = j not in match and len(prs[j] & excuse) / len(prs[j]) > 0.5
            rows[c]["fp"] += j not in match and not ignored
            if not CLASSES[c].is_thing:
                continue
            things += 1
            for threshold in THRESHOLDS:
                covered = [
                    i
                    for i, k in g_class.items()
                    if CLASSES[k].is_thing
                    and not t.is_crowd[i - 1]
                    and 100 * len(gts[i] & prs[j]) > threshold * len(gts[i])
                ]
                confused[threshold] += len(covered) >= 2
            for cell in prs[j]:
                if not ignored and truth[cell]:
                    right = match.get(j) == truth[cell]
                    px_tp, px_fp = px_tp + right, px_fp + (not right)
        for c in rows:
            a = {x for x in cells if truth[x] and g_class[truth[x]] == c}
            b = {x for x in cells if guess[x] and p_class[guess[x]] == c and truth[x]}
            rows[c]["inter"] += len(a & b)
            rows[c]["union"] += len(a | b)
    out: dict[str, Any] = {"num_images": len(pairs), "per_class": {}}
    for c, r in rows.items():
        n = r["tp"] + r["fp"] / 2 + r["fn"] / 2
        r |= {"sq": r["iou_sum"] / r["tp"] if r["tp"] else 0.0, "rq": r["tp"] / n if n else 0.0}
        r |= {"pq": r["sq"] * r["rq"], "iou": r["inter"] / r["union"] if r["union"] else 0.0}
        out["per_class"][CLASSES[c].name] = {k: r[k] for k in ("pq", "sq", "rq", "tp", "fp", "fn", "iou")}
    found = [rows[c] for c in CLASSES.thing_ids]
    tp, fp, fn = (sum(r[key] for r in found) for key in ("tp", "fp", "fn"))
    out["things"] = {"predicted": tp + fp, "matched": tp, "true": tp + fn}
    for suffix, group in (("", range(5)), ("_things", CLASSES.thing_ids), ("_stuff", CLASSES.stuff_ids)):
        seen = [c for c in group if rows[c]["tp"] + rows[c]["fp"] + rows[c]["fn"]]
        for key in ("pq", "sq", "rq"):
            out[key + suffix] = sum(rows[c][key] for c in seen) / len(seen) if seen else 0.0
    out["acc_things"] = px_tp / px_n if px_n else 0.0
    out["prec_things"] = px_tp / (px_tp + px_fp) if px_tp + px_fp else 0.0
    out["confusion"] = {f"{k:g}": v / things if things else 0.0 for k, v in confused.items()}
    return out


def assert_equal(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if isinstance(value, dict):
            assert list(ours[key]) == list(value)
            assert_equal(ours[key], value)
        else:
            assert ours[key] == pytest.approx(value, abs=1e-12), key


def score(p: Prediction, t: Target) -> dict[str, Any]:
    metric = PanopticMetrics(CLASSES, THRESHOLDS)
    metric.update([p], [t])
    result = metric.compute()
    assert_equal(result, naive([(p, t)]))
    return result


@pytest.mark.parametrize("block", range(8))
def test_equals_the_published_definitions_on_random_maps(block: int) -> None:
    pairs = [random_pair(seed) for seed in range(40 * block, 40 * block + 40)]
    metric = PanopticMetrics(CLASSES, THRESHOLDS)
    for p, t in pairs:
        score(p, t)
        metric.update([p], [t])
    total = metric.compute()
    assert_equal(total, naive(pairs))
    for key in ("tp", "fp", "fn"):  # the comparison covers every outcome
        assert sum(row[key] for row in total["per_class"].values()) > 5
    assert total["confusion"]["0"] > 0


def test_single_metrics_agree_with_the_combined_one_and_results_are_json() -> None:
    pairs = [random_pair(seed) for seed in range(20)]
    batch = [p for p, _ in pairs], [t for _, t in pairs]
    combined = PanopticMetrics(CLASSES)
    combined.update(*batch)
    whole = combined.compute()
    assert json.loads(json.dumps(whole)) == whole
    assert list(whole["confusion"]) == [str(t) for t in range(5, 100, 5)]
    singles: dict[str, Any] = {}
    for metric in (PanopticQuality(CLASSES), ThingPixelQuality(CLASSES), ConfusionCurve(CLASSES)):
        metric.update(*batch)
        singles |= metric.compute()
    assert singles.items() <= whole.items()
    assert set(whole) - set(singles) == {"pq_by_size"}
    combined.reset()
    assert combined.compute()["num_images"] == 0


def test_void_predicted_stays_in_the_union() -> None:
    """The thing's half is void, stuff is perfect: 0.5; torchmetrics says 1.0."""
    result = score(prediction([[1, 1, 0, 0]], [0]), target([[1, 1, 2, 2]], [0, 2]))
    assert (result["pq"], result["pq_stuff"], result["pq_things"]) == (0.5, 1.0, 0.0)
    partly = score(prediction([[1, 1, 1, 0]], [2]), target([[1, 1, 1, 1]], [2]))
    assert partly["pq"] == 0.75
    assert partly["prec_things"] == 1.0


def test_void_truth_leaves_the_union_and_excuses() -> None:
    result = score(prediction([[1, 1, 1, 1]], [2]), target([[1, 0, 0, 0]], [2]))
    assert (result["pq"], result["acc_things"], result["prec_things"]) == (1.0, 1.0, 1.0)
    excused = score(prediction([[1, 1, 1, 2]], [3, 2]), target([[0, 0, 1, 2]], [0, 2]))
    assert excused["per_class"]["thing1"]["fp"] == 0  # two thirds on void
    half = score(prediction([[1, 1, 2]], [3, 2]), target([[0, 1, 2]], [0, 2]))
    assert half["per_class"]["thing1"]["fp"] == 1  # exactly half is not more than half


def test_iou_of_exactly_half_does_not_match() -> None:
    result = score(prediction([[1, 0]], [2]), target([[1, 1]], [2]))
    assert (result["per_class"]["thing0"]["tp"], result["per_class"]["thing0"]["fp"]) == (0, 1)


def test_crowd_is_neither_matched_nor_missed() -> None:
    result = score(prediction([[1, 1, 1]], [2]), target([[1, 1, 1]], [2], crowd=(0,)))
    row = result["per_class"]["thing0"]
    assert (row["tp"], row["fp"], row["fn"], row["iou"]) == (0, 0, 0, 1.0)
    other = score(prediction([[1, 1, 1]], [3]), target([[1, 1, 1]], [2], crowd=(0,)))
    assert other["per_class"]["thing1"]["fp"] == 1  # a crowd excuses its own class only


def test_only_the_last_crowd_of_a_class_excuses() -> None:
    t = target([[1, 1, 1, 2, 2, 2]], [2, 2], crowd=(0, 1))
    result = score(prediction([[1, 1, 1, 2, 2, 2]], [2, 2]), t)
    assert result["per_class"]["thing0"]["fp"] == 1


def test_absent_classes_and_empty_sides() -> None:
    absent = score(prediction([[1, 1]], [2]), target([[1, 1]], [2]))
    assert (absent["pq"], absent["pq_stuff"]) == (1.0, 0.0)  # four classes absent from both do not weigh in
    nothing_predicted = score(prediction([[0, 0]], []), target([[1, 1]], [2]))
    assert nothing_predicted["per_class"]["thing0"]["fn"] == 1
    nothing_there = score(prediction([[1, 1]], [2]), target([[0, 0]], []))
    assert nothing_there["per_class"]["thing0"]["fp"] == 0  # all of it lies on void
    empty = score(prediction([[0, 0]], []), target([[0, 0]], []))
    assert empty["pq"] == empty["acc_things"] == empty["prec_things"] == empty["confusion"]["50"] == 0.0


def test_rows_without_pixels() -> None:
    """A listed prediction without a pixel does not count; a listed truth without a pixel is a miss (panopticapi)."""
    row = score(prediction([[1, 1]], [2, 3]), target([[1, 1]], [2, 4]))["per_class"]
    assert row["thing1"]["fp"] == 0
    assert row["thing2"]["fn"] == 1


def test_confusion_by_hand() -> None:
    """One guess covers all of a truth and 60 % of a second: confused below 60 %, not at it (more than T %)."""
    truth = torch.tensor([[1] * 5 + [2] * 5])
    guess = torch.tensor([[1] * 8 + [2] * 2])
    metric = ConfusionCurve(CLASSES, [50, 59.5, 60])
    metric.update([prediction(guess, [2, 2])], [target(truth, [2, 3])])
    assert metric.compute()["confusion"] == {"50": 0.5, "59.5": 0.5, "60": 0.0}
    crowd = ConfusionCurve(CLASSES, [50])
    crowd.update([prediction(guess, [2, 2])], [target(truth, [2, 3], crowd=(1,))])
    assert crowd.compute()["confusion"] == {"50": 0.0}


@pytest.mark.parametrize(("side", "size"), [(31, "small"), (32, "medium"), (95, "medium"), (96, "large")])
def test_confusion_by_size_of_the_prediction(side: int, size: str) -> None:
    truth = torch.ones(side, side, dtype=torch.int32)
    truth[:, side // 2 :] = 2
    metric = ConfusionCurve(CLASSES, [50])
    metric.update([prediction(torch.ones(side, side), [2])], [target(truth, [2, 2])])
    by_size = metric.compute()["confusion_by_size"]
    assert {k: v["50"] for k, v in by_size.items()} == {k: float(k == size) for k in ("small", "medium", "large")}


@pytest.mark.parametrize("thresholds", [[], [5, 5], [100], [-1]])
def test_bad_thresholds_raise(thresholds: list[float]) -> None:
    with pytest.raises(ValueError, match="thresholds must be distinct percentages"):
        ConfusionCurve(CLASSES, thresholds)


def test_bad_input_raises_and_leaves_the_sums_alone() -> None:
    metric = PanopticMetrics(CLASSES)
    good = prediction([[1, 1]], [2]), target([[1, 1]], [2])
    with pytest.raises(ValueError, match=r"Image image0: the prediction has size \(1, 3\)"):
        metric.update([good[0], prediction([[1, 1, 1]], [2])], [good[1], good[1]])
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        metric.update([good[0]], [good[1], good[1]])
    with pytest.raises(ValueError, match=r"image0.*second id map holds ids from 1 to 2"):
        metric.update([prediction([[1, 2]], [2])], [good[1]])
    with pytest.raises(ValueError, match="class ids of the prediction must lie in 0 to 4"):
        metric.update([prediction([[1, 1]], [5])], [good[1]])
    assert metric.num_images == 0
    assert int(metric.tp.sum()) == 0


def test_id_maps_of_any_integer_type_give_one_result() -> None:
    pairs = [random_pair(seed) for seed in range(30)]
    results = []
    for first, second in [(torch.int32, torch.int64), *((t, t) for t in MAP_TYPES), (torch.uint8, torch.int16)]:
        metric = PanopticMetrics(CLASSES, THRESHOLDS)
        for p, t in pairs:
            metric.update([replace(p, id_map=p.id_map.to(first))], [replace(t, id_map=t.id_map.to(second))])
        results.append(metric.compute())
    assert all(result == results[0] for result in results)


def test_device_path_equals_the_cpu_path() -> None:
    from panoptic_ibs.functional import overlap

    p, t = random_pair(3)
    table = joint_histogram(t.id_map, p.id_map, len(t), len(p))
    assert torch.equal(overlap._histogram_on_device(t.id_map, p.id_map, len(t), len(p)), table)
    with pytest.raises(ValueError, match="their tables have"):
        overlap._histogram_on_device(t.id_map, p.id_map, len(t), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_metrics_on_the_device() -> None:
    pairs = [random_pair(seed) for seed in range(20)]
    metric = PanopticMetrics(CLASSES, THRESHOLDS).cuda()
    for p, t in pairs:
        p.id_map = p.id_map.cuda()
        metric.update([p], [t.to("cuda")])
    assert_equal(metric.compute(), naive(pairs))


def test_raw_ids_agree_with_dense_ids() -> None:
    for seed in range(30):
        p, t = random_pair(seed)
        rng = np.random.default_rng(seed)
        ids = [torch.from_numpy(rng.choice(np.arange(1, 1 << 24), n, replace=False)) for n in (len(t), len(p))]
        raw = [
            torch.cat([torch.zeros(1, dtype=torch.long), i])[m.long()]
            for i, m in zip(ids, (t.id_map, p.id_map), strict=True)
        ]
        expected = joint_histogram(t.id_map, p.id_map, len(t), len(p))
        assert torch.equal(joint_histogram_raw(raw[0].int(), raw[1].int(), *ids), expected)


def test_states_are_sums_of_fixed_size() -> None:
    """What DDP does: add the states of two metrics that saw different images."""
    pairs = [random_pair(seed) for seed in range(30)]
    metrics = [PanopticMetrics(CLASSES, THRESHOLDS) for _ in range(2)]
    for i, (p, t) in enumerate(pairs):
        metrics[i % 3 == 0].update([p], [t])
    merged = PanopticMetrics(CLASSES, THRESHOLDS)
    for name, default in merged._defaults.items():
        parts = [getattr(m, name) for m in metrics]
        assert all(x.shape == default.shape and x.dtype == default.dtype for x in parts)
        setattr(merged, name, parts[0] + parts[1])
    merged._update_count = 1
    assert_equal(merged.compute(), naive(pairs))


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for shard in (range(7), range(10)):  # uneven, then nothing at all on rank 1
        metric = PanopticMetrics(CLASSES, THRESHOLDS)
        for seed in range(10):
            if (seed in shard) == (rank == 0):
                p, t = random_pair(seed)
                metric.update([p], [t])
        results.append(metric.compute())
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_processes_with_uneven_shards_and_an_empty_rank() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (folder,), nprocs=2)
        results = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    expected = naive([random_pair(seed) for seed in range(10)])
    for result in (*results[0], *results[1]):
        assert_equal(result, expected)
