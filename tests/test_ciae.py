"""The CIAE-loss, its memory and its parts against loops over pixels that follow the paper's equations one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import class_table, random_target, target_from_map
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional.upsampling import (
    label_shares,
    phases,
    row_strips,
    upsample_phases,
    upsample_phases_backward,
    upsampled_at,
)
from panoptic_ibs.heads.ciae import LossOptions
from panoptic_ibs.heads.ciae.embedding import Term, embedding_loss, largest
from panoptic_ibs.heads.ciae.losses import (
    Categories,
    ScaledCosine,
    category_sums,
    ciae_loss,
    crop_segments,
    grow_boxes,
    instance_embeddings,
)
from panoptic_ibs.heads.ciae.memory import CategoryMemory
from panoptic_ibs.structures import Target


def upsampled(maps: Tensor) -> Tensor:
    return F.interpolate(maps[None], scale_factor=4, mode="bilinear", align_corners=False)[0]


def small_target(seed: int = 0, image_index: int = 0, things: int = 4) -> Target:
    return random_target(class_table(), (12, 16), things, seed, image_index)


def random_maps(count: int = 2, dimension: int = 6, size: tuple[int, int] = (3, 4), seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, *size, generator=g, dtype=torch.float64)


# --- upsampling without the upsampled map ------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [1, 200, 10_000])
def test_strips_in_phases_are_the_upsampled_map(pixels: int) -> None:
    maps = random_maps(1, 3, (5, 7))[0]
    padded = F.pad(maps[None], (1, 1, 1, 1), mode="replicate")[0]
    strips = list(row_strips((5, 7), pixels))
    assert len(strips) == {1: 5, 200: 5, 10_000: 1}[pixels]
    full = upsampled(maps)
    for top, bottom in strips:
        expected = torch.stack([phases(f[4 * top : 4 * bottom]) for f in full])
        torch.testing.assert_close(upsample_phases(padded[:, top : bottom + 2]), expected)


def test_gradient_of_the_phases() -> None:
    padded = random_maps(1, 2, (4, 5))[0].requires_grad_()
    result = upsample_phases(padded)
    grad = torch.randn(result.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(upsample_phases_backward(grad, 3), torch.autograd.grad(result, padded, grad)[0])


def test_label_shares_sum_the_upsampled_map() -> None:
    maps = random_maps(1, 3, (5, 7))[0]
    labels = torch.randint(-1, 4, (20, 28), generator=torch.Generator().manual_seed(1))
    shares = label_shares(labels, 4, dtype=torch.float64)
    full = upsampled(maps)
    expected = torch.stack([full[:, labels == k].sum(1) for k in range(4)])
    torch.testing.assert_close(shares.flatten(1) @ maps.flatten(1).T, expected)
    with pytest.raises(ValueError, match="multiple of 4"):
        label_shares(labels[:-1], 4)


def test_single_pixels_of_the_upsampled_map() -> None:
    maps = random_maps(1, 3, (5, 7))[0]
    points = torch.tensor([[0, 0], [27, 19], [4, 12], [13, 1]])
    expected = torch.stack([upsampled(maps)[:, y, x] for x, y in points.tolist()])
    torch.testing.assert_close(upsampled_at(maps, points), expected)


# --- the loss ----------------------------------------------------------------------------------------------------


def test_largest_keeps_repeated_values() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0], [3.0, -1.0], [0.0, 2.0]])
    torch.testing.assert_close(largest(values, 3), values.topk(3, dim=0).values)


def pixel_loss(p: Tensor, queries: list[Tensor | None], own: int, margin: float, k: int) -> Tensor:
    """Eq. 1, 2 and 5 to 9 of one pixel; a query of None is filtered: its similarity is 0."""
    p = p / p.norm()
    distance = [1 - (p @ q if q is not None else p.new_zeros(())) for q in queries]
    losses = []
    for j in range(len(queries)):
        negative = torch.zeros(()) if j == own else distance[j]
        hinge = max(distance[own] - negative + margin, torch.zeros(()).double())
        losses.append(-torch.log(1 - hinge / (2 + margin)))
    return torch.stack(sorted(losses, key=lambda v: v.item(), reverse=True)[:k]).sum()


def naive_loss(
    maps: Tensor, targets: list[Target], memory: Tensor, categories: Categories, o: LossOptions
) -> tuple[Tensor, Tensor, int]:
    """L_CAE and L_IAE (Eq. 3, 4, 10, 11), pixel by pixel, and the number of valid pixels."""
    cae, iae, valid = maps.sum() * 0, maps.sum() * 0, 0
    for m, target in zip(maps, targets, strict=True):
        full = upsampled(m)
        rows = [i for i in range(len(target)) if target.is_thing[i] and not target.is_crowd[i] and target.areas[i] > 0]
        means = []
        for i in rows:
            total = full[:, target.id_map == i + 1].sum(1)
            means.append(total / total.norm())
        stuff = list(memory[categories.things :])
        for y in range(full.shape[1]):
            for x in range(full.shape[2]):
                row = int(target.id_map[y, x]) - 1
                if row < 0 or target.is_crowd[row]:
                    continue
                valid += 1
                category = int(categories.of_class[target.class_ids[row]])
                cae = cae + pixel_loss(full[:, y, x], list(memory), category, o.margin, o.top_k)
                near: list[Tensor | None] = []
                for i, mean in zip(rows, means, strict=True):
                    x1, y1, x2, y2 = target.boxes[i].tolist()
                    f = o.box_filter or math.inf
                    in_x = abs(x + 0.5 - (x1 + x2) / 2) <= f * (x2 - x1) / 2
                    near.append(mean if in_x and abs(y + 0.5 - (y1 + y2) / 2) <= f * (y2 - y1) / 2 else None)
                own = len(stuff) + rows.index(row) if target.is_thing[row] else category - categories.things
                loss = pixel_loss(full[:, y, x], [*stuff, *near], own, o.margin, o.top_k)
                iae = iae + loss * (o.thing_factor if target.is_thing[row] else 1.0)
    return cae, iae, valid


def setup(merged: bool = True, seed: int = 0) -> tuple[Tensor, list[Target], Tensor, Categories]:
    categories = Categories(class_table(), merged)
    targets = [small_target(seed), small_target(seed + 1, 1)]
    targets[1].is_crowd[3] = True
    memory = F.normalize(torch.randn(categories.count, 6, generator=torch.Generator().manual_seed(seed)), dim=1)
    return random_maps(seed=seed), targets, memory.double(), categories


def ours(maps: Tensor, targets: list[Target], memory: Tensor, categories: Categories, o: LossOptions, **kw) -> Tensor:
    crops = [crop_segments(m, t) for m, t in zip(maps, targets, strict=True)]
    return ciae_loss(maps, targets, crops, memory, categories, o, **kw)


@pytest.mark.parametrize(
    ("merged", "options"),
    [
        (True, {}),
        (False, {"box_filter": None, "top_k": 2}),
        (True, {"margin": 0.0, "box_filter": 1.0}),
        (False, {"margin": 2.0, "top_k": 50}),
    ],
)
def test_loss_and_gradient_against_pixel_loops(merged: bool, options: dict) -> None:
    o = LossOptions(**options)
    maps, targets, memory, categories = setup(merged)
    a, b = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    cae, iae, valid = naive_loss(a, targets, memory, categories, o)
    assert valid == sum(int(t.areas[~t.is_crowd].sum()) for t in targets)
    expected = (cae + 2.0 * iae) / valid  # Eq. 12
    actual = ours(b, targets, memory, categories, o)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, b)[0], torch.autograd.grad(expected, a)[0])
    only_cae = ours(maps, targets, memory, categories, LossOptions(**options, instance_weight=0.0))
    torch.testing.assert_close(only_cae, cae.detach() / valid)
    only_iae = ours(maps, targets, memory, categories, LossOptions(**options, category_weight=0.0))
    torch.testing.assert_close(only_iae, 2.0 * iae.detach() / valid)


def test_eq_5_to_8_by_hand() -> None:
    """One pixel along the first axis; own query at 60 degrees, the other at 90: d_pos 0.5, d_neg 1."""
    maps = torch.zeros(2, 1, 1, dtype=torch.float64)
    maps[0] = 3.0
    queries = torch.tensor([[0.5, math.sqrt(0.75)], [0.0, 1.0]], dtype=torch.float64)
    ids = torch.zeros(4, 4, dtype=torch.int32)
    ids[0, 0] = 1
    term = Term(0, 2, torch.tensor([0, 0]), torch.tensor([0.0, 1.0]).double())
    loss = embedding_loss(maps, queries, ids, [term], torch.zeros(0, 4), margin=0.6, top_k=5)
    # the own query: 0.5 - 0 + 0.6 = 1.1; the other: 0.5 - 1 + 0.6 = 0.1; divided by 2 + 0.6
    assert loss.item() == pytest.approx(-math.log(1 - 1.1 / 2.6) - math.log(1 - 0.1 / 2.6))
    lower = embedding_loss(maps, queries, ids, [term], torch.zeros(0, 4), margin=0.6, top_k=1)
    assert lower.item() == pytest.approx(-math.log(1 - 1.1 / 2.6))


def test_gradcheck_of_maps_and_queries() -> None:
    maps = random_maps(1, 3, (2, 3))[0].requires_grad_()
    queries = F.normalize(torch.randn(6, 3, dtype=torch.float64), dim=1).requires_grad_()
    ids = torch.randint(0, 5, (8, 12), dtype=torch.int32)
    weights = torch.tensor([0.0, 1, 2, 10, 10]).double()
    terms = [
        Term(1, 6, torch.tensor([0, 0, 1, 3, 4]), weights),
        Term(0, 3, torch.tensor([0, 1, 2, 0, 0]), weights.clamp(max=1)),
    ]
    boxes = torch.tensor([[1.0, 1, 7, 6], [3.0, 0, 12, 8]])

    def loss(m: Tensor, q: Tensor) -> Tensor:
        return embedding_loss(m, q, ids, terms, boxes, margin=0.3, top_k=3, strip=64)

    torch.autograd.gradcheck(loss, (maps, queries))


def test_strips_do_not_change_the_loss() -> None:
    maps, targets, memory, categories = setup()
    crop = crop_segments(maps[0], targets[0])
    from panoptic_ibs.heads.ciae.losses import crop_terms

    queries = torch.cat([memory, crop.means])
    terms = crop_terms(crop, targets[0], categories, len(queries), LossOptions(), stuff=True)
    boxes = grow_boxes(targets[0].boxes[crop.instances], 1.5)
    whole, parts = (
        embedding_loss(maps[0], queries, targets[0].id_map, terms, boxes, strip=strip) for strip in (1 << 20, 1)
    )
    torch.testing.assert_close(whole, parts)


def test_pixel_opposite_to_its_query_stays_finite() -> None:
    maps = torch.zeros(2, 1, 1)
    maps[0] = -1.0
    maps.requires_grad_()
    queries = torch.eye(2)
    term = Term(0, 2, torch.tensor([0]), torch.ones(1))
    loss = embedding_loss(maps, queries, torch.zeros(4, 4, dtype=torch.int32), [term], torch.zeros(0, 4))
    (grad,) = torch.autograd.grad(loss, maps)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_apart_from_stuff_only_instances_compete() -> None:
    """Table III's first row: without stuff, a crop of one instance leaves only the pull to its own mean."""
    classes = class_table()
    id_map = torch.ones(8, 8, dtype=torch.int32)
    id_map[:, 4:] = 2
    target = target_from_map(id_map, [0, 2], classes)
    maps = random_maps(1, 4, (2, 2))
    categories = Categories(classes, True)
    memory = F.normalize(torch.randn(categories.count, 4).double(), dim=1)
    loss = ours(maps, [target], memory, categories, LossOptions(), stuff=False)
    unit = F.normalize(upsampled(maps[0]), dim=0)[:, :, 4:].flatten(1)
    mean = F.normalize(upsampled(maps[0])[:, :, 4:].flatten(1).sum(1), dim=0)
    expected = -(1 - (1 - mean @ unit + 0.15) / 2.15).log().mean() * 10  # alpha 2, thing factor 5
    torch.testing.assert_close(loss, expected)


