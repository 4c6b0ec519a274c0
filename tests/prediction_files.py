"""A tiny split, disturbed predictions of it, and their metrics by Pillow and loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from panoptic_files import CATEGORIES, paint, write_coco
from panoptic_ibs.data.dataset import make_target
from panoptic_ibs.data.readers import PanopticReader, coco_panoptic
from panoptic_ibs.metrics import BoundaryQuality, InstanceAP, PanopticMetrics
from panoptic_ibs.prediction_files import Scorer, open_predictions
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

COUNT = 7


def reader_of(root: Path) -> PanopticReader:
    return coco_panoptic(root, "val2017", cache_dir=root / "cache")


def disturb(root: Path, name: str, seed: int) -> Path:
    """Predictions ``root/NAME.json`` with ``root/NAME/``: shifted borders, merged segments, other classes, scores."""
    rng = np.random.default_rng(seed)
    truth = root / "annotations" / "panoptic_val2017"
    content = json.loads(truth.with_suffix(".json").read_text())
    (root / name).mkdir()
    annotations = []
    for entry in content["annotations"]:
        ids = np.array(Image.open(truth / entry["file_name"])).astype(np.int64) @ [1, 256, 65536]
        ids = np.roll(ids, rng.integers(-2, 3, 2), (0, 1))
        category = {s["id"]: s["category_id"] for s in entry["segments_info"]}
        for a, b in rng.choice(list(category), (2, 2)):
            ids[ids == a] = b
        listed = [int(i) for i in np.unique(ids) if i]
        category |= {i: int(rng.choice([7, 23, 24, 26])) for i in listed if rng.random() < 0.15}
        Image.fromarray(paint(ids)).save(root / name / entry["file_name"])
        segments = [{"id": i, "category_id": category[i], "score": float(rng.integers(1, 9)) / 8} for i in listed]
        annotations.append({"image_id": entry["image_id"], "file_name": entry["file_name"], "segments_info": segments})
    path = root / f"{name}.json"
    path.write_text(json.dumps({"annotations": annotations, "categories": CATEGORIES}))
    return path


def write_split(root: Path) -> Path:
    """A COCO panoptic split ``val2017`` and predictions ``mine``."""
    write_coco(root, "val2017", COUNT, (60, 80))
    disturb(root, "mine", 1)
    return root


def targets_and_predictions(reader: PanopticReader, path: Path) -> list[tuple[Prediction, Target]]:
    """As the package's own types, by Pillow and loops."""
    content = json.loads(path.read_text())
    pairs = []
    for i in range(len(reader)):
        entry = next(a for a in content["annotations"] if str(a["image_id"]) == reader.records[i].image_id)
        ids = np.array(Image.open(path.with_suffix("") / entry["file_name"])).astype(np.int64) @ [1, 256, 65536]
        dense = np.zeros(ids.shape, np.int32)
        for k, s in enumerate(entry["segments_info"], 1):
            dense[ids == s["id"]] = k
        classes = [reader.classes.contiguous[s["category_id"]] for s in entry["segments_info"]]
        scores = torch.tensor([s.get("score", 1.0) for s in entry["segments_info"]])
        prediction = Prediction(torch.from_numpy(dense), torch.tensor(classes), scores)
        pairs.append((prediction, make_target(reader.read_id_map(i), reader, i, min_pixels=0)))
    return pairs


def expected(reader: PanopticReader, path: Path) -> dict[str, Any]:
    pairs = targets_and_predictions(reader, path)
    metrics = [PanopticMetrics(reader.classes), BoundaryQuality(reader.classes)]
    for metric in metrics:
        metric.update([p for p, _ in pairs], [t for _, t in pairs])
    precision = InstanceAP(reader.classes, panoptic=True)
    precision.update([p for p, _ in pairs], [t for _, t in pairs])
    return metrics[0].compute() | metrics[1].compute() | {"ap_from_panoptic": precision.compute()}


def close(ours: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, dict):
        assert set(wanted) <= set(ours), where
        for key in wanted:
            close(ours[key], wanted[key], f"{where}.{key}")
    else:
        assert ours == (None if wanted is None else pytest.approx(wanted, abs=1e-12)), where


def score(reader: PanopticReader, *paths: Path, **options: Any) -> list[dict[str, Any]]:
    scorer = Scorer(reader, [open_predictions(p, reader) for p in paths], range(len(reader)), **options)
    scorer.run()
    return scorer.results()
