from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from helpers import class_table, random_target
from panoptic_ibs.functional.losses import dice_loss, focal_to_empty
from panoptic_ibs.functional.masks import class_masks_at_stride_4, masks_at_stride_4
from panoptic_ibs.functional.points import sample_points, uncertain_points
from panoptic_ibs.functional.resizing import resized_size


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1.0, 2.0), (0.25, 0.5), (0.6, 3.0)])
def test_focal_to_empty_equals_torchvision(alpha: float, gamma: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, 40) * 6).requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    weight = torch.rand(5)
    ours = focal_to_empty(logits, alpha, gamma)
    theirs = sigmoid_focal_loss(twin, torch.zeros_like(twin), alpha, gamma).mean(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-4, atol=1e-7)


def test_focal_to_empty_gradient_and_extremes() -> None:
    torch.manual_seed(1)
    logits = (torch.randn(3, 7, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal_to_empty(x, 0.25, 2.0), logits)
    extreme = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = focal_to_empty(extreme)
    assert loss.item() == pytest.approx(0.75 * 1e4 / 2)
    loss.sum().backward()
    torch.testing.assert_close(extreme.grad, torch.tensor([[0.0, 0.375]]))


def test_focal_to_empty_is_float32_under_half_precision() -> None:
    logits = torch.linspace(-8, 8, 64).reshape(2, 32)
    half = logits.bfloat16()
    assert focal_to_empty(half).dtype == torch.float32
    torch.testing.assert_close(focal_to_empty(half), focal_to_empty(half.float()))


def test_dice_against_loop() -> None:
    torch.manual_seed(0)
    p, m = torch.rand(3, 2, 50), (torch.rand(3, 50) > 0.5).float()
    m[2] = 0
    p[2] = 0
    result = dice_loss(p, m)
    for n in range(3):
        for k in range(2):
            top = sum(2 * p[n, k, i] * m[n, i] for i in range(50))
            bottom = sum(p[n, k, i] ** 2 + m[n, i] ** 2 for i in range(50))
            expected = 1.0 if bottom == 0 else 1 - top / bottom
            assert result[n, k].item() == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_stride_4_masks_equal_bilinear_resizing(dtype: torch.dtype) -> None:
    classes = class_table()
    targets = [random_target(classes, (64, 96), segments=n, seed=n) for n in (9, 4, 6)]
    id_maps = torch.stack([t.id_map for t in targets]).to(dtype)
    image, rows = torch.tensor([0, 2, 0, 1, 0, 2]), torch.tensor([0, 5, 3, 3, 8, 0])
    full = torch.stack([(id_maps[i] == r + 1).float() for i, r in zip(image, rows, strict=True)])
    expected = F.interpolate(full[None], scale_factor=0.25, mode="bilinear", align_corners=False)[0]
    assert torch.equal(masks_at_stride_4(id_maps, image, rows), expected)

    channels = torch.tensor([0, 1, 3, 3, 0, 2])
    of_row = torch.full((3, max(map(len, targets))), -1)
    label = torch.full((3, 64, 96), -1)
    for i, target in enumerate(targets):
        for r in range(len(target)):
            of_row[i, r] = {0: 0, 1: 1}.get(int(target.class_ids[r]), 3)
            label[i][target.id_map == r + 1] = of_row[i, r]
    full = torch.stack([(label[i] == c).float() for i, c in zip(image, channels, strict=True)])
    expected = F.interpolate(full[None], scale_factor=0.25, mode="bilinear", align_corners=False)[0]
    assert expected.sum() > 0
    assert torch.equal(class_masks_at_stride_4(id_maps, of_row, image, channels), expected)
    assert len(masks_at_stride_4(id_maps, image[:0], rows[:0])) == 0
    with pytest.raises(ValueError, match="multiple of 4"):
        masks_at_stride_4(torch.zeros(1, 30, 32), image[:1], rows[:1])


def test_points() -> None:
    maps = torch.arange(12.0).reshape(1, 3, 4)
    centre_of_pixel = torch.tensor([[[(1 + 0.5) / 4, (2 + 0.5) / 3], [2 / 4, 0.5 / 3]]])
    torch.testing.assert_close(sample_points(maps, centre_of_pixel), torch.tensor([[9.0, 1.5]]))

    ramp = torch.linspace(-10, 10, 400).reshape(1, 20, 20).repeat(2, 1, 1)  # zero crossing in the middle rows
    points = uncertain_points(ramp, 200, generator=torch.Generator().manual_seed(0))
    assert points.shape == (2, 200, 2)
    values = sample_points(ramp, points).abs()
    assert values[:, :150].max() < values[:, 150:].max()
    assert values[:, :150].mean() < 0.5 * sample_points(ramp, torch.rand(2, 1000, 2)).abs().mean()


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "expected"),
    [
        ((1024, 2048), 512, None, (512, 1024)),
        ((480, 640), 800, 1333, (800, 1067)),
        ((427, 640), 800, 1000, (667, 1000)),
        ((100, 333), None, None, (100, 333)),
        ((100, 333), None, 111, (33, 111)),
    ],
)
def test_resized_size(size, shortest, longest, expected) -> None:
    assert resized_size(size, shortest, longest) == expected
