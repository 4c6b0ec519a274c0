"""Multi-scale deformable attention's core as one kernel a direction, in Triton (it comes with PyTorch on Linux).

The plain form on a GPU (:func:`panoptic_ibs.layers.sampling.sample_grid`) writes every sample of every level to memory
before it sums them. Here a program takes some queries of one head of one image, and the samples stay in registers.
Products and sums are float32 whatever the type of the values. The backward pass adds to the values' gradient by atomic
additions, whose order is not fixed: two runs differ by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

Size = tuple[int, int]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # bfloat16 and what Triton supports
QUERIES = 32  # of a program


@lru_cache(maxsize=64)
def level_table(sizes: tuple[Size, ...], device: torch.device) -> Tensor:
    """(levels, 3) int32: height, width and first row of each level."""
    starts = [0]
    for height, width in sizes:
        starts.append(starts[-1] + height * width)
    rows = [[h, w, start] for (h, w), start in zip(sizes, starts[:-1], strict=True)]
    return torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)


@triton.jit
def _place(reference, offsets, levels, query, real, row, level, point, LEVELS: tl.constexpr, POINTS: tl.constexpr):
    """Height, width and first row of a level, and where the samples lie on it: first corner and how far behind it."""
    height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
    start = tl.load(levels + 3 * level + 2)
    at = 2 * ((row * LEVELS + level) * POINTS + point)
    x = tl.load(reference + 2 * query, mask=real, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(reference + 2 * query + 1, mask=real, other=0.0).to(tl.float32) * height - 0.5
    x += tl.load(offsets + at, mask=real, other=0.0).to(tl.float32)
    y += tl.load(offsets + at + 1, mask=real, other=0.0).to(tl.float32)
    x = tl.minimum(tl.maximum(x, -2.0), width + 1.0)  # far outside is outside: the row must stay a small number
    y = tl.minimum(tl.maximum(y, -2.0), height + 1.0)
    left, top = tl.floor(x), tl.floor(y)
    return height, width, start, left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _corner(image, x, y, height, width, start, heads, head, channel, real, used, D: tl.constexpr):
    """Pointers to the values of one corner of each sample, (queries, D), and which of them exist."""
    inside = real & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    row = (start + tl.where(inside, y * width + x, 0)).to(tl.int64)
    return image + ((row * heads + head) * D)[:, None] + channel[None, :], inside[:, None] & used[None, :]


@triton.jit
def _forward(
    values, levels, reference, offsets, weights, result, queries, rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = query < queries
    channel = tl.arange(0, BLOCK_D)
    used = channel < D
    row = (image * queries + query).to(tl.int64) * heads + head
    table = values + image.to(tl.int64) * rows * heads * D
    total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for level in range(LEVELS):
        for point in range(POINTS):
            height, width, start, left, top, right, down = _place(
                reference, offsets, levels, query, real, row, level, point, LEVELS, POINTS
            )
            weight = tl.load(weights + (row * LEVELS + level) * POINTS + point, mask=real, other=0.0).to(tl.float32)
            for k in tl.static_range(4):
                share = (right if k % 2 else 1.0 - right) * (down if k // 2 else 1.0 - down) * weight
                place, inside = _corner(
                    table, left + k % 2, top + k // 2, height, width, start, heads, head, channel, real, used, D
                )
                total += share[:, None] * tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = result + (row * D)[:, None] + channel[None, :]
    tl.store(place, total.to(result.dtype.element_ty), mask=real[:, None] & used[None, :])


@triton.jit
def _backward(
    values, levels, reference, offsets, weights, grad, to_values, to_offsets, to_weights, queries, rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = query < queries
    channel = tl.arange(0, BLOCK_D)
    used = channel < D
    row = (image * queries + query).to(tl.int64) * heads + head
    first = image.to(tl.int64) * rows * heads * D
    given = tl.load(grad + (row * D)[:, None] + channel[None, :], mask=real[:, None] & used[None, :], other=0.0)
    given = given.to(tl.float32)
    for level in range(LEVELS):
        for point in range(POINTS):
            height, width, start, left, top, right, down = _place(
                reference, offsets, levels, query, real, row, level, point, LEVELS, POINTS
            )
            at = (row * LEVELS + level) * POINTS + point
            weight = tl.load(weights + at, mask=real, other=0.0).to(tl.float32)
            by_weight = tl.zeros((BLOCK,), dtype=tl.float32)
            by_x = tl.zeros((BLOCK,), dtype=tl.float32)
            by_y = tl.zeros((BLOCK,), dtype=tl.float32)
            for k in tl.static_range(4):
                across, steep_x = (right if k % 2 else 1.0 - right), (1.0 if k % 2 else -1.0)
                along, steep_y = (down if k // 2 else 1.0 - down), (1.0 if k // 2 else -1.0)
                place, inside = _corner(
                    first, left + k % 2, top + k // 2, height, width, start, heads, head, channel, real, used, D
                )
                product = tl.sum(given * tl.load(values + place, mask=inside, other=0.0).to(tl.float32), axis=1)
                by_weight += across * along * product
                by_x += steep_x * along * product
                by_y += across * steep_y * product
                tl.atomic_add(to_values + place, (across * along * weight)[:, None] * given, mask=inside, sem="relaxed")
            tl.store(to_weights + at, by_weight.to(to_weights.dtype.element_ty), mask=real)
            tl.store(to_offsets + 2 * at, (by_x * weight).to(to_offsets.dtype.element_ty), mask=real)
            tl.store(to_offsets + 2 * at + 1, (by_y * weight).to(to_offsets.dtype.element_ty), mask=real)


class _Sampling(torch.autograd.Function):
    """:func:`panoptic_ibs.layers.sampling.deformable_sampling` by these kernels; ``reference`` gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, sizes: tuple[Size, ...], reference: Tensor, offsets: Tensor, weights: Tensor
    ) -> Tensor:
        inputs = [t.contiguous() for t in (values, reference, offsets, weights)]
        ctx.save_for_backward(*inputs)
        ctx.sizes = sizes
        b, _, heads, d = values.shape
        dtype = torch.promote_types(values.dtype, weights.dtype)
        result = values.new_empty((b, reference.shape[0], heads, d), dtype=dtype)
        _launch(_forward, sizes, inputs, [result])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, _, offsets, weights = ctx.saved_tensors
        to_values = torch.zeros_like(values, dtype=torch.float32)
        to_offsets, to_weights = torch.empty_like(offsets), torch.empty_like(weights)
        _launch(_backward, ctx.sizes, ctx.saved_tensors, [grad.contiguous(), to_values, to_offsets, to_weights])
        return to_values.to(values.dtype), None, None, to_offsets, to_weights


