"""PQ update on 1024 x 2048 id maps: CPU time beside panopticapi's algorithm in memory and torchmetrics.

Neither side reads files. panopticapi's algorithm is timed from two starting points: the raw 24-bit ids, and the decoded
RGB arrays from which its program computes them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

SIZE, SEGMENTS = (1024, 2048), (30, 50, 60)
ALL_METRICS = "PQ + PQ by size + Acc + Prec + confusion"
NOTES = {"uint8 ids": " (as readers and heads make them)"}
NUM_CLASSES, FIRST_THING = 19, 11
Array = npt.NDArray


def run() -> list[dict[str, Any]]:
    """Rows of milliseconds of CPU time: updates with maps of several types, each beside peers on the same maps."""
    import torch

    torch.set_num_threads(1)
    rows = [row for number in SEGMENTS for row in _rows(number)]
    return sorted(rows, key=lambda row: ALL_METRICS in row["what"])


def _rows(number: int) -> list[dict[str, Any]]:
    import torch

    from panoptic_ibs.classes import ClassInfo, ClassTable
    from panoptic_ibs.metrics import PanopticMetrics, PanopticQuality

    classes = ClassTable(ClassInfo(f"class{i}", i, i >= FIRST_THING, (i, i, i)) for i in range(NUM_CLASSES))
    truth, truth_classes = make_map(number, seed=number)
    guess, guess_classes = disturb(truth, truth_classes, seed=number)
    raw = [Raw(ids, rows, seed) for seed, (ids, rows) in enumerate([(truth, truth_classes), (guess, guess_classes)])]
    target, prediction = _as_structures((truth, truth_classes), (guess, guess_classes), classes)
    pictures = [r.rgb() for r in raw]

    def update(metric: Any, dtype: Any) -> Callable[[], None]:
        p, t = (replace(item, id_map=item.id_map.to(dtype)) for item in (prediction, target))
        return lambda: metric.update([p], [t])

    def panopticapi_from_rgb() -> None:
        for r, picture in zip(raw, pictures, strict=True):
            r.ids = ids_of_rgb(picture)
        panopticapi_in_memory(*raw)

    from_raw, totals = _update_from_raw(raw, classes)
    types = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
    ours = {f"{name} ids": update(PanopticQuality(classes), dtype) for name, dtype in types.items()}
    ours |= {"raw 24-bit ids": from_raw}
    peers = {"raw ids": lambda: panopticapi_in_memory(*raw), "RGB arrays": panopticapi_from_rgb}
    _check(update(quality := PanopticQuality(classes), torch.uint8), quality, from_raw, totals, raw)

    whole = update(PanopticMetrics(classes), torch.uint8)
    times = interleaved_ms([*ours.values(), whole, *peers.values()], repeats=15)
    our_ms = dict(zip(ours, times, strict=False))
    whole_ms, peer_ms = times[len(ours)], dict(zip(peers, times[len(ours) + 1 :], strict=True))
    rows = [
        (f"PQ from {start}{NOTES.get(start, '')}, {number} segments / panopticapi from {other}", ms, theirs, goal)
        for start, ms in our_ms.items()
        for other, theirs in peer_ms.items()
        for goal in [">= 7" if start.startswith("raw") else ">= 20"]
    ]
    rows += [
        (
            f"{ALL_METRICS} from uint8 ids, {number} segments / panopticapi (PQ alone) from {other}",
            whole_ms,
            ms,
            ">= 20",
        )
        for other, ms in peer_ms.items()
    ]
    if number == SEGMENTS[0]:
        (torchmetrics_ms,) = interleaved_ms([_torchmetrics_update(raw)], repeats=1)
        rows.append((f"PQ from uint8 ids, {number} segments / torchmetrics", our_ms["uint8 ids"], torchmetrics_ms, ""))
    return [
        {"what": what, "ours": mine, "peer": theirs, "unit": "ms", "ratio": theirs / mine, "target": goal}
        for what, mine, theirs, goal in rows
    ]


def _update_from_raw(raw: list[Raw], classes: Any) -> tuple[Callable[[], None], dict[str, Any]]:
    """A function that adds the image to PQ's sums from raw ids, and those sums."""
    import torch

    from panoptic_ibs.functional.overlap import joint_histogram_raw
    from panoptic_ibs.metrics.overlap import SegmentOverlap
    from panoptic_ibs.metrics.statistics import QualityStatistic

    counter = QualityStatistic(classes)
    totals = counter.zeros()
    maps, listed = [torch.from_numpy(r.ids) for r in raw], [torch.from_numpy(r.listed) for r in raw]
    no_crowd = np.zeros(len(raw[0].listed), dtype=bool)

    def update() -> None:
        table = joint_histogram_raw(*maps, *listed).numpy()
        overlap = SegmentOverlap(table, raw[0].class_ids, no_crowd, raw[1].class_ids)
        for name, count in counter.counts(overlap).items():
            totals[name] = totals[name] + count

    return update, totals


