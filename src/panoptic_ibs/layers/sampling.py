"""The core of multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021): weighted bilinear samples.

Three forms of one function. :func:`sample_grid` uses ``grid_sample``; it runs everywhere and can be compiled. On a GPU
:mod:`panoptic_ibs.layers.sampling_kernels` does all in one kernel a direction. On a CPU ``_Table`` takes the values as
a table of rows and sums weighted rows; that is several times faster there, backwards even more. Both keep only their
inputs for the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from panoptic_ibs.functional import forms

Size = tuple[int, int]
CHUNK = 1024  # queries


def deformable_sampling(
    values: Tensor, sizes: Sequence[Size], reference: Tensor, offsets: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples around each query's reference, over levels and points; zeros outside.

    Args:
        values: (B, V, heads, D), the levels one after another.
        sizes: (height, width) of each level.
        reference: (Q, 2) x and y in [0, 1].
        offsets: (B, Q, heads, levels, points, 2), x and y in pixels of the level.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads, D).
    """
    if torch.compiler.is_compiling():
        return sample_grid(values, sizes, reference, offsets, weights)
    if forms.batched(values.device) and (kernels := _kernels(values.device, values.dtype)) is not None:
        kernel_result: Tensor = kernels.deformable_sampling(values, sizes, reference, offsets, weights)
        return kernel_result
    rows = values.shape[1] * values.shape[2]
    usable = (
        not forms.batched(values.device) and values.dtype in (torch.float32, torch.float64) and rows < 2**24
    )  # exact in float32
    if usable and min(min(s) for s in sizes) > 1:
        result: Tensor = _Table.apply(values, list(sizes), reference, offsets, weights)
        return result
    return sample_grid(values, sizes, reference, offsets, weights)


@lru_cache(maxsize=16)
def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The kernels, tried once on a device; None where there is no Triton for it, or it cannot compile them."""
    if device.type != "cuda":
        return None
    try:
        from . import sampling_kernels as kernels

        kernels.check(device, dtype)
    except Exception as error:  # whatever it is, there is another form
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(f"deformable attention runs without its kernel on {device}: {reason}", stacklevel=2)
        return None
    return kernels


def sample_grid(values: Tensor, sizes: Sequence[Size], reference: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """:func:`deformable_sampling` by ``grid_sample``, added up level by level."""
    b, _, heads, d = values.shape
    result = values.new_zeros(b * heads, d, reference.shape[0])
    parts = values.split([h * w for h, w in sizes], dim=1)
    for level, ((h, w), part) in enumerate(zip(sizes, parts, strict=True)):
        maps = part.permute(0, 2, 3, 1).reshape(b * heads, d, h, w)
        scale = torch.tensor([2.0 / w, 2.0 / h], dtype=offsets.dtype).to(offsets.device, non_blocking=True)
        grid = (2 * reference - 1)[None, :, None, None] + offsets[:, :, :, level] * scale
        grid = grid.transpose(1, 2).flatten(0, 1).to(maps.dtype)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        result = result + (sampled * weight).sum(-1)
    return result.view(b, heads, d, -1).permute(0, 3, 1, 2)


@dataclass
class _Axis:
    """Two neighbouring places on one axis for each sample: the first place, and how far in front of it the sample is.

    The first place is clamped, so that both exist; a sample outside has no share in either, or in one of them alone.
    """

    first: Tensor
    ahead: Tensor

    @classmethod
    def make(cls, reference: Tensor, offsets: Tensor, extent: Tensor) -> _Axis:
        """(Q,) references in [0, 1], (Q, heads, levels, points) offsets in pixels, (levels,) pixels of the levels."""
        place = offsets + (reference[:, None] * extent - 0.5)[:, None, :, None]
        first = place.floor().clamp_(min=0).minimum((extent - 2)[:, None])
        return cls(first, place.sub_(first))

    def shares(self) -> tuple[Tensor, Tensor]:
        """Bilinear weights of both places."""
        return tuple((1 - (self.ahead - k).abs_()).clamp_(min=0) for k in (0, 1))  # type: ignore[return-value]

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Derivatives of the weights; at a kink the one from the right."""
        below, inside, above = ((self.ahead >= k) & (self.ahead < k + 1) for k in (-1, 0, 1))
        dtype = self.ahead.dtype
        return below.to(dtype) - inside.to(dtype), inside.to(dtype) - above.to(dtype)


def _axes(sizes: Sequence[Size], reference: Tensor, offsets: Tensor) -> tuple[_Axis, _Axis, Tensor, Tensor]:
    """The axes x and y of one image's samples, the rows of their first corners (Q, heads, levels, points) int32, and
    the (2, 2, levels, 1) steps from there to the rows of the corners."""
    heads = offsets.shape[1]
    height, width = (torch.tensor(v) for v in zip(*sizes, strict=True))
    start = torch.tensor([0] + [h * w for h, w in sizes[:-1]]).cumsum(0)
    x = _Axis.make(reference[:, 0], offsets[..., 0], width.to(offsets.dtype))
    y = _Axis.make(reference[:, 1], offsets[..., 1], height.to(offsets.dtype))
    place = (y.first * width[:, None]).add_(x.first).add_(start[:, None]).int()
    first = place.mul_(heads).add_(torch.arange(heads, dtype=torch.int32)[:, None, None])
    step = torch.stack([torch.zeros_like(width), torch.ones_like(width), width, width + 1]).int() * heads
    return x, y, first, step.view(2, 2, -1, 1)


