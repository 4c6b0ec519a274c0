"""Areas shared by the segments of two id maps: the one pass over pixels that every panoptic metric needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
IdArray = npt.NDArray[np.integer]
_PIECE = 1 << 18  # pixels compared at a time; measured on 1024 x 2048 maps: 2^16 is slower, whole maps are no faster
_VOID = np.zeros(1, np.int64)
_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_MOST_BITS = 16  # of a hash: up to 255 ids
_MULTIPLIERS = np.random.default_rng(0).integers(1 << 32, size=16, dtype=np.uint32) | np.uint32(1)


def joint_histogram(first: Tensor, second: Tensor, num_first: int, num_second: int) -> Tensor:
    """Pixels shared by every pair of segments of two dense id maps.

    On the CPU the maps are read once, as runs of pixels on which both are constant; the histogram is then taken over
    the runs, a hundred times fewer than pixels. Elsewhere it is a ``bincount`` that stays on the device.

    Args:
        first: integer ids from 0 to ``num_first``, any shape and integer dtype.
        second: integer ids from 0 to ``num_second``, same shape and device.
        num_first: number of segments of ``first``; id 0 is void and not counted in it.
        num_second: number of segments of ``second``.

    Returns:
        (num_first + 1, num_second + 1) int64 pixel counts, on the maps' device.

    Raises:
        ValueError: if the shapes differ or an id lies outside its range.
    """
    if not first.is_cpu:
        _check_shapes(first, second)
        return _histogram_on_device(first, second, num_first, num_second)
    return torch.from_numpy(joint_histogram_of_arrays(first.numpy(), second.numpy(), num_first, num_second))


def joint_histogram_of_arrays(first: IdArray, second: IdArray, num_first: int, num_second: int) -> IntArray:
    """``joint_histogram`` of NumPy arrays: the same arguments, result and errors."""
    _check_shapes(first, second)
    ids_first, ids_second, lengths = _joint_runs(first, second)
    rows, columns = _in_range(ids_first, num_first, "first"), _in_range(ids_second, num_second, "second")
    return _weighted_histogram(rows, columns, lengths, num_first + 1, num_second + 1)


def joint_histogram_raw(first: Tensor, second: Tensor, first_ids: Tensor, second_ids: Tensor) -> Tensor:
    """``joint_histogram`` of maps of raw ids, such as the 24-bit R + 256 G + 256^2 B of panoptic PNGs.

    Ids are looked up after the maps were cut into runs, so the look-up never sees the pixels.

    Args:
        first: raw ids, any shape and integer dtype; 0 is void.
        second: raw ids, same shape.
        first_ids: (N,) distinct non-zero ids of the first map; the k-th gets row k + 1.
        second_ids: (M,) distinct non-zero ids of the second map.

    Returns:
        (N + 1, M + 1) int64 pixel counts on the CPU; row and column 0 are void.

    Raises:
        ValueError: if the shapes differ, an id occurs in a map but not in its list, or a list repeats an id or holds 0.
    """
    _check_shapes(first, second)
    values_first, values_second, lengths = _joint_runs(first.cpu().numpy(), second.cpu().numpy())
    rows, columns = _look_up(values_first, first_ids, "first"), _look_up(values_second, second_ids, "second")
    return torch.from_numpy(_weighted_histogram(rows, columns, lengths, first_ids.numel() + 1, second_ids.numel() + 1))


def _check_shapes(first: Tensor | IdArray, second: Tensor | IdArray) -> None:
    if first.shape != second.shape:
        raise ValueError(f"Id maps differ in shape: {tuple(first.shape)} and {tuple(second.shape)}.")


def _joint_runs(first: IdArray, second: IdArray) -> tuple[IdArray, IdArray, IntArray]:
    """Ids in both maps (R,) each, and lengths (R,), of the runs on which both flattened maps are constant."""
    a, b = first.reshape(-1), second.reshape(-1)
    if not a.size:
        return a, b, np.zeros(0, np.int64)
    last = _last_pixels(a, b)
    lengths = np.empty_like(last)
    lengths[0] = last[0] + 1
    np.subtract(last[1:], last[:-1], out=lengths[1:])
    # All indices are valid: "clip" only spares the check.
    return a.take(last, mode="clip"), b.take(last, mode="clip"), lengths


def _last_pixels(a: IdArray, b: IdArray) -> IntArray:
    """(R,) positions of the last pixels of the joint runs of two flat maps of at least one pixel."""
    inner = a.size - 1
    ends = np.empty(-(-a.size // 8) * 8, dtype=bool)  # ends[i]: the run ends with pixel i. Whole words of 8 bytes
    ends[inner:] = False
    other = np.empty(min(_PIECE, inner), dtype=bool)
    for start in range(0, inner, _PIECE):
        stop = min(start + _PIECE, inner)
        here, there = ends[start:stop], other[: stop - start]
        np.not_equal(a[start + 1 : stop + 1], a[start:stop], out=here)
        np.not_equal(b[start + 1 : stop + 1], b[start:stop], out=there)
        np.logical_or(here, there, out=here)
    ends[inner] = True
    # The positions of flags that are mostly false: whole words of false are skipped.
    words = ends.view(np.uint64)
    (hits,) = (words != 0).nonzero()
    (inside,) = words.take(hits, mode="clip").view(np.bool_).nonzero()
    hits <<= 3
    found: IntArray = hits.take(inside >> 3, mode="clip")
    inside &= 7
    found += inside
    return found


def _weighted_histogram(rows: IntArray, columns: IntArray, weights: IntArray, height: int, width: int) -> IntArray:
    rows *= width
    rows += columns
    counts = np.bincount(rows, weights=weights, minlength=height * width)
    return counts.astype(np.int64).reshape(height, width)  # float64 sums of pixel counts are exact below 2^53


def _in_range(ids: IdArray, largest: int, which: str) -> IntArray:
    """The ids as int64, fresh memory. Negative ids are huge when read as unsigned: one pass finds both offences."""
    signed = ids.dtype.kind == "i"
    limit = min(largest, (1 << (8 * ids.itemsize - signed)) - 1)
    if ids.size and np.maximum.reduce(ids.view(_UNSIGNED[ids.itemsize])) > limit:
        raise ValueError(
            f"The {which} id map holds ids from {ids.min()} to {ids.max()}, but its table has {largest} segments: "
            f"ids must lie in 0 to {largest}."
        )
    return ids.astype(np.int64)


def _look_up(values: IdArray, listed: Tensor, which: str) -> IntArray:
    """Row of each value: 0 for void, k + 1 for the k-th listed id."""
    ids = np.concatenate((_VOID, listed.detach().cpu().numpy().astype(np.int64)))
    ordered = np.sort(ids)
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError(f"The list of ids of the {which} map repeats an id or holds 0, which is void.")
    rows = _hashed_rows(values, ids)
    if rows is None:  # too many ids
        order = np.argsort(ids)
        rows = order[np.minimum(np.searchsorted(ordered, values.astype(np.int64)), ordered.size - 1)]
    unknown = ids.take(rows) != values
    if unknown.any():
        raise ValueError(f"The {which} id map holds id {values[unknown][0]}, which its list of segments lacks.")
    return rows


def _hashed_rows(values: IdArray, ids: IntArray) -> IntArray | None:
    """Positions of values in a short list of distinct ids, anything for a value that is not in it.

    Multiplicative hashing (Knuth, The Art of Computer Programming, volume 3, 6.4) by the first multiplier that gives no
    two ids one place, so one look suffices; several times faster than a binary search. None if there is no such
    multiplier.
    """
    bits = (ids.size**2).bit_length()  # a multiplier fails in about one of three cases
    if bits > _MOST_BITS:
        return None
    shift, positions = np.uint32(32 - bits), np.arange(ids.size)
    table = np.zeros(1 << bits, np.int64)
    for multiplier in _MULTIPLIERS:
        places = (ids.astype(np.uint32) * multiplier) >> shift
        table[places] = positions
        if (table[places] == positions).all():
            hashes = values.astype(np.uint32)
            hashes *= multiplier
            hashes >>= shift
            return table.take(hashes)
    return None


def _histogram_on_device(first: Tensor, second: Tensor, num_first: int, num_second: int) -> Tensor:
    a, b = first.detach().reshape(-1).long(), second.detach().reshape(-1).long()
    height, width = num_first + 1, num_second + 1
    if a.numel():
        low_a, high_a, low_b, high_b = torch.stack([*a.aminmax(), *b.aminmax()]).tolist()  # one sync
        if low_a < 0 or high_a > num_first or low_b < 0 or high_b > num_second:
            raise ValueError(
                f"The id maps hold ids from {low_a} to {high_a} and from {low_b} to {high_b}, but their tables have "
                f"{num_first} and {num_second} segments."
            )
    return torch.bincount(a * width + b, minlength=height * width).reshape(height, width)
