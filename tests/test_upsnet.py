"""UPSNet, single stage and cascade: the panoptic head against loops, training as robust as the other heads'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import reference_upsnet as reference
from cli_helpers import compose, run
from helpers import class_table, random_batch, target_from_map
from panoptic_ibs.classes import ClassTable
from panoptic_ibs.construction import build_model
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional import distributed as ranks
from panoptic_ibs.functional import forms
from panoptic_ibs.heads.two_branch import UPSNet
from panoptic_ibs.heads.two_branch.class_map import ClassMap
from panoptic_ibs.heads.two_branch.deformable import WithContext
from panoptic_ibs.heads.two_branch.instances import StageOptions
from panoptic_ibs.heads.two_branch.targets import instance_targets
from panoptic_ibs.heads.two_branch.unified import (
    PanopticOptions,
    chosen_things,
    panoptic_labels,
    panoptic_loss,
    unified,
    without_hidden,
)
from panoptic_ibs.heads.two_branch.upsnet import staged
from panoptic_ibs.layers.convolution import DeformableConv
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.refine.dense_crf import DenseCRF
from panoptic_ibs.segments import Prediction, SoftSegments
from panoptic_ibs.structures import Batch, ImageSize, Target
from recorder import BACKBONE
from test_upsnet_parts import crowd

SMALL: dict[str, Any] = {
    "channels": 16,
    "box_head": {"width": 32},
    "mask_head": {"width": 16, "convs": 1},
    "semantic": {"depth": 2, "width": 16},
    "proposals": {"anchor_scale": 4, "kept": 100, "kept_at_test": 60},
    "regions": {"sampled": 64},
    "region_semantic_weight": 0.2,
    "panoptic": {"stuff_area": 16, "score": 0.1},
}
CASCADE: dict[str, Any] = {"cascade": True, "instance_stage": 2, "deformable_outputs": [3, 4, 5], "context": True}
FORMS = pytest.mark.parametrize("form", [False, True], ids=["cpu", "batched"])
KINDS = pytest.mark.parametrize("options", [{}, CASCADE], ids=["single", "cascade"])


def small_model(classes: ClassTable | None = None, **options: Any) -> PanopticModel:
    torch.manual_seed(0)
    head = {"_target_": "panoptic_ibs.heads.two_branch.UPSNet", **SMALL, **options}
    return build_model({"backbone": BACKBONE, "head": head}, classes or class_table())


def target(id_map: Tensor, class_ids: list[int], crowd: tuple[int, ...] = ()) -> Target:
    return target_from_map(id_map, class_ids, class_table(), crowd)


def batch_of(*targets: Target) -> Batch:
    size = (targets[0].id_map.shape[0], targets[0].id_map.shape[1])
    images = torch.randint(0, 256, (len(targets), 3, *size), generator=torch.Generator().manual_seed(3))
    sizes = [ImageSize(size, size)] * len(targets)
    return Batch(images.to(torch.uint8), list(targets), sizes, torch.full((len(targets),), -1))


# --- training of the panoptic head


def test_a_share_of_the_things_is_kept() -> None:
    valid = torch.arange(10) < torch.tensor([10, 3, 1, 0])[:, None]
    torch.manual_seed(0)
    seen = torch.zeros(4, 10)
    for _ in range(60):
        kept = chosen_things(valid, 0.7)
        assert kept.sum(1).tolist() == [7, 2, 1, 0]
        assert not (kept & ~valid).any()
        seen += kept
    assert (seen[0] > 20).all()
    assert (seen[0] < 60).all()
    assert (seen[1, :3] > 10).all()


def test_panoptic_labels_pixel_by_pixel() -> None:
    classes = class_table()  # stuff 0 1, things 2 3 4
    g = torch.Generator().manual_seed(0)
    first = target(torch.randint(0, 7, (32, 40), generator=g), [1, 3, 0, 4, 2, 2], crowd=(4,))
    second = target(torch.randint(0, 3, (32, 40), generator=g), [0, 1])
    maps, targets = ClassMap.of(classes), [first, second]
    things = instance_targets(targets, maps)
    assert things.counts == [3, 0]  # rows 1, 4 and 5
    kept = torch.tensor([[True, False, True], [False] * 3])
    found = panoptic_labels(targets, things, kept, maps)
    by_row = [{0: -100, 1: 1, 2: 2, 3: 0, 4: 5, 5: 5, 6: 4}, {0: -100, 1: 0, 2: 1}]  # unknown is 2 + 3
    for b, t in enumerate(targets):
        for y in range(8):
            for x in range(10):
                assert int(found[b, y, x]) == by_row[b][int(t.id_map[4 * y + 2, 4 * x + 2])]


def test_panoptic_loss_against_planes() -> None:
    batch = random_batch(class_table(), (64, 96), segments=5, seed=2)
    maps = ClassMap.of(class_table())
    things = instance_targets(batch.targets, maps)
    b, places = things.labels.shape
    g = torch.Generator().manual_seed(0)
    semantic = torch.randn(b, 5, 16, 24, generator=g, requires_grad=True)
    masks = torch.randn(b, places, 28, 28, generator=g, requires_grad=True)
    kept = chosen_things(things.valid, 0.7)
    labels = panoptic_labels(batch.targets, things, kept, maps)
    total, count = torch.zeros(()), 0
    for i in range(b):
        rows = kept[i].nonzero().squeeze(1).tolist()
        boxes = (things.boxes[i, rows] / 4).tolist()
        channels = [int(maps.channel_of_class[maps.class_of_label[things.labels[i, r]]]) for r in rows]
        planes = reference.logits(semantic[i], 2, channels, boxes, masks[i, rows])
        own = {2 + r: 2 + k for k, r in enumerate(rows)} | {2 + places: 2 + len(rows), 0: 0, 1: 1, -100: -100}
        wanted = labels[i].clone().apply_(own.__getitem__)
        total = total + F.cross_entropy(planes[None], wanted[None], ignore_index=-100, reduction="sum")
        count += int((wanted >= 0).sum())
    found = panoptic_loss(semantic, masks, things, labels, kept, maps)
    torch.testing.assert_close(found, total / count)
    for a, e in zip(*(torch.autograd.grad(v, (semantic, masks)) for v in (found, total / count)), strict=True):
        torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-4)


# --- inference of the panoptic head


def scene(size: ImageSize, count: int, seed: int = 0, low: float = 0.0) -> SoftSegments:
    """Two stuff and three thing classes, named 4 0 and 1 3 2."""
    g = torch.Generator().manual_seed(seed)
    semantic = F.interpolate(torch.randn(1, 5, 4, 6, generator=g) * 3 - low, size=(12, 18), mode="bilinear")[0]
    boxes, masks = crowd(count, size.original, seed)
    channels = torch.randint(2, 5, (count,), generator=g)
    return SoftSegments(
        masks, torch.tensor([4, 0, 1, 3, 2])[channels], torch.ones(count, dtype=torch.bool),
        torch.linspace(0.95, 0.6, count), size, "panoptic", boxes, True, semantic, torch.tensor([4, 0, -1, -1, -1]),
        channels,
    )  # fmt: skip


def by_planes(soft: SoftSegments, options: PanopticOptions) -> Prediction:
    """The published steps, one plane an instance."""
    (height, width), original = soft.size.valid, soft.size.original
    assert soft.boxes is not None
    assert soft.semantic is not None
    assert soft.channels is not None
    scale = torch.tensor([width / original[1], height / original[0]] * 2)
    boxes = (soft.boxes * scale).tolist()
    kept = reference.pruned(soft.masks, soft.class_ids.tolist(), boxes, (height, width), options.overlap)
    full = F.interpolate(soft.semantic[None], scale_factor=4, mode="bilinear")[0, :, :height, :width]
    channels = soft.channels[kept].tolist()
    planes = reference.logits(full, 2, channels, [boxes[k] for k in kept], soft.masks[kept])
    rows = [int((y + 0.5) * height / original[0]) for y in range(original[0])]
    columns = [int((x + 0.5) * width / original[1]) for x in range(original[1])]
    label, seen = planes.argmax(0)[rows][:, columns], full.argmax(0)[rows][:, columns]
    names = {0: 4, 1: 0}
    for i in range(len(kept)):
        region = label == 2 + i
        votes = torch.bincount(seen[region], minlength=5)
        best = int(votes.argmax())
        if region.any() and best < 2 and votes[best] >= options.majority * region.sum():
            label[region] = best
    segments, id_map = [], torch.zeros(original).long()
    for k in [*range(2, 2 + len(kept)), 0, 1]:
        area = int((label == k).sum())
        if area and (k >= 2 or area >= options.stuff_area):
            segments.append((names[k] if k < 2 else int(soft.class_ids[kept[k - 2]]),
                             1.0 if k < 2 else float(soft.scores[kept[k - 2]])))  # fmt: skip
            id_map[label == k] = len(segments)
    return Prediction(id_map, torch.tensor([c for c, _ in segments]).long(), torch.tensor([s for _, s in segments]))


@pytest.mark.parametrize("size", [ImageSize((45, 70), (45, 70)), ImageSize((45, 70), (60, 95))])
@pytest.mark.parametrize(("count", "seed", "low"), [(9, 0, 0.0), (9, 1, 3.0), (1, 2, 0.0), (0, 3, 0.0)])
def test_inference_against_planes(size: ImageSize, count: int, seed: int, low: float) -> None:
    options = PanopticOptions(stuff_area=60, overlap=0.2)
    soft = scene(size, count, seed, low)
    expected = by_planes(soft, options)
    found = unified(without_hidden(soft, options), 2, options)
    assert torch.equal(found.id_map.long(), expected.id_map)
    assert found.class_ids.tolist() == expected.class_ids.tolist()
    torch.testing.assert_close(found.scores, expected.scores)
    assert count == 0 or len(found) > 1


def test_instances_become_the_stuff_that_fills_them() -> None:
    """A mask that is sure in a region that the semantic branch takes for stuff; and one that it does not."""
    soft = scene(ImageSize((48, 72), (48, 72)), 2)
    assert soft.semantic is not None
    soft.semantic = torch.full((5, 12, 18), -5.0)
    soft.semantic[0] = 4.0
    soft.semantic[2, 6:] = 6.0
    soft.boxes = torch.tensor([[0.0, 0, 20, 20], [30, 26, 60, 46]])
    soft.masks, soft.channels, soft.class_ids = (
        torch.full((2, 28, 28), 20.0),
        torch.tensor([2, 2]),
        torch.tensor([1, 1]),
    )
    found = unified(soft, 2, PanopticOptions(stuff_area=0))
    assert found.class_ids.tolist() == [1, 4]
    kept = unified(soft, 2, PanopticOptions(stuff_area=0, majority=1.0))
    assert kept.class_ids.tolist() == [1, 4]  # stuff fills all of the region
    soft.boxes[0, 3] = 32.0
    assert unified(soft, 2, PanopticOptions(stuff_area=0, majority=0.9)).class_ids.tolist() == [1, 1, 4]
    assert unified(soft, 2, PanopticOptions(stuff_area=0)).class_ids.tolist() == [1, 4]


def test_a_crf_without_a_step_changes_nothing() -> None:
    for count, size in (
        (9, ImageSize((45, 70), (45, 70))),
        (3, ImageSize((45, 70), (60, 95))),
        (0, ImageSize((45, 70), (45, 70))),
    ):
        soft, options = scene(size, count, low=1.0), PanopticOptions(stuff_area=0)
        image = torch.randint(0, 256, (3, 45, 70), dtype=torch.uint8)
        plain = unified(soft, 2, options)
        found = unified(DenseCRF(iterations=0)(image, soft), 2, options)
        assert found.class_ids.tolist() == plain.class_ids.tolist() or size.valid != size.original
        same = (found.id_map == plain.id_map).float().mean()
        assert same > (0.999 if size.valid == size.original else 0.9)  # logits are resized in place of labels
        refined = unified(DenseCRF()(image, soft), 2, options)
        assert set(refined.class_ids.tolist()) <= set(plain.class_ids.tolist())
        assert count == 0 or not torch.equal(refined.id_map, plain.id_map)


# --- the network


def test_parts_are_where_they_are_asked_for() -> None:
    plain, made = small_model().head, small_model(**CASCADE).head
    assert isinstance(plain, UPSNet)
    assert isinstance(made, UPSNet)
    assert plain.instances is not None
    assert made.instances is not None
    assert not plain.embeds
    assert (len(plain.instances.box_heads), len(made.instances.box_heads)) == (1, 3)
    assert [isinstance(m, DeformableConv) for m in made.neck.output] == [False, True, True, True]
    assert isinstance(made.neck.lateral[3], WithContext)
    assert not any(isinstance(m, DeformableConv) for m in plain.neck.modules())
    assert (made.instances.used, made.instances.stages.masks_from) == (2, "refined")
    default = StageOptions()
    assert staged(default, None, True) is default
    assert (staged(default, "avg", True).used, staged(default, "avg", True).masks_from) == (None, "proposals")
    assert "region_semantic" not in small_model(region_semantic_weight=0.0).head.weights
    assert made.weights["box_move_3"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_stage": 2}, r"head.instance_stage=2 chooses a stage of a cascade; set head.cascade=true\."),
        ({"cascade": True, "instance_stage": 4}, r"head.instance_stage is 4; choose 1, 2, 3 or avg\."),
        ({"deformable_outputs": [3, 6]}, r"head.deformable_outputs holds 6; the levels are 2 \(P2\) to 5 \(P5\)\."),
        ({"panoptic": {"scores": 0.5}}, r"head.panoptic has no option scores; the options are kept_share"),
    ],
)
def test_contradictory_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_model(**options)


def difficult() -> dict[str, Batch]:
    stuff = torch.ones(64, 96)
    one_pixel, crowd_map, many = stuff.clone(), stuff.clone(), stuff.clone()
    one_pixel[10, 20] = 2
    crowd_map[5:60, 5:90] = 2
    for k in range(30):
        many[2 * k : 2 * k + 2, 3 * k : 3 * k + 3] = 2 + k
    plain = target(stuff, [0])
    return {
        "nothing but stuff": batch_of(plain, plain),
        "nothing but void": batch_of(target(0 * stuff, []), target(0 * stuff, [])),
        "a thing of one pixel": batch_of(target(one_pixel, [0, 3]), plain),
        "a crowd": batch_of(target(crowd_map, [0, 3], crowd=(1,)), plain),
        "things in one of three": batch_of(plain, target(many, [0] + [2 + k % 3 for k in range(30)]), plain),
        "an image smaller than an anchor": batch_of(target(stuff[:32, :32], [0]), target(one_pixel[:32, :32], [0, 2])),
    }


@FORMS
@KINDS
def test_losses_are_finite_and_reach_every_weight(form: bool, options: dict[str, Any]) -> None:
    model = small_model(**options).train()
    for name, batch in difficult().items():
        model.zero_grad()
        with forms.forced(form):
            losses, segments = model.losses(batch)
        assert set(losses) == set(model.head.weights)
        assert list(segments) == []
        torch.stack(list(losses.values())).sum().backward()
        for key, value in losses.items():
            assert torch.isfinite(value), (name, key)
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, (name, key)
            assert torch.isfinite(parameter.grad).all(), (name, key)
        if name == "nothing but void":
            assert losses["panoptic"] == 0
        assert name.startswith("nothing") or losses["panoptic"] > 0


@FORMS
@KINDS
def test_no_proposal_at_all(form: bool, options: dict[str, Any]) -> None:
    nothing: dict[str, Any] = {"proposals": {**SMALL["proposals"], "least_side": 1e6}, "regions": {"add_truth": False}}
    model = small_model(**{**options, **nothing})
    batch = random_batch(model.classes, (64, 96))
    with forms.forced(form):
        losses, _ = model.train().losses(batch)
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        (first, _) = model.eval().predict_batch(batch)
    assert first.instances is not None
    assert len(first.instances) == 0
    assert set(first.class_ids.tolist()) <= set(model.classes.stuff_ids)


@pytest.mark.parametrize(("things", "stuff"), [(0, 2), (3, 0)])
def test_tables_without_things_or_stuff(things: int, stuff: int) -> None:
    classes = class_table(things, stuff)
    model = small_model(classes)
    batch = random_batch(class_table(), (64, 96))
    for t in batch.targets:
        t.class_ids = t.class_ids.clamp(max=len(classes) - 1)
        t.is_thing = torch.tensor(classes.is_thing)[t.class_ids]
    losses, _ = model.train().losses(batch)
    torch.stack(list(losses.values())).sum().backward()
    assert set(losses) == set(model.head.weights)
    assert ("panoptic" in losses) == (things > 0)
    found = model.eval().predict_batch(batch)
    assert all((p.instances is None) == (things == 0) for p in found)
    assert all(len(p) for p in found)


def test_both_forms_train_alike() -> None:
    model = small_model(**CASCADE).train()
    batch = random_batch(model.classes, (64, 96), count=3)
    norms, terms = [], []
    for form in (False, True):
        model.zero_grad()
        with forms.forced(form):
            torch.manual_seed(1)
            losses, _ = model.losses(batch)
        torch.stack(list(losses.values())).sum().backward()
        terms.append({k: v.item() for k, v in losses.items()})
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-5)


def test_mixed_precision() -> None:
    model = small_model().train()
    batch = random_batch(model.classes, (64, 96))
    values = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses, _ = model.losses(batch)
        assert all(v.dtype == torch.float32 for v in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        values.append({k: v.item() for k, v in losses.items()})
    assert values[0] == pytest.approx(values[1], rel=0.1, abs=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.eval().predict_batch(batch)) == 2


class Count(TorchDispatchMode):
    """Counts operations."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_operations_do_not_grow_with_the_batch() -> None:
    model = small_model(**CASCADE).train()
    numbers = []
    for crops in (2, 6):
        batch = random_batch(model.classes, (64, 96), count=crops)
        with forms.forced(True):
            output = model(batch)
            with Count() as count:
                losses, _ = model.head.losses(output, batch.targets)
                torch.stack(list(losses.values())).sum().backward()
        numbers.append(count.number)
    assert numbers[1] <= 1.1 * numbers[0]


