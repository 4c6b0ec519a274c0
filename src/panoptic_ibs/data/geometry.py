"""Sizes and windows in whole pixels: no images here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Protocol

import numpy as np

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional.resizing import Size, resized_size
from panoptic_ibs.ranges import AtLeastOne, Bounds, Items, Positive


class ShortestSide:
    """Resizing policy: the shorter side is drawn, the longer side is capped.

    Args:
        range: (low, high) in pixels, drawn uniformly from the whole numbers in between, both included.
        choices: values to draw from, in place of ``range``.
        longest: cap of the longer side in pixels.

    Raises:
        ConfigError: unless exactly one of ``range`` and ``choices`` is given, and is sensible.
    """

    def __init__(
        self,
        range: Annotated[Sequence[AtLeastOne], Items(2)] | None = None,
        choices: Annotated[Sequence[AtLeastOne], Items(least=1)] | None = None,
        longest: Annotated[float, Bounds(least=1)] = math.inf,
    ) -> None:
        if (range is None) == (choices is None):
            raise ConfigError("ShortestSide needs either 'range' (low, high) or 'choices', not both.")
        if range is not None and (len(range) != 2 or not 1 <= range[0] <= range[1]):
            raise ConfigError(f"ShortestSide.range={list(range)} is not (low, high) with 1 <= low <= high.")
        if choices is not None and (not len(choices) or min(choices) < 1):
            raise ConfigError(f"ShortestSide.choices={list(choices)} must be one or more positive sizes.")
        self.range = tuple(range) if range is not None else None
        self.choices = tuple(choices) if choices is not None else None
        self.longest = longest

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Size:
        """Draw the resized (height, width) of an image."""
        if self.range is not None:
            shortest = int(rng.integers(self.range[0], self.range[1], endpoint=True))
        else:
            assert self.choices is not None
            shortest = int(self.choices[int(rng.integers(len(self.choices)))])
        return resized_size((height, width), shortest, self.longest)

    def fixed(self, height: int, width: int) -> Size:
        """The resized (height, width) when nothing is drawn: by the largest of the sizes (evaluation)."""
        shortest = self.range[1] if self.range is not None else max(self.choices or ())
        return resized_size((height, width), shortest, self.longest)


class ScaleJitter:
    """Resizing policy of large-scale jitter (Ghiasi et al., CVPR 2021): the image fits into a square of random size.

    Args:
        target: side of the square in pixels at scale 1.
        scales: (low, high), drawn uniformly.

    Raises:
        ConfigError: unless 0 < low <= high.
    """

    def __init__(self, target: AtLeastOne, scales: Annotated[Sequence[Positive], Items(2)] = (0.1, 2.0)) -> None:
        if len(scales) != 2 or not 0 < scales[0] <= scales[1] or target < 1:
            raise ConfigError(
                f"ScaleJitter: target={target}, scales={list(scales)} is not (low, high), 0 < low <= high."
            )
        self.target, self.scales = target, (float(scales[0]), float(scales[1]))

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Size:
        """Draw the resized (height, width) of an image."""
        factor = self.target * rng.uniform(*self.scales) / max(height, width)
        return max(round(height * factor), 1), max(round(width * factor), 1)


class Resize(Protocol):
    """What a sampler asks of a resizing policy."""

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Size:
        """Draw the resized (height, width) of an image."""


def random_offset(rng: np.random.Generator, full: int, part: int) -> int:
    """Start of a part of a side, anywhere inside; 0 when the part is longer than the side."""
    return int(rng.integers(0, max(full - part, 0), endpoint=True))


def offset_around(rng: np.random.Generator, full: int, part: int, center: float) -> int:
    """Start of a part of a side such that ``center`` (in pixels) lies in it and as little as possible is padding."""
    pixel = min(max(math.floor(center), 0), full - 1)
    low = max(pixel - part + 1, 0)
    high = min(pixel, max(full - part, 0))
    return int(rng.integers(low, high, endpoint=True))
