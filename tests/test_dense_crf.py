"""Dense CRF: the mean field against the sums over all pairs of pixels, and what it makes of soft segments."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.functional import mean_field as module
from panoptic_ibs.functional.mean_field import Kernel, Lattice, Window, mean_field, pixel_features
from panoptic_ibs.refine.dense_crf import PRESETS, DenseCRF
from panoptic_ibs.segments import SoftSegments
from panoptic_ibs.structures import ImageSize
from recorder import HEADS, model_of
from test_refine import images, predict

PHOTOGRAPHS = "PANOPTIC_IBS_PHOTOGRAPHS"  # a folder of them


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Noise on two halves of different colours, (3, H, W) uint8."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 30, (3, height, width), generator=g)
    image[:, :, width // 2 :] += 60
    return image.to(torch.uint8)


def noise(pixels: int, labels: int, seed: int = 1) -> Tensor:
    return torch.randn(pixels, labels, generator=torch.Generator().manual_seed(seed)) * 2


def exact(logits: Tensor, kernels: list[tuple[float, Tensor]], steps: int, near: Tensor | None = None) -> Tensor:
    """The mean field by tables of all pairs of pixels, in float64; ``near`` says which of them see each other."""
    logits = logits.double()
    tables = []
    for weight, features in kernels:
        f = features.double()
        table = torch.exp(-0.5 * ((f[:, None] - f[None]) ** 2).sum(-1))
        table = table if near is None else table * near
        norm = table.sum(1)
        tables.append(weight * table / (norm[:, None] * norm[None]).sqrt())
    q = logits.softmax(1)
    for _ in range(steps):
        q = (logits + sum(table @ q for table in tables)).softmax(1)
    return q


@pytest.mark.parametrize(
    ("size", "labels", "steps"), [((9, 14), 3, 5), ((14, 5), 7, 2), ((1, 8), 2, 1), ((4, 1), 1, 3)]
)
def test_window_that_covers_the_image_is_exact(size: tuple[int, int], labels: int, steps: int) -> None:
    image, logits = picture(*size), noise(size[0] * size[1], labels)
    features = [(3.0, pixel_features(image, 2.0)), (5.0, pixel_features(image, 6.0, 20.0))]
    expected = exact(logits, features, steps)
    found = mean_field(logits, [Window(f, size, 14, w) for w, f in features], steps)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)
    unary = logits.softmax(1)
    assert labels == 1 or float((found - unary).abs().max()) > 0.05


def test_features_are_places_and_colours_in_standard_deviations() -> None:
    image = picture(3, 4)
    found = pixel_features(image, 2.0, 5.0)
    for y in range(3):
        for x in range(4):
            expected = [x / 2, y / 2, *(image[:, y, x].float() / 5).tolist()]
            assert found[4 * y + x].tolist() == pytest.approx(expected)


def test_a_smaller_window_leaves_out_pixels_further_apart() -> None:
    size, radius = (7, 9), 2
    image, logits = picture(*size), noise(63, 4)
    y, x = torch.arange(63) // 9, torch.arange(63) % 9
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    features = pixel_features(image, 6.0, 20.0)
    expected = exact(logits, [(5.0, features)], 3, near.double())
    found = mean_field(logits, [Window(features, size, radius, 5.0)], 3)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


def test_the_lattice_is_nearly_exact() -> None:
    size = (24, 32)
    image, logits = picture(*size), noise(24 * 32, 5) / 2
    features = [(3.0, pixel_features(image, 3.0)), (5.0, pixel_features(image, 20.0, 13.0))]
    expected = exact(logits, features, 5).float()
    found = mean_field(logits, [Lattice(f, w) for w, f in features], 5)
    changed = expected.argmax(1) != logits.argmax(1)
    assert changed.float().mean() > 0.3
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.98
    assert (found - expected).abs().mean() < 0.02


@pytest.mark.parametrize("dimension", [1, 2, 3, 5])
def test_lattice_against_loops(dimension: int) -> None:
    """Splat, blur and slice with a dictionary of corners, after Adams et al. (2010)."""
    n, d = 40, dimension
    g = torch.Generator().manual_seed(dimension)
    features, values = torch.rand(n, d, generator=g) * 3, torch.rand(n, 2, generator=g)
    points = module._lifted(features).T.double().numpy()
    corners: list[list[tuple[tuple[int, ...], float]]] = []
    for p in points:
        assert abs(p.sum()) < 1e-4
        base = np.round(p / (d + 1)).astype(int) * (d + 1)
        order = sorted(range(d + 1), key=lambda i: (-(p - base)[i], i))
        excess = base.sum() // (d + 1)
        if excess > 0:  # lower those that were rounded up most
            for i in order[len(order) - excess :]:
                base[i] -= d + 1
        for i in order[: max(-excess, 0)]:
            base[i] += d + 1
        rest = (p - base) / (d + 1)
        order = sorted(range(d + 1), key=lambda i: (-rest[i], i))
        own = []
        for k in range(d + 1):
            place = base + k
            place[order[d + 1 - k :]] -= d + 1
            high = rest[order[d - k]]
            share = high - rest[order[d + 1 - k]] if k else 1 + rest[order[d]] - rest[order[0]]
            own.append((tuple(place.tolist()), share))
        assert sum(s for _, s in own) == pytest.approx(1)
        assert min(s for _, s in own) > -1e-5
        np.testing.assert_allclose(sum(np.array(c) * s for c, s in own), p, atol=1e-4)
        corners.append(own)

    def filtered(v: np.ndarray) -> np.ndarray:
        at: dict[tuple[int, ...], np.ndarray] = {}
        for own, value in zip(corners, v, strict=True):
            for c, s in own:
                at[c] = at.get(c, 0) + s * value
        for axis in range(d + 1):
            step = np.ones(d + 1, int)
            step[axis] -= d + 1
            none = np.zeros(v.shape[1])
            at = {
                c: value + 0.5 * (at.get(tuple(np.array(c) + step), none) + at.get(tuple(np.array(c) - step), none))
                for c, value in at.items()
            }
        return np.stack([sum(s * at[c] for c, s in own) for own in corners]) / (1 + 2.0**-d)

    norm = filtered(np.ones((n, 1))) ** -0.5
    expected = 2.5 * norm * filtered(norm * values.double().numpy())
    kernel = Lattice(features, 2.5)
    found = kernel.read(kernel.spread(values), slice(None))
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=2e-5)


def test_the_two_ways_to_sort_by_corner_agree() -> None:
    keys, corners, shares = module._corners(pixel_features(picture(20, 30), 4.0, 9.0))
    pairs = zip(
        module._by_corner_sparse(corners, shares, len(keys) + 1),
        module._by_corner_sorted(corners, shares, len(keys) + 1), strict=True,
    )  # fmt: skip
    for a, b in pairs:
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def kernels_of(image: Tensor) -> list[Kernel]:
    return [Lattice(pixel_features(image, 3.0), 3.0), Lattice(pixel_features(image, 20.0, 13.0), 5.0)]


def test_symmetries(monkeypatch: pytest.MonkeyPatch) -> None:
    image, logits = picture(20, 30), noise(600, 9)
    kernels = kernels_of(image)
    found = mean_field(logits, kernels, 4)
    torch.testing.assert_close(found.sum(1), torch.ones(600))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_field(logits[:, order], kernels, 4), found[:, order], atol=1e-5, rtol=1e-4)
    uniform = mean_field(torch.zeros(600, 4), kernels_of(torch.full_like(image, 7)), 3)
    torch.testing.assert_close(uniform, torch.full((600, 4), 0.25))
    assert torch.equal(mean_field(logits, kernels, 0), logits.softmax(1))
    monkeypatch.setattr(module, "LABELS", 4)  # some labels at a time, some pixels at a time
    monkeypatch.setattr(module, "PIXELS", 77)
    torch.testing.assert_close(mean_field(logits, kernels_of(image), 4), found, atol=1e-5, rtol=1e-4)


def photographs() -> list[Path]:
    folder = os.environ.get(PHOTOGRAPHS)
    return sorted(Path(folder).glob("*.jpg"))[:6] if folder else []


@pytest.mark.parametrize("preset", PRESETS)
def test_labels_are_those_of_pydensecrf(preset: str) -> None:
    dense = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    if not photographs():
        pytest.skip(f"the variable {PHOTOGRAPHS} names no folder of photographs (*.jpg)")
    p = PRESETS[preset]
    for file in photographs():
        pixels = np.ascontiguousarray(np.array(Image.open(file).convert("RGB")))
        height, width = pixels.shape[:2]
        coarse = torch.randn(1, 20, height // 40 + 1, width // 40 + 1, generator=torch.Generator().manual_seed(1)) * 3
        logits = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0].flatten(1).T
        logits = (logits + noise(height * width, 20) / 4).log_softmax(1).clamp(min=np.log(1e-5))
        crf = dense.DenseCRF2D(width, height, 20)
        crf.setUnaryEnergy(np.ascontiguousarray(-logits.T.numpy()))
        crf.addPairwiseGaussian(sxy=p.smoothness_position, compat=p.smoothness_weight)
        crf.addPairwiseBilateral(
            sxy=p.appearance_position, srgb=p.appearance_colour, rgbim=pixels, compat=p.appearance_weight
        )
        expected = torch.from_numpy(np.array(crf.inference(p.iterations)).argmax(0))
        kernels = DenseCRF(preset).kernels(torch.from_numpy(pixels).permute(2, 0, 1))
        found = mean_field(logits.contiguous(), kernels, p.iterations).argmax(1)
        assert (expected != logits.argmax(1)).float().mean() > 0.05
        assert (found == expected).float().mean() >= 0.99


# --- as a refine step


def rough(kind: str) -> SoftSegments:
    """Two masks that meet at column 26 of a picture whose colours meet at 32; a third that is nowhere."""
    step = torch.where(torch.arange(16) < 6.5, 1.0, -1.0).expand(12, 16)
    masks = torch.stack([step, -step, torch.full((12, 16), -3.0)]) * (0.2 if kind == "similarity" else 1.5)
    size = ImageSize((48, 64), (48, 64))
    return SoftSegments(masks, torch.tensor([3, 0, 4]), torch.tensor([True, False, True]), torch.ones(3), size, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["logits", "similarity"])
@pytest.mark.parametrize("window", [None, 8])
def test_masks_end_where_colours_do(kind: str, window: int | None) -> None:
    soft, image = rough(kind), picture(48, 64)
    crf = DenseCRF(appearance_weight=10, appearance_position=20, iterations=10, window=window)
    found = crf(image, soft)
    assert found.stride == 1
    assert found.masks.shape == (3, 48, 64)
    label = found.masks.argmax(0)
    if kind == "logits":
        assert torch.equal((found.masks > 0).sum(0) == 1, torch.ones(48, 64, dtype=torch.bool))
    assert (label[:, :32] == 0).all()
    assert (label[:, 32:] == 1).all()
    before = torch.nn.functional.interpolate(soft.masks[None], scale_factor=4, mode="bilinear")[0].argmax(0)
    assert not (before[:, :32] == 0).all()
    assert torch.equal(soft.masks, rough(kind).masks)


def test_what_no_mask_claims_stays_void_and_no_step_changes_no_winner() -> None:
    soft, image = rough("logits"), picture(48, 64)
    soft.masks = soft.masks - 1.4  # the left mask is sure by 0.1, the right one as well; at their border neither is
    full = torch.nn.functional.interpolate(soft.masks[None], scale_factor=4, mode="bilinear")[0]
    found = DenseCRF(iterations=0)(image, soft).masks
    for y, x in ((5, 3), (20, 26), (20, 28), (40, 60)):
        p = [*full[:, y, x].sigmoid().tolist()]
        p.append(1 - max(p))
        assert [value > 0 for value in found[:, y, x].tolist()] == [p[k] == max(p) for k in range(3)]
    assert (found <= 0).all(0).any()


def test_semantic_logits_decide_on_stuff() -> None:
    """A thing and two stuff classes; the stuff's border moves to that of the colours, and a class nowhere best goes."""
    size = ImageSize((48, 64), (48, 64))
    step = torch.where(torch.arange(16) < 6.5, 1.0, -1.0).expand(12, 16)
    thing = torch.full((1, 12, 16), -4.0)
    thing[:, 2:6, 2:5] = 4.0
    merged = torch.full((2, 12, 16), -3.0)
    merged[:, 2:6, 2:5] = 3.0
    semantic = torch.stack([*merged, step, -step, torch.full((12, 16), -9.0)])
    soft = SoftSegments(
        thing, torch.tensor([4]), torch.tensor([True]), torch.ones(1), size, semantic=semantic,
        semantic_classes=torch.tensor([-1, -1, 0, 1, 2]),
    )  # fmt: skip
    image = picture(48, 64)
    image[:, 8:24, 8:20] = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]
    found = DenseCRF(appearance_position=20, iterations=10)(image, soft)
    assert found.semantic_classes is not None
    assert found.semantic is not None
    assert found.semantic_classes.tolist() == [-1, 0, 1]
    inside = torch.zeros(48, 64, dtype=torch.bool)
    inside[8:24, 8:20] = True
    assert torch.equal(found.masks[0] > 0, inside)
    label = found.semantic.argmax(0)
    assert torch.equal(label == 0, inside)
    assert (label[:, :32][~inside[:, :32]] == 1).all()
    assert (label[:, 32:] == 2).all()


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_refined(head: str) -> None:
    model, batch = model_of(head), images()
    batch.sizes = [ImageSize((64, 90), (64, 90)), ImageSize((64, 96), (80, 120))]
    plain = predict(model, batch)
    same = predict(model, batch, (DenseCRF(iterations=0, similarity_scale=1.0),))
    refined = predict(model, batch, (DenseCRF(),))
    for a, b, c in zip(plain, same, refined, strict=True):
        assert a.id_map.shape == b.id_map.shape == c.id_map.shape
        if head == "ciae":  # its masks are only compared: without a step nothing changes but rounding
            label = [classes_of(p)[p.id_map.long()] for p in (a, b)]
            assert (label[0] == label[1]).float().mean() > 0.99


