"""Training steps on a CUDA device in bfloat16 (R50, crops of 512 x 1024): time, memory, busy share, and what IBS costs.

It ends by itself within eight minutes, and says what it has skipped by then.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import bench_step

ROUNDS = 20
SECONDS = 400  # after these no other row is begun


def panoptic_fcn(crops: int) -> tuple[Any, Any, Any]:
    """Model, batch and IBS of :mod:`bench_step` for any even number of crops."""
    model, batch, ibs = bench_step.make(crops=crops)
    return model.cuda(), batch.to("cuda"), ibs


def mask2former(crops: int) -> tuple[Any, Any, Any]:
    """Mask2Former with its published sizes on the same batch; dense IBS at all layers."""
    from panoptic_ibs.ibs import IntraBatchSupervision

    return _on_batch("mask2former.Mask2Former", crops, IntraBatchSupervision(weight=50.0))


def ciae(crops: int) -> tuple[Any, Any, Any]:
    """CIAE with its published sizes on the same batch."""
    from panoptic_ibs.ibs import IntraBatchSupervision

    return _on_batch("ciae.CIAE", crops, IntraBatchSupervision())


def _on_batch(head: str, crops: int, ibs: Any) -> tuple[Any, Any, Any]:
    """Model, batch and IBS on the device."""
    from panoptic_ibs.construction import build_model

    model, batch, _ = bench_step.make(crops=crops)
    config = {
        "backbone": {"_target_": "panoptic_ibs.backbones.TimmBackbone", "name": "resnet50"},
        "head": {"_target_": f"panoptic_ibs.heads.{head}"},
    }
    model = build_model(config, model.classes)
    return model.cuda(), batch.to("cuda"), ibs


def step(model: Any, batch: Any, ibs: Any | None, optimizer: Any) -> None:
    """One optimisation step, queued and not waited for."""
    import torch

    with torch.autocast("cuda", torch.bfloat16):
        losses, segments = model.losses(batch)
        total = torch.stack([v.float() for v in losses.values()]).sum()
        if ibs is not None:
            total = total + ibs(segments, batch.pairs, batch.targets)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds until the device is done, and peak of its memory in MB."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, torch.cuda.max_memory_allocated() / 1e6


def busy(function: Callable[[], None]) -> tuple[float, int]:
    """Milliseconds in which the device computes for ``function``, and kernels and copies that it runs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    events = [e for e in found.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in events) / 1e3, len(events)


def rows_of(name: str, make: Callable[[int], tuple[Any, Any, Any]], crops: int) -> list[dict[str, Any]]:
    """Steps without and with IBS by turns, medians; the order of the two changes from round to round."""
    import torch

    model, batch, ibs = make(crops)
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, momentum=0.9)
    jobs = {False: lambda: step(model, batch, None, optimizer), True: lambda: step(model, batch, ibs, optimizer)}
    for _ in range(3):  # cuDNN chooses its algorithms, the allocator fills
        for job in jobs.values():
            job()
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(ROUNDS):
        for on in (False, True) if turn % 2 else (True, False):
            found[on].append(timed(jobs[on]))
    ms = {on: statistics.median(t for t, _ in values) for on, values in found.items()}
    mb = {on: max(m for _, m in values) for on, values in found.items()}
    working, kernels = busy(jobs[False])
    what = f"{name} R50 step, {crops} crops 512x1024, bf16, {torch.cuda.get_device_name()}"
    return [
        {"what": f"{what}: with IBS over without", "ours": ms[True], "peer": ms[False], "unit": "ms",
         "ratio": ms[True] / ms[False], "target": "<= 1.02"},
        {"what": f"{what}: peak memory with IBS over without", "ours": mb[True], "peer": mb[False], "unit": "MB",
         "ratio": mb[True] / mb[False], "target": "<= 1.05"},
        {"what": f"{what}: device busy ({kernels} kernels) over the step, without IBS", "ours": working,
         "peer": ms[False], "unit": "ms", "ratio": working / ms[False], "target": ">= 0.9"},
    ]  # fmt: skip


def run() -> list[dict[str, Any]]:
    """Rows of the table; none where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        print("gpu: skipped, this machine has no CUDA device", file=sys.stderr, flush=True)
        return []
    torch.set_float32_matmul_precision("high")  # as trainer.float32_matmul does by default
    rows, started = [], time.perf_counter()
    for name, make, crops in (
        ("Panoptic FCN", panoptic_fcn, 2),
        ("Panoptic FCN", panoptic_fcn, 8),
        ("Mask2Former", mask2former, 2),
        ("Mask2Former", mask2former, 8),
        ("CIAE", ciae, 2),
        ("CIAE", ciae, 8),
    ):
        if time.perf_counter() - started > SECONDS:
            print(f"gpu: skipped {name} at {crops} crops, for want of time", file=sys.stderr, flush=True)
            continue
        rows += rows_of(name, make, crops)
    return rows
