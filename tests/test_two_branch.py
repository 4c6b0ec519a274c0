"""The parts of the two-branch networks, each beside a naive loop or a library's own."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, roi_align

from helpers import class_table, random_target, target_from_map
from panoptic_ibs.classes import ClassInfo, ClassTable
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional import forms
from panoptic_ibs.functional.box_masks import mask_targets, paste
from panoptic_ibs.heads.two_branch import anchors, boxes
from panoptic_ibs.heads.two_branch.class_map import IGNORE, ClassMap
from panoptic_ibs.heads.two_branch.detection import InferenceOptions, detections
from panoptic_ibs.heads.two_branch.matching import (
    RoiOptions,
    match,
    positives,
    regions_of,
    rematched,
    sample,
    sampled_regions,
)
from panoptic_ibs.heads.two_branch.network import BoxHead, BoxHeadOptions, MaskHead, MaskHeadOptions
from panoptic_ibs.heads.two_branch.proposals import ProposalNetwork, ProposalOptions
from panoptic_ibs.heads.two_branch.regions import level_of, pool
from panoptic_ibs.heads.two_branch.semantic import semantic_loss
from panoptic_ibs.heads.two_branch.targets import InstanceTargets, instance_targets, semantic_labels

FORMS = pytest.mark.parametrize("form", [False, True], ids=["cpu", "batched"])


def some_boxes(count: int, size: tuple[int, int] = (64, 96), seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=g) * (torch.tensor([size[1], size[0]]) - 1.0)
    return torch.cat([corners.amin(1), corners.amax(1) + 0.5], 1)


# --- classes and targets


def mixed_table() -> ClassTable:
    """Things and stuff in turn, as COCO's categories may stand in a table."""
    kinds = [True, False, True, False, False]
    return ClassTable(ClassInfo(f"c{i}", 10 + i, kind, (i, i, i)) for i, kind in enumerate(kinds))


def test_maps_of_classes_say_what_two_branch_networks_mean() -> None:
    table = mixed_table()
    every, merged = ClassMap.of(table), ClassMap.of(table, "merged")
    assert every.class_of_label.tolist() == [-1, 0, 2]
    assert every.label_of_class.tolist() == [1, -1, 2, -1, -1]
    assert every.class_of_channel.tolist() == [1, 3, 4, 0, 2]  # stuff first, then things
    assert every.stuff_channels.tolist() == [True, True, True, False, False]
    assert merged.class_of_channel.tolist() == [-1, 1, 3, 4]
    assert merged.channel_of_class.tolist() == [0, 1, 0, 2, 3]
    assert merged.stuff_channels.tolist() == [False, True, True, True]
    for found in (every, merged):  # there and back
        for c, info in enumerate(table.classes):
            channel = int(found.channel_of_class[c])
            assert int(found.class_of_channel[channel]) == (-1 if found is merged and info.is_thing else c)
    label_to_channel = every.channel_of_class[every.class_of_label[1:]]
    assert label_to_channel.tolist() == [3, 4]  # detector label + number of stuff - 1
    with pytest.raises(ConfigError, match="choose 'all' or 'merged'"):
        ClassMap.of(table, "some")  # type: ignore[arg-type]
    many = ClassTable(ClassInfo(str(i), i, False, (0, 0, 0)) for i in range(300))
    with pytest.raises(ConfigError, match="needs 300 channels and can have 255"):
        ClassMap.of(many)


