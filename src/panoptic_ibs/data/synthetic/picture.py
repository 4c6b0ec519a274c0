"""What a picture of the embedded sets is, and the classes that it may hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from panoptic_ibs.classes import ClassInfo, ClassTable

MIN_PIXELS = 12
"""Segments with fewer visible pixels are void: nobody could tell what they are."""

CLASSES = ClassTable(
    ClassInfo(name, dataset_id, thing, color)
    for name, dataset_id, thing, color in (
        ("road", 7, False, (128, 64, 128)),
        ("sidewalk", 8, False, (244, 35, 232)),
        ("building", 11, False, (70, 70, 70)),
        ("wall", 12, False, (102, 102, 156)),
        ("fence", 13, False, (190, 153, 153)),
        ("pole", 17, False, (153, 153, 153)),
        ("vegetation", 21, False, (107, 142, 35)),
        ("terrain", 22, False, (152, 251, 152)),
        ("sky", 23, False, (70, 130, 180)),
        ("person", 24, True, (220, 20, 60)),
        ("rider", 25, True, (255, 0, 0)),
        ("car", 26, True, (0, 0, 142)),
        ("truck", 27, True, (0, 0, 70)),
        ("bus", 28, True, (0, 60, 100)),
        ("train", 31, True, (0, 80, 100)),
        ("motorcycle", 32, True, (0, 0, 230)),
        ("bicycle", 33, True, (119, 11, 32)),
    )
)
"""Names, label ids and colours as in Cityscapes, of the classes that the scenes hold."""


@dataclass
class SyntheticImage:
    """One picture and its panoptic labels.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        id_map: (H, W) int32; 0 is void, k >= 1 is row k - 1 of ``segments``.
        segments: (class name, iscrowd) rows. Every row has at least ``MIN_PIXELS`` pixels; a stuff class and a class's
            crowd are one row each.
    """

    image: NDArray[np.uint8]
    id_map: NDArray[np.int32]
    segments: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def num_things(self) -> int:
        """Number of thing instances, crowd not counted."""
        thing = dict(zip(CLASSES.names, CLASSES.is_thing, strict=True))
        return sum(thing[name] and not crowd for name, crowd in self.segments)


def check_request(seed: int, index: int, size: tuple[int, int]) -> None:
    """Make sure that a picture can be drawn.

    Raises:
        ValueError: if the size is below 32 pixels, or the seed or index negative.
    """
    if min(size) < 32 or seed < 0 or index < 0:
        raise ValueError(f"render(seed={seed}, index={index}, size={size}): need seed, index >= 0 and size >= 32 x 32.")


def compact(
    ids: NDArray[np.int32], rows: Sequence[tuple[str, bool]]
) -> tuple[NDArray[np.int32], list[tuple[str, bool]]]:
    """Drop segments with too few visible pixels (void from now on) and number the others without gaps."""
    area = np.bincount(ids.ravel(), minlength=len(rows) + 1)
    keep = area >= MIN_PIXELS
    keep[0] = False
    new = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return new[ids], [row for row, kept in zip(rows, keep[1:], strict=True) if kept]
