"""The losses for GPUs, a few operations over all predictions and crops, hold the same numbers as those for CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import class_table, random_batch, random_target
from panoptic_ibs.functional import forms
from panoptic_ibs.functional.masks import sample_masks, sample_masks_of
from panoptic_ibs.functional.points import sample_features, sample_points
from panoptic_ibs.heads.mask2former import batched, losses
from panoptic_ibs.heads.mask2former.losses import usable_rows
from panoptic_ibs.heads.mask2former.network import Mask2FormerOutput
from panoptic_ibs.heads.mask2former.options import LossOptions
from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.structures import Target
from recorder import model_of

OPTIONS = LossOptions(points=64)


def make_output(crops: int, layers: int = 3, queries: int = 12, seed: int = 0) -> Mask2FormerOutput:
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(crops, queries, 6, generator=g).requires_grad_() for _ in range(layers)]
    embeddings = [torch.randn(crops, queries, 8, generator=g).requires_grad_() for _ in range(layers)]
    return Mask2FormerOutput(logits, embeddings, torch.randn(crops, 8, 16, 24, generator=g).requires_grad_())


def both(
    output: Mask2FormerOutput, targets: list[Target], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[dict[str, Tensor], list[Any], list[Tensor | None]]]:
    """Terms, segments and gradients of either form, for the same points."""
    g = torch.Generator().manual_seed(5)
    fixed, drawn = torch.rand(OPTIONS.points, 2, generator=g), torch.rand(OPTIONS.points, 2, generator=g)
    for module in (losses, batched):
        monkeypatch.setattr(module, "uncertain_points", lambda maps, *_: fixed.expand(len(maps), -1, -1))
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: drawn.expand(*shape))
    rows = [usable_rows(t, True) for t in targets]
    leaves = [*output.logits, *output.embeddings, output.features]
    found = []
    for form in (False, True):
        with forms.forced(form):
            terms, segments = losses.all_losses(output, targets, rows, OPTIONS)
        # every use of the embeddings, weighted differently
        total = sum((k + 1) * term for k, term in enumerate(terms.values()))
        total = total + sum((s.embeddings * torch.arange(8)).sum() for s in segments)
        grads = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        found.append((terms, segments, grads))
    return found


@pytest.mark.parametrize("counts", [(6, 3, 1), (5,), (0, 4), (0, 0)])
@pytest.mark.parametrize("parts", [1 << 28, 16 * 24 * 3])
def test_both_forms_agree(counts: tuple[int, ...], parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "MAP_ELEMENTS", parts)
    classes = class_table()
    targets = []
    for i, n in enumerate(counts):
        target = random_target(classes, (64, 96), max(n, 1), seed=i, image_index=i)
        if n == 0:
            target.is_crowd[:] = True
        target.id_map = target.id_map.to((torch.uint8, torch.int16, torch.int32)[i % 3])
        targets.append(target)
    (terms, segments, grads), (others, parts_of, more) = both(make_output(len(counts)), targets, monkeypatch)
    for name, term in terms.items():
        torch.testing.assert_close(others[name], term, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(segments, parts_of, strict=True):
        for field in ("embeddings", "image_index", "is_thing", "segment_index"):
            torch.testing.assert_close(getattr(ours, field), getattr(theirs, field))
        assert ours.features is theirs.features
    for one, other in zip(grads, more, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(g is not None for g in more)


def test_more_segments_than_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [random_target(class_table(), (64, 96), 9, seed=1), random_target(class_table(), (64, 96), 2, seed=2)]
    (terms, _, _), (others, segments, _) = both(make_output(2, queries=4), targets, monkeypatch)
    for name, term in terms.items():
        torch.testing.assert_close(others[name], term, rtol=1e-5, atol=1e-6)
    assert max(len(s.embeddings) for s in segments) <= 8


def test_look_ups_of_several_images_equal_those_of_one() -> None:
    g = torch.Generator().manual_seed(2)
    targets = [random_target(class_table(), (64, 96), 6, seed=s) for s in range(3)]
    maps = torch.stack([t.id_map for t in targets])
    rows = torch.tensor([[0, 3], [1, -1], [2, 5]])
    for points in (torch.rand(3, 40, 2, generator=g) * 1.2 - 0.1, torch.rand(3, 2, 40, 2, generator=g)):
        found = sample_masks_of(maps, rows, points)
        for i in range(3):
            torch.testing.assert_close(found[i], sample_masks(maps[i], rows[i], points[i]))
    features, points = torch.randn(2, 5, 7, 9, generator=g), torch.rand(2, 30, 2, generator=g)
    for i, sampled in enumerate(sample_features(features, points)):
        torch.testing.assert_close(sampled, sample_points(features[i], points[i].expand(5, -1, -1)))


class Count(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operations(crops: int) -> int:
    """Dispatched operations of the losses, IBS and backward pass in the form for GPUs."""
    output = make_output(crops, layers=10)
    targets = random_batch(class_table(), (64, 96), count=crops, segments=4).targets
    rows = [usable_rows(t, True) for t in targets]
    with forms.forced(True), Count() as count:
        terms, segments = losses.all_losses(output, targets, rows, OPTIONS)
        loss = sum(terms.values()) + IntraBatchSupervision(partners="random")(segments[1:], targets=targets)
        loss.backward()
    return count.number


def test_operations_do_not_grow_with_the_batch() -> None:
    few, many = operations(2), operations(8)
    assert few < 700
    assert many < 1.2 * few  # tables on the CPU, IBS's product a target crop


def test_a_head_trains_in_the_form_for_gpus() -> None:
    """Whole head, on the CPU: finite losses that fall."""
    model = model_of("mask2former").train()
    batch = random_batch(model.classes, (64, 96), count=2, segments=4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    history = []
    with forms.forced(True):
        for _ in range(8):
            terms, _ = model.losses(batch)
            loss = sum(terms.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    assert history[-1] < 0.8 * history[0]
