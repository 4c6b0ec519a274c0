"""Scan a data set for defects and list them all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from panoptic_ibs.cores import usable_cores
from panoptic_ibs.errors import DataError
from panoptic_ibs.files import check_regular
from panoptic_ibs.schemas import SHOWN

from .readers import Defect, PanopticReader
from .readers.images import MISSING, check_rgb, dense_rows, read_ids

BOX_TOLERANCE = 1.0  # pixels: writers differ on whether the last pixel belongs to the box


def check(
    reader: PanopticReader,
    images: bool = True,
    workers: int | None = None,
    progress: Callable[[], None] | None = None,
) -> list[Defect]:
    """List the defects of a split: those of the JSON, then those of its files. Entries with defects hide no others.

    Found are: values that are not what the format says, missing, truncated and damaged images and PNGs, size
    mismatches, file names that lead elsewhere, ids in a PNG that the JSON does not list, listed segments without a
    pixel, areas and boxes that deviate from the pixels, unknown categories, duplicate ids, images without annotation
    and an empty split. Photographs that viewers turn (EXIF orientation) are warnings.

    Args:
        reader: made with ``strict=False``, so that it gathers the defects of the JSON.
        images: decode the photographs too (slower).
        workers: threads; one per CPU core when None.
        progress: called after each image.
    """
    defects = list(reader.defects)
    names = reader.table.unannotated.tolist()
    if names:
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        text = f"{reader.json_path}: {len(names)} images in 'images' have no annotation: {shown}."
        defects.append(Defect("no annotation", str(reader.json_path), text))

    def scan(i: int) -> list[Defect]:
        found = list(_scan(reader, i, images))
        if progress is not None:
            progress()
        return found

    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for found in pool.map(scan, range(len(reader))):
            defects += found
    return defects


def _scan(reader: PanopticReader, i: int, images: bool) -> Iterator[Defect]:
    """Defects of one image and its PNG; files outside their folders are told already, and left alone."""
    if i in reader.outside:
        return
    record = reader.records[i]
    size = (record.height, record.width)
    key = f"{reader.json_path}: image {record.image_id}"
    yield from _scan_image(reader.image_path(i), size, key, images)
    png = reader.png_path(i)
    try:
        raw = read_ids(png, size, key=key)
    except DataError as error:
        yield Defect("id PNG", str(png), str(error))
        return
    id_map, unlisted = dense_rows(raw, record.segments.ids)
    for value in sorted(set(unlisted.tolist()) - reader.left_out.get(record.image_id, set())):
        pixels = int((raw == value).sum())
        text = f"{png}: holds the id {value} ({pixels} pixels), which {key}.segments_info does not list."
        yield Defect("unlisted id", str(png), text)
    yield from _scan_segments(reader, i, id_map, key)


def _scan_image(path: Path, size: tuple[int, int], key: str, decode: bool) -> Iterator[Defect]:
    """Defects of a photograph, and a warning where viewers do not show it as it is stored."""
    try:
        if not decode:
            check_regular(path, "the image", f"{key} names it. {MISSING}")
            return
        turn = check_rgb(path, size, key)
    except DataError as error:
        yield Defect("image", str(path), str(error))
        return
    if turn > 1:
        text = (
            f"{path}: its EXIF orientation is {turn}, so viewers show it turned or mirrored ({key}). Labels must lie "
            "on the pixels as they are stored; make sure that they were not drawn on what viewers show."
        )
        yield Defect("orientation", str(path), text, warning=True)


def _scan_segments(reader: PanopticReader, i: int, id_map: np.ndarray, key: str) -> Iterator[Defect]:
    """Listed area and box against the pixels."""
    from scipy.ndimage import find_objects

    segments = reader.records[i].segments
    png = str(reader.png_path(i))
    areas = np.bincount(id_map.ravel(), minlength=len(segments) + 1)[1:]
    for row, found in enumerate(find_objects(id_map, max_label=len(segments))):
        name = f"segment {segments.ids[row]} of {key}"
        if found is None:
            yield Defect("absent segment", png, f"{name} has no pixel in {png}. Paint it or take it out of the JSON.")
            continue
        if areas[row] != segments.areas[row]:
            text = f"{name}: area is {int(segments.areas[row])}, but {png} holds {areas[row]} pixels."
            yield Defect("area", str(reader.json_path), text)
        y, x = found
        tight = np.array([x.start, y.start, x.stop, y.stop], dtype=np.float64)
        left, top, width, height = segments.boxes[row].astype(np.float64)
        if np.abs(tight - (left, top, left + width, top + height)).max() > BOX_TOLERANCE:
            box = [x.start, y.start, x.stop - x.start, y.stop - y.start]
            text = f"{name}: bbox is {segments.boxes[row].tolist()}, but the pixels in {png} span {box}."
            yield Defect("bbox", str(reader.json_path), text)
