"""Panoptic FPN: converted checkpoints compute what the reference does; training is as robust as other heads'."""

from __future__ import annotations

import json
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou

from cli_helpers import run
from helpers import class_table, random_batch, target_from_map
from panoptic_ibs.classes import ClassInfo, ClassTable
from panoptic_ibs.construction import build_model, load
from panoptic_ibs.errors import CheckpointError, ConfigError
from panoptic_ibs.functional import forms
from panoptic_ibs.heads.two_branch import PanopticFPN, boxes
from panoptic_ibs.heads.two_branch.combination import CombinationOptions, combined
from panoptic_ibs.heads.two_branch.instances import InstanceBranch, StageOptions
from panoptic_ibs.heads.two_branch.matching import Regions
from panoptic_ibs.heads.two_branch.network import BoxHeadOptions, MaskHeadOptions
from panoptic_ibs.heads.two_branch.targets import InstanceTargets
from panoptic_ibs.importing import import_checkpoint
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.refine.dense_crf import DenseCRF
from panoptic_ibs.segments import SoftSegments
from panoptic_ibs.structures import Batch, ImageSize, Target
from recorder import BACKBONE
from reference_panoptic_fpn import ReferencePanopticFPN

HEAD = "panoptic_ibs.heads.two_branch.PanopticFPN"
SMALL: dict[str, Any] = {
    "channels": 16,
    "box_head": {"width": 32},
    "mask_head": {"width": 16, "convs": 1},
    "semantic": {"width": 16},
    "proposals": {"anchor_scale": 4, "kept": 100, "kept_at_test": 60},
    "regions": {"sampled": 64},
    "combination": {"stuff_area": 16, "score": 0.1},
}
FORMS = pytest.mark.parametrize("form", [False, True], ids=["cpu", "batched"])


def small_model(classes: ClassTable | None = None, **options: Any) -> PanopticModel:
    torch.manual_seed(0)
    head = {"_target_": HEAD, **SMALL, **options}
    return build_model({"backbone": BACKBONE, "head": head}, classes or class_table())


def target(id_map: Tensor, class_ids: list[int], crowd: tuple[int, ...] = (), index: int = 0) -> Target:
    return target_from_map(id_map, class_ids, class_table(), crowd, index)


def batch_of(*targets: Target) -> Batch:
    size = (targets[0].id_map.shape[0], targets[0].id_map.shape[1])
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (len(targets), 3, *size), generator=g, dtype=torch.uint8)
    return Batch(images, list(targets), [ImageSize(size, size)] * len(targets), torch.full((len(targets),), -1))


# --- checkpoints of detectron2


def reference(cascade: bool, things: int, semantic: int) -> ReferencePanopticFPN:
    torch.manual_seed(4)
    network = ReferencePanopticFPN(things, semantic, cascade=cascade).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.mul_(1 + 0.3 * torch.rand(value.shape, generator=g))
            elif name.endswith(("running_mean", "norm.bias")):
                value.add_(0.1 * torch.randn(value.shape, generator=g))
            elif name.endswith("conv3.norm.weight"):
                value.fill_(0.3)
            elif name.endswith(("fpn_output2.weight", "fpn_output3.weight", "fpn_output4.weight")):
                value.mul_(8)
    return network


def state_of(network: ReferencePanopticFPN) -> dict[str, Tensor]:
    """With what else lies in such files."""
    extra = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    cells = {f"proposal_generator.anchor_generator.cell_anchors.{k}": torch.zeros(3, 4) for k in range(5)}
    found = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    return {**found, **extra, **cells}


