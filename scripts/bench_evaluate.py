"""Scoring a folder of predictions beside decoding its PNGs alone: wall clock, the same threads; and memory."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from bench_metrics import FIRST_THING, NUM_CLASSES, SIZE, disturb, make_map

SEGMENTS, IMAGES, WORKERS, REPEATS = 50, 40, 2, 5
SMALL = (480, 640)  # as COCO's


def run() -> list[dict[str, Any]]:
    """Rows of milliseconds an image (ground truth and prediction), and of memory for few and for many images."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for size in (SIZE, SMALL):
            root = Path(folder, f"{size[0]}x{size[1]}")
            write(root, size, IMAGES)
            rows += _rows(root, f"{size[0]} x {size[1]}, {SEGMENTS} segments, {WORKERS} threads")
        rows.append(_memory(Path(folder, f"{SMALL[0]}x{SMALL[1]}")))
    return rows


def write(root: Path, size: tuple[int, int], images: int) -> None:
    """A COCO panoptic split ``val`` and predictions ``guess.json`` with ``guess/``; images share four pairs of maps."""
    from panoptic_ibs.classes import ClassInfo, ClassTable

    table = ClassTable(ClassInfo(f"class{i}", i + 1, i >= FIRST_THING, (i, i, i)) for i in range(NUM_CLASSES))
    pairs = []
    for seed in range(4):
        truth = make_map(SEGMENTS, seed)
        pairs.append((truth, disturb(*truth, seed=seed)))
    folders = (root / "annotations" / "panoptic_val", root / "guess")
    for folder in (*folders, root / "val"):
        folder.mkdir(parents=True)
    annotations: tuple[list[Any], list[Any]] = ([], [])
    infos = []
    for i in range(images):
        infos.append({"id": i, "file_name": f"{i}.jpg", "height": size[0], "width": size[1]})
        for (ids, classes), folder, entries in zip(pairs[i % 4], folders, annotations, strict=True):
            listed = np.random.default_rng(i).choice(np.arange(1, 1 << 24), len(classes), replace=False)
            y, x = (np.arange(n) * full // n for n, full in zip(size, ids.shape, strict=True))
            raw = np.concatenate(([0], listed))[ids[y][:, x]]
            png = np.stack([raw >> shift & 255 for shift in (0, 8, 16)], 2).astype(np.uint8)
            Image.fromarray(png).save(folder / f"{i}.png")
            present = np.isin(listed, raw)
            segments = [
                {"id": int(s), "category_id": int(c) + 1, "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1}
                for s, c in zip(listed[present], classes[present], strict=True)
            ]
            entries.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    for path, entries in zip((folders[0].with_suffix(".json"), root / "guess.json"), annotations, strict=True):
        path.write_text(json.dumps({"images": infos, "annotations": entries, "categories": table.to_coco()}))


def _scorer(root: Path, repeat: int = 1, **options: Any) -> Any:
    from panoptic_ibs.data.readers import coco_panoptic
    from panoptic_ibs.prediction_files import Scorer, open_predictions

    reader = coco_panoptic(root, "val", cache_dir=root / "cache")
    return Scorer(reader, [open_predictions(root / "guess.json", reader)], [*range(len(reader))] * repeat,
                  workers=WORKERS, **options)  # fmt: skip


def _rows(root: Path, what: str) -> list[dict[str, Any]]:
    files = sorted([*(root / "guess").glob("*.png"), *(root / "annotations" / "panoptic_val").glob("*.png")])

    def each(function: Callable[[Path], None]) -> Callable[[], None]:
        def run_all() -> None:
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(function, files))

        return run_all

    def score(**options: Any) -> Callable[[], Any]:
        def run_all() -> Any:
            scorer = _scorer(root, **options)
            scorer.run()
            return scorer.results()  # with the intervals, where there are draws

        return run_all

    peer, *rest = _interleaved([
        each(_decode), score(samples=0), score(), score(ap=True), score(boundary=True), each(_as_array), each(_opencv)
    ])  # fmt: skip
    names = (
        ("score a folder: all metrics", "<= 1.2"),
        ("score a folder: all metrics and confidence intervals", "<= 1.2"),
        ("score a folder: the same and AP", ""),
        ("score a folder: the same and boundary PQ", ""),
        ("decode to arrays by Pillow", ""),
        ("decode to arrays by OpenCV", ""),
    )
    return [
        {"what": f"{name}, {what}, {clock} / decode its PNGs by Pillow", "ours": taken[k], "peer": peer[k],
         "unit": "ms", "ratio": taken[k] / peer[k], "target": target}
        for (name, target), taken in zip(names, rest, strict=True)
        for k, clock in enumerate(("wall clock", "CPU time"))
    ]  # fmt: skip


def _decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _as_array(path: Path) -> None:
    with Image.open(path) as image:
        np.asarray(image)


def _opencv(path: Path) -> None:
    cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)


def _interleaved(functions: list[Callable[[], Any]]) -> list[tuple[float, float]]:
    """Median milliseconds an image of each, in turns: wall clock and CPU time of all threads."""
    times: list[list[tuple[float, float]]] = [[] for _ in functions]
    for turn in range(REPEATS + 1):
        for function, taken in zip(functions, times, strict=True):
            start, busy = time.perf_counter(), time.process_time()
            function()
            if turn:
                taken.append((time.perf_counter() - start, time.process_time() - busy))
    medians = [[statistics.median(c) for c in zip(*taken, strict=True)] for taken in times]
    return [(1000 * wall / IMAGES, 1000 * cpu / IMAGES) for wall, cpu in medians]


def _memory(root: Path) -> dict[str, Any]:
    """Peak of Python's and NumPy's memory while scoring some images, and five times as many."""
    peaks = []
    for repeat in (4, 20):
        scorer = _scorer(root, repeat)
        tracemalloc.start()
        scorer.run()[0].result()
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    return {"what": f"peak memory: {20 * IMAGES} images / {4 * IMAGES} images", "ours": peaks[1], "peer": peaks[0],
            "unit": "MB", "ratio": peaks[1] / peaks[0], "target": "<= 1.2"}  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for row in run():
        print(
            f"{row['what']:100} {row['ours']:8.2f} {row['peer']:8.2f} {row['unit']} {row['ratio']:.2f} {row['target']}"
        )
