from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from helpers import class_table, random_target
from panoptic_ibs.functional.losses import dice_of_products, focal_to_empty
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


def dice_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Five segments, two predictions each, in three crops, of which the second has none; one mask is empty."""
    g = torch.Generator().manual_seed(0)
    embeddings, features = (torch.randn(*s, generator=g, dtype=dtype) for s in ((5, 2, 3), (3, 3, 20)))
    masks = (torch.rand(5, 20, generator=g) > 0.5).to(dtype)
    masks[2] = 0
    return embeddings.requires_grad_(), features.requires_grad_(), masks, [2, 0, 3]


def test_dice_of_products_against_loop() -> None:
    embeddings, features, masks, counts = dice_inputs()
    result = dice_of_products(embeddings, features, masks, counts)
    for n, crop in enumerate((0, 0, 2, 2, 2)):
        for k in range(2):
            p = [torch.dot(embeddings[n, k], features[crop, :, i]).sigmoid().item() for i in range(20)]
            top = sum(2 * p[i] * masks[n, i].item() for i in range(20))
            bottom = sum(p[i] ** 2 + masks[n, i].item() ** 2 for i in range(20))
            assert result[n, k].item() == pytest.approx(1 - top / bottom, abs=1e-5)


def test_dice_of_products_gradients() -> None:
    embeddings, features, masks, counts = dice_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda e, f: dice_of_products(e, f, masks, counts), (embeddings, features))
    with torch.no_grad():  # nothing predicted, nothing there: the loss is one and has no slope
        embeddings[2], features[2, 0] = torch.tensor([-1e3, 0, 0]), 9
    result = dice_of_products(embeddings, features, masks, counts)
    assert result[2].tolist() == [1.0, 1.0]
    result.sum().backward()
    assert torch.isfinite(embeddings.grad).all()
    assert embeddings.grad[2].abs().max() == 0
    assert features.grad[1].abs().max() == 0
    nothing = dice_of_products(embeddings[:0], features, masks[:0], [0, 0, 0])
    assert nothing.shape == (0, 2)
    assert torch.autograd.grad(nothing.sum(), features)[0].abs().max() == 0


def test_dice_is_summed_in_float32_under_autocast() -> None:
    """On one long row: sums in bfloat16 would be off by up to 0.4 %."""
    g = torch.Generator().manual_seed(0)
    embeddings, features = torch.randn(1, 1, 4, generator=g), torch.randn(1, 4, 4096, generator=g)
    masks = torch.rand(1, 4096, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        result = dice_of_products(embeddings, features, masks, [1])
    assert result.dtype == torch.float32
    p = (embeddings[0].bfloat16() @ features[0].bfloat16()).double().sigmoid()
    expected = 1 - 2 * (p * masks).sum() / ((p * p).sum() + (masks * masks).sum())
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


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