def same_picture(model: PanopticModel, network: ReferencePanopticFPN) -> None:
    """The whole way from an image to the panoptic map."""
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 8, 12, generator=g)
    image = (F.interpolate(coarse, size=(64, 96), mode="bicubic")[0] * 255).clamp(0, 255).to(torch.uint8)
    head = model.head
    assert isinstance(head, PanopticFPN)
    head.combination, model.test_size = replace(head.combination, stuff_area=100), (None, None)
    with torch.no_grad():
        wanted, segments = network.panoptic(image, 100)
        (found,) = model.predict(image)
    names = [(model.classes.thing_ids if thing else model.classes.stuff_ids)[label] for thing, label, _ in segments]
    assert sum(thing for thing, _, _ in segments) > 3
    assert not all(thing for thing, _, _ in segments)
    assert found.class_ids.tolist() == names
    torch.testing.assert_close(found.scores, torch.tensor([s for _, _, s in segments]), atol=1e-4, rtol=0)
    assert ((found.id_map.long() == wanted).float().mean()) > 0.999
    assert found.instances is not None
    assert len(found.instances) > 20


def test_a_pickle_of_detectron2_becomes_a_checkpoint(tmp_path: Path) -> None:
    network = reference(False, 80, 54)
    weights = {name: value.numpy() for name, value in state_of(network).items()}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": weights, "__author__": "somebody"}))
    out = tmp_path / "out.ckpt"
    result = run("convert", f"source={tmp_path / 'model_final.pkl'}", f"out={out}", "head=panoptic_fpn",
                 "data=coco_panoptic")  # fmt: skip
    assert result.code == 0, result.err + result.out
    same_picture(load(out), network)


def imported_model(state: dict[str, Tensor], classes: ClassTable) -> PanopticModel:
    imported = import_checkpoint(state, "panoptic_fpn", len(classes), len(classes.stuff_ids))
    assert not imported.unused
    backbone = {"_target_": "panoptic_ibs.backbones.TimmBackbone", **imported.backbone}
    model = build_model({"backbone": backbone, "head": {"_target_": HEAD, **imported.head}, **imported.model}, classes)
    model.load_state_dict(imported.weights)
    return model.eval()


def test_a_cascade_of_detectron2(tmp_path: Path) -> None:
    network = reference(True, 3, 3)
    model = imported_model(state_of(network), class_table())
    assert isinstance(model.head, PanopticFPN)
    assert model.head.instances is not None
    assert len(model.head.instances.box_heads) == 3
    same_picture(model, network)


def test_a_checkpoint_of_other_classes() -> None:
    state = state_of(reference(False, 4, 3))
    with pytest.raises(
        CheckpointError, match="4 thing classes apart and 3 semantic channels; the data set has 3 thing"
    ):
        import_checkpoint(state, "panoptic_fpn", 5, 2)
    with pytest.raises(
        CheckpointError, match=r"of Panoptic FPN or Mask R-CNN \(detectron2\)\. .* Give head=panoptic_fpn"
    ):
        import_checkpoint(state, "mask2former", 5, 2)
    with pytest.raises(CheckpointError, match=r"lacks the tensor that would be 'instances\.box_heads\.0\.class"):
        import_checkpoint({k: v for k, v in state.items() if "box_predictor" not in k}, "panoptic_fpn", 7, 3)


# --- the cascade, beside torchvision's loss and plain loops


def branch(cascade: bool, **stages: Any) -> InstanceBranch:
    torch.manual_seed(1)
    made = InstanceBranch(
        8, 3, (4, 8, 16, 32, 64), cascade, stages=StageOptions(**stages), box_head=BoxHeadOptions(width=16),
        mask_head=MaskHeadOptions(convs=1, width=8),
    )  # fmt: skip
    for head in made.box_heads:
        torch.nn.init.normal_(head.move.weight, std=0.3)  # type: ignore[arg-type]
    return made


