"""The kernels of deformable attention under Triton's interpreter, on the CPU, against the plain form.

Triton's language is another one under the interpreter, from its first import on: ``test_deformable_kernels.py`` runs
this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from panoptic_ibs.layers import sampling
from panoptic_ibs.layers import sampling_kernels as kernels

SIZES = [(3, 5), (2, 1)]


def inputs(queries: int = 5, batch: int = 1, heads: int = 2, channels: int = 3, reach: float = 2.0) -> list[Tensor]:
    """Values, references, offsets (some samples lie outside of the map) and weights."""
    generator = torch.Generator().manual_seed(queries + channels)
    rows = sum(h * w for h, w in SIZES)
    values = torch.randn(batch, rows, heads, channels, generator=generator)
    reference = torch.rand(queries, 2, generator=generator)
    offsets = reach * torch.randn(batch, queries, heads, len(SIZES), 2, 2, generator=generator)
    return [values, reference, offsets, torch.rand(batch, queries, heads, len(SIZES), 2, generator=generator)]


def both(given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Result and gradients of the kernels and of the plain form."""
    found = []
    upstream: Tensor | None = None
    for form in (kernels.deformable_sampling, sampling.sample_grid):
        values, reference, offsets, weights = given
        leaves = [t.clone().requires_grad_() for t in (values, offsets, weights)]
        result = form(leaves[0], SIZES, reference, leaves[1], leaves[2])
        if upstream is None:
            upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
        found.append([result, *torch.autograd.grad(result, leaves, upstream.to(result.dtype))])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("reach", [0.0, 2.0, 1e6])
def test_forward_and_gradients_equal_the_plain_form(reach: float) -> None:
    (result, plain), *gradients = both(inputs(reach=reach))
    torch.testing.assert_close(result, plain, atol=1e-5, rtol=0)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_several_images_and_more_queries_than_a_program_takes() -> None:
    for ours, theirs in both(inputs(queries=kernels.QUERIES + 1, batch=2, heads=1, channels=1)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_values_of_bfloat16() -> None:
    values, *rest = inputs()
    (result, _), *_ = both([values.bfloat16(), *rest])
    wanted = sampling.sample_grid(values.bfloat16().float(), SIZES, *rest)
    assert result.dtype == torch.float32  # as the plain form's: weights are single precision
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=0)  # the sums are single precision as well


@pytest.mark.parametrize(("queries", "batch"), [(0, 1), (5, 0)])
def test_nothing_to_sample(queries: int, batch: int) -> None:
    values, reference, offsets, weights = inputs(queries=queries, batch=batch)
    leaves = [t.requires_grad_() for t in (values, offsets, weights)]
    result = kernels.deformable_sampling(values, SIZES, reference, offsets, weights)
    assert result.shape == (batch, queries, 2, 3)
    assert all((g == 0).all() for g in torch.autograd.grad(result.sum(), leaves))
