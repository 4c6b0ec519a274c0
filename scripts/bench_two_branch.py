"""Training step of Panoptic FPN (R50, two 512 x 1024 crops, ten instances) beside torchvision's Mask R-CNN."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE, CROPS = (512, 1024), 2


def _options() -> dict[str, Any]:
    """torchvision's values, so that both do the same work."""
    return {
        "_target_": "panoptic_ibs.heads.two_branch.PanopticFPN",
        "proposals": {"rounded_anchors": True, "beta": 1 / 9, "kept": 2000},
        "stages": {"beta": 1 / 9, "sampling": 2, "aligned": False},
        "semantic": {"width": 128, "groups": 32},
    }


def ours() -> tuple[Callable[[], Any], Any]:
    """A step of forward and backward, and the model."""
    import torch

    from bench_step import make
    from panoptic_ibs.construction import build_model

    _, batch, _ = make(SIZE, CROPS)
    torch.manual_seed(0)
    backbone = {"_target_": "panoptic_ibs.backbones.TimmBackbone", "name": "resnet50", "freeze_norm": True}
    classes = make_classes()
    model = build_model({"backbone": backbone, "head": _options()}, classes).train()
    return lambda: torch.stack(list(model.losses(batch)[0].values())).sum().backward(), model


def make_classes() -> Any:
    """Cityscapes' counts."""
    from panoptic_ibs.classes import ClassInfo, ClassTable

    return ClassTable(ClassInfo(f"class{i}", i, i >= 11, (i, i, i)) for i in range(19))


def peer() -> tuple[Callable[[], Any], Any]:
    """A step of torchvision's Mask R-CNN on the same crops; its targets' masks are made before."""
    import torch
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    from bench_step import make

    _, batch, _ = make(SIZE, CROPS)
    torch.manual_seed(0)
    network = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=9, min_size=SIZE[0], max_size=SIZE[1]
    ).train()
    freeze_norms(network.backbone.body)  # as it is with pretrained weights, and as ours is
    images = [image.float() / 255 for image in batch.images]
    targets = []
    for t in batch.targets:
        rows = t.is_thing.nonzero().squeeze(1)
        masks = (t.id_map == rows[:, None, None] + 1).to(torch.uint8)
        targets.append({"boxes": t.boxes[rows], "labels": t.class_ids[rows] - 10, "masks": masks})
    return lambda: torch.stack(list(network(images, targets).values())).sum().backward(), network


def freeze_norms(module: Any) -> None:
    """Replace torch's batch norms by torchvision's fixed ones."""
    from torch import nn
    from torchvision.ops import FrozenBatchNorm2d

    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
        else:
            freeze_norms(child)


def semantic(plain: bool) -> tuple[Callable[[], Any], Any]:
    """The semantic branch and its loss alone, on a detached pyramid; ``plain``: the loss on upsampled logits."""
    import torch
    from torch.nn import functional as F

    from bench_step import make
    from panoptic_ibs.heads.two_branch.class_map import IGNORE, ClassMap
    from panoptic_ibs.heads.two_branch.semantic import SemanticBranch, SemanticOptions, semantic_loss
    from panoptic_ibs.heads.two_branch.targets import semantic_labels

    _, batch, _ = make(SIZE, CROPS)
    torch.manual_seed(0)
    branch = SemanticBranch(256, 12, SemanticOptions(groups=32))
    pyramid = [torch.randn(CROPS, 256, SIZE[0] // s, SIZE[1] // s, requires_grad=True) for s in (4, 8, 16, 32)]
    classes = ClassMap.of(make_classes(), "merged")

    def step() -> None:
        logits, labels = branch(pyramid), semantic_labels(batch.targets, classes)
        if plain:
            full = F.interpolate(logits, scale_factor=4, mode="bilinear")
            F.cross_entropy(full, labels.long(), ignore_index=IGNORE).backward()
        else:
            semantic_loss(logits, labels).backward()

    return step, branch


MAKERS: dict[str, Callable[[], tuple[Callable[[], Any], Any]]] = {
    "ours": ours,
    "peer": peer,
    "semantic": lambda: semantic(False),
    "plain": lambda: semantic(True),
}


def seconds(step: Callable[[], Any], model: Any) -> float:
    """CPU seconds of one step."""
    for parameter in model.parameters():
        parameter.grad = None
    start = time.process_time()
    step()
    return time.process_time() - start


def peak_memory(name: str) -> float:
    """Peak resident memory of two steps in a process of its own, MB."""
    command = [sys.executable, str(Path(__file__).resolve()), "memory", name]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak"])


def run(repeats: int = 3) -> list[dict[str, Any]]:
    """Rows of the table. Of several times the least counts: what else a machine does can only add to one."""
    import torch

    torch.set_num_threads(1)
    made = {name: make() for name, make in MAKERS.items()}
    for step, model in made.values():
        seconds(step, model)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats):
        for name in list(made)[:: 1 if turn % 2 else -1]:
            times[name].append(seconds(*made[name]))
            print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    del made
    best = {name: min(found) for name, found in times.items()}
    memory = {name: peak_memory(name) for name in ("ours", "peer")}
    what = "Panoptic FPN R50 step, 2 crops 512x1024, 10 instances"
    both = best["peer"] + best["semantic"]
    return [
        {"what": f"{what}: over torchvision's Mask R-CNN and our semantic branch", "ours": best["ours"], "peer": both,
         "unit": "s", "ratio": best["ours"] / both, "target": "<= 0.9"},
        {"what": f"{what}: semantic branch, our loss over the upsampled logits'", "ours": best["semantic"],
         "peer": best["plain"], "unit": "s", "ratio": best["semantic"] / best["plain"]},
        {"what": f"{what}: peak memory over torchvision's Mask R-CNN", "ours": memory["ours"], "peer": memory["peer"],
         "unit": "MB", "ratio": memory["ours"] / memory["peer"], "target": "<= 0.8"},
    ]  # fmt: skip


def _memory_process(name: str) -> None:
    import torch

    torch.set_num_threads(1)
    step, model = MAKERS[name]()
    for _ in range(2):
        seconds(step, model)
    # Not getrusage: its peak may be that of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    print(json.dumps({"peak": next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024}))


if __name__ == "__main__":
    _memory_process(sys.argv[2])
