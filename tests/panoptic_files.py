"""Tiny panoptic data sets written on the fly, in any of the three layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [
    {"id": 7, "name": "road", "isthing": 0, "color": [128, 64, 128]},
    {"id": 23, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
    {"id": 24, "name": "person", "isthing": 1, "color": [220, 20, 60]},
    {"id": 26, "name": "car", "isthing": 1, "color": [0, 0, 142]},
]


def paint(ids: np.ndarray) -> np.ndarray:
    """Ids to RGB: R + 256 G + 65536 B."""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], -1).astype(np.uint8)


def random_scene(
    rng: np.random.Generator, size: tuple[int, int], things: int, only: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """A noise image, its raw id map and the segments; about one thing in ten is a crowd."""
    h, w = size
    coarse = rng.integers(0, 256, (h // 4 + 1, w // 4 + 1, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC))
    ids = np.full(size, 70_007, np.int64)
    ids[: h // 3] = 23
    categories = {70_007: 7, 23: 23}
    crowd = set()
    for k in range(things):
        sid = 1_000_000 + 317 * k
        bh, bw = int(rng.integers(3, h // 2)), int(rng.integers(3, w // 2))
        y, x = int(rng.integers(0, h - bh)), int(rng.integers(0, w - bw))
        ids[y : y + bh, x : x + bw] = sid
        categories[sid] = only or (24, 26)[int(rng.integers(2))]
        if rng.random() < 0.1:
            crowd.add(sid)
    ids[-2:, -5:] = 0
    segments = []
    for sid, category in categories.items():
        ys, xs = np.nonzero(ids == sid)
        if len(ys):
            box = [int(v) for v in (xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)]
            crowded = int(sid in crowd)
            segments.append({"id": sid, "category_id": category, "iscrowd": crowded, "bbox": box, "area": len(ys)})
    return image, ids, segments


def write_coco(
    root: Path,
    split: str = "train2017",
    count: int = 4,
    size: tuple[int, int] = (40, 56),
    things: int = 6,
    seed: int = 0,
) -> Path:
    """A COCO panoptic split; returns its JSON path."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    (root / f"annotations/panoptic_{split}").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        shape = (size[0] + 4 * i, size[1] + 6 * i)
        image, ids, segments = random_scene(rng, shape, things)
        Image.fromarray(image).save(root / split / f"{i:04d}.png")
        Image.fromarray(paint(ids)).save(root / f"annotations/panoptic_{split}/{i:04d}.png")
        images.append({"id": 10 + i, "file_name": f"{i:04d}.png", "height": shape[0], "width": shape[1]})
        annotations.append({"image_id": 10 + i, "file_name": f"{i:04d}.png", "segments_info": segments})
    path = root / f"annotations/panoptic_{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def edit(path: Path, change: Any) -> None:
    """Load a JSON, let ``change`` mend or spoil it, write it back."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