def test_targets_by_hand() -> None:
    classes = class_table(2, 1)  # stuff 0, things 1 and 2
    id_map = torch.zeros(6, 8)
    id_map[:3], id_map[3:5, 1:4], id_map[4, 6], id_map[5, :2] = 1, 2, 3, 4
    first = target_from_map(id_map, [0, 2, 1, 1, 1], classes, crowd=(3,))  # the last has no pixel
    second = target_from_map(torch.ones(6, 8), [0], classes)
    found = instance_targets([first, second], ClassMap.of(classes))
    assert found.counts == [2, 0]
    assert found.boxes.tolist() == [[[1, 3, 4, 5], [6, 4, 7, 5]], [[0, 0, 0, 0]] * 2]
    assert (found.labels.tolist(), found.rows.tolist()) == ([[2, 1], [0, 0]], [[1, 2], [-1, -1]])
    assert found.crowds.tolist() == [[[0, 5, 2, 6]], [[0, 0, 0, 0]]]
    labels = semantic_labels([first, second], ClassMap.of(classes, "merged"))
    wanted = torch.full((6, 8), IGNORE)
    wanted[:3], wanted[3:5, 1:4], wanted[4, 6], wanted[5, :2] = 1, 0, 0, 0
    assert torch.equal(labels[0].long(), wanted)
    assert torch.equal(labels[1].long(), torch.ones(6, 8).long())
    nothing = instance_targets([second, second], ClassMap.of(classes))
    assert (nothing.boxes.shape, nothing.crowds.shape[1], nothing.valid.any().item()) == ((2, 1, 4), 0, False)


# --- boxes and anchors


def test_boxes_are_coded_as_torchvision_does() -> None:
    a, b = some_boxes(9), some_boxes(9, seed=1)
    weights = (10.0, 10.0, 5.0, 5.0)
    coder = torchvision.models.detection._utils.BoxCoder(weights)
    deltas = boxes.encode(a, b, weights)
    torch.testing.assert_close(deltas, coder.encode_single(b, a))
    torch.testing.assert_close(boxes.decode(deltas, a, weights), b, atol=1e-4, rtol=1e-4)
    wild = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)) * 40
    torch.testing.assert_close(boxes.decode(wild, a, weights), coder.decode_single(wild, a))
    torch.testing.assert_close(boxes.iou(a[:, None], b), box_iou(a, b))
    assert boxes.iou(torch.zeros(4), torch.zeros(4)) == 0
    assert boxes.encode(torch.zeros(4), torch.zeros(4), weights).isfinite().all()
    assert boxes.clip(torch.tensor([-3.0, 2, 50, 70]), torch.tensor([40.0, 60])).tolist() == [0, 2, 40, 60]


def test_anchors_are_torchvisions_but_for_the_strides() -> None:
    ratios = (0.5, 1.0, 2.0)
    made = torchvision.models.detection.anchor_utils.AnchorGenerator(((16,), (32,)), (ratios,) * 2)
    for level, (size, cell) in enumerate(zip((16, 32), made.cell_anchors, strict=True)):
        torch.testing.assert_close(anchors.cells([size], ratios, rounded=True), cell)
        strides = [[torch.tensor(4 * 2**level)] * 2 for level in range(2)]
        theirs = made.grid_anchors([[3, 5], [2, 3]], strides)[level]
        shape = [(3, 5), (2, 3)][level]
        assert torch.equal(anchors.grid(cell, 4 * 2**level, shape), theirs)
    exact = anchors.cells([16], ratios)
    torch.testing.assert_close(boxes.areas(exact), torch.full((3,), 256.0))
    torch.testing.assert_close((exact[:, 3] - exact[:, 1]) / (exact[:, 2] - exact[:, 0]), torch.tensor(ratios))


# --- matching and sampling


def things_of(*crops: Tensor, crowds: Tensor | None = None) -> InstanceTargets:
    most = max(max(map(len, crops)), 1)
    table = torch.stack([F.pad(c, (0, 0, 0, most - len(c))) for c in crops])
    valid = torch.stack([torch.arange(most) < len(c) for c in crops])
    labels = valid * (torch.arange(most) % 2 + 1)
    rows = torch.where(valid, torch.arange(most) + 5, -1)
    none = torch.zeros(len(crops), 0, 4)
    return InstanceTargets(table, labels, rows, none if crowds is None else crowds, torch.zeros(len(crops), 64, 96),
                           [len(c) for c in crops])  # fmt: skip