def scene() -> tuple[list[Tensor], Regions, InstanceTargets]:
    """A pyramid, regions of two crops, and their things."""
    g = torch.Generator().manual_seed(2)
    pyramid = [torch.randn(2, 8, 64 // s, 96 // s, generator=g) for s in (4, 8, 16, 32)] + [torch.zeros(2, 8, 1, 2)]
    truth = torch.tensor([[[5.0, 5, 40, 40], [50, 10, 90, 60]], [[20.0, 20, 60, 50], [0, 0, 0, 0]]])
    labels, rows = torch.tensor([[1, 3], [2, 0]]), torch.tensor([[0, 1], [0, -1]])
    id_maps = torch.zeros(2, 64, 96, dtype=torch.uint8)
    id_maps[0, 5:40, 5:40], id_maps[0, 10:60, 50:90], id_maps[1, 20:50, 20:60] = 1, 2, 1
    things = InstanceTargets(truth, labels, rows, torch.zeros(2, 0, 4), id_maps, [2, 1])
    image = torch.tensor([0] * 8 + [1] * 6)
    index = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0] + [0] * 6)
    near = truth[image, index] + 4 * torch.randn(14, 4, generator=g)
    label = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    regions = Regions(near.clamp(0, 64), image, labels[image, index] * label, truth[image, index], rows[image, index],
                      torch.ones(14))  # fmt: skip
    return pyramid, regions, things


@FORMS
@pytest.mark.parametrize("cascade", [False, True])
def test_stages_by_torchvisions_loss_and_loops(form: bool, cascade: bool) -> None:
    made = branch(cascade)
    pyramid, regions, things = scene()
    with torch.no_grad(), forms.forced(form):
        found = made.region_losses(pyramid, regions, things)
    places, labels = regions.boxes, regions.labels
    truth = regions.truth
    for k, head in enumerate(made.box_heads):
        name = f"_{k + 1}" if cascade else ""
        with torch.no_grad():
            logits, moves = head(made.pool(pyramid, places, regions.image, 7))
        goal = boxes.encode(places, truth, made.stages.coding[k])
        wide = moves[:, None].expand(-1, 4, 4) if cascade else torch.cat([moves[:, :1], moves], 1)
        by_class, by_box = fastrcnn_loss(logits, wide.flatten(1), [labels], [goal])
        torch.testing.assert_close(found[f"box_class{name}"], by_class)
        torch.testing.assert_close(found[f"box_move{name}"], by_box)
        if cascade and k < 2:
            places = boxes.clip(boxes.decode(moves, places, made.stages.coding[k]), torch.tensor([96.0, 64]))
            labels, truth = torch.zeros(14).long(), torch.zeros(14, 4)
            for n, (box, i) in enumerate(zip(places, regions.image.tolist(), strict=True)):
                overlap = box_iou(box[None], things.boxes[i, : things.counts[i]])[0]
                best = int(overlap.argmax())
                truth[n] = things.boxes[i, best]
                labels[n] = things.labels[i, best] if overlap[best] >= (0.6, 0.7)[k] else 0
    assert found["box_move_3" if cascade else "box_move"] > 0


def test_masks_can_be_trained_on_refined_boxes() -> None:
    pyramid, regions, things = scene()
    values = []
    for masks_from, used in (("proposals", None), ("refined", 1), ("refined", 2), ("refined", 3)):
        made = branch(True, masks_from=masks_from, used=used)
        with torch.no_grad():
            values.append(made.region_losses(pyramid, regions, things)["mask"].item())
    assert len(set(values)) == 4


def test_the_used_stages_decide_at_test() -> None:
    pyramid, _, _ = scene()
    limits = torch.tensor([[96.0, 64]] * 2)
    scores = {}
    for used in (1, 2, 3, None):
        made = branch(True, used=used).eval()
        scores[used] = made.classified(pyramid, made(pyramid), limits)
    for place, other in zip(scores[3], scores[None], strict=True):
        assert torch.equal(place, other)
    assert not torch.equal(scores[1][0], scores[2][0])
    made = branch(True).eval()
    found = made.proposals.propose(made(pyramid), limits)
    places, p = found.boxes.flatten(0, 1), found.boxes.shape[1]
    image = torch.arange(2).repeat_interleave(p)
    logits, moves = made.box_heads[0](made.pool(pyramid, places, image, 7))
    moved = boxes.clip(boxes.decode(moves, places, (10.0, 10, 5, 5)), torch.tensor([96.0, 64]))
    second, _ = made.box_heads[1](made.pool(pyramid, moved, image, 7))
    mean = (logits.softmax(1) + second.softmax(1))[:, 1:] / 2
    torch.testing.assert_close(scores[2][1].flatten(0, 1), mean)


