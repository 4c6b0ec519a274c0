"""Predictions written in COCO panoptic format: a JSON and one id PNG an image."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import find_objects

from .classes import ClassTable
from .errors import DataError
from .files import inside, write_json
from .image_files import _digest, file_path, file_stem
from .segments import Instances, Prediction
from .staging import Staging, abandoned, undisturbed

PROGRAM = "panoptic_ibs"  # marks our files: only what they list is ever deleted


def segments_info(prediction: Prediction, classes: ClassTable) -> list[dict[str, Any]]:
    """COCO's ``segments_info`` of a prediction: id (row + 1), category_id of the data set, area and bbox [x, y, width,
    height] in pixels, iscrowd and score. Segments without a pixel are left out.
    """
    ids = prediction.id_map.cpu().numpy()
    areas = np.bincount(ids.ravel(), minlength=len(prediction) + 1)
    segments = []
    for row, found in enumerate(find_objects(ids, max_label=len(prediction))):
        if found is None:
            continue
        y, x = found
        segments.append(
            {
                "id": row + 1,
                "category_id": classes[int(prediction.class_ids[row])].dataset_id,
                "area": int(areas[row + 1]),
                "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start],
                "iscrowd": 0,
                "score": round(float(prediction.scores[row]), 5),
            }
        )
    return segments


class PanopticWriter:
    """Writes ``folder/panoptic.json`` and ``folder/panoptic/*.png``, and instances as ``folder/instances.json``.

    A segment's id in its PNG is its row + 1; category ids are the data set's. Instances are in COCO's results format.

    Everything is written aside and moved when the writer is closed, the JSON last, so that a JSON and its PNGs always
    belong together. What an earlier writer left in the folder stays until then; of its PNGs (and pictures of the same
    names in ``overlay/``) those that are not written again go then.

    Args:
        folder: where to write.
        classes: the class table.
        integer_ids: write image ids as numbers, as COCO has them.
    """

    def __init__(self, folder: Path | str, classes: ClassTable, integer_ids: bool = False) -> None:
        self.folder, self.classes, self.integer_ids = Path(folder), classes, integer_ids
        self.entries: list[dict[str, Any]] = []
        self._names: set[str] = set()
        self._former: set[str] = set()
        self.staging = Staging(self.folder)
        for path in abandoned(self.folder):
            self._former |= _listed(path / "panoptic.json")
            shutil.rmtree(path, ignore_errors=True)

    def name(self, image_id: str, folders: bool = False) -> str:
        """The name of an image's PNG, another one for each image even where capitals do not count.

        Args:
            image_id: the image's id.
            folders: slashes in the id make folders.
        """
        stem = file_path(image_id) if folders else file_stem(image_id)
        name = f"{stem}.png"
        if name.casefold() in self._names:
            name = f"{stem}_{_digest(image_id)}.png"
        self._names.add(name.casefold())
        return name

    def add(self, prediction: Prediction, name: str = "") -> None:
        """Write the PNG of one image and remember its segments; ``name`` is one of :meth:`name`'s."""
        ids = prediction.id_map.cpu().numpy()
        name = name or self.name(prediction.image_id)
        png = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
        Image.fromarray(png).save(self.staging / f"panoptic/{name}", compress_level=3)
        image_id = int(prediction.image_id) if self.integer_ids else prediction.image_id
        size = {"height": ids.shape[0], "width": ids.shape[1]}
        segments = segments_info(prediction, self.classes)
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

    def go_on(self, without: str) -> None:
        """List what the folder holds already, too, but for one image; it is called first.

        Raises:
            DataError: another program's predictions, other classes, or a damaged JSON.
        """
        path = self.folder / "panoptic.json"
        if not path.exists():
            return
        try:
            content = json.loads(path.read_bytes())
            ours = content["info"]["program"] == PROGRAM and content["categories"] == self.classes.to_coco()
            sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
            former = [(dict(a), *sizes[a["image_id"]]) for a in content["annotations"] if a["image_id"] != without]
            self._names.update(annotation["file_name"].casefold() for annotation, *_ in former)
            rows = path.with_name("instances.json")
            instances = json.loads(rows.read_bytes()) if rows.exists() else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            ours = False
        if not ours:
            raise DataError(
                f"{path}: holds predictions of another program or of other classes, or is damaged. Choose another "
                "folder."
            )
        for annotation, height, width in former:
            own = [row for row in instances if row["image_id"] == annotation["image_id"]]
            kept = {"instances": own} if own else {}
            self.entries.append({**annotation, "height": height, "width": width, **kept})

    def close(self, entries: Sequence[dict[str, Any]] | None = None) -> Path:
        """Move everything into the folder; ``entries`` may bring those of other processes, too. Returns the JSON.

        Several processes do this in three steps, each after all have done the one before: the first one
        :meth:`retire`, all :meth:`move`, the first one :meth:`finish`.
        """
        with undisturbed():
            self.retire(entries)
            self.move()
            return self.finish()

    def retire(self, entries: Sequence[dict[str, Any]] | None = None) -> None:
        """Write the JSONs aside; from here to the end the folder has none."""
        entries = sorted(self.entries if entries is None else entries, key=lambda e: str(e["image_id"]))
        images = [{"id": e["image_id"], "height": e["height"], "width": e["width"]} for e in entries]
        annotations = [{k: e[k] for k in ("image_id", "file_name", "segments_info")} for e in entries]
        content = {
            "info": {"program": PROGRAM},
            "images": images,
            "annotations": annotations,
            "categories": self.classes.to_coco(),
        }
        if any("instances" in e for e in entries):
            write_json(self.staging / "instances.json", [row for e in entries for row in e.get("instances", [])])
        write_json(self.staging / "panoptic.json", content)
        for name in (".former.json", "panoptic.json"):
            self._former |= _listed(self.folder / name)
        if (self.folder / "panoptic.json").is_file():
            os.replace(self.folder / "panoptic.json", self.folder / ".former.json")

    def move(self) -> None:
        """Move this process's PNGs."""
        (self.folder / "panoptic").mkdir(exist_ok=True)
        self.staging.move("panoptic", "overlay")
        if not (self.staging.path / "panoptic.json").exists():  # not the first process
            self.staging.discard()

    def finish(self) -> Path:
        """Take away what the new JSON does not list any more, and move it; returns its path."""
        stale = self._former - _listed(self.staging.path / "panoptic.json")
        for name in sorted(stale):
            for kind in ("panoptic", "overlay"):
                (self.folder / kind / name).unlink(missing_ok=True)
                _remove_empty((self.folder / kind / name).parent, self.folder / kind)
        if self._former and not (self.staging.path / "instances.json").exists():
            (self.folder / "instances.json").unlink(missing_ok=True)
        self.staging.move("instances.json", "panoptic.json")
        (self.folder / ".former.json").unlink(missing_ok=True)
        self.staging.discard()
        return self.folder / "panoptic.json"

    def discard(self) -> None:
        """Leave the folder as it was."""
        self.staging.discard()


def _remove_empty(folder: Path, top: Path) -> None:
    """Take away a folder below ``top`` that holds nothing any more, and those around it."""
    with suppress(OSError):  # there is something in it
        while folder != top:
            folder.rmdir()
            folder = folder.parent


def _listed(path: Path) -> set[str]:
    """Names of the PNGs that a JSON of this program lists; nothing from any other file."""
    try:
        content = json.loads(path.read_bytes())
        if content["info"]["program"] != PROGRAM:
            return set()
        names = {entry["file_name"] for entry in content["annotations"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {name for name in names if isinstance(name, str) and name.endswith(".png") and inside(name)}