def test_matching_beside_a_loop() -> None:
    truth, places = some_boxes(5, seed=3), some_boxes(400, seed=4)
    targets = things_of(truth, truth[:0], truth[:2])
    for best in (False, True):
        label, index = match(places, targets, 0.5, 0.3, best=best)
        for i, count in enumerate(targets.counts):
            overlap = box_iou(truth[:count], places)
            for n in range(len(places)):
                column = overlap[:, n].tolist()
                value = max(column, default=-1.0)
                wanted = 1 if value >= 0.5 else 0 if value < 0.3 else -1
                if best and any(v == overlap[g].max() and v > 0 for g, v in enumerate(column)):
                    wanted = 1
                assert int(label[i, n]) == wanted
                if wanted == 1:
                    assert int(index[i, n]) == column.index(value)
    assert (label[0] == 1).sum() >= 5  # every thing has an anchor
    assert (label == -1).any()


def test_boxes_in_crowds_are_neither_things_nor_background() -> None:
    crowds = torch.tensor([[[10.0, 10, 50, 50]], [[0.0, 0, 0, 0]]])
    places = torch.tensor([[12.0, 12, 20, 20], [0, 0, 12, 12], [70, 20, 90, 40], [12, 12, 30, 30]])
    targets = things_of(places[3:], places[:0], crowds=crowds)
    label, _ = match(places, targets, 0.5, 0.5)
    assert label.tolist() == [[-1, 0, 0, 1], [0, 0, 0, 0]]
    regions = regions_of(places[None].expand(2, 4, 4), label.clamp(min=0), torch.zeros(2, 4).long(),
                         torch.ones(2, 4) > 0, targets)  # fmt: skip
    again = rematched(regions, regions.boxes, targets, 0.5)
    assert len(again.boxes) == 7
    assert (again.image == 0).sum() == 3


def test_samples_are_random_and_balanced() -> None:
    label = torch.zeros(3, 100).long()
    label[0, :40], label[0, 40:50], label[1, :3], label[2, 10:] = 1, -1, 1, -1
    torch.manual_seed(0)
    seen = torch.zeros(3, 100)
    for _ in range(40):
        index, kind, counts = sample(label, 20, 0.25)
        assert kind.sum(1).tolist() == [5, 3, 0]
        assert counts.sum(1).tolist() == [20, 20, 10]
        for i in range(3):
            chosen = index[i][counts[i]]
            assert len(chosen.unique()) == len(chosen)
            assert torch.equal(label[i][chosen] == 1, kind[i][counts[i]])
            seen[i, chosen] += 1
    assert (seen[0, :40] > 0).all()  # every one has its turn
    assert seen[0, 40:50].sum() == 0
    assert seen[2, 10:].sum() == 0


def test_both_forms_sample_the_same_regions() -> None:
    truth = some_boxes(6, seed=5)
    targets = things_of(truth, truth[:0], truth[:3])
    places = torch.stack([some_boxes(50, seed=s) for s in range(3)])
    valid = torch.ones(3, 50, dtype=torch.bool)
    valid[1, 10:] = False
    found = []
    for form in (False, True):
        with forms.forced(form):
            torch.manual_seed(1)
            regions = sampled_regions(places, valid, targets, 0.5, RoiOptions(sampled=24))
            things = positives(regions, 2, 3)
            assert len(things.boxes) == (6 if form else int(things.things.sum()))
            found.append([{k: v[r.counts > 0] for k, v in vars(r).items()} for r in (regions, things)])
    for ours, theirs in zip(*found, strict=True):
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
    regions, things = found[0]
    assert (regions["image"] == 1).sum() == 10  # no more proposals are valid, and there is no thing
    assert things["image"].bincount(minlength=3).tolist() == [2, 0, 2]
    overlap = boxes.iou(regions["boxes"], regions["truth"])
    assert ((overlap >= 0.5) == (regions["labels"] > 0))[regions["image"] != 1].all()


