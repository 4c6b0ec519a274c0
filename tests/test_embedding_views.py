from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic_ibs.functional.embedding_views import PrincipalColors, nearest, similarity_map


def a_map(dimension: int = 7, height: int = 9, width: int = 11, seed: int = 0) -> Tensor:
    """Embeddings whose variances differ clearly from axis to axis."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator)).Q
    scale = 3.0 * 0.6 ** torch.arange(dimension)
    pixels = torch.randn(dimension, height * width, generator=generator) * scale[:, None]
    return (mixing @ pixels + torch.randn(dimension, 1, generator=generator)).view(dimension, height, width)


def pca_rgb(maps: Tensor, percentile: float = 1.0) -> Tensor:
    return PrincipalColors.fit(maps, percentile)(maps)


def reference(maps: Tensor, percentile: float) -> np.ndarray:
    """By the singular value decomposition of the centred pixels, and sorting."""
    x = maps.flatten(1).numpy().astype(np.float64)
    x = x - x.mean(1, keepdims=True)
    left = np.linalg.svd(x, full_matrices=False)[0][:, :3]
    out = []
    for axis in left.T:
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        values = axis @ x
        ordered = np.sort(values)
        cut = round(percentile / 100 * (len(ordered) - 1))
        low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
        out.append(np.clip((values - low) / (high - low), 0, 1))
    return np.stack(out).reshape(3, *maps.shape[1:])


@pytest.mark.parametrize("percentile", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("dimension", [3, 7, 32])
def test_pca_equals_singular_value_decomposition(dimension: int, percentile: float) -> None:
    maps = a_map(dimension)
    colors = pca_rgb(maps, percentile)
    assert colors.shape == (3, 9, 11)
    assert colors.dtype == torch.float32
    np.testing.assert_allclose(colors.numpy(), reference(maps, percentile), atol=1e-5)
    assert colors.min() == 0
    assert colors.max() == 1


def test_colors_do_not_depend_on_the_order_of_pixels() -> None:
    maps = a_map()
    order = torch.randperm(9 * 11, generator=torch.Generator().manual_seed(1))
    shuffled = pca_rgb(maps.flatten(1)[:, order][:, None])[:, 0]
    torch.testing.assert_close(shuffled, pca_rgb(maps).flatten(1)[:, order])


def test_colors_of_another_map_are_those_of_the_fit() -> None:
    maps = a_map()
    colors = PrincipalColors.fit(maps)
    torch.testing.assert_close(colors(maps[:, 2:5, 3:7]), pca_rgb(maps)[:, 2:5, 3:7])
    assert not torch.allclose(pca_rgb(maps[:, 2:5, 3:7]), pca_rgb(maps)[:, 2:5, 3:7], atol=0.05)
    far = colors(maps + 1000 * colors.axes[0].float()[:, None, None])
    assert (far[0] == 1).all()  # beyond the fit, not over 1
    with pytest.raises(ValueError, match="dimension 4; fit to dimension 7"):
        colors(torch.zeros(4, 2, 2))


def test_outliers_do_not_take_the_contrast() -> None:
    maps = a_map(height=30, width=30)
    spoilt = maps.clone()
    spoilt[:, 0, 0] = maps.mean((1, 2)) + 100 * PrincipalColors.fit(maps).axes[0].float()
    assert pca_rgb(spoilt, 0.0)[0].std() < 0.1
    assert pca_rgb(spoilt, 1.0)[0].std() > 0.2


@pytest.mark.parametrize("shape", [(5, 4, 6), (1, 4, 6), (2, 1, 1), (5, 0, 6)])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_maps_are_grey(shape: tuple[int, int, int], value: float) -> None:
    colors = pca_rgb(torch.full(shape, value))
    assert colors.shape == (3, *shape[1:])
    assert (colors == 0.5).all()


def test_missing_components_are_grey() -> None:
    line = torch.linspace(-1, 1, 24).view(1, 4, 6)
    colors = pca_rgb(line, 0.0)
    torch.testing.assert_close(colors[0], (line[0] + 1) / 2)
    assert (colors[1:] == 0.5).all()
    plane = torch.cat([line, -2 * line, 0.5 * line, line])  # one direction in four dimensions
    colors = pca_rgb(plane, 0.0)
    assert colors[0].std() > 0.2
    assert (colors[1:] == 0.5).all()


def test_pixels_that_are_not_finite_are_black_and_take_no_part() -> None:
    maps = a_map()
    good = torch.ones(9, 11, dtype=torch.bool)
    good[0, 0] = good[3, 4] = False
    spoilt = maps.clone()
    spoilt[2, 0, 0], spoilt[5, 3, 4] = torch.nan, torch.inf
    colors = pca_rgb(spoilt)
    assert torch.isfinite(colors).all()
    assert (colors[:, ~good] == 0).all()
    torch.testing.assert_close(colors[:, good], pca_rgb(maps[:, good][:, None])[:, 0])
    assert (pca_rgb(torch.full((4, 2, 2), torch.nan)) == 0).all()


def test_percentile_is_checked() -> None:
    with pytest.raises(ValueError, match="below 50"):
        pca_rgb(a_map(), 50.0)


def test_similarity_equals_a_loop() -> None:
    maps, query = a_map().double(), torch.randn(7, generator=torch.Generator().manual_seed(2)).double()
    maps[:, 1, 1] = 0
    cosine, product = similarity_map(maps, query), similarity_map(maps, query, cosine=False)
    assert cosine.shape == product.shape == (9, 11)
    for y in range(9):
        for x in range(11):
            dot = sum(float(maps[d, y, x]) * float(query[d]) for d in range(7))
            length = float(maps[:, y, x].square().sum().sqrt() * query.square().sum().sqrt())
            assert product[y, x].item() == pytest.approx(dot, abs=1e-10)
            assert cosine[y, x].item() == pytest.approx(dot / length if length else 0.0, abs=1e-10)
    assert similarity_map(maps, maps[:, 4, 5]).argmax() == 4 * 11 + 5


def test_nearest_by_hand() -> None:
    embeddings = torch.tensor([[10.0, 10.0], [1.0, 0.1], [-1.0, 0.0], [0.0, 2.0]])
    query = torch.tensor([2.0, 0.0])
    values, index = nearest(embeddings, query, k=3)
    assert index.tolist() == [1, 0, 3]
    torch.testing.assert_close(values, torch.tensor([1 / 1.01**0.5, 0.5**0.5, 0.0]))
    values, index = nearest(embeddings, query, k=9, cosine=False)
    assert index.tolist() == [0, 1, 3, 2]
    assert values.tolist() == [20.0, 2.0, 0.0, -2.0]
    assert nearest(embeddings[:0], query)[1].tolist() == []
