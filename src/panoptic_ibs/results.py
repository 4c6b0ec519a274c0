"""Writing predictions in COCO panoptic format (JSON + id PNGs). Anybody's are read in ``scoring``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import find_objects

from .classes import ClassTable
from .errors import DataError
from .files import write_atomically, write_json
from .structures import Instances, Prediction


def file_stem(image_id: str) -> str:
    """A file name for an image id; ids that differ get names that differ."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", image_id)[-150:]
    return stem if stem == image_id else f"{stem}_{hashlib.sha256(image_id.encode()).hexdigest()[:8]}"


class PanopticWriter:
    """Writes ``folder/panoptic.json`` and ``folder/panoptic/*.png``, and instances as ``folder/instances.json``.

    A segment's id in its PNG is its row + 1; category ids are the data set's. Instances are in COCO's results format.

    Args:
        folder: where to write.
        classes: the class table.
        integer_ids: write image ids as numbers, as COCO has them.
    """

    def __init__(self, folder: Path | str, classes: ClassTable, integer_ids: bool = False) -> None:
        self.folder, self.classes, self.integer_ids = Path(folder), classes, integer_ids
        self.entries: list[dict[str, Any]] = []
        (self.folder / "panoptic").mkdir(parents=True, exist_ok=True)

    def add(self, prediction: Prediction) -> None:
        """Write the PNG of one image and remember its segments."""
        ids = prediction.id_map.cpu().numpy()
        name = f"{file_stem(prediction.image_id)}.png"
        png = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
        write_atomically(self.folder / "panoptic" / name, lambda p: Image.fromarray(png).save(p, compress_level=3))
        areas = np.bincount(ids.ravel(), minlength=len(prediction) + 1)
        segments = []
        for row, found in enumerate(find_objects(ids, max_label=len(prediction))):
            if found is None:
                continue
            y, x = found
            segments.append(
                {
                    "id": row + 1,
                    "category_id": self.classes[int(prediction.class_ids[row])].dataset_id,
                    "area": int(areas[row + 1]),
                    "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start],
                    "iscrowd": 0,
                    "score": round(float(prediction.scores[row]), 5),
                }
            )
        image_id = int(prediction.image_id) if self.integer_ids else prediction.image_id
        size = {"height": ids.shape[0], "width": ids.shape[1]}
        entry = {"image_id": image_id, "file_name": name, "segments_info": segments, **size}
        if prediction.instances is not None:
            entry["instances"] = self._instances(prediction.instances, image_id)
        self.entries.append(entry)

    def _instances(self, found: Instances, image_id: int | str) -> list[dict[str, Any]]:
        return [
            {
                "image_id": image_id,
                "category_id": self.classes[int(label)].dataset_id,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                "score": round(float(score), 5),
            }
            for rle, label, score in zip(found.rles, found.class_ids, found.scores, strict=True)
        ]

    def close(self, entries: Sequence[dict[str, Any]] | None = None) -> Path:
        """Write the JSON; ``entries`` may bring those of other processes, too."""
        entries = sorted(self.entries if entries is None else entries, key=lambda e: str(e["image_id"]))
        images = [{"id": e["image_id"], "height": e["height"], "width": e["width"]} for e in entries]
        annotations = [{k: e[k] for k in ("image_id", "file_name", "segments_info")} for e in entries]
        content = {"images": images, "annotations": annotations, "categories": self.classes.to_coco()}
        write_json(self.folder / "panoptic.json", content)
        if any("instances" in e for e in entries):
            write_json(self.folder / "instances.json", [row for e in entries for row in e.get("instances", [])])
        return self.folder / "panoptic.json"


IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def find_images(path: Path | str) -> list[Path]:
    """The image itself, or the images of a folder by name.

    Raises:
        DataError: nothing there.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: there is no such image or folder (input=).")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_TYPES and p.is_file())
    if not found:
        raise DataError(f"{path}: the folder holds no image ({', '.join(IMAGE_TYPES)}).")
    return found


def image_names(paths: Sequence[Path]) -> Iterator[str]:
    """A name for each image: its stem, or with the suffix where two would be alike."""
    stems = [p.stem for p in paths]
    for path in paths:
        yield path.name if stems.count(path.stem) > 1 else path.stem
