"""Sizes of resized images."""

from __future__ import annotations

import math

Size = tuple[int, int]


def resized_size(size: Size, shortest: float | None, longest: float | None = None) -> Size:
    """(height, width) after bringing the shorter side to ``shortest``, unless the longer side would pass ``longest``.

    Sides are rounded half up, after the cap, as in detectron2's ResizeShortestEdge. ``shortest=None`` keeps the size,
    unless it is over ``longest``.
    """
    height, width = size
    shortest, longest = shortest or min(size), longest or math.inf
    scale = shortest / min(height, width)
    high, wide = (shortest, scale * width) if height < width else (scale * height, shortest)
    if max(high, wide) > longest:
        cap = longest / max(high, wide)
        high, wide = high * cap, wide * cap
    return max(int(high + 0.5), 1), max(int(wide + 0.5), 1)