def _corners(x: _Axis, y: _Axis, first: Tensor, step: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and weights of all corners of one image's samples, both (Q heads, 4 levels points)."""
    rows = first[:, :, None, None] + step
    down = torch.stack([share.mul_(weights) for share in y.shares()], dim=2)
    shares = down[:, :, :, None] * torch.stack(x.shares(), dim=2)[:, :, None]
    return rows.view(-1, step[..., 0].numel() * first.shape[-1]), shares.view(rows.shape[0] * rows.shape[1], -1)


class _Table(torch.autograd.Function):
    """Sums of weighted rows of the table of values, image by image. Corners are made anew in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, sizes: list[Size], reference: Tensor, offsets: Tensor, weights: Tensor
    ) -> Tensor:
        b, _, heads, d = values.shape
        ctx.sizes = sizes
        ctx.save_for_backward(values, reference, offsets, weights)
        result = values.new_empty(b, reference.shape[0], heads, d)
        for i, part in _parts(b, len(reference)):
            rows, shares = _corners(*_axes(sizes, reference[part], offsets[i, part]), weights[i, part])
            summed = F.embedding_bag(rows, values[i].reshape(-1, d), per_sample_weights=shares, mode="sum")
            result[i, part] = summed.view(-1, heads, d)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, reference, offsets, weights = ctx.saved_tensors
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (values, offsets, weights)]
        queries, (heads, d) = len(reference), values.shape[2:]
        corners = 4 * weights[0, 0, 0].numel()
        rows = torch.empty(queries, heads, corners, dtype=torch.int32)
        shares = values.new_empty(queries, heads, corners)
        for i, part in _parts(len(values), queries):
            x, y, first, step = _axes(ctx.sizes, reference[part], offsets[i, part])
            row, share = _corners(x, y, first, step, weights[i, part])
            rows[part], shares[part] = row.view_as(rows[part]), share.view_as(shares[part])
            corner = _row_products(row, share, values[i].reshape(-1, d), grad[i, part].reshape(-1, d))
            corner = corner.view(*first.shape[:2], 2, 2, *first.shape[2:])
            _sample_gradients(x, y, corner, weights[i, part], grads[1][i, part], grads[2][i, part])
            if part.stop == queries:
                table = _transposed(rows, shares, grad[i].reshape(-1, d), values[i].numel() // d)
                grads[0][i] = table.view_as(values[i])
        return grads[0], None, None, grads[1], grads[2]


def _parts(images: int, queries: int) -> list[tuple[int, slice]]:
    """Image after image in slices of queries whose corners fit in a cache."""
    starts = range(0, queries, CHUNK)
    return [(i, slice(start, min(start + CHUNK, queries))) for i in range(images) for start in starts]


def _row_products(rows: Tensor, shares: Tensor, table: Tensor, grad: Tensor) -> Tensor:
    """(N, K) inner products of each bag's gradient (N, D) with the rows that it summed."""
    with torch.enable_grad():
        shares = shares.detach().requires_grad_()
        summed = F.embedding_bag(rows, table.detach(), per_sample_weights=shares, mode="sum")
        return torch.autograd.grad(summed, shares, grad)[0]


def _sample_gradients(x: _Axis, y: _Axis, corner: Tensor, weight: Tensor, offsets: Tensor, weights: Tensor) -> None:
    """Fill the gradients of some offsets and weights from those of their corners' shares."""
    left, right = x.shares()
    steep_left, steep_right = x.slopes()
    across = [corner[:, :, k, 0] * left + corner[:, :, k, 1] * right for k in (0, 1)]
    along = [corner[:, :, k, 0] * steep_left + corner[:, :, k, 1] * steep_right for k in (0, 1)]
    up, down = y.shares()
    steep_up, steep_down = y.slopes()
    weights.copy_(across[0] * up + across[1] * down)
    offsets[..., 0] = (along[0] * up + along[1] * down) * weight
    offsets[..., 1] = (across[0] * steep_up + across[1] * steep_down) * weight


def _transposed(rows: Tensor, shares: Tensor, grad: Tensor, count: int) -> Tensor:
    """Gradient of the table (count, D): for each of its rows the weighted sum of the bags that it went into.

    The samples are brought into the order of the table's rows by SciPy's conversion of sparse matrices, a counting
    sort; the gradient of ``embedding_bag`` itself is many times slower.
    """
    bags = grad.shape[0]
    ends = np.arange(bags + 1, dtype=np.int32) * (rows.numel() // bags)
    by_row = csr_matrix((shares.numpy().ravel(), rows.numpy().ravel(), ends), shape=(bags, count)).tocsc()
    index, starts, weights = (torch.from_numpy(v) for v in (by_row.indices, by_row.indptr, by_row.data))
    return F.embedding_bag(index, grad, starts, per_sample_weights=weights, mode="sum", include_last_offset=True)