# --- the combination, pixel by pixel


@pytest.mark.parametrize("size", [ImageSize((24, 40), (24, 40)), ImageSize((24, 37), (30, 46))])
@pytest.mark.parametrize("whole", [False, True])
def test_the_combination_by_hand(size: ImageSize, whole: bool) -> None:
    h, w = size.original
    places = torch.tensor([[0.0, 0, w / 2, h / 2], [2, 2, w / 2, h / 2], [w / 4, h / 4, w, h], [1, 1, 1.2, 1.2]])
    masks = torch.full((4, 6, 6), 5.0)
    masks[2, :2] = -5
    semantic = torch.full((4, 6, 10), -3.0)
    semantic[0, :, 7:], semantic[1, :3], semantic[2, 3:], semantic[3, 5, 0] = 9.0, 2.0, 2.0, 6.0
    classes = torch.tensor([-1, 4, 3, 2])
    soft = SoftSegments(masks, torch.tensor([7, 8, 9, 9]), torch.ones(4) > 0, torch.tensor([0.9, 0.8, 0.7, 0.6]), size,
                        boxes=places, in_boxes=True, semantic=semantic, semantic_classes=classes)  # fmt: skip
    area = 2 * w if whole else w
    found = combined(soft, CombinationOptions(stuff_area=area, whole_stuff=whole))
    id_map, segments = torch.zeros(h, w).long(), []
    y, x = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    for k, (x1, y1, x2, y2) in enumerate(places.tolist()):
        grid = torch.stack([((x - x1) / (x2 - x1) * 2 - 1).expand(h, w),
                            ((y - y1) / (y2 - y1) * 2 - 1)[:, None].expand(h, w)], -1)  # fmt: skip
        mask = F.grid_sample(masks[k].sigmoid()[None, None], grid[None], align_corners=False)[0, 0] > 0.5
        if mask.sum() == 0 or (mask & (id_map > 0)).sum() > 0.5 * mask.sum():
            continue
        segments.append(int(soft.class_ids[k]))
        id_map[mask & (id_map == 0)] = len(segments)
    full = F.interpolate(semantic[None], scale_factor=4, mode="bilinear")[..., : size.valid[0], : size.valid[1]]
    label = F.interpolate(full, size=(h, w), mode="bilinear")[0].argmax(0)
    things = id_map > 0
    for channel in range(1, 4):
        region = (label == channel) & ~things
        counted = (label == channel) if whole else region
        if counted.sum() >= area and region.any():
            segments.append(int(classes[channel]))
            id_map[region] = len(segments)
    assert segments == [7, 9, 4, 3]  # the second thing is covered, the last has no pixel, the small stuff is left out
    assert found.class_ids.tolist() == segments
    assert torch.equal(found.id_map.long(), id_map)


def test_a_dense_crf_refines_masks_in_boxes() -> None:
    model = small_model().eval()
    batch = random_batch(model.classes, (64, 96), count=1)
    plain = model.predict_batch(batch)[0]
    model.refine = (DenseCRF(),)
    refined = model.predict_batch(batch)[0]
    assert len(plain) > 2
    assert refined.id_map.shape == plain.id_map.shape
    assert set(refined.class_ids.tolist()) <= set(plain.class_ids.tolist())
    assert not torch.equal(refined.id_map, plain.id_map)


# --- training is robust


