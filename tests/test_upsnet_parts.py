"""Parts of UPSNet: deformable semantic branch, RoI semantic loss, panoptic logits; each against loops."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reference_upsnet as reference
from panoptic_ibs.functional import panoptic_logits as module
from panoptic_ibs.functional.panoptic_logits import panoptic_logits, touched, uncovered, winners
from panoptic_ibs.heads.two_branch.deformable import (
    DeformableBranch,
    DeformableOptions,
    WithContext,
    deform_outputs,
    region_semantic_loss,
)
from panoptic_ibs.layers.convolution import DeformableConv
from panoptic_ibs.layers.pyramid import FeaturePyramid
from panoptic_ibs.structures import FeatureLevel


def bilinear(plane: Tensor, y: float, x: float) -> float:
    """Value between pixels, zeros outside."""
    total, (top, left) = 0.0, (math.floor(y), math.floor(x))
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += float(plane[row, column]) * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def deformed(conv: DeformableConv, x: Tensor) -> Tensor:
    """A deformable 3 x 3 convolution of one image (C, H, W) by loops; offsets are (dy, dx) for each tap."""
    offset = F.conv2d(x[None], conv.offset.weight, conv.offset.bias, padding=1)[0]
    _, height, width = x.shape
    result = torch.zeros(conv.conv.weight.shape[0], height, width)
    for i in range(height):
        for j in range(width):
            patch = torch.zeros(x.shape[0], 9)
            for tap in range(9):
                y = i + tap // 3 - 1 + float(offset[2 * tap, i, j])
                z = j + tap % 3 - 1 + float(offset[2 * tap + 1, i, j])
                patch[:, tap] = torch.tensor([bilinear(plane, y, z) for plane in x])
            result[:, i, j] = conv.conv.weight.flatten(1) @ patch.flatten()
    return result if conv.conv.bias is None else result + conv.conv.bias[:, None, None]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_branch_against_loops(depth: int, norm: bool) -> None:
    torch.manual_seed(0)
    branch = DeformableBranch(4, 3, DeformableOptions(depth, 2, norm), levels=3)
    convs = [m for m in branch.shared if isinstance(m, DeformableConv)]
    assert [c.conv.weight.shape[:2] for c in convs] == ([(2, 4)] if depth == 1 else [(2, 4), (2, 2)])
    for m in convs:
        assert not m.offset.weight.any()
        nn.init.normal_(m.offset.weight, std=0.3)
    levels = [torch.randn(1, 4, 8 >> i, 8 >> i) for i in range(3)]
    parts = []
    with torch.no_grad():
        for i, level in enumerate(levels):
            x = level[0]
            for layer in branch.shared:
                x = deformed(layer, x) if isinstance(layer, DeformableConv) else layer(x[None])[0]
            parts.append(F.interpolate(x[None], scale_factor=2**i, mode="bilinear", align_corners=False))
        nn.init.normal_(branch.predict.weight)
        nn.init.normal_(branch.predict.bias)
        expected = branch.predict(torch.cat(parts, 1))
        torch.testing.assert_close(branch(levels), expected, atol=1e-4, rtol=1e-4)


def test_depth_and_width_are_upsnets() -> None:
    for depth, widths in ((3, (256, 256, 128, 128)), (2, (256, 128, 128))):
        branch = DeformableBranch(256, 19, DeformableOptions(depth, 128, norm=False))
        shapes = [m.conv.weight.shape[:2] for m in branch.shared if isinstance(m, DeformableConv)]
        assert shapes == [(b, a) for a, b in pairwise(widths)]
        assert branch.predict.weight.shape == (19, 512, 1, 1)
        assert all(m.conv.bias is not None for m in branch.shared if isinstance(m, DeformableConv))


def test_deformable_convolutions_start_as_the_plain_ones() -> None:
    found = []
    for deformable in (True, False):
        torch.manual_seed(0)
        branch = DeformableBranch(8, 3, DeformableOptions(2, 8, deformable=deformable))
        assert any(isinstance(m, DeformableConv) for m in branch.modules()) == deformable
        torch.manual_seed(1)
        convs = [m.conv if isinstance(m, DeformableConv) else m for m in branch.shared]
        for layer in (*convs, branch.predict):
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
        found.append(branch([torch.linspace(-1, 1, 8 * (16 >> i) ** 2).view(1, 8, 16 >> i, 16 >> i) for i in range(4)]))
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_region_semantic_loss_against_loops() -> None:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 8, 10, generator=g)
    labels = torch.randint(0, 3, (2, 32, 40), generator=g).to(torch.uint8)
    labels[:, :6] = 255
    boxes = torch.tensor([[[2.0, 3, 30, 29], [0, 0, 40, 2]], [[8, 8, 9, 9], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    losses = []
    for image, box in ((0, boxes[0, 0]), (0, boxes[0, 1]), (1, boxes[1, 0])):
        left, top, right, bottom = box.tolist()
        for i in range(28):
            for j in range(28):
                label = labels[
                    image, int(top + (bottom - top) * (i + 0.5) / 28), int(left + (right - left) * (j + 0.5) / 28)
                ]
                if label == 255:
                    continue
                values = []
                for plane in logits[image]:  # RoIAlign: the mean of 2 x 2 bilinear samples
                    total = 0.0
                    for a in (0.25, 0.75):
                        for b in (0.25, 0.75):
                            y = (top + (bottom - top) * (i + a) / 28) / 4 - 0.5
                            x = (left + (right - left) * (j + b) / 28) / 4 - 0.5
                            total += bilinear(plane, min(max(y, 0), 7), min(max(x, 0), 9)) / 4
                    values.append(total)
                losses.append(F.cross_entropy(torch.tensor([values]), label.long()[None]))
    found = region_semantic_loss(logits, labels, boxes, valid)
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_region_semantic_loss_without_things_keeps_its_graph() -> None:
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = region_semantic_loss(
        logits, torch.zeros(2, 32, 32, dtype=torch.uint8), torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.bool)
    )
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_deformable_outputs_of_a_pyramid_start_as_plain_ones() -> None:
    torch.manual_seed(0)
    levels = [FeatureLevel(s, 4) for s in (4, 8, 16, 32)]
    neck = FeaturePyramid(levels, 4)
    features = [torch.randn(1, 4, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    before = neck(features)
    deform_outputs(neck, (3, 4, 5))
    assert [isinstance(m, DeformableConv) for m in neck.output] == [False, True, True, True]
    for a, b in zip(before, neck(features), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    nn.init.normal_(neck.output[1].offset.weight)
    after = neck(features)
    assert not torch.allclose(before[1], after[1])
    assert torch.equal(before[0], after[0])


def test_context_is_a_function_of_the_mean() -> None:
    torch.manual_seed(0)
    lateral = nn.Conv2d(3, 2, 1)
    layer, x = WithContext(lateral, 3, 2), torch.randn(2, 3, 4, 5)
    expected = lateral(x) + (x.mean((2, 3)) @ layer.context.weight.T + layer.context.bias)[:, :, None, None]
    torch.testing.assert_close(layer(x), expected)


# --- panoptic logits


def crowd(n: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) of many sizes, some of less than a pixel, and mask logits (n, 28, 28) of blobs."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, generator=g) * torch.tensor([size[1], size[0]])
    extent = torch.rand(n, 2, generator=g) ** 3 * torch.tensor([size[1], size[0]]) * 0.6 + 0.2
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], 1)
    limit = torch.tensor([size[1], size[0]] * 2)
    masks = F.interpolate(torch.randn(n, 1, 5, 5, generator=g) * 3 + 1, size=28, mode="bilinear")[:, 0]
    return boxes.clamp(min=0).minimum(limit), masks


@pytest.mark.parametrize("count", [0, 1, 6])
def test_training_logits_against_planes(count: int) -> None:
    size, stuff, places = (20, 33), 3, 7
    g = torch.Generator().manual_seed(count)
    semantic = torch.randn(2, 6, *size, generator=g, requires_grad=True)
    boxes, masks = crowd(2 * places, size, 5)
    boxes, masks = boxes.view(2, places, 4), masks.view(2, places, 28, 28).requires_grad_()
    channels = torch.randint(stuff, 6, (2, places), generator=g)
    kept = torch.zeros(2, places, dtype=torch.bool)
    kept[0, torch.randperm(places, generator=g)[:count]] = True
    kept[1, :2] = count > 0
    found = panoptic_logits(semantic, stuff, channels, boxes, masks, kept)
    assert found.shape == (2, stuff + places + 1, *size)
    grads = []
    for b in range(2):
        rows = kept[b].nonzero().squeeze(1).tolist()
        expected = reference.logits(
            semantic[b], stuff, channels[b, rows].tolist(), boxes[b, rows].tolist(), masks[b, rows]
        )
        used = [*range(stuff), *(stuff + i for i in rows), stuff + places]
        torch.testing.assert_close(found[b, used], expected, atol=1e-5, rtol=1e-5)
        unused = [stuff + i for i in range(places) if i not in rows]
        assert (found[b, unused] == module.NEVER).all()
        grads.append(expected.sin().sum())
    used = torch.cat([torch.ones(2, stuff), kept, torch.ones(2, 1)], 1)
    wanted = torch.autograd.grad(sum(grads), (semantic, masks), allow_unused=True)
    got = torch.autograd.grad((found.sin() * used[..., None, None]).sum(), (semantic, masks))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("stuff", "things", "count"), [(3, 4, 12), (3, 4, 1), (2, 1, 2), (3, 2, 0), (0, 3, 9)])
@pytest.mark.parametrize("low", [0.0, 3.0])
def test_winners_against_planes(
    stuff: int, things: int, count: int, low: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``low`` all semantic logits are negative: then instances win outside of their boxes, as published."""
    monkeypatch.setattr(module, "STRIP", 900)
    size = (45, 70)  # not multiples of the stride
    g = torch.Generator().manual_seed(10 * stuff + count)
    semantic = torch.randn(stuff + things, 12, 18, generator=g) * 2 - low
    boxes, masks = crowd(count, size, count)
    masks = masks - low
    channels = torch.randint(stuff, stuff + things, (count,), generator=g)
    full = F.interpolate(semantic[None], scale_factor=4, mode="bilinear", align_corners=False)[0, :, :45, :70]
    expected = reference.logits(full, stuff, channels.tolist(), boxes.tolist(), masks)
    found = winners(semantic, stuff, channels, touched(boxes, size), masks, size)
    assert torch.equal(found.label, expected.argmax(0).int())
    assert torch.equal(found.semantic, full.argmax(0).int())
    if count:
        instances = (found.label >= stuff) & (found.label < stuff + count)
        assert instances.any()