# --- several processes


def panoptic_terms(targets: list[Target], first: int) -> dict[str, Tensor]:
    """The terms that the instance branch has not, with all things kept, of crops from ``first`` on."""
    model = small_model(panoptic={**SMALL["panoptic"], "kept_share": 1.0}).train()
    g = torch.Generator().manual_seed(8)
    features = [torch.randn(2, level.channels, 64 // level.stride, 96 // level.stride, generator=g)
                for level in model.head.levels]  # fmt: skip
    output = model.head([f[first : first + len(targets)] for f in features])
    terms = model.head.losses(output, targets)[0]
    return {k: terms[k] for k in ("semantic", "region_semantic", "panoptic")}


def test_two_processes_weigh_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with one crop each, one of them without things: their normalisers are recorded, averaged, and used."""
    targets = [random_batch(class_table(), (64, 96), count=1).targets[0], target(torch.ones(64, 96), [0])]
    wanted = panoptic_terms(targets, 0)
    counts: list[list[Tensor]] = [[], []]
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "mean_over_ranks", lambda v, own=counts[rank]: own.append(v) or v)
        panoptic_terms(targets[rank : rank + 1], rank)
    found = []
    for rank in (0, 1):
        means = iter([(a + b) / 2 for a, b in zip(*counts, strict=True)])
        monkeypatch.setattr(ranks, "mean_over_ranks", lambda v, left=means: next(left))
        found.append(panoptic_terms(targets[rank : rank + 1], rank))
    assert found[1]["region_semantic"] == 0
    for name, value in wanted.items():
        torch.testing.assert_close((found[0][name] + found[1][name]) / 2, value, rtol=1e-4, atol=1e-6, msg=name)


# --- configurations and commands


def test_recipes_are_the_published_ones() -> None:
    city = compose("data=cityscapes", "data.root=DIR", "head=upsnet", "sampling=full_image", "ibs=none")
    coco = compose("data=coco_panoptic", "data.root=DIR", "head=upsnet", "sampling=full_image", "ibs=none")
    eleme = compose("data=coco_panoptic", "data.root=DIR", "head=cascade_upsnet", "backbone=resnext101_64x4d",
                    "sampling=full_image", "ibs=none")  # fmt: skip
    found = [
        (c.trainer.max_steps, c.sampling.batch_size * c.trainer.devices, c.optim.lr, list(c.optim.milestones),
         c.optim.milestone_factor, c.head.semantic_weight, c.head.region_semantic_weight, c.head.panoptic_weight,
         c.head.semantic.depth, c.head.panoptic.stuff_area, c.backbone.name)
        for c in (city, coco, eleme)
    ]  # fmt: skip
    assert found == [
        (12000, 16, 0.02, [9000], 0.1, 1.0, 0.0, 0.5, 2, 2048, "resnet50"),
        (90000, 16, 0.02, [60000, 80000], 0.1, 0.2, 0.04, 0.1, 3, 4096, "resnet50"),
        (147860, 16, 0.01, [118288, 140467], 0.5, 0.2, 0.04, 0.1, 3, 4096, "resnext101_64x4d"),
    ]
    assert (eleme.head.cascade, eleme.head.instance_stage, list(eleme.head.deformable_outputs)) == (True, 2, [3, 4, 5])
    assert (city.head.cascade, city.head.instance_stage, coco.head.context) == (False, None, True)


SETS = ("data.synthetic.num_train=4", "data.synthetic.num_val=2", "data.synthetic.size=[96,192]", "data.num_workers=0")
TRAIN = (
    "debug=fast", *SETS, "data.presets.crop_size=[64,96]", "callbacks.progress=null", "callbacks.pictures=null",
    "evaluation.baselines=false", "head=cascade_upsnet", "head.panoptic.score=0.05", "sampling=paired_crop",
    "callbacks=ema", "weigh=uncertainty",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of three runs: two steps, one step, and the second step after the first."""
    root = tmp_path_factory.mktemp("upsnet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANOPTIC_IBS_CACHE", str(root / "cache"))
        patch.setattr("panoptic_ibs.report_pages.page.can_be_written", lambda: False)  # figures take half of the time
        half = f"ckpt_path={root / 'half' / 'checkpoints' / 'last.ckpt'}"
        for name, count, more in (("whole", 2, ()), ("half", 1, ()), ("rest", 2, (half,))):
            given = ("ibs=none", f"trainer.max_steps={count}", f"run_dir={root / name}")
            result = run("train", *TRAIN, *more, *given)
            assert result.code == 0, result.err
        yield root


def test_training_resumes_bit_by_bit(trained: Path) -> None:
    result = run("train", *TRAIN, "ibs=paired", f"run_dir={trained / 'no'}")
    assert result.code == 2
    assert "ibs=paired: the head UPSNet has no segment embeddings" in result.message
    states = {
        name: torch.load(trained / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "half", "rest")
    }
    assert all(torch.equal(value, states["rest"][name]) for name, value in states["whole"].items())
    assert any(not torch.equal(value, states["half"][name]) for name, value in states["whole"].items())
    metrics = json.loads((trained / "rest" / "metrics.json").read_text())
    assert {"ap", "ap50", "pq"} <= set(metrics)


def test_an_evaluation_with_a_dense_crf_has_the_one_without_beside_it(trained: Path, tmp_path: Path) -> None:
    ckpt = f"ckpt_path={trained / 'rest' / 'checkpoints' / 'last.ckpt'}"
    result = run("evaluate", ckpt, *SETS, "refine=dense_crf", "refine.preset=deeplab_coco", "refine.iterations=2",
                 "+overrides.head.panoptic.score=0.0", "evaluation.bootstrap=20", f"run_dir={tmp_path}")  # fmt: skip
    assert result.code == 0, result.err
    assert "without refine" in result.out
    found = json.loads((tmp_path / "metrics.json").read_text())
    apart = {name: json.loads((tmp_path / "sets" / name / "metrics.json").read_text())
             for name in ("refined", "without_refine")}  # fmt: skip
    compared = found["comparison"]
    assert (compared["reference"], compared["sets"]) == ("refined", ["refined", "without_refine"])
    difference = apart["without_refine"]["pq"] - found["pq"]
    assert compared["differences"]["without_refine"]["pq"]["value"] == pytest.approx(difference)
    assert apart["refined"]["pq"] == found["pq"]
    assert found["config"]["refine"]["iterations"] == 2
    assert apart["without_refine"]["config"]["refine"]["_target_"] is None
    maps = [sorted((folder / "predictions" / "panoptic").rglob("*.png"))
            for folder in (tmp_path, tmp_path / "sets" / "without_refine")]  # fmt: skip
    assert [f.name for f in maps[0]] == [f.name for f in maps[1]]
    assert any(a.read_bytes() != b.read_bytes() for a, b in zip(*maps, strict=True))
    for wrong, message in (
        (("refine.iterations=-2",), "refine.iterations is -2; expected: a whole number >= 0 or null."),
        (("refine.appearance_weight=nan",), "refine.appearance_weight is nan; expected: a number >= 0 or null."),
    ):
        bad = run("evaluate", ckpt, *SETS, "refine=dense_crf", *wrong, f"run_dir={tmp_path / 'bad'}")
        assert (bad.code, message in bad.message) == (2, True), bad.err
    bad = run("evaluate", "predictions=x.json", "refine=dense_crf", f"run_dir={tmp_path / 'bad'}")
    assert "refine needs a network's soft segments, which files of predictions have not" in bad.message


def test_segments_of_a_refined_network_fit_the_input() -> None:
    model = small_model(panoptic={**SMALL["panoptic"], "score": 0.2}).eval()
    batch = random_batch(model.classes, (64, 96))
    batch.sizes = [ImageSize((64, 90), (64, 90)), ImageSize((60, 96), (80, 120))]
    plain = model.predict_batch(batch)
    model.refine = (DenseCRF(),)
    refined = model.predict_batch(batch)
    for a, b, size in zip(plain, refined, batch.sizes, strict=True):
        assert a.id_map.shape == b.id_map.shape == size.original
        assert set(b.class_ids.tolist()) <= set(a.class_ids.tolist()) | set(model.classes.stuff_ids)
    with torch.no_grad():
        (soft, _) = model.head.segments(model(batch), batch.sizes)
    assert soft.kind == "panoptic"
    assert replace(soft, size=batch.sizes[1]).in_boxes
