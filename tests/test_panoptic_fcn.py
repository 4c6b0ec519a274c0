from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from helpers import class_table, random_batch, random_target, target_from_map
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.heads.panoptic_fcn import InferenceOptions, PanopticFCN
from panoptic_ibs.heads.panoptic_fcn.inference import (
    find_centers,
    find_regions,
    fuse_kernels,
    merge_regions,
    rescore,
)
from panoptic_ibs.heads.panoptic_fcn.network import PanopticFCNOutput
from panoptic_ibs.heads.panoptic_fcn.targets import (
    assign_levels,
    draw_gaussians,
    gaussian_radius,
    mass_centers,
)
from panoptic_ibs.structures import FeatureLevel, ImageSize, Target

LEVELS = [FeatureLevel(4, 8), FeatureLevel(8, 8), FeatureLevel(16, 16), FeatureLevel(32, 16)]
RANGES = [(1, 16), (8, 24), (16, 48), (32, 64), (48, 512)]


def make_head(stuff: str = "merged", **options) -> PanopticFCN:
    torch.manual_seed(0)
    head = PanopticFCN(
        class_table(),
        LEVELS,
        stuff,
        channels=32,
        feature_channels=8,
        depth=1,
        instance_ranges=RANGES,
        num_positions=3,
        **options,
    )
    for generator in (head.thing_generator, head.stuff_generator, head.kernel_head):
        for p in generator.parameters():
            torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    return head