# --- features of regions


@FORMS
@pytest.mark.parametrize("aligned", [False, True])
def test_regions_are_read_from_the_level_that_fits(form: bool, aligned: bool) -> None:
    g = torch.Generator().manual_seed(0)
    strides = (4, 8, 16, 32)
    levels = [torch.randn(2, 3, 256 // s, 512 // s, generator=g).double().requires_grad_() for s in strides]
    places = torch.tensor(
        [[3.0, 4, 40, 60], [10, 10, 200, 240], [0, 0, 512, 256], [100, 50, 101, 51], [5, 5, 5, 5], [300, 0, 420, 110]]
    ).double()
    image = torch.tensor([0, 1, 1, 0, 0, 1])
    fits = level_of(places, strides)
    wanted = [min(max(math.floor(4 + math.log2(max((b[2] - b[0]) * (b[3] - b[1]), 1e-9) ** 0.5 / 224)), 2), 5) - 2
              for b in places.tolist()]  # fmt: skip
    assert fits.tolist() == wanted
    assert len(set(wanted)) == 3
    with forms.forced(form):
        found = pool(levels, strides, places, image, 7, sampling=2, aligned=aligned)
    for k, (box, i, level) in enumerate(zip(places, image, fits, strict=True)):
        region = torch.cat([i[None].double(), box])[None]
        alone = roi_align(levels[level], region, 7, 1 / strides[level], 2, aligned)[0]
        torch.testing.assert_close(found[k], alone)
    (found**2).sum().backward()
    assert all((x.grad != 0).any() for x in levels[:3])


@FORMS
@pytest.mark.parametrize("aligned", [False, True])
def test_mask_targets_are_roi_align_of_full_masks(form: bool, aligned: bool) -> None:
    targets = [random_target(class_table(), (64, 96), segments=6, seed=s) for s in range(2)]
    id_maps = torch.stack([t.id_map for t in targets])
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 2, (20,), generator=g)
    rows = torch.randint(0, 8, (20,), generator=g)
    places = some_boxes(20)
    places[0], places[1] = torch.tensor([0.0, 0, 96, 64]), torch.tensor([10.0, 10, 11, 11])
    with forms.forced(form):
        found = mask_targets(id_maps, image, rows, places, 14, aligned)
    full = (id_maps[image] == (rows + 1)[:, None, None]).float()[:, None]
    regions = torch.cat([torch.arange(20.0)[:, None], places], 1)
    torch.testing.assert_close(found, roi_align(full, regions, 14, aligned=aligned)[:, 0], atol=1e-5, rtol=1e-5)
    assert found.amax((1, 2)).gt(0.5).sum() > 5


def test_masks_are_pasted_by_grid_sample() -> None:
    """As detectron2 pastes: the values of the mask at the pixels' centres, zeros outside."""
    g = torch.Generator().manual_seed(0)
    masks, places, size = torch.rand(7, 28, 28, generator=g), some_boxes(7, (48, 80)), (48, 80)
    places[0] = torch.tensor([-5.0, -9, 200, 100])
    places[1] = torch.tensor([3.2, 4.1, 3.9, 4.8])  # holds no pixel's centre, or one
    y, x = torch.arange(48) + 0.5, torch.arange(80) + 0.5
    places_y = (y - places[:, 1:2]) / (places[:, 3:] - places[:, 1:2]) * 2 - 1
    places_x = (x - places[:, :1]) / (places[:, 2:3] - places[:, :1]) * 2 - 1
    grid = torch.stack([places_x[:, None].expand(7, 48, 80), places_y[:, :, None].expand(7, 48, 80)], 3)
    wanted = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    for form in (False, True):
        with forms.forced(form):
            torch.testing.assert_close(paste(masks, places, size), wanted, atol=1e-5, rtol=1e-5)
    assert paste(masks[:0], places[:0], size).shape == (0, 48, 80)


# --- networks


def test_only_the_wanted_channel_of_the_mask_head_is_made() -> None:
    torch.manual_seed(0)
    head = MaskHead(6, 5, MaskHeadOptions(convs=2, width=8))
    torch.nn.init.normal_(head.predict.weight)
    torch.nn.init.normal_(head.predict.bias)  # type: ignore[arg-type]
    x, labels = torch.randn(4, 6, 14, 14), torch.tensor([3, 1, 5, 0])
    found = head(x, labels)
    every = head.predict(F.relu(head.grow(head.convs(x))))
    torch.testing.assert_close(found, every[torch.arange(4), (labels - 1).clamp(min=0)])
    assert found.shape == (4, 28, 28)
    for norm in (False, True):  # nothing there, with a gradient all the same
        empty = MaskHead(6, 5, MaskHeadOptions(convs=1, width=8, norm=norm))
        empty(x[:0], labels[:0]).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in empty.parameters())