def difficult() -> dict[str, Batch]:
    size = (64, 96)
    nothing = torch.zeros(size)
    stuff = torch.ones(size)
    one_pixel, crowd, many = stuff.clone(), stuff.clone(), stuff.clone()
    one_pixel[10, 20] = 2
    crowd[5:60, 5:90] = 2
    for k in range(30):
        many[2 * k : 2 * k + 2, 3 * k : 3 * k + 3] = 2 + k
    plain = target(stuff, [0])
    return {
        "nothing but stuff": batch_of(plain, plain),
        "nothing but void": batch_of(target(nothing, []), target(nothing, [])),
        "a thing of one pixel": batch_of(target(one_pixel, [0, 3]), plain),
        "a crowd": batch_of(target(crowd, [0, 3], crowd=(1,)), plain),
        "things in one of three": batch_of(plain, target(many, [0] + [2 + k % 3 for k in range(30)]), plain),
        "an image smaller than an anchor": batch_of(target(stuff[:32, :32], [0]), target(one_pixel[:32, :32], [0, 2])),
    }


@FORMS
@pytest.mark.parametrize("cascade", [False, True])
def test_losses_are_finite_and_reach_every_weight(form: bool, cascade: bool) -> None:
    model = small_model(
        cascade=cascade, **({"stages": {"masks_from": "refined", "used": 2}} if cascade else {})
    ).train()
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
        if name.startswith("nothing"):
            assert losses["mask"] == 0
            assert losses["rpn_box"] == 0


@FORMS
def test_no_proposal_at_all(form: bool) -> None:
    options: dict[str, Any] = {"proposals": {**SMALL["proposals"], "least_side": 1e6}, "regions": {"add_truth": False}}
    for cascade in (False, True):
        model = small_model(cascade=cascade, **options)
        batch = random_batch(model.classes, (64, 96))
        with forms.forced(form):
            losses, _ = model.train().losses(batch)
            torch.stack(list(losses.values())).sum().backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
            assert losses["mask"] == 0
            (first, _) = model.eval().predict_batch(batch)
        assert first.instances is not None
        assert len(first.instances) == 0


@pytest.mark.parametrize(("things", "stuff"), [(0, 2), (3, 0)])
def test_tables_without_things_or_stuff(things: int, stuff: int) -> None:
    classes = class_table(things, stuff)
    model = small_model(classes)
    full = class_table()
    batch = random_batch(full, (64, 96))
    for t in batch.targets:
        t.class_ids = t.class_ids.clamp(max=len(classes) - 1)
        t.is_thing = torch.tensor(classes.is_thing)[t.class_ids]
    losses, _ = model.train().losses(batch)
    torch.stack(list(losses.values())).sum().backward()
    assert set(losses) == ({"semantic"} if not things else {"rpn_class", "rpn_box", "box_class", "box_move", "mask"})
    found = model.eval().predict_batch(batch)
    assert all((p.instances is None) == (things == 0) for p in found)
    assert model.head.makes_instances == (things > 0)
    assert all(len(p) for p in found)


def test_both_forms_train_alike() -> None:
    model = small_model(cascade=True).train()
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


@pytest.mark.parametrize("cascade", [False, True])
def test_operations_do_not_grow_with_the_batch(cascade: bool) -> None:
    model = small_model(cascade=cascade).train()
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


def _head_losses(targets: list[Target], first: int) -> dict[str, Tensor]:
    """Of the crops from ``first`` on, with nothing drawn at random and the same features for the same crop."""
    everything = {"proposals": {**SMALL["proposals"], "sampled": 10**6, "positive_share": 1.0},
                  "regions": {"sampled": 10**6, "positive_share": 1.0}}  # fmt: skip
    model = small_model(cascade=True, **everything).train()
    g = torch.Generator().manual_seed(8)
    features = [torch.randn(2, level.channels, 64 // level.stride, 96 // level.stride, generator=g)
                for level in model.head.levels]  # fmt: skip
    output = model.head([f[first : first + len(targets)] for f in features])
    return model.head.losses(output, targets)[0]


def _targets() -> list[Target]:
    """The second crop has no thing."""
    stuff = torch.ones(64, 96)
    return [random_batch(class_table(), (64, 96), count=1).targets[0], target(stuff, [0])]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        losses = _head_losses(_targets()[rank : rank + 1], rank)
        torch.stack(list(losses.values())).sum().backward()
        torch.save({k: v.detach() for k, v in losses.items()}, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_weigh_as_one() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, args=(folder,), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in (0, 1))
    wanted = _head_losses(_targets(), 0)
    assert second["mask"] == 0
    for name, value in wanted.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, value.detach(), rtol=1e-4, atol=1e-6, msg=name)