def test_other_crops_instances_are_negatives_unless_shared() -> None:
    maps, targets, memory, categories = setup()
    on, off = LossOptions(other_crops=True, top_k=50), LossOptions(top_k=50)
    extended, plain = (ours(maps, targets, memory, categories, o) for o in (on, off))
    extra, valid = torch.zeros(()).double(), 0
    means = [crop_segments(m, t).means for m, t in zip(maps, targets, strict=True)]
    for i, target in enumerate(targets):
        unit = F.normalize(upsampled(maps[i]), dim=0)
        crop = crop_segments(maps[i], target)
        for row in crop.rows.tolist():
            pixels = unit[:, target.id_map == row + 1]
            valid += pixels.shape[1]
            thing = bool(target.is_thing[row])
            own = crop.means[crop.instances.tolist().index(row)] if thing else memory[target.class_ids[row] + 1]
            hinge = (means[1 - i] @ pixels - own @ pixels + 0.15).clamp(min=0)
            extra += -(1 - hinge / 2.15).log().sum() * 2 * (5 if thing else 1)
    torch.testing.assert_close(extended - plain, extra / valid)
    same = [targets[0], small_target(0)]  # the very same segments: their similarity counts as 0
    zero = ours(maps, same, memory, categories, on)
    assert zero < ours(maps, [same[0], small_target(0, 5)], memory, categories, on)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"margin": -0.1}, {"margin": 2.1}, {"top_k": 0}, {"box_filter": 0.0}])