def test_box_heads() -> None:
    for agnostic, convs in ((False, 0), (True, 1)):
        head = BoxHead(4, 3, BoxHeadOptions(convs=convs, width=8, norm=True), agnostic)
        logits, moves = head(torch.randn(5, 4, 7, 7))
        assert logits.shape == (5, 4)
        assert moves.shape == ((5, 4) if agnostic else (5, 3, 4))


# --- proposals


def test_both_forms_propose_the_same() -> None:
    torch.manual_seed(0)
    network = ProposalNetwork(8, (4, 8), ProposalOptions(anchor_scale=4, candidates=60, kept=40, nms=0.5))
    torch.nn.init.normal_(network.deltas.weight, std=0.05)
    torch.nn.init.normal_(network.objectness.weight, std=0.5)
    output = network([torch.randn(3, 8, 16, 24), torch.randn(3, 8, 8, 12)])
    limits = torch.tensor([[96.0, 64], [50, 64], [96, 20]])
    found = []
    for form in (False, True):
        with forms.forced(form):
            found.append(network.propose(output, limits))
    assert torch.equal(found[0].valid, found[1].valid)
    assert torch.equal(found[0].boxes[found[0].valid], found[1].boxes[found[1].valid])
    assert found[0].valid.sum(1).min() > 5
    for some, valid, (width, height) in zip(found[0].boxes, found[0].valid, limits.tolist(), strict=True):
        kept = some[valid]
        assert kept.min() >= 0
        assert kept[:, 0::2].max() <= width
        assert kept[:, 1::2].max() <= height


def test_proposal_losses_by_a_loop() -> None:
    torch.manual_seed(0)
    network = ProposalNetwork(8, (4, 8), ProposalOptions(anchor_scale=4, sampled=10**6, positive_share=1.0, beta=0.1))
    torch.nn.init.normal_(network.objectness.weight, std=0.3)
    levels = [torch.randn(2, 8, 16, 24), torch.randn(2, 8, 8, 12)]
    output = network(levels)
    truth = some_boxes(4, seed=9)
    targets = things_of(truth, truth[:0])
    by_class, by_box = network.losses(levels, output, targets)
    places, count, wanted_class, wanted_box = torch.cat(output.anchors), 0, 0.0, 0.0
    for i in range(2):
        label, index = match(places, targets, 0.7, 0.3, best=True)
        logits, deltas = (torch.cat(part, 1)[i] for part in (output.logits, output.deltas))
        for n in range(len(places)):
            if label[i, n] < 0:
                continue
            count += 1
            wanted_class += F.binary_cross_entropy_with_logits(logits[n], label[i, n].float()).item()
            if label[i, n] == 1:
                goal = boxes.encode(places[n], targets.boxes[i, index[i, n]], (1.0,) * 4)
                wanted_box += F.smooth_l1_loss(deltas[n], goal, beta=0.1, reduction="sum").item()
    assert by_class.item() == pytest.approx(wanted_class / count, rel=1e-4)
    assert by_box.item() == pytest.approx(wanted_box / count, rel=1e-4)
    nobody = network.losses(levels, output, things_of(truth[:0], truth[:0]))
    assert nobody[1].item() == 0
    assert nobody[1].requires_grad


