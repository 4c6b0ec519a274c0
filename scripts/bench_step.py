"""Training step of Panoptic FCN (R50, two 512 x 1024 crops, ten instances): what IBS, targets and losses cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZE, CROPS, INSTANCES = (512, 1024), 2, 10


def make(size: tuple[int, int] = SIZE, crops: int = CROPS) -> tuple[Any, Any, Any]:
    """Model, batch and IBS; Cityscapes' class counts and head options, plain convolutions."""
    import torch

    from panoptic_ibs.classes import ClassInfo, ClassTable
    from panoptic_ibs.construction import build_model
    from panoptic_ibs.ibs import IntraBatchSupervision
    from panoptic_ibs.structures import Batch, ImageSize, Target

    torch.manual_seed(0)
    torch.set_num_threads(1)
    classes = ClassTable(ClassInfo(f"class{i}", i, i >= 11, (i, i, i)) for i in range(19))
    head = {"_target_": "panoptic_ibs.heads.panoptic_fcn.PanopticFCN", "stuff": "all", "segment_weight": 4.0}
    backbone = {"_target_": "panoptic_ibs.backbones.TimmBackbone", "name": "resnet50"}
    model = build_model({"backbone": backbone, "head": head}, classes)
    height, width = size
    targets = []
    for image in range(crops):
        id_map = torch.arange(8).repeat_interleave(height // 8)[:, None].expand(height, width).clone() + 1
        boxes = [[0, i * height // 8, width, (i + 1) * height // 8] for i in range(8)]
        for k in range(INSTANCES):
            side = [16, 32, 64, 96, 128, 160, 200, 240, 300, 400][k]
            y, x = (37 * k * (image + 1)) % (height - side), (97 * k * (image + 1)) % (width - side)
            id_map[y : y + side, x : x + side] = 9 + k
            boxes.append([x, y, x + side, y + side])
        areas = torch.bincount(id_map.flatten(), minlength=19)[1:]
        ids = torch.cat([torch.arange(8), 11 + torch.arange(INSTANCES) % 8])
        targets.append(
            Target(
                id_map.int(),
                ids,
                ids >= 11,
                ids < 0,
                torch.tensor(boxes).float(),
                areas,
                ids,
                image,
                str(image),
            )
        )
    images = torch.randint(0, 256, (crops, 3, *size), dtype=torch.uint8)
    batch = Batch(images, targets, [ImageSize(size, size)] * crops, torch.arange(crops) // 2)
    return model, batch, IntraBatchSupervision(weight=4.0, partners="paired")


def step(model: Any, batch: Any, ibs: Any | None, optimizer: Any) -> float:
    """One optimisation step; CPU seconds."""
    start = time.process_time()
    losses, segments = model.losses(batch)
    total = sum(losses.values())
    if ibs is not None:
        total = total + ibs(segments, batch.pairs, batch.targets)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return time.process_time() - start


def parts(model: Any, batch: Any, ibs: Any) -> dict[str, float]:
    """CPU seconds, forward and backward, of targets and losses, and of IBS, on detached outputs of the network."""
    import torch

    with torch.no_grad():
        output = model(batch)
    for value in vars(output).values():
        for tensor in value if isinstance(value, list) else [value]:
            tensor.requires_grad_()
    start = time.process_time()
    losses, segments = model.head.losses(output, batch.targets)
    sum(losses.values()).backward(retain_graph=True)
    middle = time.process_time()
    leaf = segments[0]
    leaf.embeddings, leaf.weight = (
        leaf.embeddings.detach().requires_grad_(),
        leaf.weight.detach().requires_grad_(),
    )
    start_ibs = time.process_time()
    ibs([leaf], batch.pairs, batch.targets).backward()
    return {"losses": middle - start, "ibs": time.process_time() - start_ibs}


def peak_memory(with_ibs: bool) -> float:
    """Peak resident memory of two steps in a process of its own, MB."""
    command = [sys.executable, str(Path(__file__).resolve()), "memory", str(int(with_ibs))]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak"])


def run(repeats: int = 5) -> list[dict[str, Any]]:
    """Rows of the table. Of several times the least counts: what else a machine does can only add to one."""
    import torch

    model, batch, ibs = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    step(model, batch, ibs, optimizer)  # warm-up
    times: dict[bool, list[float]] = {True: [], False: []}
    pieces = []
    for turn in range(repeats):
        for on in (False, True) if turn % 2 else (True, False):
            times[on].append(step(model, batch, ibs if on else None, optimizer))
            print(f"step {'with' if on else 'without'} IBS: {times[on][-1]:.2f} s", file=sys.stderr, flush=True)
        pieces.append(parts(model, batch, ibs))
    off, on = (min(times[k]) for k in (False, True))
    losses, extra = (min(p[k] for p in pieces) for k in ("losses", "ibs"))
    memory = {k: peak_memory(k) for k in (False, True)}
    what = "Panoptic FCN R50 step, 2 crops 512x1024, 10 instances"
    return [
        {"what": f"{what}: with IBS over without, whole steps", "ours": on, "peer": off, "unit": "s",
         "ratio": on / off, "target": "<= 1.02"},
        {"what": f"{what}: (step + IBS alone) over step", "ours": off + extra, "peer": off, "unit": "s",
         "ratio": (off + extra) / off, "target": "<= 1.02"},
        {"what": f"{what}: peak memory with IBS over without", "ours": memory[True], "peer": memory[False],
         "unit": "MB", "ratio": memory[True] / memory[False], "target": "<= 1.05"},
        {"what": f"{what}: targets and losses, share of the step", "ours": losses, "peer": off, "unit": "s",
         "ratio": losses / off, "target": "< 0.02"},
    ]  # fmt: skip


def _memory_process(with_ibs: bool) -> None:
    import torch

    model, batch, ibs = make()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    for _ in range(2):
        step(model, batch, ibs if with_ibs else None, optimizer)
    # Not getrusage: its peak may be that of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    print(json.dumps({"peak": next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024}))


if __name__ == "__main__":
    _memory_process(sys.argv[2] == "1")