def make_output(
    head: PanopticFCN, batch: int = 2, size: tuple[int, int] = (64, 128), seed: int = 0
) -> PanopticFCNOutput:
    g = torch.Generator().manual_seed(seed)
    shapes = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in (8, 16, 32, 64, 128)]

    def maps(channels: int, scale: float = 1.0) -> list[Tensor]:
        return [(torch.randn(batch, channels, *s, generator=g) * scale).requires_grad_() for s in shapes]

    features = torch.randn(batch, 8, size[0] // 4, size[1] // 4, generator=g).requires_grad_()
    return PanopticFCNOutput(maps(3, 2.0), maps(len(head.class_of_stuff), 2.0), maps(32), features)


# --- targets -----------------------------------------------------------------------------------------------------


def test_radius_by_hand() -> None:
    """For a square of side s the least root is 0.2733 s: (-2.8 + sqrt(2.8^2 + 4 * 2.8 * 0.3)) / 2."""
    side = torch.tensor([10.0, 100.0])
    torch.testing.assert_close(gaussian_radius(side, side), side * (-2.8 + math.sqrt(2.8**2 + 3.36)) / 2)
    assert gaussian_radius(torch.tensor([4.0]), torch.tensor([400.0])).item() < 110  # dominated by the long side


def test_gaussians_against_loops() -> None:
    """On maps of two sizes, one after the other in the flat result."""
    g = torch.Generator().manual_seed(0)
    sizes, a = [(9, 11)] * 4 + [(5, 3)] * 4, 24
    begins = [sum(h * w for h, w in sizes[:i]) for i in range(len(sizes) + 1)]
    number = torch.randint(0, len(sizes), (a,), generator=g)
    height, width = torch.tensor(sizes)[number].unbind(1)
    centers = (torch.rand(a, 2, generator=g) * torch.stack([width, height], dim=1)).long()
    radii = torch.randint(0, 6, (a,), generator=g)
    peak = (torch.rand(a, generator=g) > 0.2).float()
    maps = [torch.zeros(size) for size in sizes]
    for i in range(a):
        r, sigma = int(radii[i]), (2 * int(radii[i]) + 1) / 3
        heat = maps[int(number[i])]
        for y in range(heat.shape[0]):
            for x in range(heat.shape[1]):
                dx, dy = x - int(centers[i, 0]), y - int(centers[i, 1])
                if max(abs(dx), abs(dy)) <= r:
                    value = math.exp(-(dx * dx + dy * dy) / (2 * sigma * sigma)) * peak[i].item()
                    heat[y, x] = max(heat[y, x].item(), value)
    first = torch.tensor(begins)[number]
    result = draw_gaussians(begins[-1], first, height, width, centers, radii, peak, reach=5)
    torch.testing.assert_close(result, torch.cat([m.flatten() for m in maps]))
    nothing = draw_gaussians(begins[-1], *(t[:0] for t in (first, height, width, centers, radii, peak)), reach=0)
    assert nothing.shape == (begins[-1],)
    assert nothing.sum() == 0


def test_levels_overlap_and_centers_are_mass_centers() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 16, 16], [5, 5, 5, 5], [0, 0, 900, 900]])
    assert assign_levels(boxes, RANGES).int().tolist() == [
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    masks = torch.zeros(3, 6, 8)
    masks[0, 1:3, 2:5] = 0.25
    masks[1, 5, 7] = 1
    centers, visible = mass_centers(masks)
    assert centers.tolist() == [[3.0, 1.5], [7.0, 5.0], [0.0, 0.0]]
    assert visible.tolist() == [1.0, 1.0, 0.0]


# --- losses ------------------------------------------------------------------------------------------------------


def naive_losses(head: PanopticFCN, output: PanopticFCNOutput, targets: list[Target]) -> dict[str, Tensor]:
    """The published losses, one level, crop, segment and position after the other."""
    k, classes = head.num_positions, head.classes
    totals = {n: torch.zeros(()) for n in ("position_things", "position_stuff", "segment_things", "segment_stuff")}
    num_things, num_stuff = 0, 0
    for level, (center, region, kernel) in enumerate(zip(output.centers, output.regions, output.kernels, strict=True)):
        h, w = center.shape[-2:]
        for i, target in enumerate(targets):
            map_h, map_w = output.features.shape[-2:]
            heat, score_map = torch.zeros(center.shape[1:]), torch.zeros(region.shape[1:])
            semantic: dict[int, Tensor] = {}
            for row in range(len(target)):
                full = (target.id_map == row + 1).float()[None, None]
                mask = F.interpolate(full, scale_factor=0.25, mode="bilinear", align_corners=False)[0, 0]
                info = classes[int(target.class_ids[row])]
                if head.class_of_stuff[0] == -1 and len(head.class_of_stuff) == 1 + len(classes.stuff_ids):
                    channel = 0 if info.is_thing else 1 + classes.stuff_ids.index(int(target.class_ids[row]))
                else:
                    channel = int(target.class_ids[row])
                semantic[channel] = semantic.get(channel, 0) + mask
                if not info.is_thing or target.is_crowd[row] or full.sum() == 0:
                    continue
                x1, y1, x2, y2 = target.boxes[row].tolist()
                size = math.sqrt((x2 - x1) * (y2 - y1))
                if not RANGES[level][0] <= size <= RANGES[level][1]:
                    continue
                num_things += 1
                thing = classes.thing_ids.index(int(target.class_ids[row]))
                ys, xs = mask.nonzero(as_tuple=True)
                if len(ys):
                    cy = int(ys.float().mean() * h / map_h)
                    cx = int(xs.float().mean() * w / map_w)
                    box_w, box_h = (
                        torch.tensor((x2 - x1) * w / (4 * map_w)),
                        torch.tensor((y2 - y1) * h / (4 * map_h)),
                    )
                    r = int(gaussian_radius(box_w, box_h))
                    for y in range(max(cy - r, 0), min(cy + r + 1, h)):
                        for x in range(max(cx - r, 0), min(cx + r + 1, w)):
                            d = ((x - cx) ** 2 + (y - cy) ** 2) / (2 * ((2 * r + 1) / 3) ** 2)
                            heat[thing, y, x] = max(heat[thing, y, x].item(), math.exp(-d))
                guided = F.interpolate(mask[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0]
                scored = [
                    (center[i, thing, y, x].sigmoid(), y, x) for y in range(h) for x in range(w) if guided[y, x] > 0.1
                ]
                scored = sorted(scored, key=lambda s: -s[0].item())[:k]
                norm = sum(s[0] for s in scored)
                for score, y, x in scored:
                    embedding = head.thing_generator(kernel[i, :, y, x])
                    p = torch.einsum("c,chw->hw", embedding, output.features[i]).sigmoid()
                    dice = 1 - 2 * (p * mask).sum() / ((p * p).sum() + (mask * mask).sum())
                    totals["segment_things"] = totals["segment_things"] + score / norm * dice
            for channel, mask in semantic.items():
                soft = F.interpolate(mask[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0]
                soft = torch.where(soft < 0.5, 0.0, soft)
                score_map[channel] = soft
                if soft.sum() == 0:
                    continue
                num_stuff += 1
                pooled = ((soft > 0) * kernel[i]).mean(dim=(1, 2))
                p = torch.einsum("c,chw->hw", head.stuff_generator(pooled), output.features[i]).sigmoid()
                dice = 1 - 2 * (p * mask).sum() / ((p * p).sum() + (mask * mask).sum())
                totals["segment_stuff"] = totals["segment_stuff"] + dice
            totals["position_things"] = totals["position_things"] + sigmoid_focal_loss(center[i], heat, reduction="sum")
            stuff = sigmoid_focal_loss(region[i], score_map).mean(dim=(1, 2)).sum()
            totals["position_stuff"] = totals["position_stuff"] + stuff
    return {
        "position_things": totals["position_things"] / max(num_things, 1),
        "position_stuff": totals["position_stuff"] / len(targets),
        "segment_things": totals["segment_things"] / max(num_things, 1),
        "segment_stuff": totals["segment_stuff"] / max(num_stuff, 1),
    }


@pytest.mark.parametrize("stuff", ["merged", "all"])
def test_losses_and_gradients_against_loops(stuff: str) -> None:
    head = make_head(stuff)
    output = make_output(head)
    targets = [random_target(head.classes, segments=n, seed=n, image_index=n) for n in (7, 3)]
    targets[0].is_crowd[3] = True
    targets[0].id_map, targets[1].id_map = targets[0].id_map.to(torch.uint8), targets[1].id_map.to(torch.int16)
    losses, (segments,) = head.losses(output, targets)
    expected = naive_losses(head, output, targets)
    assert set(losses) == set(expected)
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

    inputs = [
        *output.centers,
        *output.kernels,
        *output.regions,
        output.features,
        *head.thing_generator.parameters(),
    ]
    ours = torch.autograd.grad(sum(losses.values()), inputs, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(sum(expected.values()), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if a is None else a, torch.zeros_like(a) if b is None else b, rtol=1e-3, atol=1e-5
        )
    assert segments.is_thing.all()
    assert segments.image_index.tolist() == sorted(segments.image_index.tolist())
    sums = segments.weight.view(-1, 3).sum(1)
    assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()
    for image, row in zip(segments.image_index, segments.segment_index, strict=True):
        assert targets[image].is_thing[row]
        assert not targets[image].is_crowd[row]


def test_no_things_and_no_segments_still_have_gradients() -> None:
    head = make_head()
    output = make_output(head)
    classes = head.classes
    only_stuff = target_from_map(torch.ones(64, 128), [0], classes)
    void = target_from_map(torch.zeros(64, 128), [], classes)
    for targets in ([only_stuff, void], [void, void]):
        losses, (segments,) = head.losses(output, targets)
        total = sum(losses.values()) + segments.embeddings.sum()
        head.zero_grad()
        total.backward(retain_graph=True)
        assert torch.isfinite(total)
        assert head.thing_generator.embed.weight.grad is not None
        assert head.stuff_generator.embed.weight.grad is not None
        assert losses["segment_things"].item() == 0


def test_an_instance_too_small_for_stride_4_is_no_target() -> None:
    head = make_head()
    id_map = torch.ones(64, 128)
    id_map[0, 0:3] = 2  # misses the four central pixels of its cell
    target = target_from_map(id_map, [0, 2], head.classes)
    losses, (segments,) = head.losses(make_output(head, batch=1), [target])
    assert losses["segment_things"].item() == 0
    assert segments.weight.sum() == 0
    assert torch.isfinite(sum(losses.values()))


# --- inference ---------------------------------------------------------------------------------------------------


def test_centers_against_loops() -> None:
    head = make_head()
    output = make_output(head, batch=1, seed=4)
    options = InferenceOptions(center_threshold=0.4, top_num=12)
    kernel, channel, score = find_centers([c[0] for c in output.centers], [k[0] for k in output.kernels], options)
    expected = []
    for center, kernels, pool in zip(output.centers, output.kernels, options.pool_sizes, strict=True):
        p = center[0].sigmoid()
        _, h, w = p.shape
        reach = pool // 2
        padded = F.pad(p, (reach,) * 4)
        smooth = torch.stack([(p[c] + F.unfold(padded[c][None, None], pool).mean(1).view(h, w)) / 2 for c in range(3)])
        found = []
        for c in range(3):
            for y in range(h):
                for x in range(w):
                    around = smooth[c, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
                    if smooth[c, y, x] == around.max() and smooth[c, y, x] > 0.4:
                        found.append((smooth[c, y, x].item(), c, kernels[0, :, y, x]))
        expected += sorted(found, key=lambda f: -f[0])[: min(h * w, 6)]
    expected.sort(key=lambda f: -f[0])
    assert score.tolist() == pytest.approx([f[0] for f in expected], abs=1e-6)
    assert channel.tolist() == [f[1] for f in expected]
    torch.testing.assert_close(kernel, torch.stack([f[2] for f in expected]))
    assert len(score) > 10


def test_kernel_fusion_against_loops() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=g)
    embeddings = base[torch.randint(0, 4, (20,), generator=g)] * (1 + torch.rand(20, 1, generator=g))
    embeddings = embeddings + 0.15 * torch.randn(20, 6, generator=g)
    channels = torch.randint(0, 2, (20,), generator=g)
    scores = torch.linspace(0.9, 0.1, 20)
    unit = F.normalize(embeddings, dim=1)
    members: dict[int, list[int]] = {}
    for j in range(20):
        earlier = [i for i in range(j) if channels[i] == channels[j] and unit[i] @ unit[j] >= 0.97]
        if not earlier:
            members[j] = [j]
        elif earlier[0] in members:
            members[earlier[0]].append(j)
    fused, fused_channels, fused_scores = fuse_kernels(embeddings, channels, scores, 0.97)
    assert 2 < len(members) < 20
    torch.testing.assert_close(fused, torch.stack([embeddings[m].mean(0) for m in members.values()]))
    assert fused_channels.tolist() == channels[list(members)].tolist()
    assert fused_scores.tolist() == scores[list(members)].tolist()
    assert len(fuse_kernels(embeddings[:0], channels[:0], scores[:0], 0.9)[0]) == 0


def test_regions_pool_over_the_whole_map() -> None:
    score = torch.full((2, 4, 6), -9.0)
    score[0, :, :2], score[1, :, 2:] = 4.0, 2.0
    kernels = torch.randn(5, 4, 6)
    kernel, channel, mean = find_regions([score, score], [kernels, 2 * kernels], threshold=0.5)
    assert channel.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(kernel[0], kernels[:, :, :2].sum(dim=(1, 2)) / 24)
    torch.testing.assert_close(mean, torch.tensor([4.0, 2.0, 4.0, 2.0]).sigmoid())
    merged, classes, scores = merge_regions(kernel, channel, mean)
    assert classes.tolist() == [0, 1]
    torch.testing.assert_close(merged, 1.5 * kernel[:2])
    torch.testing.assert_close(scores, torch.tensor([4.0, 2.0]).sigmoid())
    assert find_regions([score], [kernels], threshold=0.99)[1].tolist() == []


def test_rescore_by_hand() -> None:
    logits = torch.full((3, 2, 2), -20.0)
    logits[0, 0] = 20.0  # two pixels at probability 1
    logits[1] = math.log(3)  # four pixels at 0.75
    scores, order = rescore(logits, torch.tensor([0.5, 0.8, 0.9]), InferenceOptions())
    assert order.tolist() == [1, 0]
    assert scores.tolist() == pytest.approx([0.6, 0.5], abs=1e-5)


# --- the whole head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stuff": "all"}, {"deform": True}])
def test_head_end_to_end(options: dict) -> None:
    head = make_head(**options)
    batch = random_batch(head.classes)
    features = [torch.randn(2, lv.channels, 64 // lv.stride, 128 // lv.stride) for lv in LEVELS]
    output = head(features)
    assert [c.shape[-2:] for c in output.centers] == [(8, 16), (4, 8), (2, 4), (1, 2), (1, 1)]
    losses, segments = head.losses(output, batch.targets)
    (sum(losses.values()) + segments[0].embeddings.sum()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None] == []
    head.eval()
    for prediction, size in zip(head.predict(output, batch.sizes), batch.sizes, strict=True):
        assert prediction.id_map.shape == size.original
        present = prediction.id_map.unique()
        assert present[present > 0].tolist() == list(range(1, len(prediction) + 1))
        assert (prediction.class_ids >= 0).all()


def test_it_learns_two_instances_of_one_class() -> None:
    """Overfitting one picture must end in the right panoptic map: targets, losses and inference agree."""
    classes = class_table(things=1, stuff=1)
    id_map = torch.ones(64, 128)
    id_map[16:48, 16:48], id_map[20:52, 80:112] = 2, 3
    target = target_from_map(id_map, [0, 1, 1], classes)
    torch.manual_seed(0)
    head = PanopticFCN(
        classes, LEVELS, channels=32, feature_channels=16, depth=1, instance_ranges=RANGES, num_positions=2,
        inference={"stuff_area": 64, "center_threshold": 0.1},
    )  # fmt: skip
    picture = torch.stack([(id_map == k).float() for k in (1, 2, 3)] + [torch.rand(64, 128) for _ in range(13)])
    features = [F.avg_pool2d(picture, lv.stride)[None, : lv.channels] for lv in LEVELS]
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(150):
        losses, _ = head.losses(head(features), [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    (prediction,) = head.eval().predict(head(features), [ImageSize((64, 128), (64, 128))])
    assert sorted(prediction.class_ids.tolist()) == [0, 1, 1]
    for k, truth in ((1, id_map == 2), (1, id_map == 3), (0, id_map == 1)):
        masks = [prediction.id_map == i + 1 for i in range(3) if prediction.class_ids[i] == k]
        assert max(((m & truth).sum() / (m | truth).sum()).item() for m in masks) > 0.85


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="'all' or 'merged'"):
        make_head("none")
    with pytest.raises(ConfigError, match="no option speed"):
        make_head(inference={"speed": 1})
    with pytest.raises(ConfigError, match="at least one thing"):
        PanopticFCN(class_table(things=0), LEVELS)
    with pytest.raises(ConfigError, match="stride-4"):
        PanopticFCN(class_table(), LEVELS[1:])
    with pytest.raises(ConfigError, match="5 ranges"):
        PanopticFCN(class_table(), LEVELS, instance_ranges=[(1, 2)])
