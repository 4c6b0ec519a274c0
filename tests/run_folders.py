"""Run folders as training leaves them, without training: for tests of reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers import class_table, random_target
from panoptic_ibs.classes import ClassTable
from panoptic_ibs.report_pages import GalleryWriter
from panoptic_ibs.segments import Prediction

CLASSES = class_table(things=3, stuff=2)


def write_run(path: Path, seed: int = 0, pq: float = 0.3125, ibs: str = "paired", **config: Any) -> Path:
    """A run folder with metrics only."""
    path.mkdir(parents=True)
    metrics = {
        **{f"{k}{s}": 0.4 for k in ("sq", "rq") for s in ("", "_things", "_stuff")},
        "pq": pq,
        "pq_things": 0.2,
        "pq_stuff": 0.5,
        "acc_things": 0.613,
        "prec_things": 0.727,
        "confusion": {"75": 0.01, "25": 0.091, "50": 0.043, "5": 0.2},
        "confusion_by_size": {"small": {"25": 0.05, "50": 0.02}, "large": {"25": 0.3, "50": 0.2}},
        "per_class": {
            "thing0": {"pq": 0.25, "sq": 0.7, "rq": 0.3571, "tp": 5, "fp": 8, "fn": 10, "iou": 0.44},
            "stuff0": {"pq": 0.5, "sq": 0.8, "rq": 0.625, "tp": 3, "fp": 1, "fn": 2, "iou": 0.6},
            "thing2": {"pq": 0.0, "sq": 0.0, "rq": 0.0, "tp": 0, "fp": 0, "fn": 0, "iou": 0.0},
        },
        "num_images": 12,
        "step": 600,
        "config": {
            "seed": seed,
            "paths": {"cache": str(path)},
            "run_dir": str(path),
            "head": {"name": "panoptic_fcn"},
            "data": {"name": "synthetic", "root": "data", "seed": seed},
            "sampling": {"name": "paired_crop"},
            "ibs": {"partners": ibs, **config},
        },
        "versions": {"panoptic_ibs": "0.1.0"},
    }
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


def add_curves(run: Path) -> None:
    """CSVLogger's layout: one kind of value a row, the rest empty."""
    columns = [
        "step",
        "epoch",
        "train/loss",
        "train/loss_ibs",
        "train/loss_things",
        "train/lr",
        "val/pq",
        "val/acc_things",
    ]
    with (run / "metrics.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        for step in range(40):
            writer.writerow(
                {"step": step, "epoch": 0, "train/loss": 5 - step / 20, "train/loss_ibs": 0.1, "train/loss_things": 3}
            )
            writer.writerow({"step": step, "train/lr": 0.02})
            if step % 10 == 9:
                writer.writerow({"step": step, "val/pq": step / 100, "val/acc_things": "nan" if step == 9 else 0.5})


def add_gallery(run: Path, classes: ClassTable = CLASSES, count: int = 3, limit: int = 8) -> None:
    """Pictures of random predictions beside random targets."""
    writer = GalleryWriter(run, classes, limit=limit)
    for i in range(count):
        target = random_target(classes, seed=i, image_index=i)
        other = random_target(classes, seed=50 + i, segments=3)
        image = np.random.default_rng(i).integers(0, 256, (64, 128, 3), dtype=np.uint8)
        scores = torch.full((len(other),), 0.5)
        writer.add(image, Prediction(other.id_map, other.class_ids, scores, f"image{i}"), target)
    assert writer.close() == run / "gallery"
