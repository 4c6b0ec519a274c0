"""Window first: the pixels of a crop, from no more of the stored image than they need.

Resizing the whole image and then cropping computes up to a hundred times the pixels that the crop keeps. Both functions
here give the same pixels as Pillow's resize of the whole followed by a crop.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from panoptic_ibs.functional.resizing import Size

from .readers.images import Window

REACH = 32  # output pixels by which a side may grow to end where Pillow's single-precision box is (nearly) exact


class Part(NamedTuple):
    """The part of a crop that lies on the image, and where it comes from.

    ``window`` is the part in the resized image, ``grown`` a slightly larger window that is resized in its place;
    ``source`` is the window of the stored image to read (with the margin that the filter needs), and ``box`` is (left,
    top, right, bottom) of ``grown`` in pixels of ``source``. Windows are (top, left, height, width).
    """

    source: Window
    box: tuple[float, float, float, float]
    grown: Window
    window: Window


def plan(stored: Size, resized: Size, window: Window) -> Part:
    """Find the source window of a crop.

    Args:
        stored: (height, width) of the image on disk.
        resized: (height, width) that the whole image would be resized to.
        window: (top, left, height, width) in the resized image; may pass its bottom and right border.

    Raises:
        ValueError: if the window holds no pixel of the image.
    """
    top, left = window[:2]
    height, width = min(window[2], resized[0] - top), min(window[3], resized[1] - left)
    if min(top, left) < 0 or height < 1 or width < 1:
        raise ValueError(f"The window {window} does not lie on the resized image {resized}.")
    y, y0, y1, rows = _side(stored[0], resized[0], top, height)
    x, x0, x1, columns = _side(stored[1], resized[1], left, width)
    return Part(
        source=(y.start, x.start, len(y), len(x)),
        box=(x0, y0, x1, y1),
        grown=(rows.start, columns.start, len(rows), len(columns)),
        window=(top, left, height, width),
    )


def _side(stored: int, resized: int, start: int, length: int) -> tuple[range, float, float, range]:
    """Source pixels of one side, the grown part's two ends counted from the first of them, and the grown part.

    Pillow takes the box in single precision. A box that is off by 1e-5 pixels turns ties of rounding (frequent at
    simple ratios such as 2/3) into other grey levels than resizing the whole gives, so each end moves outwards to a
    near output pixel whose place in the source has the smallest error; at simple ratios it has none.
    """
    scale = stored / resized
    margin = math.ceil(max(scale, 1.0)) + 1  # the triangle filter reaches one output pixel, or one source pixel
    first = max(math.floor(max(start - REACH, 0) * scale) - margin, 0)
    starts = np.arange(start, max(start - REACH, 0) - 1, -1)
    ends = np.arange(start + length, min(start + length + REACH, resized) + 1)
    low, high = (_most_exact(pixels, stored, resized, first) for pixels in (starts, ends))
    last = min(math.ceil(high * scale) + margin, stored)
    return range(first, last), low * stored / resized - first, high * stored / resized - first, range(low, high)


def _most_exact(pixels: np.ndarray, stored: int, resized: int, first: int) -> int:
    """The output pixel whose start in the source, counted from ``first``, loses least in single precision."""
    place = pixels * stored / resized - first
    return int(pixels[np.argmin(np.abs(place - place.astype(np.float32)))])


def resize_image(source: np.ndarray, part: Part) -> np.ndarray:
    """Bilinear resize (antialiased when it shrinks) of the source window to the part.

    Along rows first, then along columns, as Pillow did before it chose the order by cost (version 13): the choice would
    depend on the window, and the order decides how grey levels round.

    Args:
        source: (h, w, 3) uint8 pixels of ``part.source``.
        part: from :func:`plan`.

    Returns:
        (H, W, 3) uint8, equal to the same part of the whole image resized in that order; against the other order,
        single pixels differ by one grey level.
    """
    left, top, right, bottom = part.box
    height, width = part.grown[2:]
    rows = source.shape[0]
    wide = Image.fromarray(source).resize((width, rows), Image.Resampling.BILINEAR, box=(left, 0, right, rows))
    resized = np.asarray(wide.resize((width, height), Image.Resampling.BILINEAR, box=(0, top, width, bottom)))
    y, x = (part.window[k] - part.grown[k] for k in (0, 1))
    return np.ascontiguousarray(resized[y : y + part.window[2], x : x + part.window[3]])


def resize_id_map(source: np.ndarray, stored: Size, resized: Size, part: Part) -> np.ndarray:
    """Nearest resize of the source window of an id map to the part; no id is ever mixed.

    Args:
        source: (h, w) ids of ``part.source``.
        stored: (height, width) of the image on disk.
        resized: (height, width) that the whole image would be resized to.
        part: from :func:`plan`.

    Returns:
        (H, W), equal to the same part of the whole map resized by Pillow.
    """
    top, left, height, width = part.window
    if stored == resized:
        y, x = top - part.source[0], left - part.source[1]
        return source[y : y + height, x : x + width]
    rows = _nearest(stored[0], resized[0])[top : top + height] - part.source[0]
    columns = _nearest(stored[1], resized[1])[left : left + width] - part.source[1]
    return source.take(rows, axis=0).take(columns, axis=1)  # a third of the time of indexing by both at once


def _nearest(stored: int, resized: int) -> np.ndarray:
    """Source pixel under the centre of each output pixel; summed up as Pillow does, so that ties fall the same way."""
    steps = np.full(resized, stored / resized)
    steps[0] *= 0.5
    return np.minimum(np.cumsum(steps).astype(np.int64), stored - 1)
