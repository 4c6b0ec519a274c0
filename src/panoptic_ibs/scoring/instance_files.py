"""Instances of any program in COCO's results format: a JSON list of image_id, category_id, segmentation and score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as coco_mask

from panoptic_ibs.data.readers import PanopticReader
from panoptic_ibs.structures import Instances

from .classes import check_categories
from .naming import match_image
from .problems import Problems


class InstanceFile:
    """Instances for the images of a reader. An image without any is one in which nothing was found.

    Args:
        name: shown in tables.
        source: the JSON.
        reader: the split.
        entries: the JSON's list.
        indices: the images of the reader that are judged; all when None.
    """

    def __init__(
        self,
        name: str,
        source: Path,
        reader: PanopticReader,
        entries: Sequence[Any],
        indices: Sequence[int] | None = None,
    ) -> None:
        self.name, self.source, self.reader = name, source, reader
        self.problems = Problems(source)
        self.indices = list(range(len(reader)) if indices is None else indices)
        position = {str(image): i for i, image in enumerate(reader.table.image_ids)}
        things = {reader.classes[c].dataset_id: c for c in reader.classes.thing_ids}
        self._found: dict[int, list[tuple[dict[str, Any], int, float]]] = {}
        used: set[int] = set()
        for number, entry in enumerate(entries):
            try:
                image = match_image(str(entry["image_id"]), position)
                category, score = int(entry["category_id"]), float(entry["score"])
                shape = entry["segmentation"]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self.problems.add("malformed", f"entry {number} ({type(error).__name__}: {error})")
                continue
            used.add(category)
            if image is None:
                self.problems.add("extra", f"image {entry['image_id']}")
            elif category not in things:
                self.problems.add("unknown class", f"image {entry['image_id']}: category_id {category}, not a thing")
            elif (rle := self._rle(shape, position[image], number)) is not None:
                self._found.setdefault(position[image], []).append((rle, things[category], score))
        check_categories(used, reader.classes, self.problems)

    def _rle(self, shape: Any, index: int, number: int) -> dict[str, Any] | None:
        """Compressed run lengths from run lengths of either kind or polygons."""
        height, width = (int(v) for v in self.reader.table.sizes[index])
        try:
            if isinstance(shape, list):
                rle: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                rle = coco_mask.frPyObjects(shape, *shape["size"])
            else:
                rle = {"size": [int(v) for v in shape["size"]], "counts": str(shape["counts"]).encode()}
                coco_mask.area(rle)
        except Exception as error:  # pycocotools raises whatever comes to hand
            self.problems.add("malformed", f"entry {number}: segmentation ({type(error).__name__}: {error})")
            return None
        if list(rle["size"]) != [height, width]:
            text = f"entry {number}: {rle['size'][0]}x{rle['size'][1]}, the image {height}x{width}"
            self.problems.add("size", text)
            return None
        return rle

    def read(self, index: int) -> Instances:
        """The instances of image ``index``."""
        found = self._found.get(index, [])
        return Instances(
            [rle for rle, _, _ in found],
            torch.tensor([c for _, c, _ in found], dtype=torch.int64),
            torch.tensor([s for _, _, s in found], dtype=torch.float32),
        )