def test_loss_options_outside_their_range(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"head.loss.{next(iter(options))}"):
        LossOptions(**options)


def test_empty_crops_give_a_connected_zero() -> None:
    """A crop without things, one that is all void, one with a removed instance."""
    classes = class_table()
    categories = Categories(classes, True)
    maps = random_maps(3, 4, (2, 2)).requires_grad_()
    memory = F.normalize(torch.randn(categories.count, 4).double(), dim=1)
    void, stuff = torch.zeros(8, 8, dtype=torch.int32), torch.ones(8, 8, dtype=torch.int32)
    nothing = target_from_map(void, [], classes)
    targets = [nothing, target_from_map(stuff, [1], classes), target_from_map(stuff, [0, 3], classes)]
    loss = ours(maps, targets, memory, categories, LossOptions())
    (grad,) = torch.autograd.grad(loss, maps)
    assert torch.isfinite(loss)
    assert loss > 0
    assert grad[0].abs().sum() == 0
    assert grad[1].abs().sum() > 0
    assert torch.isfinite(grad).all()
    zero = ours(maps, [nothing] * 3, memory, categories, LossOptions())
    assert zero.item() == 0
    assert torch.autograd.grad(zero, maps)[0].abs().sum() == 0
    crops = [crop_segments(m, t) for m, t in zip(maps, targets, strict=True)]
    segments = instance_embeddings(maps, crops, ScaledCosine(20.0, 0.85))
    assert segments.embeddings.shape == (0, 4)


