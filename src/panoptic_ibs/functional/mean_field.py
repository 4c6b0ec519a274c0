"""Mean field of a fully connected CRF with Gaussian kernels and Potts compatibility (Kraehenbuehl and Koltun, 2011).

The energy of labels x of the pixels of an image is ``sum_i u_i(x_i) + sum_{i<j} [x_i != x_j] sum_m w_m k_m(f_i, f_j)``
with Gaussian kernels ``k_m = exp(-|f_i - f_j|^2 / 2)`` of the pixels' features, here their places and their colours,
each divided by its standard deviation. One step of the mean field sets ``Q_i(l)`` to the softmax over l of
``-u_i(l) + sum_m w_m sum_j k_m(f_i, f_j) Q_j(l)``.

What it costs is the sum over j, a Gaussian filter in the space of features. There are two forms of it:
:class:`Lattice`, fast for any standard deviation and nearly exact, and :class:`Window`, exact but for pixels that are
further apart than the window. Kernels are normalised symmetrically, ``k(i, j) / sqrt(n_i n_j)`` with
``n_i = sum_j k(i, j)``, and a pixel is its own neighbour.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn import functional as F

LABELS = 32  # filtered at a time: what a step needs beside its input and result does not grow with the labels
PIXELS = 4096  # looked at a time on a CPU: they stay in its cache
_HASH = (  # odd numbers of 64 bits without a pattern, so that sums of small multiples of them are all different
    -7046029254386353131, -4417276706812531889, 8021346262164302293, -2643881736870682267, 6872012353406106453,
    -4658895280553007687, -7723592293110705685, 7046029254386353087, -8663945395140668459, 4354685564936845355,
)  # fmt: skip
_TINY = 1e-20  # of the kernels' sums


class Kernel(ABC):
    """A Gaussian kernel of the N pixels of one image, normalised symmetrically and weighted."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """Values (N, L) of the pixels, filtered: of the kernel's own form."""

    @abstractmethod
    def read(self, filtered: Tensor, pixels: slice) -> Tensor:
        """Rows of these pixels, (n, L), from what :meth:`spread` gave: weighted sums over all pixels."""


class Lattice(Kernel):
    """Filter on the permutohedral lattice (Adams, Baek and Davis, 2010): time linear in pixels and labels.

    Space is tiled with simplices. Every pixel's values are splatted to the d + 1 corners of its own, the corners are
    blurred along the lattice's d + 1 axes, and pixels are interpolated from the corners.

    Args:
        features: (N, d) float32, places and colours in standard deviations, d at most 5.
        weight: of the kernel.
    """

    def __init__(self, features: Tensor, weight: float = 1.0) -> None:
        n, d = features.shape
        keys, corners, shares = _corners(features)
        self.corners, self.shares = corners, shares
        by_corner = _by_corner_sparse if features.is_cpu else _by_corner_sorted
        self.pixels, self.pixel_shares, self.first = by_corner(corners, shares, len(keys) + 1)  # the last has no pixel
        self.neighbours = [_neighbours(keys, step) for step in _steps(d, keys)]
        scale = (self.read(self.spread(features.new_ones(n, 1)), slice(None)) / (1 + 2.0**-d) + _TINY).rsqrt()
        self.pixel_shares *= scale.flatten().index_select(0, self.pixels)
        self.shares *= scale * (weight / (1 + 2.0**-d))

    def spread(self, values: Tensor) -> Tensor:
        """Values of the lattice's corners (M + 1, L); the last row is zero."""
        at = _weighted_sums(self.pixels, values, self.pixel_shares, self.first)
        other, step = torch.empty_like(at), 4 * _part(at)
        shares = at.new_tensor([0.5, 1.0, 0.5]).expand(min(step, len(at)), 3).contiguous()
        for neighbours in self.neighbours:
            # Two tables for all axes: most of the time of a new one is that of getting its memory.
            for some, target in zip(neighbours.split(step), other.split(step), strict=True):
                target.copy_(_weighted_sums(some, at, shares[: len(some)]))
            at, other = other, at
        return at

    def read(self, filtered: Tensor, pixels: slice) -> Tensor:
        """See :meth:`Kernel.read`."""
        return _weighted_sums(self.corners[pixels], filtered, self.shares[pixels])


