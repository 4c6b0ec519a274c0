"""The worst confusion of an evaluation: which prediction it is, and a close picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from panoptic_ibs.visualize import Confused, IdMap, Picture, draw_confused

from .records import number

WORST = "worst"  # the picture's key in the gallery's index
_MARGIN = 0.2  # of the longer side, around the prediction and what it swallows
_WIDTH, _HEIGHT = 900, 640  # pixels of the picture at most
_ENLARGED = 8  # times at most
_NARROWEST, _WIDEST = 1.4, 1.9  # width over height, where the image has room


def severity(row: Mapping[str, Any]) -> tuple[int, float]:
    """How bad a confused prediction is: the true instances that it swallows, then the pixels of them that it covers.

    Args:
        row: as in the gallery's index, see :class:`panoptic_ibs.visualize.Confused`.
    """
    swallowed = swallowed_by(row)
    return len(swallowed), sum((number(s.get("share")) or 0.0) * (number(s.get("area")) or 0.0) for s in swallowed)


def swallowed_by(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The swallowed instances of a row read from a file; what is no object is left out."""
    swallowed = row.get("swallowed")
    return [s for s in swallowed if isinstance(s, dict)] if isinstance(swallowed, list | tuple) else []


def worst_of(rows: Sequence[Confused]) -> Confused | None:
    """The prediction that swallows most true instances; of several the one that covers most of them; the first."""
    return max(rows, key=lambda row: severity(row.to_dict()), default=None)


def draw_worst(image: Picture, predicted: IdMap, true: IdMap, row: Confused) -> Picture:
    """A picture of one confused prediction alone: cut out with some of what is around it, small ones enlarged.

    Args:
        image: (H, W, 3) uint8, RGB.
        predicted: (H, W) integer id map of the prediction.
        true: (H, W) integer id map of the ground truth.
        row: the prediction.

    Returns:
        (h, w, 3) uint8, at most 900 x 640: the prediction in full light with a white outline, the true instances that
        it swallows in colours with numbers from 1, as they stand in ``row``.
    """
    inside = (predicted == row.row + 1) | np.isin(true, [s.row + 1 for s in row.swallowed])
    top, bottom, left, right = _window(inside)
    height, width = bottom - top, right - left
    factor = min(_WIDTH / width, _HEIGHT / height, _ENLARGED)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))

    def cut(array: Any, method: Image.Resampling) -> Any:
        part = np.ascontiguousarray(array[top:bottom, left:right])
        return np.asarray(Image.fromarray(part).resize(size, method))

    alone = replace(row, swallowed=tuple(replace(s, number=i) for i, s in enumerate(row.swallowed, 1)))
    return draw_confused(
        cut(image, Image.Resampling.LANCZOS),
        cut(predicted.astype(np.int32), Image.Resampling.NEAREST),
        cut(true.astype(np.int32), Image.Resampling.NEAREST),
        [alone],
        thick=2,
    )


def _window(inside: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is to be seen: the mask's box with a margin, neither tall nor flat."""
    ys, xs = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
    limits = inside.shape
    low, high = [int(ys[0]), int(xs[0])], [int(ys[-1]) + 1, int(xs[-1]) + 1]
    margin = max(2, round(_MARGIN * max(high[0] - low[0], high[1] - low[1])))
    sides = [high[i] - low[i] + 2 * margin for i in (0, 1)]
    sides[1] = max(sides[1], round(_NARROWEST * sides[0]))
    sides[0] = max(sides[0], round(sides[1] / _WIDEST))
    edges = []
    for i in (0, 1):
        side = min(sides[i], limits[i])
        start = min(max(0, (low[i] + high[i] - side) // 2), limits[i] - side)
        edges += [start, start + side]
    return edges[0], edges[1], edges[2], edges[3]