def test_closed_boxes_hold_their_instances() -> None:
    size, g = (24, 24), torch.Generator().manual_seed(0)
    semantic = torch.randn(4, 6, 6, generator=g) - 4
    boxes, masks = torch.tensor([[4.0, 4, 12, 12], [10, 2, 20, 9]]), torch.zeros(2, 28, 28)
    channels, windows = torch.tensor([2, 3]), touched(boxes, size)
    open_, closed = (winners(semantic, 2, channels, windows, masks, size, closed=c).label for c in (False, True))
    for i, (top, bottom, left, right) in enumerate(windows):
        outside = torch.ones(size, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        assert not (closed[outside] == 2 + i).any()
    assert (open_[20:, 20:] == 2).any()
    cells = F.interpolate(semantic[None], scale_factor=4, mode="bilinear")
    trained = panoptic_logits(
        cells, 2, channels[None], boxes[None], masks[None], torch.ones(1, 2, dtype=torch.bool), closed=True
    )
    assert torch.equal(trained.argmax(1)[0].int(), closed)


def test_pruning_against_planes() -> None:
    size = (50, 60)
    boxes, masks = crowd(40, size, 1)
    masks[7] = -1.0
    labels = torch.arange(40) % 3
    expected = reference.pruned(masks, labels.tolist(), boxes.tolist(), size, 0.1)
    found = uncovered(masks, labels, touched(boxes, size), size, 0.1)
    assert found.nonzero().squeeze(1).tolist() == expected
    assert 7 not in expected
    assert 5 < len(expected) < 36


def test_a_class_table_without_things_has_no_unknown() -> None:
    semantic = torch.randn(1, 3, 6, 6)
    none = torch.zeros(1, 1, dtype=torch.long)
    found = panoptic_logits(semantic, 3, none, torch.zeros(1, 1, 4), torch.zeros(1, 1, 2, 2), none.bool())
    assert torch.equal(found.argmax(1), semantic.argmax(1))
    label = winners(semantic[0], 3, none[0, :0], [], torch.zeros(0, 2, 2), (24, 24)).label
    assert torch.equal(label, F.interpolate(semantic, scale_factor=4, mode="bilinear")[0].argmax(0).int())