def _by_corner_sparse(corners: Tensor, shares: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels and their shares corner by corner, and the first of each corner. A few times faster than sorting."""
    pixels, each = corners.shape
    rows = np.arange(0, pixels * each + 1, each, dtype=np.int32)
    matrix = csr_matrix((shares.flatten().numpy(), corners.flatten().numpy(), rows), (pixels, count)).tocsc()
    found = (torch.from_numpy(part) for part in (matrix.indices, matrix.data, matrix.indptr[:-1]))
    return tuple(found)  # type: ignore[return-value]


def _by_corner_sorted(corners: Tensor, shares: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_by_corner_sparse`, on any device."""
    order = corners.flatten().sort(stable=True).indices
    pixels = order.div(corners.shape[1], rounding_mode="floor").int()
    counts = torch.bincount(corners.flatten(), minlength=count)
    return pixels, shares.flatten().index_select(0, order), (counts.cumsum(0) - counts).int()


def _weighted_sums(rows: Tensor, table: Tensor, shares: Tensor, first: Tensor | None = None) -> Tensor:
    """Weighted sums of rows of a table (M, L), whose numbers and weights are (S, k), or flat from ``first`` (S,) on."""
    return F.embedding_bag(rows, table, first, mode="sum", per_sample_weights=shares)


def _corners(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The corners of each pixel's simplex.

    Args:
        features: (N, d).

    Returns:
        (M,) int64 sorted keys of the lattice's corners, (N, d + 1) int32 which of them are a pixel's, and (N, d + 1)
        its barycentric shares of them.
    """
    d = features.shape[1]
    found = [_simplices(part) for part in features.split(8 * _part(features))]
    base, order, simplices = (torch.cat([f[i] for f in found], dim=-1) for i in range(3))
    shares = torch.cat([f[3] for f in found])
    which, sorted_by = simplices.sort()
    new = F.pad(which[1:] != which[:-1], (1, 0), value=True)
    simplex = torch.empty_like(sorted_by).scatter_(0, sorted_by, new.cumsum(0) - 1)
    one = sorted_by[new]  # a pixel of each simplex
    # The k-th corner is the base plus k, less d + 1 in the coordinates of the k highest ranks.
    hashes = torch.tensor(_HASH[:d], device=features.device)
    down = F.pad(hashes, (0, 1))[order[:, one].flip(0)[:d].long()]
    up = torch.arange(1, d + 1, device=down.device)[:, None] * hashes.sum()
    first = base[one]
    others = first + up - (d + 1) * down.cumsum(0)
    keys, corner = _unique(torch.cat([first[None], others]).T)
    return keys, corner.int().index_select(0, simplex), shares


def _unique(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted, without doubles, and where each one is among them; on a CPU NumPy sorts some times faster."""
    if not keys.is_cpu:
        found: tuple[Tensor, Tensor] = keys.unique(return_inverse=True)
        return found
    unique, inverse = np.unique(keys.numpy(), return_inverse=True)
    return torch.from_numpy(unique), torch.from_numpy(inverse).view(keys.shape)


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The simplex of each pixel, and where in it.

    Args:
        features: (N, d).

    Returns:
        (N,) key of the simplex's first corner; (d + 1, N) int8 the coordinates by what is left of them there, the
        largest first; (N,) a key of the simplex; (N, d + 1) barycentric shares of its corners.
    """
    d = features.shape[1]
    place = _lifted(features)
    base = (place / (d + 1)).round()
    rest = place - base * (d + 1)
    rank = torch.zeros_like(rest, dtype=torch.int8)
    for i, j in itertools.combinations(range(d + 1), 2):
        later = rest[i] < rest[j]
        rank[i] += later
        rank[j] += ~later
    rank += base.sum(0).to(torch.int8)  # a corner's coordinates sum to zero: for that some go up or down by one cell
    wrap = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    rank += wrap * (d + 1)
    base += wrap
    names = torch.arange(d + 1, device=rank.device)[:, None].expand_as(rank)
    order = torch.empty_like(names, memory_format=torch.contiguous_format).scatter_(0, rank.long(), names)
    left = (place / (d + 1) - base).gather(0, order)
    shares = torch.cat([(1 + left[-1] - left[0])[None], (left[:-1] - left[1:]).flip(0)])
    hashes = torch.tensor(_HASH, device=features.device)
    cell = (base[:d].long() * ((d + 1) * hashes[:d, None])).sum(0)
    simplex = cell + (rank[:d] * hashes[5 : 5 + d, None]).sum(0)
    return cell, order.to(torch.int8), simplex, shares.T.contiguous()


def _lifted(features: Tensor) -> Tensor:
    """Features (N, d) in the plane of d + 1 coordinates, (d + 1, N), that sum to zero.

    They are scaled so that one blur along every axis is a Gaussian of unit standard deviation.
    """
    d = features.shape[1]
    place = features.new_zeros(d + 1, len(features))
    for j in range(d, 0, -1):
        value = features[:, j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
        place[j] = place[0] - j * value
        place[0] += value
    return place


def _steps(d: int, keys: Tensor) -> list[Tensor]:
    """Differences of the keys of neighbours along each of the lattice's d + 1 axes; int64 wraps."""
    hashes = torch.tensor(_HASH[:d], device=keys.device)
    return [*(hashes.sum() - (d + 1) * hashes), hashes.sum()]


def _neighbours(keys: Tensor, step: Tensor) -> Tensor:
    """(M + 1, 3) int32: the corner below each one along an axis, itself, and that above; M where there is none."""
    count = len(keys)
    rows = torch.arange(count, device=keys.device)
    above = torch.searchsorted(keys, keys + step).clamp_(max=count - 1)
    above = torch.where(keys[above] == keys + step, above, count)
    below = torch.full((count + 1,), count, device=keys.device).scatter_(0, above, rows)[:-1]
    return F.pad(torch.stack([below, rows, above], dim=1), (0, 0, 0, 1), value=count).int()


class Window(Kernel):
    """Exact within a window: pixels that are more than ``radius`` rows or columns apart do not see each other.

    Time, but no memory, grows with the window's area. It is for small windows, and an exact answer on small images.

    Args:
        features: (N, d), N = height x width, row by row.
        size: (height, width).
        radius: in pixels.
        weight: of the kernel.
    """

    def __init__(self, features: Tensor, size: tuple[int, int], radius: int, weight: float = 1.0) -> None:
        self.size, self.features, self.weight = size, features.view(*size, -1), weight
        self.radius = (min(radius, size[0] - 1), min(radius, size[1] - 1))
        self.scale = features.new_ones(len(features), 1)
        self.scale = (self.spread(self.scale) + _TINY).rsqrt()

    def spread(self, values: Tensor) -> Tensor:
        """Weighted sums (N, L), but for what stands before them."""
        field = (values * self.scale).view(*self.size, -1)
        total = field.clone()
        for here, there in self._shifts():
            share = torch.exp(-0.5 * (self.features[here] - self.features[there]).square().sum(-1, keepdim=True))
            total[here] += share * field[there]
            total[there] += share * field[here]
        return total.flatten(0, 1)

    def read(self, filtered: Tensor, pixels: slice) -> Tensor:
        """See :meth:`Kernel.read`."""
        return filtered[pixels] * (self.scale[pixels] * self.weight)

    def _shifts(self) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """Two overlapping parts of the image for each offset in half of the window; the other half is the reverse."""
        (height, width), (rows, columns) = self.size, self.radius
        for dy, dx in itertools.product(range(rows + 1), range(-columns, columns + 1)):
            if dy == 0 and dx <= 0:
                continue
            here = (slice(0, height - dy), slice(max(-dx, 0), width - max(dx, 0)))
            there = (slice(dy, height), slice(max(dx, 0), width - max(-dx, 0)))
            yield here, there


def pixel_features(image: Tensor, place: float, colour: float | None = None) -> Tensor:
    """Features of the pixels of an image in standard deviations, row by row.

    Args:
        image: (3, H, W) RGB, from 0 to 255.
        place: standard deviation of places, in pixels.
        colour: of colours, in their steps; without it features are places alone.

    Returns:
        (H W, 2) or (H W, 5) float32: x, y, and red, green, blue.
    """
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=image.device), torch.arange(width, device=image.device), indexing="ij"
    )
    parts = [torch.stack([x, y]).float() / place]
    if colour is not None:
        parts.append(image.float() / colour)
    return torch.cat(parts).flatten(1).T.contiguous()


