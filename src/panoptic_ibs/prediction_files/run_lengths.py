"""Masks of other programs: checked before pycocotools sees them, which trusts its input and may crash or never end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from panoptic_ibs.metrics.overlap import Array

Size = tuple[int, int]
_FIRST, _LAST = 48, 111  # characters of compressed run lengths: six bits each
_OTHER = re.compile(f"[^{re.escape(chr(_FIRST))}-{re.escape(chr(_LAST))}]")
_GROUP = 7  # characters of a number: 35 bits
_AT_ONCE = 1 << 18  # characters that are decoded together
_STEPS = 10  # pycocotools walks an outline in fifths of a pixel, and keeps two numbers a step
_MOST_STEPS = 1e8


class MaskError(ValueError):
    """What is wrong with a mask, as the end of a sentence."""


def from_polygons(polygons: Sequence[Sequence[float]], size: Size) -> dict[str, Any]:
    """Compressed run lengths of the union of polygons (x and y in turn, finite, at least six numbers each).

    Raises:
        MaskError: an odd number of coordinates, or an outline far outside of the image.
    """
    reach = 2 * max(size)
    for number, polygon in enumerate(polygons):
        if len(polygon) % 2:
            raise MaskError(f"segmentation[{number}] has {len(polygon)} numbers; expected: x and y in turn")
        low, high = min(polygon), max(polygon)
        if low < -reach or high > reach:
            raise MaskError(f"segmentation[{number}] holds {low if low < -reach else high:g}, far outside of the image")
        if len(polygon) * _STEPS * (high - low) > _MOST_STEPS:
            steps = np.abs(np.diff(np.reshape(polygon, (-1, 2)), axis=0)).max(1).sum() * _STEPS
            if steps > _MOST_STEPS:
                raise MaskError(f"segmentation[{number}] has an outline of {steps / _STEPS:.3g} pixels")
    merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects([list(p) for p in polygons], *size))
    return merged


def from_counts(counts: Sequence[int], size: Size) -> dict[str, Any]:
    """Compressed run lengths of uncompressed ones: how many pixels are outside and inside in turn, column by column.

    Raises:
        MaskError: they do not add up to the image.
    """
    total = sum(counts)
    if total != size[0] * size[1]:
        raise MaskError(f"segmentation.counts add up to {total} pixels; expected: {size[0]} x {size[1]}")
    runs = np.array(counts, np.int64)
    if (runs[1:] == 0).any():
        runs = _without_empty(runs)
    encoded: dict[str, Any] = coco_mask.frPyObjects({"size": list(size), "counts": runs.astype(np.uint32)}, *size)
    return encoded


def _without_empty(runs: Array) -> Array:
    """The same mask without runs of no pixels (but a first one), on which pycocotools stumbles."""
    inside = np.repeat(np.arange(len(runs)) % 2, runs > 0)
    lengths = runs[runs > 0]
    starts = np.flatnonzero(np.diff(inside, prepend=-1))
    merged = np.add.reduceat(lengths, starts)
    return np.concatenate(([0], merged)) if inside[0] else merged


def check_compressed(texts: Sequence[str], sizes: Sequence[Size]) -> list[str | Array | None]:
    """Look at compressed run lengths, many at a time.

    Args:
        texts: pycocotools' strings.
        sizes: (height, width) of each.

    Returns:
        Of each None where it is sound; else what is wrong with it, or the runs where some are empty.
    """
    found: list[str | Array | None] = []
    start, characters = 0, 0
    for stop, text in enumerate(texts, 1):
        characters += len(text)
        if characters > _AT_ONCE or stop == len(texts):
            found += _check(texts[start:stop], sizes[start:stop])
            start, characters = stop, 0
    return found


def _check(texts: Sequence[str], sizes: Sequence[Size]) -> list[str | Array | None]:
    good: list[int] = []
    found: list[str | Array | None] = [None] * len(texts)
    for i, text in enumerate(texts):
        if not text or _OTHER.search(text):
            found[i] = f"segmentation.counts is no text of compressed run lengths ({chr(_FIRST)} to {chr(_LAST)})"
        elif ord(text[-1]) - _FIRST & 32:
            found[i] = "segmentation.counts ends in the middle of a number"
        else:
            good.append(i)
    if good:
        wrong = _judged("".join(texts[i] for i in good), [len(texts[i]) for i in good], [sizes[i] for i in good])
        for place, what in wrong.items():
            found[good[place]] = what
    return found


def _judged(text: str, lengths: Sequence[int], sizes: Sequence[Size]) -> dict[int, str | Array]:
    """Of those of the joined texts that are not sound what is wrong, or their runs where only empty ones are."""
    runs, digits, offset = _decoded(text, np.array(lengths))
    starts = offset[:-1]
    empty = runs == 0
    empty[starts] = False
    least, total = np.minimum.reduceat(runs, starts), np.add.reduceat(runs, starts)
    long = np.maximum.reduceat(digits, starts) > _GROUP
    pixels = np.array([height * width for height, width in sizes])
    found: dict[int, str | Array] = {}
    wrong = long | (least < 0) | (total != pixels) | np.maximum.reduceat(empty, starts)
    for i in np.flatnonzero(wrong).tolist():
        if long[i]:
            found[i] = f"segmentation.counts holds a number of more than {5 * _GROUP} bits"
        elif least[i] < 0:
            found[i] = f"segmentation.counts holds a run of {least[i]} pixels"
        elif total[i] != pixels[i]:
            height, width = sizes[i]
            found[i] = f"segmentation.counts add up to {total[i]} pixels; expected: {height} x {width}"
        else:
            found[i] = runs[offset[i] : offset[i + 1]]
    return found


def _decoded(text: str, lengths: Array) -> tuple[Array, Array, Array]:
    """Runs of all texts, how many characters each number has, and where each text's runs begin (and the end)."""
    six = np.frombuffer(text.encode(), np.uint8) - np.uint8(_FIRST)
    last = np.flatnonzero(six < 32)  # the sixth bit says that the number goes on
    first = np.concatenate(([0], last[:-1] + 1))
    digits = last - first + 1
    values = (six[first] & 31).astype(np.int64)
    for k in range(1, min(_GROUP, int(digits.max()))):
        longer = np.flatnonzero(digits > k)
        values[longer] |= (six[first[longer] + k] & 31).astype(np.int64) << 5 * k
    negative = np.flatnonzero(six[last] & 16)
    values[negative] -= np.int64(1) << 5 * np.minimum(digits[negative], _GROUP)
    offset = np.concatenate(([0], np.searchsorted(last, np.cumsum(lengths) - 1) + 1))
    return _summed(values, offset), digits, offset


def _summed(values: Array, offset: Array) -> Array:
    """From the third number on a run is written as its difference to the one before the last, the very first not."""
    number = np.arange(len(values)) - np.repeat(offset[:-1], np.diff(offset))
    runs = values.copy()
    for parity in (0, 1):
        chosen = np.flatnonzero((number % 2 == parity) & (number > 0))
        if chosen.size:
            total = np.cumsum(values[chosen])
            starts = np.flatnonzero(number[chosen] <= 2)  # 1, or 2 of the even ones: here a text's own sum begins
            before = np.concatenate(([0], total))[starts]
            runs[chosen] = total - np.repeat(before, np.diff(starts, append=len(chosen)))
    return runs
