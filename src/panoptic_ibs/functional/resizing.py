"""Sizes of resized images."""

from __future__ import annotations


def resized_size(size: tuple[int, int], shortest: float | None, longest: float | None = None) -> tuple[int, int]:
    """(height, width) after bringing the shortest side to ``shortest``, the longest at most to ``longest``.

    Sides are rounded half up. ``shortest=None`` keeps the size, unless it is over ``longest``.
    """
    height, width = size
    scale = 1.0 if shortest is None else shortest / min(height, width)
    if longest is not None and scale * max(height, width) > longest:
        scale = longest / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
