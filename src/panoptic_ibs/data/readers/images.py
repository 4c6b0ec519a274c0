"""Decoding of photographs and id PNGs. See :mod:`panoptic_ibs.functional.pictures` for EXIF orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from panoptic_ibs.errors import DataError
from panoptic_ibs.files import check_regular
from panoptic_ibs.functional.pictures import check_pixels, opened, orientation, to_rgb
from panoptic_ibs.structures import id_map_dtype

from .png import ModeError, PngError, SizeError, read_png_ids

Window = tuple[int, int, int, int]
"""(top, left, height, width) in stored pixels."""

RESTORE = "Restore the original file or correct height and width in the JSON."
MISSING = "Restore the file or take its entry out of the JSON."


def check_size(
    image: Image.Image, size: tuple[int, int], path: Path, what: str, key: str, remedy: str = RESTORE
) -> None:
    """Make sure that a picture has the size (height, width) that ``key`` says.

    Raises:
        DataError: another one; where its EXIF orientation explains that, the message says so.
    """
    if image.size[::-1] == size:
        return
    found = f"{path}: {what} is {image.height}x{image.width} (height x width), but {key} says {size[0]}x{size[1]}. "
    turn = orientation(image)
    if image.size == size and turn >= 5:
        raise DataError(
            f"{found}Its EXIF orientation is {turn}: viewers turn it by a quarter, but labels must lie on the "
            "stored pixels. Store it upright (e.g. with mogrify -auto-orient), or turn labels, height and width."
        )
    raise DataError(f"{found}{remedy}")


def _crop(image: Image.Image, window: Window | None) -> Image.Image:
    """Cut before any conversion. Decoding itself takes the whole file: Pillow has no part of a PNG, and JPEG's draft
    mode, which decodes less, gives other pixels.
    """
    if window is None:
        image.load()
        return image
    top, left, height, width = window
    return image.crop((left, top, left + width, top + height))


def read_rgb(path: Path, size: tuple[int, int], window: Window | None = None, key: str = "the JSON") -> np.ndarray:
    """Read a photograph of any mode.

    Args:
        path: the file.
        size: (height, width) that the annotations state.
        window: the part to return; all of it when None.
        key: where the JSON names the file, for messages.

    Returns:
        (H, W, 3) uint8, RGB, in stored orientation: labels lie on stored pixels.

    Raises:
        DataError: if the file is missing, truncated, of another size or of floating-point pixels.
    """
    with opened(path, "the image", key, MISSING) as image:
        check_size(image, size, path, "the image", key)
        return np.asarray(to_rgb(_crop(image, window), path))


def check_rgb(path: Path, size: tuple[int, int], key: str) -> int:
    """Decode a photograph as :func:`read_rgb`, with its errors; returns the EXIF orientation, 1 to 8."""
    with opened(path, "the image", key, MISSING) as image:
        check_size(image, size, path, "the image", key)
        to_rgb(image, path)
        return orientation(image)


def read_ids(path: Path, size: tuple[int, int], window: Window | None = None, key: str = "the JSON") -> np.ndarray:
    """Read an id PNG: (H, W) uint32, id = R + 256 G + 256^2 B. Arguments as :func:`read_rgb`.

    Raises:
        DataError: if the file is missing, truncated, damaged, of another size or not RGB of 8 bits.
    """
    check_regular(path, "the id PNG", f"{key} names it. {MISSING}")
    check_pixels(*size, path, "the id PNG")
    try:
        ids = read_png_ids(path, size)
    except SizeError as error:
        found = "{}x{}".format(*error.found)
        raise DataError(
            f"{path}: the id PNG is {found} (height x width), but {key} says {size[0]}x{size[1]}. {RESTORE}"
        ) from None
    except ModeError as error:
        raise DataError(
            f"{path}: the id PNG is {error}; {key} names it. Write the ids as RGB with 8 bits a channel."
        ) from None
    except (PngError, OSError, MemoryError) as error:
        raise DataError(
            f"{path}: the id PNG cannot be decoded ({error}; {key} names it). Fetch the file again."
        ) from None
    if window is None:
        return ids
    top, left, height, width = window
    return ids[top : top + height, left : left + width]


def dense_rows(raw: np.ndarray, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace raw ids by rows of the segment table: 0 void, row k as k + 1.

    Ids are constant over long runs of pixels, so only the first pixel of each run is looked up (binary search in the
    sorted ids); the cost does not grow with the number of segments.

    Args:
        raw: (H, W) unsigned integer ids.
        segment_ids: (N,) listed ids, all different and positive.

    Returns:
        The (H, W) map of :func:`panoptic_ibs.structures.id_map_dtype`, and the sorted ids that occur in ``raw`` without
        being listed (void in the map).
    """
    flat = raw.ravel()
    dtype = torch.empty(0, dtype=id_map_dtype(len(segment_ids))).numpy().dtype
    if not flat.size:
        return np.zeros(raw.shape, dtype), flat
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values = flat[starts].astype(np.int64)
    listed = np.concatenate([[0], segment_ids]).astype(np.int64)
    order = np.argsort(listed)
    place = np.minimum(np.searchsorted(listed[order], values), len(listed) - 1)
    rows = order[place].astype(dtype)
    known = listed[rows] == values
    rows[~known] = 0
    lengths = np.diff(starts, append=flat.size)
    return np.repeat(rows, lengths).reshape(raw.shape), np.unique(values[~known])
