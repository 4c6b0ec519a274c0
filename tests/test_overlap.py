"""The joint histogram of two id maps, beside a loop over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic_ibs.functional.overlap import joint_histogram, joint_histogram_raw

MAP_TYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)


def naive_histogram(a: Tensor, b: Tensor, height: int, width: int) -> Tensor:
    table = torch.zeros(height, width, dtype=torch.int64)
    for i, j in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        table[i, j] += 1
    return table


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_outside_the_table_raise(dtype: torch.dtype) -> None:
    """Also -1 in a type too narrow for the number of segments: read as unsigned it would be a row of the table."""
    ones = torch.ones(2, 3, dtype=dtype)
    for number in (1, 200, 300):
        with pytest.raises(ValueError, match="first id map holds ids from -1 to -1"):
            joint_histogram(-ones, ones, number, 1)
        with pytest.raises(ValueError, match="second id map holds ids from 2 to 2"):
            joint_histogram(ones, 2 * ones, number, 1)


@pytest.mark.parametrize("dtype", MAP_TYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 5), (16, 31)])
def test_joint_histogram_equals_counting_pixels(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(len(shape))
    a = torch.randint(0, 4, shape, generator=g).to(dtype)
    b = torch.randint(0, 3, shape, generator=g).sort(-1).values.to(dtype)
    table = joint_histogram(a, b, 5, 2)  # two ids of the first table do not occur
    assert table.dtype == torch.int64
    assert torch.equal(table, naive_histogram(a, b, 6, 3))
    assert torch.equal(joint_histogram(a.flip(0).transpose(0, -1), b.flip(0).transpose(0, -1), 5, 2), table)


def test_joint_histogram_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs begin, end and go on where one piece of the maps meets the next."""
    monkeypatch.setattr("panoptic_ibs.functional.overlap._PIECE", 16)
    g = torch.Generator().manual_seed(0)
    for size in (15, 16, 17, 18, 31, 32, 33, 34, 200):
        for longest in (2, 20):
            a, b = (
                torch.repeat_interleave(
                    torch.randint(0, 4, (size,), generator=g), torch.randint(1, longest, (size,), generator=g)
                )[:size]
                for _ in range(2)
            )
            assert torch.equal(joint_histogram(a, b, 3, 3), naive_histogram(a, b, 4, 4))


@pytest.mark.parametrize("number", [0, 1, 40, 254, 255, 300, 3000])
@pytest.mark.parametrize("largest", [4000, 1 << 24, 1 << 40])
def test_raw_ids_are_looked_up_in_lists_of_any_length(number: int, largest: int) -> None:
    """Short lists are hashed, long ones searched; neighbouring ids and ids of more than 32 bits are in them."""
    rng = np.random.default_rng(number)
    ids = rng.choice(largest - 1, number, replace=False) + 1 if largest == 4000 else rng.integers(1, largest, number)
    if number > 2 and largest > 1 << 32:
        ids[1:3] = ids[0] + np.array([1 << 32, 1 << 33])  # alike in their lower 32 bits
    ids = rng.permutation(np.unique(ids))
    rows = [rng.integers(0, len(ids) + 1, 700) for _ in range(2)]
    raw = [torch.from_numpy(np.concatenate(([0], ids))[r]) for r in rows]
    table = joint_histogram_raw(*raw, torch.from_numpy(ids), torch.from_numpy(ids))
    expected = np.zeros((len(ids) + 1, len(ids) + 1), np.int64)
    np.add.at(expected, (rows[0], rows[1]), 1)
    np.testing.assert_array_equal(table.numpy(), expected)
    stranger = (1 << 34) + int(raw[1][5])
    raw[1][5] = stranger
    with pytest.raises(ValueError, match=f"second id map holds id {stranger}, which"):
        joint_histogram_raw(*raw, torch.from_numpy(ids), torch.from_numpy(ids))


@pytest.mark.parametrize("dtype", MAP_TYPES)
def test_patterns_and_views_are_counted_pixel_by_pixel(dtype: torch.dtype) -> None:
    """Checkerboards with periods around a machine word's, sizes that no word divides, odd offsets, strided views."""
    for period in (1, 2, 3, 4, 5, 8):
        for size in (1, 3, 4, 7, 8, 63, 64, 65, 130):
            at = torch.arange(size + 3)
            a, b = (at // period % 2).to(dtype), ((at + 1) // (period + 1) % 3).to(dtype)
            for first, second in (
                (a[:size], b[:size]),
                (a[3:], b[1 : size + 1]),
                (a[::2], b[::2]),
                (a[1:], b.flip(0)[1:]),
            ):
                assert torch.equal(joint_histogram(first, second, 1, 2), naive_histogram(first, second, 2, 3))


def test_bad_maps_raise() -> None:
    ones, ids = torch.ones(2, 3, dtype=torch.int32), torch.tensor([1])
    for call in (
        lambda: joint_histogram(ones, ones.T, 1, 1),
        lambda: joint_histogram_raw(ones, ones.T, ids, ids),
    ):
        with pytest.raises(ValueError, match="differ in shape"):
            call()
    with pytest.raises(ValueError, match="ids must lie in 0 to 1"):
        joint_histogram(-ones, ones, 1, 1)
    with pytest.raises(ValueError, match="holds id 7"):
        joint_histogram_raw(ones, 7 * ones, ids, ids)
    for bad in (torch.tensor([1, 1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="repeats an id or holds 0"):
            joint_histogram_raw(ones, ones, ids, bad)
