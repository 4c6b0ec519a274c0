"""Decoded images kept in memory: of small data sets every image is decoded once, not once a crop."""

from __future__ import annotations

import numpy as np

from panoptic_ibs.errors import ConfigError

from .images import Window
from .panoptic import PanopticReader


class ImageMemory:
    """Reads windows of a reader's images; keeps whole decoded images until the limit is reached, and never drops one.

    Crops of images that found no place are read from disk as before. Every loader process has a memory of its own.

    Args:
        reader: the split.
        megabytes: limit (1e6 bytes); 0 keeps nothing.

    Raises:
        ConfigError: a negative limit.
    """

    def __init__(self, reader: PanopticReader, megabytes: float = 0) -> None:
        if megabytes < 0:
            raise ConfigError(f"data.memory_mb={megabytes} must be 0 (keep nothing) or more.")
        self.reader = reader
        self._left = int(megabytes * 1e6)
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, i: int, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """What ``reader.read(i, window)`` gives, with its errors; the arrays are the caller's to change."""
        if i not in self._kept and 3 * int(np.prod(self.reader.table.sizes[i])) <= self._left:
            self._keep(i)
        if i not in self._kept:
            return self.reader.read(i, window)
        top, left, height, width = window
        image, id_map = (whole[top : top + height, left : left + width].copy() for whole in self._kept[i])
        return image, id_map

    def _keep(self, i: int) -> None:
        image, id_map = self.reader.read(i)
        if image.nbytes + id_map.nbytes <= self._left:
            self._kept[i] = image, id_map
            self._left -= image.nbytes + id_map.nbytes
        else:
            self._left = 0  # full
