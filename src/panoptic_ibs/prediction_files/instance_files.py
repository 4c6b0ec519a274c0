"""Instances of any program in COCO's results format: a JSON list of image_id, category_id, segmentation and score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from panoptic_ibs.data.readers import PanopticReader
from panoptic_ibs.segments import Instances

from .classes import check_categories
from .naming import match_image
from .problems import Problems
from .run_lengths import MaskError, Size, check_compressed, from_counts, from_polygons
from .schema import RESULTS, Read


class InstanceFile:
    """Instances for the images of a reader. An image without any is one in which nothing was found.

    Args:
        name: shown in tables.
        source: the JSON.
        reader: the split.
        content: the JSON's list.
        indices: the images of the reader that are judged; all when None.
    """

    def __init__(
        self,
        name: str,
        source: Path,
        reader: PanopticReader,
        content: Read,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.name, self.source, self.reader = name, source, reader
        self.problems = Problems(source, {"malformed": RESULTS})
        self.indices = list(range(len(reader)) if indices is None else indices)
        self.unusable: set[int] = set()
        self._position = {str(image): i for i, image in enumerate(reader.table.image_ids)}
        self._things = {reader.classes[c].dataset_id: c for c in reader.classes.thing_ids}
        self._found: dict[int, list[tuple[dict[str, Any], int, float]]] = {}
        for text in content.faults:
            self.problems.add("malformed", text)
        used, known = self._known(content)
        check_categories(used, reader.classes, self.problems)
        self._take_masks(known)

    def _known(self, content: Read) -> tuple[set[int], list[tuple[int, dict[str, Any], int]]]:
        """The category ids that occur; and number, entry and image of the entries whose image and class are known."""
        used: set[int] = set()
        known = []
        wanted = set(self.indices)
        for number, entry in content.entries:
            name, category = str(entry["image_id"]), entry["category_id"]
            image = match_image(name, self._position)
            used.add(category)
            if image is None:
                self.problems.add("extra", f"image {name}")
                continue
            index = self._position[image]
            if category in self._things:
                known.append((number, entry, index))
            elif index in wanted:
                self.problems.add("unknown class", f"image {name}: category_id {category}, not a thing")
                self.unusable.add(index)
        return used, known

    def _take_masks(self, known: Sequence[tuple[int, dict[str, Any], int]]) -> None:
        """Compressed run lengths from run lengths of either kind or polygons, none of which is trusted."""
        sizes = {index: self._size(index) for index in {index for *_, index in known}}
        compressed = [k for k in known if _is_text(k[1]["segmentation"])]
        verdicts = iter(
            check_compressed(
                [entry["segmentation"]["counts"] for _, entry, _ in compressed], [sizes[i] for *_, i in compressed]
            )
        )
        for number, entry, index in known:
            shape, size = entry["segmentation"], sizes[index]
            verdict = next(verdicts) if _is_text(shape) else None
            if isinstance(shape, dict) and tuple(shape["size"]) != size:
                height, width = shape["size"]
                self.problems.add("size", f"[{number}]: {height}x{width}, the image {size[0]}x{size[1]}")
                self.unusable.add(index)
                continue
            try:
                rle = _run_lengths(shape, size, verdict)
            except MaskError as error:
                self.problems.add("malformed", f"[{number}].{error}")
                continue
            row = rle, self._things[entry["category_id"]], entry["score"]
            self._found.setdefault(index, []).append(row)

    def _size(self, index: int) -> Size:
        height, width = self.reader.table.sizes[index]
        return int(height), int(width)

    def read(self, index: int) -> Instances:
        """The instances of image ``index``."""
        found = self._found.get(index, [])
        return Instances(
            [rle for rle, _, _ in found],
            torch.tensor([c for _, c, _ in found], dtype=torch.int64),
            torch.tensor([s for _, _, s in found], dtype=torch.float32),
        )


def _is_text(shape: Any) -> bool:
    return isinstance(shape, dict) and isinstance(shape["counts"], str)


def _run_lengths(shape: Any, size: Size, verdict: Any) -> dict[str, Any]:
    """Of a mask that fits its schema; ``verdict`` is :func:`check_compressed`'s.

    Raises:
        MaskError: it is no mask of the image.
    """
    if isinstance(shape, list):
        return from_polygons(shape, size)
    if isinstance(verdict, str):
        raise MaskError(verdict)
    if verdict is not None or not isinstance(shape["counts"], str):
        return from_counts(shape["counts"] if verdict is None else verdict.tolist(), size)
    return {"size": list(size), "counts": shape["counts"].encode()}
