"""Fusion of soft masks, against loops over segments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from panoptic_ibs.functional.fusion import combine, upsample
from panoptic_ibs.structures import ImageSize


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_combination_against_loops(chunk: int) -> None:
    g = torch.Generator().manual_seed(1)
    things = F.interpolate(torch.randn(9, 1, 3, 4, generator=g) * 2, size=(8, 12), mode="bilinear")[:, 0].sigmoid()
    things[4] = 0
    stuff = F.interpolate(torch.randn(4, 1, 3, 4, generator=g), size=(8, 12), mode="bilinear")[:, 0].sigmoid()
    thing_classes, stuff_classes = torch.arange(9) % 3 + 2, torch.tensor([-1, 0, 1, 9])
    size = ImageSize((30, 45), (41, 60))
    id_map, classes, scores = combine(
        things, thing_classes, torch.linspace(0.9, 0.3, 9), stuff, stuff_classes, torch.ones(4), size,
        stuff_area=150, chunk=chunk,
    )  # fmt: skip

    full = F.interpolate(things[None], scale_factor=4, mode="bilinear")[..., :30, :45]
    full = F.interpolate(full, size=(41, 60), mode="bilinear")[0]
    torch.testing.assert_close(upsample(things, size), full)
    label = upsample(stuff, size).argmax(0)
    expected, ids = torch.zeros(41, 60, dtype=torch.int32), []
    for k in range(9):
        mask = full[k] > 0.5
        if mask.sum() == 0 or (mask & (expected > 0)).sum() / mask.sum() > 0.5:
            continue
        ids.append(int(thing_classes[k]))
        expected[mask & (expected == 0)] = len(ids)
    for k in range(4):
        mask = (label == k) & (expected == 0)
        if stuff_classes[k] < 0 or mask.sum() < 150:
            continue
        ids.append(int(stuff_classes[k]))
        expected[mask] = len(ids)
    assert torch.equal(id_map, expected)
    assert classes.tolist() == ids
    assert len(scores) == len(ids) >= 4
    empty = combine(things[:0], thing_classes[:0], scores[:0], stuff[:0], stuff_classes[:0], scores[:0], size)
    assert empty[0].sum() == 0
    assert len(empty[1]) == 0


@pytest.mark.parametrize(("things", "stuff"), [(200, 54), (200, 55), (255, 1), (300, 0)])
def test_ids_do_not_wrap_where_the_type_of_the_map_changes(things: int, stuff: int) -> None:
    """Each mask is one column of the image, so ids count from left to right; bytes hold up to 254 segments."""
    masks = torch.eye(things + stuff)[:, None, :].expand(-1, 8, -1)
    size = ImageSize((8, things + stuff), (8, things + stuff))
    classes = torch.arange(things + stuff)
    id_map, found, _ = combine(
        masks[:things], classes[:things], torch.ones(things), masks[things:], classes[things:], torch.ones(stuff), size,
        stuff_area=1, stride=1,
    )  # fmt: skip
    assert id_map.dtype == (torch.uint8 if things + stuff <= 254 else torch.int16)
    assert id_map[3].tolist() == list(range(1, things + stuff + 1))
    assert torch.equal(found, classes)