def test_what_is_said_of_chosen_anchors_has_the_gradient_of_convolutions() -> None:
    """Places at borders, on all levels, some twice; levels of one column or one pixel."""
    torch.manual_seed(0)
    network = ProposalNetwork(8, (4, 8, 16), ProposalOptions(anchor_scale=4)).double()
    for layer in (network.conv, network.objectness, network.deltas):
        torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(layer.bias, std=0.3)
    levels = [torch.randn(2, 8, *size, dtype=torch.double).requires_grad_() for size in ((5, 7), (4, 1), (1, 1))]
    chosen = torch.stack([torch.arange(120), torch.randint(120, (120,))])
    found = network.said(levels, chosen)
    whole = network.forward.__wrapped__(network, levels)  # type: ignore[attr-defined]
    logits, deltas = torch.cat(whole.logits, 1), torch.cat(whole.deltas, 1)
    wanted = logits.gather(1, chosen), deltas.gather(1, chosen[..., None].expand(-1, -1, 4))
    inputs = [*levels, *network.parameters()]
    slopes = [torch.randn(2, 120, dtype=torch.double), torch.randn(2, 120, 4, dtype=torch.double)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    pairs = [torch.autograd.grad([x.double() for x in said], inputs, slopes) for said in (found, wanted)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- semantic loss


@FORMS
def test_semantic_loss_is_that_of_the_upsampled_logits(form: bool) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 9, 7, generator=g).requires_grad_()
    labels = torch.randint(0, 5, (2, 36, 28), generator=g).to(torch.uint8)
    labels[0, :11] = IGNORE
    full = F.interpolate(logits, scale_factor=4, mode="bilinear")
    wanted = F.cross_entropy(full, labels.long(), ignore_index=IGNORE)
    (gradient,) = torch.autograd.grad(3 * wanted, logits)
    with forms.forced(form), pytest.MonkeyPatch.context() as patch:
        patch.setattr("panoptic_ibs.heads.two_branch.semantic.STRIP_PIXELS", 2 * 4 * 28)
        found = semantic_loss(logits, labels)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(3 * found, logits)[0], gradient, atol=1e-6, rtol=1e-4)
    nothing = semantic_loss(logits, torch.full_like(labels, IGNORE))
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().sum() == 0


# --- detections


def test_detections_by_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    places = torch.stack([some_boxes(60, seed=s) for s in range(3)], 1)
    scores = torch.rand(60, 3, generator=g)
    places[7, 1], scores[8, 0] = torch.nan, torch.nan
    valid = torch.arange(60) != 5
    for across in (False, True):
        options = InferenceOptions(score=0.4, nms=0.3, across_classes=across, kept=12)
        found = detections(places, scores, valid, options)
        order = sorted(((float(scores[p, t]), p, t) for p in range(60) for t in range(3)), reverse=True)
        kept: list[tuple[float, int, int]] = []
        for score, p, t in order:
            if not (score > 0.4 and valid[p]) or p in (7, 8):
                continue
            rivals = [places[q, u] for _, q, u in kept if across or u == t]
            if all(box_iou(places[p, t][None], r[None]) <= 0.3 for r in rivals):
                kept.append((score, p, t))
        wanted = kept[:12]
        assert found.labels.tolist() == [t + 1 for _, _, t in wanted]
        assert torch.equal(found.boxes, torch.stack([places[p, t] for _, p, t in wanted]))
    assert len(detections(places, scores * 0, valid, InferenceOptions())) == 0
