"""Compare two checkpoints on the same images: every number with the interval of its difference.

python examples/compare_checkpoints.py A.ckpt B.ckpt DATA SPLIT OUT

DATA is a data set in COCO panoptic layout. OUT gets the predictions of both, metrics and a page that sets them side by
side.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

import panoptic_ibs


def predict(ckpt: str, data: Path, split: str, out: Path) -> Path:
    """Predict the images of a split; returns the JSON."""
    model = panoptic_ibs.load(ckpt)
    listed = json.loads((data / "annotations" / f"panoptic_{split}.json").read_text(encoding="utf-8"))["images"]
    for image in listed:
        (prediction,) = model.predict(Image.open(data / split / image["file_name"]))
        path = prediction.save(out, name=str(image["id"]))
    return path


def main(first: str, second: str, data: str, split: str, out: str) -> dict[str, Any]:
    """Compare; returns the differences of the second to the first."""
    files = [predict(ckpt, Path(data), split, Path(out) / name) for ckpt, name in ((first, "A"), (second, "B"))]
    scored = panoptic_ibs.score_files(
        files, data="coco_panoptic", root=data, val=split, run_dir=Path(out) / "comparison"
    )
    table = next(metrics["comparison"] for metrics in scored.values() if "comparison" in metrics)
    (differences,) = table["differences"].values()
    for key in ("pq", "pq_things", "acc_things", "prec_things"):
        found = differences[key]
        low, high = (100 * found[end] for end in ("low", "high"))
        print(f"{key:12} B - A {100 * found['value']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}")
    return dict(differences)


if __name__ == "__main__":
    main(*sys.argv[1:])