def _check(from_dense: Callable[[], None], quality: Any, from_raw: Callable[[], None], totals: Any, raw: Any) -> None:
    """The peer must find what we find, or the comparison means nothing."""
    from_dense()
    from_raw()
    expected = panopticapi_in_memory(*raw)
    for key, column in (("tp", 0), ("fp", 1), ("fn", 2), ("iou_sum", 3)):
        np.testing.assert_allclose(getattr(quality, key).numpy(), expected[:, column], rtol=1e-12)
        np.testing.assert_allclose(totals[key], expected[:, column], rtol=1e-12)


def make_map(number: int, seed: int) -> tuple[Array, Array]:
    """A dense id map of ``number`` segments with wavy borders and 3 % void, and their class ids."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = y + 9 * np.sin(x / 37) + 2 * np.sin(x / 5), x + 9 * np.sin(y / 29) + 2 * np.sin(y / 4)
    stuff = FIRST_THING
    ids = np.clip((y * stuff / height).astype(np.int32), 0, stuff - 1) + 1
    for k in range(stuff, number):  # things: ellipses of all sizes, later ones in front
        radius = 20 * 12 ** rng.random()
        cy, cx = rng.uniform(0.1, 0.9) * height, rng.uniform(0.02, 0.98) * width
        ids[((y - cy) / radius) ** 2 + ((x - cx) / (1.5 * radius)) ** 2 < 1] = k + 1
    ids[-height // 32 :] = 0
    return ids, np.concatenate((np.arange(stuff), rng.integers(FIRST_THING, NUM_CLASSES, number - stuff)))


def disturb(ids: Array, class_ids: Array, seed: int) -> tuple[Array, Array]:
    """A prediction: borders shifted, two pairs of segments confused, a few lost to void."""
    rng = np.random.default_rng(seed)
    guess = np.roll(ids, (3, 5), (0, 1))
    a, b, c, d, lost = rng.choice(np.arange(FIRST_THING, len(class_ids)), 5, replace=False) + 1
    guess[guess == a] = b
    guess[guess == c] = d
    guess[guess == lost] = 0
    kept = np.flatnonzero(np.isin(np.arange(1, len(class_ids) + 1), guess))
    dense = np.zeros(len(class_ids) + 1, np.int32)
    dense[kept + 1] = np.arange(1, len(kept) + 1)
    return dense[guess], class_ids[kept]


class Raw:
    """The same map with random 24-bit ids, as a panoptic PNG has them once decoded."""

    def __init__(self, ids: Array, class_ids: Array, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.class_ids = class_ids
        self.areas = np.bincount(ids.ravel(), minlength=len(class_ids) + 1)[1:]
        self.listed = rng.choice(np.arange(1, 1 << 24), len(class_ids), replace=False).astype(np.int32)
        self.ids = np.concatenate((np.zeros(1, np.int32), self.listed))[ids]

    def rgb(self) -> Array:
        """The decoded panoptic PNG, (H, W, 3) uint8, which is where panopticapi starts."""
        return np.stack([self.ids >> shift & 255 for shift in (0, 8, 16)], axis=2).astype(np.uint8)


def ids_of_rgb(picture: Array) -> Array:
    """Ids of a decoded panoptic PNG by arithmetic on whole channels in uint32, as panopticapi computes them."""
    wide = np.array(picture, dtype=np.uint32)
    return wide[..., 0] + 256 * wide[..., 1] + 256 * 256 * wide[..., 2]


def panopticapi_in_memory(truth: Raw, guess: Raw) -> Array:
    """Counts tp, fp, fn, sum of IoUs per class (C, 4), the way panopticapi takes: sort all pixels, walk dicts."""
    offset = np.uint64(256**3)
    truth_ids, guess_ids = truth.ids.astype(np.uint32), guess.ids.astype(np.uint32)
    truth_class = dict(zip(truth.listed.tolist(), truth.class_ids.tolist(), strict=True))
    guess_class = dict(zip(guess.listed.tolist(), guess.class_ids.tolist(), strict=True))
    truth_area = dict(zip(truth.listed.tolist(), truth.areas.tolist(), strict=True))  # given by the JSON
    guess_area = dict(zip(*(v.tolist() for v in np.unique(guess_ids, return_counts=True)), strict=True))
    keys, counts = np.unique(truth_ids.astype(np.uint64) * offset + guess_ids.astype(np.uint64), return_counts=True)
    shared = {}
    for key, count in zip(keys, counts, strict=True):
        shared[int(key // offset), int(key % offset)] = int(count)
    result = np.zeros((NUM_CLASSES, 4))
    truth_hit, guess_hit = set(), set()
    for (i, j), count in shared.items():
        if i not in truth_class or j not in guess_class or truth_class[i] != guess_class[j]:
            continue
        iou = count / (truth_area[i] + guess_area[j] - count - shared.get((0, j), 0))
        if iou > 0.5:
            result[truth_class[i]] += (1, 0, 0, iou)
            truth_hit.add(i)
            guess_hit.add(j)
    for i, c in truth_class.items():
        result[c, 2] += i not in truth_hit
    for j, c in guess_class.items():
        result[c, 1] += j not in guess_hit and shared.get((0, j), 0) / guess_area[j] <= 0.5
    return result


def _as_structures(truth: tuple[Array, Array], guess: tuple[Array, Array], classes: Any) -> tuple[Any, Any]:
    import torch

    from panoptic_ibs.segments import Prediction
    from panoptic_ibs.structures import Target

    n = len(truth[1])
    ids = torch.from_numpy(truth[1])
    target = Target(
        id_map=torch.from_numpy(truth[0]),
        class_ids=ids,
        is_thing=torch.tensor(classes.is_thing)[ids],
        is_crowd=torch.zeros(n, dtype=torch.bool),
        boxes=torch.zeros(n, 4),
        areas=torch.from_numpy(np.bincount(truth[0].ravel(), minlength=n + 1)[1:]),
        segment_ids=torch.arange(n),
    )
    rows = torch.from_numpy(guess[1])
    return target, Prediction(torch.from_numpy(guess[0]), rows, torch.ones(len(rows)))


def _torchmetrics_update(raw: list[Raw]) -> Callable[[], None]:
    """Its input is (1, H, W, 2): class and instance; class ``NUM_CLASSES`` stands for void."""
    import torch
    from torchmetrics.detection import PanopticQuality

    metric = PanopticQuality(
        things=set(range(FIRST_THING, NUM_CLASSES)),
        stuffs=set(range(FIRST_THING)),
        allow_unknown_preds_category=True,
    )
    maps = []
    for r in raw:
        order = np.argsort(r.listed)
        at = np.minimum(np.searchsorted(r.listed[order], r.ids), len(order) - 1)
        class_map = np.where(r.ids == 0, NUM_CLASSES, r.class_ids[order][at])
        maps.append(torch.from_numpy(np.stack((class_map, r.ids), -1))[None].long())
    return lambda: metric.update(maps[1], maps[0])


def interleaved_ms(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median CPU milliseconds of each, in turns of one untimed and three timed calls.

    Turns, so that a noisy moment hits all alike; the untimed call, so that none pays for the cache that its
    predecessor in the list left behind.
    """
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            function()
            for _ in range(3):
                start = time.process_time()
                function()
                taken.append(time.process_time() - start)
    return [1000 * statistics.median(t) for t in times]
