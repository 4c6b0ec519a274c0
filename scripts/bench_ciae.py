"""CIAE: the loss against a dense one, IBS in a training step, inference against torchvision's FCOS."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE, CROPS, INSTANCES, STUFF = (512, 512), 2, 15, 11
TEST_SIZE = (800, 1216)


def make_loss(size: tuple[int, int] = SIZE) -> tuple[Any, ...]:
    """Embeddings, targets, memory, categories and options: Cityscapes' numbers of classes, 15 instances a crop."""
    import torch
    from torch.nn import functional as F

    from panoptic_ibs.classes import ClassInfo, ClassTable
    from panoptic_ibs.heads.ciae import LossOptions
    from panoptic_ibs.heads.ciae.losses import Categories

    torch.manual_seed(0)
    torch.set_num_threads(1)
    classes = ClassTable(ClassInfo(f"class{i}", i, i >= STUFF, (i, i, i)) for i in range(19))
    categories = Categories(classes, merged=True)
    targets = [make_target(image, size) for image in range(CROPS)]
    maps = torch.randn(CROPS, 32, size[0] // 4, size[1] // 4)
    memory = F.normalize(torch.randn(categories.count, 32), dim=1)
    return maps, targets, memory, categories, LossOptions(), classes


def make_target(image: int, size: tuple[int, int], instances: int = INSTANCES) -> Any:
    """Stuff stripes under boxes of many sizes."""
    import torch

    from panoptic_ibs.structures import Target

    height, width = size
    id_map = (torch.arange(height) * STUFF // height)[:, None].expand(height, width).clone() + 1
    boxes = []
    for i in range(STUFF):
        rows = (torch.arange(height) * STUFF // height == i).nonzero()
        boxes.append([0, int(rows[0]), width, int(rows[-1]) + 1])
    for k in range(instances):
        side = 16 + 12 * k
        y, x = (37 * k * (image + 1)) % (height - side), (97 * k * (image + 1)) % (width - side)
        id_map[y : y + side, x : x + side] = STUFF + 1 + k
        boxes.append([x, y, x + side, y + side])
    areas = torch.bincount(id_map.flatten(), minlength=STUFF + instances + 1)[1:]
    ids = torch.cat([torch.arange(STUFF), STUFF + torch.arange(instances) % 8])
    return Target(id_map.int(), ids, ids >= STUFF, ids < 0, torch.tensor(boxes).float(), areas, ids, image, str(image))


def ours(maps: Any, targets: Any, memory: Any, categories: Any, options: Any) -> Any:
    """The package's loss."""
    from panoptic_ibs.heads.ciae.losses import ciae_loss, crop_segments

    crops = [crop_segments(m, t) for m, t in zip(maps, targets, strict=True)]
    return ciae_loss(maps, targets, crops, memory, categories, options)


def dense(maps: Any, targets: Any, memory: Any, categories: Any, o: Any) -> Any:
    """Eq. 1 to 12 as they stand, in dense tensors of segments x pixels."""
    import torch
    from torch.nn import functional as F

    p = F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False)
    total, valid = maps.sum() * 0.0, 0
    for i, target in enumerate(targets):
        height, width = target.id_map.shape
        rows = target.is_thing.nonzero().squeeze(1)
        masks = (target.id_map == rows[:, None, None] + 1).flatten(1).float()  # (N, H W)
        raw = p[i].flatten(1)
        unit = F.normalize(raw, dim=0)
        means = F.normalize(masks @ raw.T, dim=1)
        category = categories.of_class[target.class_ids][target.id_map.flatten().long() - 1]
        number = torch.zeros(len(target), dtype=torch.long)
        number[rows] = torch.arange(len(rows))
        thing = target.is_thing[target.id_map.flatten().long() - 1]
        own = torch.where(thing, len(memory) - 1 + number[target.id_map.flatten().long() - 1], category - 1)
        center = (target.boxes[rows, :2] + target.boxes[rows, 2:]) / 2
        half = (target.boxes[rows, 2:] - target.boxes[rows, :2]) / 2 * o.box_filter
        y = (torch.arange(height) + 0.5)[None, :, None].expand(len(rows), height, width).flatten(1)
        x = (torch.arange(width) + 0.5)[None, None].expand(len(rows), height, width).flatten(1)
        inside = ((x - center[:, :1]).abs() <= half[:, :1]) & ((y - center[:, 1:]).abs() <= half[:, 1:])
        cae = _dense_term(1 - memory @ unit, category, o)
        near = (means @ unit) * inside
        iae = _dense_term(1 - torch.cat([memory[1:] @ unit, near]), own, o)
        factor = torch.where(thing, o.thing_factor, 1.0)
        total = total + (cae + o.instance_weight * factor * iae).sum()
        valid += height * width
    return total / valid


def _dense_term(distance: Any, own: Any, o: Any) -> Any:
    import torch

    positive = distance.gather(0, own[None])
    negative = distance.scatter(0, own[None], 0.0)
    loss = -torch.log(1 - (positive - negative + o.margin).clamp(min=0) / (2 + o.margin))
    return loss.topk(min(o.top_k, len(loss)), dim=0).values.sum(0)


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds."""
    start = time.process_time()
    call()
    return time.process_time() - start


def loss_step(which: str) -> Callable[[], Any]:
    """Forward and backward of one of the losses, from fresh gradients."""
    maps, targets, memory, categories, options, _ = make_loss()
    maps.requires_grad_()
    function = {"ours": ours, "dense": dense}[which]

    def call() -> Any:
        import torch

        loss = function(maps, targets, memory, categories, options)
        return loss.detach(), torch.autograd.grad(loss, maps)[0]

    return call


def loss_memory(which: str) -> float:
    """Peak resident memory that a forward and backward pass adds, in a process of its own, MB."""
    command = [sys.executable, str(Path(__file__).resolve()), "memory", which]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["added"])


def loss_rows(repeats: int = 5) -> list[dict[str, Any]]:
    """Time, memory and value of the loss."""

    steps = {which: loss_step(which) for which in ("ours", "dense")}
    (value, grad), (dense_value, dense_grad) = steps["ours"](), steps["dense"]()
    # Float32: where two similarities nearly tie, the two programs may select different ones.
    assert (grad - dense_grad).norm() < 1e-3 * dense_grad.norm()
    times: dict[str, list[float]] = {"ours": [], "dense": []}
    for _ in range(repeats):
        for which, step in steps.items():
            times[which].append(timed(step))
    mine, theirs = (statistics.median(times[w]) for w in ("ours", "dense"))
    memory = {which: loss_memory(which) for which in steps}
    what = "CIAE-loss, 2 crops 512x512, 15 instances, forward and backward"
    return [
        {"what": f"{what}: time, dense over ours", "ours": mine, "peer": theirs, "unit": "s",
         "ratio": theirs / mine, "target": ">= 3"},
        {"what": f"{what}: added peak memory, ours over dense", "ours": memory["ours"], "peer": memory["dense"],
         "unit": "MB", "ratio": memory["ours"] / memory["dense"], "target": "<= 0.2"},
        {"what": f"{what}: relative difference of the values", "ours": value.item(), "peer": dense_value.item(),
         "unit": "", "ratio": abs(value.item() / dense_value.item() - 1), "target": "<= 1e-5"},
    ]  # fmt: skip


def make_model(size: tuple[int, int]) -> tuple[Any, Any]:
    """CIAE on an R50 with random weights, and a batch of two crops."""
    import torch

    from panoptic_ibs.construction import build_model
    from panoptic_ibs.structures import Batch, ImageSize

    *_, classes = make_loss()
    head = {"_target_": "panoptic_ibs.heads.ciae.CIAE"}
    backbone = {"_target_": "panoptic_ibs.backbones.TimmBackbone", "name": "resnet50"}
    model = build_model({"backbone": backbone, "head": head}, classes)
    images = torch.randint(0, 256, (CROPS, 3, *size), dtype=torch.uint8)
    targets = [make_target(i, size) for i in range(CROPS)]
    return model, Batch(images, targets, [ImageSize(size, size)] * CROPS, torch.zeros(CROPS, dtype=torch.long))


def step_rows(repeats: int = 3) -> list[dict[str, Any]]:
    """A training step with IBS over without: the whole step, and IBS alone on top of it (steadier)."""
    import torch

    from panoptic_ibs.ibs import IntraBatchSupervision

    model, batch = make_model(SIZE)
    model.train()
    ibs = IntraBatchSupervision(partners="paired")
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def step(on: bool) -> None:
        losses, segments = model.losses(batch)
        total = torch.stack(list(losses.values())).sum()
        if on:
            total = total + ibs(segments, batch.pairs, batch.targets)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    def alone() -> None:
        output = model.head.forward(features)
        _, (segments,) = model.head.losses(output, batch.targets)
        segments.embeddings = segments.embeddings.detach().requires_grad_()
        segments.features = segments.features.detach().requires_grad_()
        extra.append(timed(lambda: ibs([segments], batch.pairs, batch.targets).backward()))

    step(False)
    times: dict[bool, list[float]] = {False: [], True: []}
    extra: list[float] = []
    for _ in range(repeats):
        for on in times:
            times[on].append(timed(lambda on=on: step(on)))
    with torch.no_grad():
        features = model.backbone(model.normalize(batch.images, batch.sizes))
    for _ in range(repeats):
        alone()
    off, on = (statistics.median(times[k]) for k in (False, True))
    added = statistics.median(extra)
    what = "CIAE R50 step, 2 crops 512x512, 15 instances"
    return [
        {"what": f"{what}: with IBS over without, whole steps", "ours": on, "peer": off, "unit": "s",
         "ratio": on / off, "target": "<= 1.03"},
        {"what": f"{what}: (step + IBS alone) over step", "ours": off + added, "peer": off, "unit": "s",
         "ratio": (off + added) / off, "target": "<= 1.03"},
    ]  # fmt: skip


def inference_rows(repeats: int = 3) -> list[dict[str, Any]]:
    """One image against torchvision's FCOS with the same backbone, and where the time goes (Table I).

    With random weights nothing scores: 40 proposals are taken by a threshold of zero, so that fusing has its work.
    """
    import torch
    from torchvision.models.detection import fcos_resnet50_fpn

    from panoptic_ibs.structures import ImageSize

    model, _ = make_model(SIZE)
    model.eval()
    peer = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=9, min_size=800, max_size=1333).eval()
    image = torch.rand(1, 3, *TEST_SIZE)
    size, head = ImageSize(TEST_SIZE, TEST_SIZE), model.head
    head.inference = type(head.inference)(score_threshold=0.0, proposals=40)
    parts: dict[str, list[float]] = {"network": [], "nms": [], "fusing": [], "peer": []}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            out: dict[str, Any] = {}
            parts["network"].append(timed(lambda out=out: out.update(o=head(model.backbone(image)))))
            maps = out["o"].embeddings[0]
            parts["nms"].append(
                timed(
                    lambda out=out, maps=maps: out.update(q=head.queries(maps, head.proposals(out["o"], 0, size), size))
                )
            )
            parts["fusing"].append(timed(lambda out=out, maps=maps: head.fuse(head.soft(maps, out["q"], size))))
            parts["peer"].append(timed(lambda: peer([image[0]])))
    seconds = {name: statistics.median(values[1:]) for name, values in parts.items()}  # the first warms up
    whole = seconds["network"] + seconds["nms"] + seconds["fusing"]
    what = "CIAE R50 inference, 800x1216"
    rows = [{"what": f"{what}, over torchvision's FCOS-R50", "ours": whole, "peer": seconds["peer"], "unit": "s",
             "ratio": whole / seconds["peer"], "target": "<= 1.35"}]  # fmt: skip
    for name, target in (("network", ""), ("nms", ""), ("fusing", "<= 0.1")):
        rows.append({"what": f"{what}: {name}, share of the whole", "ours": seconds[name], "peer": whole, "unit": "s",
                     "ratio": seconds[name] / whole, "target": target})  # fmt: skip
    return rows


def run() -> list[dict[str, Any]]:
    """Rows of the table."""
    return [*loss_rows(), *step_rows(), *inference_rows()]


def _status(key: str) -> float:
    """A line of /proc/self/status in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _memory_process(which: str) -> None:
    call = loss_step(which)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    call()
    print(json.dumps({"added": _status("VmHWM") - before}))


if __name__ == "__main__":
    _memory_process(sys.argv[2])