def mean_field(logits: Tensor, kernels: Sequence[Kernel], iterations: int) -> Tensor:
    """Probabilities of labels after some steps of the mean field.

    Beside input and result it takes memory for :data:`LABELS` labels at a time, however many there are.

    Args:
        logits: (N, L) float32, the negative unary energies, e.g. logarithms of a network's probabilities.
        kernels: of the N pixels.
        iterations: steps; without any, the result is the softmax of ``logits``.

    Returns:
        (N, L), rows sum to one.
    """
    step, labels = _part(logits), logits.shape[1]
    parts = [slice(start, start + step) for start in range(0, len(logits), step)]
    found = torch.empty_like(logits)
    for part in parts:
        torch.softmax(logits[part], 1, out=found[part])
    for _ in range(iterations):
        for start in range(0, labels, LABELS):
            some = slice(start, start + LABELS)  # the new energy of a label depends on no other label
            filtered = [kernel.spread(found[:, some].contiguous()) for kernel in kernels]
            for part in parts:
                total = logits[part, some]
                for kernel, values in zip(kernels, filtered, strict=True):
                    total = kernel.read(values, part).add_(total)
                if labels <= LABELS:
                    torch.softmax(total, 1, out=found[part])
                else:
                    found[part, some] = total
        for part in parts if labels > LABELS else ():
            torch.softmax(found[part].clone(), 1, out=found[part])
    return found


def _part(pixels: Tensor) -> int:
    """Pixels to look at a time: so many that they stay in a CPU's cache; on a GPU the fewer calls the better."""
    return PIXELS if pixels.is_cpu else 2**20
