"""Writing a data set: plain masks become COCO panoptic JSON and id PNGs, which every command reads."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.ndimage import find_objects

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.coco_format import MAX_ID
from panoptic_ibs.errors import DataError
from panoptic_ibs.files import write_atomically, write_json
from panoptic_ibs.functional.pictures import opened

from .readers.images import check_size


@dataclass(frozen=True)
class LabelledImage:
    """One image and its labels, as :func:`write_coco_panoptic` takes them.

    Attributes:
        name: file name without suffix; unlike all others of the split.
        image: (H, W, 3) uint8 RGB, or the path of an image file, which is copied as it is.
        id_map: (H, W) integer; 0 is void, k >= 1 is row k - 1 of ``class_ids``.
        class_ids: (N,) contiguous class ids.
        crowd: rows that are crowds: several objects in one segment.
    """

    name: str
    image: NDArray[np.uint8] | Path | str
    id_map: NDArray[np.integer[Any]]
    class_ids: Sequence[int]
    crowd: Sequence[int] = ()


def panoptic_from_masks(
    semantic: ArrayLike, masks: Sequence[ArrayLike], mask_classes: Sequence[int], classes: ClassTable, void: int = 255
) -> tuple[NDArray[np.int32], list[int]]:
    """Join a semantic map and instance masks to one id map.

    An instance lies over the semantic map, a later mask over an earlier one. What the semantic map calls a thing
    outside all masks belongs to no known instance and becomes void.

    Args:
        semantic: (H, W) contiguous class ids, ``void`` where there is none.
        masks: N masks (H, W), one an instance; a pixel belongs to it where it is not 0.
        mask_classes: (N,) contiguous ids of thing classes.
        classes: the class table.
        void: the value of ``semantic`` for pixels without a class; no class may have it (-1 fits every table).

    Returns:
        The id map (H, W) and the contiguous class ids (M,) of its segments: stuff in table order, then the instances
        of which a pixel is left. Every id from 1 to M occurs.

    Raises:
        DataError: sizes that differ, a class that the table lacks, an instance of a stuff class, or a ``void`` that is
            also a class.
    """
    if 0 <= void < len(classes):
        raise DataError(
            f"void={void} is also the id of class {classes[void].name!r}, one of {len(classes)}: its pixels would be "
            "lost. Mark void by another value, e.g. void=-1 in a map of signed integers."
        )
    semantic = np.asarray(semantic)
    if semantic.ndim != 2 or not np.issubdtype(semantic.dtype, np.integer):
        raise DataError(f"The semantic map has shape {semantic.shape} and type {semantic.dtype}; (H, W) of integers.")
    if len(masks) != len(mask_classes):
        raise DataError(f"{len(masks)} masks, but {len(mask_classes)} classes of masks: give one class a mask.")
    unknown = [int(c) for c in np.unique(semantic) if c != void and not 0 <= c < len(classes)]
    unknown += [c for c in mask_classes if not _is_index(c, len(classes))]
    if unknown:
        raise DataError(f"Class {unknown[0]} is not in the table of {len(classes)} classes (contiguous ids from 0).")
    ids = np.zeros(semantic.shape, np.int32)
    found = list(classes.stuff_ids)
    for k, c in enumerate(found, 1):
        ids[semantic == c] = k
    for number, (mask, c) in enumerate(zip(masks, mask_classes, strict=True)):
        mask = np.asarray(mask)
        if mask.shape != semantic.shape:
            raise DataError(f"Mask {number} has shape {mask.shape}, the semantic map {semantic.shape}.")
        if not classes[int(c)].is_thing:
            raise DataError(
                f"Mask {number} is of {classes[int(c)].name!r}, which is stuff: paint it in the semantic map."
            )
        found.append(int(c))
        ids[mask != 0] = len(found)
    present = np.unique(ids[ids > 0])
    lookup = np.zeros(len(found) + 1, np.int32)
    lookup[present] = np.arange(1, len(present) + 1)
    return lookup[ids], [found[k - 1] for k in present]


def write_coco_panoptic(root: Path | str, split: str, images: Iterable[LabelledImage], classes: ClassTable) -> Path:
    """Write a split in the layout of ``data=coco_panoptic``; a segment's id in its PNG is its row + 1.

    ``root/SPLIT/NAME.*`` are the images, ``root/annotations/panoptic_SPLIT/NAME.png`` the ids, and
    ``root/annotations/panoptic_SPLIT.json``, which comes last, lists them. Images are taken one at a time, so a
    generator keeps memory low.

    Returns:
        The path of the JSON.

    Raises:
        DataError: the split exists, it is empty, or an image and its labels contradict each other.
    """
    root = Path(root).expanduser()
    path = root / "annotations" / f"panoptic_{split}.json"
    if path.exists():
        raise DataError(f"{path}: exists already. Choose another root or split, or delete the data set.")
    names: set[str] = set()
    listed, annotations = [], []
    for number, item in enumerate(images, 1):
        if item.name in names or not item.name or Path(item.name).name != item.name:
            raise DataError(f"Image {number}: the name {item.name!r} is empty, a path or taken by another image.")
        names.add(item.name)
        ids = _checked_ids(item, classes)
        file_name = _write_image(item, root / split, (ids.shape[0], ids.shape[1]))
        png = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
        write_atomically(path.with_suffix("") / f"{item.name}.png", partial(_save, png))
        listed.append({"id": number, "file_name": file_name, "height": ids.shape[0], "width": ids.shape[1]})
        segments = _segments(ids, item, classes)
        annotations.append({"image_id": number, "file_name": f"{item.name}.png", "segments_info": segments})
    if not listed:
        raise DataError(f"{path}: no image was given, so the split would be empty.")
    write_json(path, {"images": listed, "annotations": annotations, "categories": classes.to_coco()})
    return path


def _checked_ids(item: LabelledImage, classes: ClassTable) -> NDArray[np.int32]:
    ids = np.asarray(item.id_map)
    rows = len(item.class_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{item.name}: the id map has shape {ids.shape} and type {ids.dtype}; (H, W) of integers.")
    if ids.size and not 0 <= ids.min() <= ids.max() <= min(rows, MAX_ID):
        raise DataError(
            f"{item.name}: the id map holds ids from {ids.min()} to {ids.max()}, its table has {rows} rows."
        )
    bad = [c for c in item.class_ids if not _is_index(c, len(classes))]
    if bad:
        raise DataError(f"{item.name}: class {bad[0]} is not in the table of {len(classes)} classes.")
    bad = [row for row in item.crowd if not _is_index(row, rows)]
    if bad:
        raise DataError(f"{item.name}: crowd names the row {bad[0]}, but the table has {rows} rows (from 0).")
    return ids.astype(np.int32)


def _is_index(value: Any, count: int) -> bool:
    """Whether a value is a whole number from 0 to ``count`` - 1: 1.5 would become 1."""
    try:
        return 0 <= operator.index(value) < count
    except TypeError:
        return False


def _write_image(item: LabelledImage, folder: Path, size: tuple[int, int]) -> str:
    """Write or copy the photograph; returns its file name."""
    if isinstance(item.image, Path | str):
        source = Path(item.image).expanduser()
        with opened(source) as image:
            where = f"the id map of {item.name}"
            check_size(image, size, source, "the image", where, "An image and its id map must have one size.")
        target, write = folder / f"{item.name}{source.suffix}", partial(shutil.copyfile, source)
    else:
        pixels = np.asarray(item.image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise DataError(f"{item.name}: an image must be uint8 RGB (H, W, 3); got {pixels.dtype} {pixels.shape}.")
        target, write = folder / f"{item.name}.png", partial(_save, pixels)
        if pixels.shape[:2] != size:
            found = "{}x{}".format(*pixels.shape[:2])
            raise DataError(f"{item.name}: the image is {found} (height x width), its id map {size[0]}x{size[1]}.")
    write_atomically(target, write)
    return target.name


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=3)


def _segments(ids: NDArray[np.int32], item: LabelledImage, classes: ClassTable) -> list[dict[str, Any]]:
    """``segments_info``; rows without a pixel are left out."""
    areas = np.bincount(ids.ravel(), minlength=len(item.class_ids) + 1)
    crowd = set(item.crowd)
    return [
        {
            "id": row + 1,
            "category_id": classes[int(item.class_ids[row])].dataset_id,
            "area": int(areas[row + 1]),
            "bbox": [box[1].start, box[0].start, box[1].stop - box[1].start, box[0].stop - box[0].start],
            "iscrowd": int(row in crowd),
        }
        for row, box in enumerate(find_objects(ids, max_label=len(item.class_ids)))
        if box is not None
    ]