def _launch(kernel: Any, sizes: tuple[Size, ...], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """One launch over blocks of queries of every head of every image; none where there is nothing to compute."""
    values, reference, offsets, weights = inputs
    b, rows, heads, d = values.shape
    queries, (levels, points) = reference.shape[0], weights.shape[3:]
    if not values.numel() or not offsets.numel():
        for output in outputs[1:] or outputs:  # the first of the backward pass's is its input
            output.zero_()
        return
    grid = (triton.cdiv(queries, QUERIES), b * heads)
    kernel[grid](
        values, level_table(sizes, values.device), reference, offsets, weights, *outputs, queries, rows, heads,
        D=d, BLOCK_D=triton.next_power_of_2(d), LEVELS=levels, POINTS=points, BLOCK=QUERIES,
    )  # fmt: skip


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Run both kernels once on a few numbers.

    Raises:
        RuntimeError: the device is too old, the type is none of theirs, or the compiler cannot be used.
    """
    if dtype not in DTYPES:
        raise RuntimeError(f"values of {dtype}")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise RuntimeError("the GPU's compute capability is below {}.{}".format(*CAPABILITY))
    with torch.enable_grad():
        values = torch.ones(1, 4, 1, 4, dtype=dtype, device=device, requires_grad=True)
        reference, offsets = torch.full((1, 2), 0.5, device=device), torch.zeros(1, 1, 1, 1, 1, 2, device=device)
        result = deformable_sampling(values, [(2, 2)], reference, offsets, torch.ones(1, 1, 1, 1, 1, device=device))
        result.sum().backward()


def deformable_sampling(
    values: Tensor, sizes: Sequence[Size], reference: Tensor, offsets: Tensor, weights: Tensor
) -> Tensor:
    """See :func:`panoptic_ibs.layers.sampling.deformable_sampling`."""
    result: Tensor = _Sampling.apply(values, tuple(tuple(s) for s in sizes), reference, offsets, weights)
    return result
