"""Read predictions with NumPy alone: which class and object each pixel is of.

python examples/read_prediction.py FOLDER          (the output of panoptic_ibs.predict, or predictions/ of a run)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def read(folder: Path) -> Iterator[tuple[str, np.ndarray, list[dict[str, Any]]]]:
    """Of every image its id, the map of segment ids (H, W), and the segments, each with its class's name."""
    content = json.loads((folder / "panoptic.json").read_text(encoding="utf-8"))
    classes = {category["id"]: category for category in content["categories"]}
    for entry in content["annotations"]:
        png = np.asarray(Image.open(folder / "panoptic" / entry["file_name"])).astype(np.int64)
        ids = png @ [1, 256, 65536]  # red + 256 green + 65536 blue; 0 is void
        segments = [{**segment, "name": classes[segment["category_id"]]["name"]} for segment in entry["segments_info"]]
        yield str(entry["image_id"]), ids, segments


def main(folder: str) -> dict[str, dict[str, int]]:
    """Print, and return, the pixels of each class in every image."""
    pixels: dict[str, dict[str, int]] = {}
    for image, ids, segments in read(Path(folder)):
        pixels[image] = {}
        for segment in segments:
            mask = ids == segment["id"]  # (H, W), true on this object
            pixels[image][segment["name"]] = pixels[image].get(segment["name"], 0) + int(mask.sum())
        print(image, f"{len(segments)} segments", pixels[image])
    return pixels


if __name__ == "__main__":
    main(*sys.argv[1:])
