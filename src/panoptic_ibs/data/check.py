"""Scan a data set for defects and list them all at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from panoptic_ibs.errors import DataError

from .readers import Defect, PanopticReader
from .readers.images import dense_rows, read_ids, read_rgb

BOX_TOLERANCE = 1.0  # pixels: writers differ on whether the last pixel belongs to the box


def check(
    reader: PanopticReader,
    images: bool = True,
    workers: int | None = None,
    progress: Callable[[], None] | None = None,
) -> list[Defect]:
    """List the defects of a split: those of the JSON, then those of its files.

    Found are: missing and truncated images and PNGs, size mismatches, ids in a PNG that the JSON does not list, listed
    segments without a pixel, areas and boxes that deviate from the pixels, unknown categories, duplicate ids, images
    without annotation and an empty split.

    Args:
        reader: made with ``strict=False``, so that it gathers the defects of the JSON.
        images: decode the photographs too (slower).
        workers: threads; one per CPU core when None.
        progress: called after each image.
    """
    defects = list(reader.defects)
    if reader.table.without_annotation:
        text = f"{reader.json_path}: {int(reader.table.without_annotation)} images in 'images' have no annotation."
        defects.append(Defect("no annotation", str(reader.json_path), text))

    def scan(i: int) -> list[Defect]:
        found = list(_scan(reader, i, images))
        if progress is not None:
            progress()
        return found

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for found in pool.map(scan, range(len(reader))):
            defects += found
    return defects


def _scan(reader: PanopticReader, i: int, images: bool) -> Iterator[Defect]:
    """Defects of one image and its PNG."""
    record = reader.records[i]
    size = (record.height, record.width)
    key = f"{reader.json_path}: image {record.image_id}"
    if images:
        try:
            read_rgb(reader.image_path(i), size, key=key)
        except DataError as error:
            yield Defect("image", str(reader.image_path(i)), str(error))
    elif not reader.image_path(i).is_file():
        yield Defect("image", str(reader.image_path(i)), f"{reader.image_path(i)}: the image is missing ({key}).")
    png = reader.png_path(i)
    try:
        raw = read_ids(png, size, key=key)
    except DataError as error:
        yield Defect("id PNG", str(png), str(error))
        return
    id_map, unlisted = dense_rows(raw, record.segments.ids)
    for value in unlisted:
        pixels = int((raw == value).sum())
        text = f"{png}: holds the id {value} ({pixels} pixels), which {key}.segments_info does not list."
        yield Defect("unlisted id", str(png), text)
    yield from _scan_segments(reader, i, id_map, key)


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
            text = f"{name}: area is {segments.areas[row]}, but {png} holds {areas[row]} pixels."
            yield Defect("area", str(reader.json_path), text)
        y, x = found
        tight = np.array([x.start, y.start, x.stop, y.stop], dtype=np.float64)
        left, top, width, height = segments.boxes[row].astype(np.float64)
        if np.abs(tight - (left, top, left + width, top + height)).max() > BOX_TOLERANCE:
            box = [x.start, y.start, x.stop - x.start, y.stop - y.start]
            text = f"{name}: bbox is {segments.boxes[row].tolist()}, but the pixels in {png} span {box}."
            yield Defect("bbox", str(reader.json_path), text)
