from __future__ import annotations

import pytest
import torch
from torch import Tensor

from panoptic_ibs.layers import sampling
from panoptic_ibs.layers.sampling import deformable_sampling, sample_grid

SIZES = [(2, 3), (4, 6), (7, 11)]


def inputs(sizes=SIZES, batch: int = 2, queries: int = 9, heads: int = 2) -> tuple[Tensor, ...]:
    """Values, references, offsets (some far outside) and weights, in float64."""
    g = torch.Generator().manual_seed(0)
    points = sum(h * w for h, w in sizes)
    shape = (batch, queries, heads, len(sizes), 3)
    values = torch.randn(batch, points, heads, 4, generator=g, dtype=torch.float64)
    reference = torch.rand(queries, 2, generator=g, dtype=torch.float64)
    offsets = torch.randn(*shape, 2, generator=g, dtype=torch.float64) * 4
    return values, reference, offsets, torch.rand(*shape, generator=g, dtype=torch.float64)


def naive(values: Tensor, sizes, reference: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Every sample by itself: four neighbours, those outside are zero."""
    b, _, heads, d = values.shape
    result = torch.zeros(b, len(reference), heads, d, dtype=values.dtype)
    for i, q, m, level, p in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        h, w = sizes[level]
        start = sum(a * c for a, c in sizes[:level])
        x = float(reference[q, 0] * w + offsets[i, q, m, level, p, 0] - 0.5)
        y = float(reference[q, 1] * h + offsets[i, q, m, level, p, 1] - 0.5)
        for row in range(h):
            for column in range(w):
                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                result[i, q, m] += weights[i, q, m, level, p] * share * values[i, start + row * w + column, m]
    return result


@pytest.mark.parametrize("chunk", [2, 1024])
@pytest.mark.parametrize("sizes", [SIZES, [(1, 3), (4, 6), (7, 11)]], ids=["table", "one row: grid"])
def test_against_a_loop(sizes, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK", chunk)
    values, reference, offsets, weights = inputs(sizes)
    expected = naive(values, sizes, reference, offsets, weights)
    for form in (deformable_sampling, sample_grid):
        torch.testing.assert_close(form(values, sizes, reference, offsets, weights), expected)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK", 2)
    values, reference, offsets, weights = inputs(queries=5)
    for t in (values, offsets, weights):
        t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, o, w: deformable_sampling(v, SIZES, reference, o, w), (values, offsets, weights), fast_mode=True
    )
    grad = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    of_table, of_grid = (
        torch.autograd.grad(form(values, SIZES, reference, offsets, weights), (values, offsets, weights), grad)
        for form in (deformable_sampling, sample_grid)
    )
    for mine, theirs in zip(of_table, of_grid, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradient_on_pixel_centres_equals_grid_sample() -> None:
    """Where a layer starts: offsets are whole numbers, and the derivative is the one from the right."""
    sizes = [(4, 8)]
    y, x = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(8) + 0.5) / 8, indexing="ij")
    reference = torch.stack([x.flatten(), y.flatten()], 1).double()  # exact in binary
    values = torch.randn(1, 32, 2, 4, dtype=torch.float64)
    offsets = torch.randint(-3, 4, (1, 32, 2, 1, 4, 2)).double().requires_grad_()
    weights = torch.rand(1, 32, 2, 1, 4, dtype=torch.float64)
    results = [form(values, sizes, reference, offsets, weights) for form in (deformable_sampling, sample_grid)]
    grad = torch.randn_like(results[0])
    mine, theirs = (torch.autograd.grad(result, offsets, grad)[0] for result in results)
    assert theirs.abs().sum() > 0
    torch.testing.assert_close(mine, theirs)


def test_half_precision_and_compilation_take_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    values, reference, offsets, weights = (t.float() for t in inputs())
    full = deformable_sampling(values, SIZES, reference, offsets, weights)
    half = deformable_sampling(values.bfloat16(), SIZES, reference, offsets, weights)
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.2)
    compiled = torch.compile(deformable_sampling, backend="eager", fullgraph=True)
    monkeypatch.setattr(sampling._Table, "apply", None)
    torch.testing.assert_close(compiled(values, SIZES, reference, offsets, weights), full)
