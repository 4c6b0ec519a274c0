from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

import panoptic_ibs.ibs
from helpers import class_table, random_target
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.ibs import IntraBatchSupervision, held_by, paired_partners, random_partners
from panoptic_ibs.structures import SegmentEmbeddings


def segments(b: int = 4, c: int = 5, per_crop: int = 3, seed: int = 0, weighted: bool = True) -> SegmentEmbeddings:
    g = torch.Generator().manual_seed(seed)
    s = b * per_crop
    return SegmentEmbeddings(
        embeddings=torch.randn(s, c, generator=g, requires_grad=True),
        features=torch.randn(b, c, 6, 7, generator=g, requires_grad=True),
        image_index=torch.arange(b).repeat_interleave(per_crop),
        is_thing=torch.rand(s, generator=g) > 0.3,
        weight=torch.rand(s, generator=g) if weighted else None,
        segment_index=torch.arange(per_crop).repeat(b),
    )


def naive(out: SegmentEmbeddings, partners: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The loss as the paper has it: one segment, one target crop, one pixel after the other."""
    total, count = torch.zeros(()), 0.0
    for s in range(len(out.image_index)):
        if not out.is_thing[s]:
            continue
        w = 1.0 if out.weight is None else out.weight[s].item()
        count += w
        targets = partners[out.image_index[s]].tolist()
        for t in targets:
            if t < 0:
                continue
            pixels = []
            for y in range(out.features.shape[2]):
                for x in range(out.features.shape[3]):
                    logit = (out.embeddings[s] * out.features[t, :, y, x]).sum()
                    pixels.append(sigmoid_focal_loss(logit, torch.zeros(()), alpha, gamma))
            total = total + w * torch.stack(pixels).mean() / len(targets)
    return total / max(count, 1.0)


def test_docstring_example() -> None:
    result = doctest.testmod(panoptic_ibs.ibs)
    assert result.attempted >= 10
    assert result.failed == 0


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("partners", [[[1], [0], [3], [2]], [[1, 2], [3, 0], [0, 1], [2, 1]], [[1], [-1], [0], [-1]]])
def test_value_and_gradient_against_loops(partners: list[list[int]], weighted: bool) -> None:
    out, chosen = segments(weighted=weighted), torch.tensor(partners)
    loss = IntraBatchSupervision(weight=2.0)(out, partners=chosen)
    expected = 2.0 * naive(out, chosen)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, (out.embeddings, out.features))
    expected_grads = torch.autograd.grad(expected, (out.embeddings, out.features))
    torch.testing.assert_close(grads, expected_grads)


def test_scale_is_a_second_factor() -> None:
    out, chosen = segments(), torch.tensor([[1], [0], [3], [2]])
    whole, split = IntraBatchSupervision(weight=15.0), IntraBatchSupervision(weight=5.0, scale=3.0)
    assert torch.equal(whole(out, partners=chosen), split(out, partners=chosen))
    assert IntraBatchSupervision().scale == 1.0
    with pytest.raises(ConfigError, match="no segment"):
        split([])


def test_several_outputs_with_shared_features_add_up() -> None:
    first = segments(seed=1)
    second = SegmentEmbeddings(
        torch.randn(9, 5, requires_grad=True),
        first.features,
        first.image_index[3:],
        torch.ones(9, dtype=torch.bool),
        name="layer 2",
    )
    partners, inputs = torch.tensor([2, 3, 1, 0]), (first.embeddings, second.embeddings, first.features)
    together = IntraBatchSupervision()([first, second], partners=partners)
    apart = naive(first, partners[:, None]) + naive(second, partners[:, None])
    torch.testing.assert_close(together, apart)
    ours, theirs = (torch.autograd.grad(loss, inputs) for loss in (together, apart))
    torch.testing.assert_close(ours, theirs)


def test_index_tensors_may_live_anywhere_and_stuff_is_left_alone() -> None:
    out = segments(weighted=False)
    partners = torch.tensor([1, 0, 3, 2])
    before = IntraBatchSupervision()(out, partners=partners)
    with torch.no_grad():
        out.embeddings[~out.is_thing] += 100
    torch.testing.assert_close(IntraBatchSupervision()(out, partners=partners), before)


def test_random_partners_are_uniform_and_never_the_crop_itself() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_partners(4, 1, g)[:, 0] for _ in range(3000)])
    for i in range(4):
        counts = torch.bincount(drawn[:, i], minlength=4)
        assert counts[i] == 0
        assert all(abs(int(counts[j]) - 1000) < 120 for j in range(4) if j != i)
    many = random_partners(5, 4, g)
    assert all(sorted(many[i].tolist()) == [j for j in range(5) if j != i] for i in range(5))


def test_paired_partners() -> None:
    assert paired_partners(torch.tensor([7, 7, 3, 3])).tolist() == [[1], [0], [3], [2]]
    for bad in ([0, 1, 1, 0], [0, 0, 1], [-1, -1], []):
        with pytest.raises(ConfigError, match="sampling=paired_crop"):
            paired_partners(torch.tensor(bad, dtype=torch.long))


def test_no_things_gives_a_zero_with_a_gradient_path() -> None:
    out = segments()
    out.is_thing[:] = False
    loss = IntraBatchSupervision()(out)
    assert loss.item() == 0.0
    loss.backward()
    assert out.embeddings.grad is not None
    assert out.embeddings.grad.abs().sum() == 0
    empty = SegmentEmbeddings(
        torch.zeros(0, 5, requires_grad=True), out.features, torch.zeros(0).long(), torch.zeros(0).bool()
    )
    assert IntraBatchSupervision()(empty).requires_grad


def test_same_instance_guard() -> None:
    classes = class_table()
    same = [random_target(classes, seed=1, image_index=9), random_target(classes, seed=1, image_index=9)]
    other = [random_target(classes, seed=1, image_index=8), random_target(classes, seed=1, image_index=7)]
    targets = same + other
    targets[1].segment_ids = targets[1].segment_ids + 1  # row r of crop 1 is row r + 1 of crop 0
    out = segments(weighted=False)
    held = held_by([out], targets)
    assert held is not None
    last = len(targets[1]) - 1
    for s in range(12):
        crop, row = int(out.image_index[s]), int(out.segment_index[s])
        expected = {crop} | ({1} if crop == 0 and row > 0 else set()) | ({0} if crop == 1 and row < last else set())
        assert set(held[s].nonzero().flatten().tolist()) == expected

    partners = torch.tensor([1, 0, 3, 2])
    guarded = IntraBatchSupervision()(out, partners=partners, targets=targets)
    out_free = segments(weighted=False)
    keep = torch.tensor([not held[s, partners[out.image_index[s]]] for s in range(12)])
    count = out.is_thing.sum()
    out_free.is_thing &= keep
    expected = naive(out_free, partners[:, None]) * out_free.is_thing.sum().clamp(min=1) / count
    torch.testing.assert_close(guarded, expected)
    assert guarded < IntraBatchSupervision()(out, partners=partners)


def test_points_at_all_pixel_centres_equal_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    out, partners = segments(), torch.tensor([1, 0, 3, 2])
    dense = IntraBatchSupervision()(out, partners=partners)
    y, x = torch.meshgrid((torch.arange(6) + 0.5) / 6, (torch.arange(7) + 0.5) / 7, indexing="ij")
    centres = torch.stack([x, y], dim=-1).flatten(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(panoptic_ibs.ibs, "uncertain_points", lambda maps, *_: centres.expand(len(maps), -1, -1))
        torch.testing.assert_close(IntraBatchSupervision(points=42)(out, partners=partners), dense)
    sampled = IntraBatchSupervision(points=64)(out, partners=partners)
    sampled.backward()
    assert torch.isfinite(out.embeddings.grad).all()
    assert out.embeddings.grad.abs().sum() > 0


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="at least 2 crops"):
        IntraBatchSupervision()(segments(b=1))
    with pytest.raises(ConfigError, match="at least 4 crops"):
        IntraBatchSupervision(num_targets=3)(segments(b=3))
    with pytest.raises(ConfigError, match="'random' or 'paired'"):
        IntraBatchSupervision(partners="any")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_targets"):
        IntraBatchSupervision(partners="paired", num_targets=2)
    with pytest.raises(ConfigError, match="points"):
        IntraBatchSupervision(points=0)
    with pytest.raises(ConfigError, match="paired_crop"):
        IntraBatchSupervision(partners="paired")(segments())
    with pytest.raises(ValueError, match="do not fit"):
        SegmentEmbeddings(torch.zeros(2, 3), torch.zeros(1, 4, 2, 2), torch.zeros(2).long(), torch.ones(2).bool())
    with pytest.raises(ValueError, match="image_index"):
        SegmentEmbeddings(torch.zeros(2, 4), torch.zeros(1, 4, 2, 2), torch.zeros(3).long(), torch.ones(2).bool())


def test_ibs_costs_no_gradient_elsewhere() -> None:
    """Only the target crops' features and the embeddings that were used get a gradient."""
    out = segments(weighted=False)
    partners = torch.tensor([[1], [1], [1], [1]])
    IntraBatchSupervision()(out, partners=partners).backward()
    assert out.features.grad[1].abs().sum() > 0
    assert out.features.grad[[0, 2, 3]].abs().sum() == 0
    own = (out.image_index == 1) | ~out.is_thing
    assert out.embeddings.grad[own].abs().sum() == 0


def test_outputs_is_a_slice_over_the_supervised_outputs() -> None:
    outputs = [segments(seed=seed) for seed in range(4)]
    partners = torch.tensor([1, 2, 3, 0])
    alone = [naive(output, partners[:, None]) for output in outputs]
    for chosen in ((-1, None), (0, 1), (None, None, 3), (1, 3)):
        got = IntraBatchSupervision(outputs=chosen)(outputs, partners=partners)
        torch.testing.assert_close(got, torch.stack(alone[slice(*chosen)]).sum())
    with pytest.raises(ConfigError, match="none of the head's 4"):
        IntraBatchSupervision(outputs=(4, None))(outputs, partners=partners)
    for wrong in ((1,), (0, 1, 0), (1, 2, 3, 4)):
        with pytest.raises(ConfigError, match=r"ibs\.outputs"):
            IntraBatchSupervision(outputs=wrong)
