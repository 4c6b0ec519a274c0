"""Pixel embeddings made visible: principal components as colours, similarity to one query, nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

CONSTANT = 1e-10  # share of the largest variance below which a component is rounding noise


@dataclass(frozen=True)
class PrincipalColors:
    """The first three principal components of embeddings as red, green and blue.

    Fit once and applied to several maps, equal embeddings have equal colours: crops of one model can be compared.
    Maps of two models share no axes; fit on the pixels of one and the colours of the other mean nothing, unless
    both continue the same weights.

    Attributes:
        mean: (D,).
        axes: (3, D) unit vectors by falling variance; zero where the embeddings vary in fewer directions. The
            largest entry of each is positive, so that the colours do not depend on the solver's sign.
        low: (3,) projection that becomes 0.
        high: (3,) projection that becomes 1; equal to ``low`` where a component is constant, which becomes 0.5.
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, embeddings: Tensor, percentile: float = 1.0) -> Self:
        """Find the components of (D, ...) embeddings, of one map or several joined; scale by percentiles.

        Args:
            embeddings: (D, ...); pixels with a value that is not finite take no part.
            percentile: share in percent at either end of each component that is cut off: few outliers would
                leave the rest without contrast.

        Raises:
            ValueError: a percentile outside [0, 50).
        """
        if not 0 <= percentile < 50:
            raise ValueError(f"percentile is {percentile}; it must be at least 0 and below 50.")
        flat = embeddings.detach().flatten(1).double()
        flat = flat[:, flat.isfinite().all(0)]
        dimension, count = flat.shape
        mean = flat.mean(1) if count else flat.new_zeros(dimension)
        centred = flat - mean[:, None]
        variance, vectors = torch.linalg.eigh(centred @ centred.T / max(count, 1))  # ascending
        variance, found = variance.flip(0)[:3], vectors.flip(1)[:, :3].T
        largest = found.gather(1, found.abs().argmax(1, keepdim=True))
        found = found * largest.sign()
        real = variance > CONSTANT * torch.maximum(variance[:1], mean.square().sum())
        axes = flat.new_zeros(3, dimension)
        axes[: len(found)] = torch.where(real[:, None], found, 0.0)
        low, high = flat.new_zeros(3), flat.new_zeros(3)
        if count:
            place = max(1, round(percentile / 100 * (count - 1)) + 1)
            projected = axes @ centred
            low, high = projected.kthvalue(place, 1).values, projected.kthvalue(count + 1 - place, 1).values
        return cls(mean, axes, low, high)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Colours (3, ...) in [0, 1], float32, of (D, ...) embeddings; black where a value is not finite.

        Raises:
            ValueError: another dimension than that of the fit.
        """
        if embeddings.shape[0] != len(self.mean):
            raise ValueError(f"Embeddings of dimension {embeddings.shape[0]}; fit to dimension {len(self.mean)}.")
        flat = embeddings.detach().flatten(1).to(self.mean)
        finite = flat.isfinite().all(0)
        projected = self.axes @ (torch.where(finite, flat, 0.0) - self.mean[:, None])
        width = (self.high - self.low)[:, None]
        colors = torch.where(width > 0, (projected - self.low[:, None]) / width.clamp(min=1e-300), 0.5).clamp(0, 1)
        return torch.where(finite, colors, 0.0).float().unflatten(1, embeddings.shape[1:])


def similarity_map(maps: Tensor, query: Tensor, cosine: bool = True) -> Tensor:
    """Similarity of one query to every pixel: the cosine in [-1, 1], or the inner product.

    Args:
        maps: (D, ...) embeddings of any length.
        query: (D,).
        cosine: False for the inner product.

    Returns:
        (...) of the maps' shape; a zero vector has cosine 0.
    """
    flat = maps.flatten(1)
    if cosine:
        flat, query = F.normalize(flat, dim=0), F.normalize(query, dim=0)
    return (query @ flat).unflatten(0, maps.shape[1:])


def nearest(embeddings: Tensor, query: Tensor, k: int = 5, cosine: bool = True) -> tuple[Tensor, Tensor]:
    """The ``k`` embeddings most similar to a query, the most similar first.

    Args:
        embeddings: (N, D); leave the query itself out, or it is the first.
        query: (D,).
        k: how many; all where there are fewer.
        cosine: False for the inner product.

    Returns:
        Similarities and positions, (min(k, N),) each.
    """
    values, index = similarity_map(embeddings.T, query, cosine).topk(min(k, len(embeddings)))
    return values, index