# --- memory ------------------------------------------------------------------------------------------------------


def test_memory_against_eq_13_and_14() -> None:
    memory = CategoryMemory(3, 4, momentum=0.5)
    directions = memory.directions.clone().double()
    g = torch.Generator().manual_seed(0)
    for t in range(6):
        sums = torch.randn(3, 4, generator=g)
        pixels = torch.tensor([5.0, 0.0, 2.0])
        left = max(1 - t / 4, 0)
        rate = 1 - 0.5 * left**3
        memory.share = t / 4
        assert memory.current_momentum() == pytest.approx(rate)
        memory.update(sums, pixels)
        for c in (0, 2):
            mean = sums[c].double() / sums[c].double().norm()
            moved = rate * directions[c] + (1 - rate) * mean
            directions[c] = moved / moved.norm()
        torch.testing.assert_close(memory.directions.double(), directions, rtol=1e-5, atol=1e-6)
    assert memory.seen.tolist() == [True, False, True]
    copy = CategoryMemory(3, 4, momentum=0.5)
    copy.load_state_dict(memory.state_dict())
    assert copy.iteration.item() == 6
    torch.testing.assert_close(copy.directions, memory.directions)


def test_published_momentum_and_no_schedule() -> None:
    memory = CategoryMemory(1, 2, 0.9999)
    memory.share = 45_000 / 90_000
    assert memory.current_momentum() == pytest.approx(1 - 0.0001 / 8, abs=1e-12)
    assert CategoryMemory(1, 2, 0.99).current_momentum() == 0.99
    for momentum in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=r"head.memory.momentum"):
            CategoryMemory(1, 2, momentum)


def test_category_sums_by_hand() -> None:
    maps, targets, _, categories = setup(merged=True)
    crops = [crop_segments(m, t) for m, t in zip(maps, targets, strict=True)]
    sums, pixels = category_sums(crops, targets, categories)
    expected, count = torch.zeros_like(sums), torch.zeros_like(pixels)
    for m, target in zip(maps, targets, strict=True):
        full = upsampled(m)
        for row in range(len(target)):
            if not target.is_crowd[row]:
                category = 0 if target.is_thing[row] else int(target.class_ids[row]) + 1  # stuff classes are 0 and 1
                expected[category] += full[:, target.id_map == row + 1].sum(1)
                count[category] += (target.id_map == row + 1).sum()
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(pixels, count)
    assert not sums.requires_grad


def test_scaled_cosine() -> None:
    logits = ScaledCosine(20.0, 0.85)
    embeddings, features = (
        torch.tensor([[2.0, 0.0]]),
        torch.tensor([[3.0, 0.0, 0.85], [0.0, 5.0, math.sqrt(1 - 0.85**2)]]),
    )
    torch.testing.assert_close(logits(embeddings, features), torch.tensor([[3.0, -17.0, 0.0]]), atol=1e-5, rtol=0)
    assert ScaledCosine(20.0, 0.85) == logits  # IBS groups outputs by it
