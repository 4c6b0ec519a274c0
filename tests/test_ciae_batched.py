"""CIAE's losses for GPUs, a few operations over all crops, hold the same numbers as those for CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import class_table, random_target
from panoptic_ibs.functional import forms
from panoptic_ibs.functional.ragged import padded
from panoptic_ibs.functional.upsampling import label_shares, label_shares_of, phases, phases_of
from panoptic_ibs.heads.ciae import CIAE, batched
from panoptic_ibs.structures import FeatureLevel, Target

LEVELS = [FeatureLevel(s, 8) for s in (4, 8, 16, 32)]


def make_head(**options: Any) -> CIAE:
    torch.manual_seed(1)
    return CIAE(class_table(), LEVELS, dimension=8, channels=16, embedding_channels=16, depth=1, **options)


def some_targets(counts: tuple[int, ...]) -> list[Target]:
    targets = []
    for i, n in enumerate(counts):
        target = random_target(class_table(), (64, 96), max(n, 1), seed=i, image_index=i)
        if n == 0:
            target.is_crowd[:] = True
        target.id_map = target.id_map.to((torch.uint8, torch.int16, torch.int32)[i % 3])
        targets.append(target)
    return targets


def both(head: CIAE, targets: list[Target]) -> list[tuple[Tensor, tuple[Tensor, Tensor], Any, tuple[Tensor, ...]]]:
    g = torch.Generator().manual_seed(3)
    maps = torch.randn(len(targets), 8, 16, 24, generator=g).requires_grad_()
    found = []
    for form in (False, True):
        with forms.forced(form):
            loss, sums, segments = head._embedding_loss(maps, targets, head.memory.directions.clone())
        total = loss + (segments.embeddings * torch.arange(8)).sum()
        found.append((loss, sums, segments, torch.autograd.grad(total, maps)))
    return found


@pytest.mark.parametrize("counts", [(6, 3, 1), (5,), (0, 4), (0, 0)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": {"box_filter": None, "top_k": 2, "margin": 1.5}},
        {"loss": {"top_k": 50}},
        {"loss": {"category_weight": 0.0}, "thing_categories": "separate"},
        {"consistent_stuff": False},
    ],
)
@pytest.mark.parametrize("pixels", [1 << 21, 4 * 96 * 8])
def test_both_forms_agree(
    counts: tuple[int, ...], options: dict[str, Any], pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "PIXELS", pixels)
    (loss, sums, segments, grads), (other, more, theirs, slopes) = both(make_head(**options), some_targets(counts))
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    for one, two in zip(sums, more, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    for field in ("embeddings", "image_index", "is_thing", "segment_index"):
        torch.testing.assert_close(getattr(segments, field), getattr(theirs, field), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0], slopes[0], rtol=1e-4, atol=1e-6)
    if counts != (0, 0):
        assert loss > 0
        assert grads[0].abs().sum() > 0


def test_whole_losses_agree_and_the_memory_moves_alike() -> None:
    features = [torch.randn(2, 8, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    targets, found = some_targets((5, 2)), []
    for form in (False, True):
        head = make_head().train()
        with forms.forced(form):
            terms, _ = head.losses(head(features), targets)
        found.append((terms, head.memory.directions))
    for name, term in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], term, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_several_maps_equal_one_by_one() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 5, (3, 16, 24), generator=g)
    shares = label_shares_of(labels, 5)
    assert torch.equal(phases_of(labels), torch.stack([phases(m) for m in labels]))
    for i in range(3):
        assert torch.equal(shares[i], label_shares(labels[i], 5))


def test_padded() -> None:
    table = padded([torch.tensor([[1, 2]]), torch.zeros(0, 2, dtype=torch.long), torch.tensor([[3, 4], [5, 6]])], -1)
    assert table.tolist() == [[[1, 2], [-1, -1]], [[-1, -1], [-1, -1]], [[3, 4], [5, 6]]]
    assert padded([torch.zeros(0), torch.zeros(0)], 1).shape == (2, 0)