# --- commands and options


SETS = ("data.synthetic.num_train=4", "data.synthetic.num_val=2", "data.synthetic.size=[96,192]", "data.num_workers=0")
TRAIN = (
    "debug=fast", *SETS, "data.presets.crop_size=[64,96]", "callbacks.progress=null", "callbacks.pictures=null",
    "evaluation.baselines=false", "head=panoptic_fpn", "sampling=random_crop", "callbacks=ema", "weigh=uncertainty",
)  # fmt: skip


def test_training_resumes_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANOPTIC_IBS_CACHE", str(tmp_path / "cache"))
    result = run("train", *TRAIN, "ibs=random", f"run_dir={tmp_path / 'no'}")
    assert result.code == 2
    assert "ibs=random: the head PanopticFPN has no segment embeddings" in result.message
    assert not (tmp_path / "cache" / "synthetic").exists()  # said before anything is drawn
    steps = [
        ("whole", 2, ()),
        ("half", 1, ()),
        ("rest", 2, (f"ckpt_path={tmp_path / 'half' / 'checkpoints' / 'last.ckpt'}",)),
    ]
    states = {}
    for name, count, more in steps:
        given = ("ibs=none", f"trainer.max_steps={count}", f"run_dir={tmp_path / name}")
        result = run("train", *TRAIN, *more, *given)
        assert result.code == 0, result.err
        states[name] = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, states["rest"][name]) for name, value in states["whole"].items())
    assert any(not torch.equal(value, states["half"][name]) for name, value in states["whole"].items())
    metrics = json.loads((tmp_path / "rest" / "metrics.json").read_text())
    assert {"ap", "ap50", "pq"} <= set(metrics)


def test_unknown_and_contradictory_options() -> None:
    with pytest.raises(ConfigError, match=r"head.stages has no option stage; the options are thresholds, coding"):
        small_model(stages={"stage": 2})
    with pytest.raises(ConfigError, match="a cascade has one box for all classes; set it to null"):
        small_model(cascade=True, stages={"agnostic": False})


def test_classes_in_any_order() -> None:
    """Stuff and things in turn in the table: what the detector and the semantic branch say lands at the right class."""
    classes = ClassTable(ClassInfo(f"c{i}", i, i % 2 == 0, (i, i, i)) for i in range(5))
    model = small_model(classes, combination={"stuff_area": 0, "score": 0.0}).eval()
    batch = random_batch(class_table(), (64, 96), count=1)
    head = model.head
    assert isinstance(head, PanopticFPN)
    assert head.instances is not None
    with torch.no_grad():
        head.instances.box_heads[0].classify.bias.copy_(torch.tensor([0.0, 0, 9, 0]))  # label 2 is class 2
        assert head.semantic is not None
        head.semantic.predict.bias.copy_(torch.tensor([0.0, 0, 50]))  # type: ignore[operator, union-attr]  # class 3
        (found,) = model.predict_batch(batch)
        (soft,) = head.segments(model(batch), batch.sizes)
    assert set(soft.class_ids.tolist()) == {2}
    assert soft.semantic_classes is not None
    assert soft.semantic_classes.tolist() == [-1, 1, 3]
    assert set(found.class_ids.tolist()) <= {2, 3}