def classes_of(prediction: object) -> Tensor:
    return torch.cat([torch.tensor([-1]), prediction.class_ids])  # type: ignore[attr-defined]


def test_nothing_to_refine() -> None:
    soft = rough("logits")
    nothing = replace(soft, masks=soft.masks[:0], class_ids=soft.class_ids[:0], is_thing=soft.is_thing[:0],
                      scores=soft.scores[:0])  # fmt: skip
    assert len(DenseCRF()(picture(48, 64), nothing)) == 0
    stuff = replace(nothing, semantic=torch.randn(3, 12, 16), semantic_classes=torch.tensor([-1, 0, 1]))
    assert len(DenseCRF()(picture(48, 64), stuff)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"appearance_weight": -1.0}, r"dense_crf.appearance_weight is -1.0; give a number of at least 0\."),
        ({"smoothness_position": float("nan")}, r"dense_crf.smoothness_position is nan; give a number above 0\."),
        ({"appearance_colour": 0.0}, r"dense_crf.appearance_colour is 0.0; give a number above 0\."),
        ({"iterations": -2}, r"dense_crf.iterations is -2; give a number of at least 0\."),
        ({"window": 0}, r"dense_crf.window is 0; give a number of at least 1\."),
        ({"preset": "best"}, r"dense_crf.preset is 'best'; choose 'pydensecrf' or 'deeplab_coco'\."),
    ],
)
def test_bad_parameters_are_one_sentence(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DenseCRF(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [torch.zeros(1, 48, 64, dtype=torch.uint8), torch.zeros(3, 48, 64)])
def test_an_image_that_is_not_rgb_is_one_sentence(image: Tensor) -> None:
    with pytest.raises(DataError, match=r"compares colours of an RGB image: it needs \(3, 48, 64\) of type uint8"):
        DenseCRF()(image, rough("logits"))
