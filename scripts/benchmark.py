"""Benchmarks: ratios in one run, one thread, CPU time. Usage: python scripts/benchmark.py NAME|all [--json FILE]."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
BENCHMARKS = {
    "metrics": ("bench_metrics", "PQ update against panopticapi's algorithm and torchmetrics"),
    "crops": ("bench_crops", "window first against resize-then-crop"),
    "step": (
        "bench_step",
        "training step of Panoptic FCN: cost of IBS, of targets and losses (some minutes)",
    ),
    "evaluate": ("bench_evaluate", "scoring a folder of predictions against decoding its PNGs alone (wall clock)"),
    "mask2former": (
        "bench_mask2former",
        "Mask2Former beside transformers': step, inference, post-processing, IBS (10 minutes)",
    ),
    "ciae": (
        "bench_ciae",
        "CIAE: loss against a dense one, cost of IBS in a step, inference against torchvision's FCOS (some minutes)",
    ),
    "two_branch": (
        "bench_two_branch",
        "Panoptic FPN: training step and memory beside torchvision's Mask R-CNN (some minutes)",
    ),
    "operations": (
        "bench_operations",
        "operations a step dispatches in the form for GPUs, counted on the CPU (a minute)",
    ),
    "gpu": ("bench_gpu", "training steps on a CUDA device: what IBS costs (wall clock; skipped without a device)"),
    "help": ("bench_help", "time until --help answers"),
}


def main() -> None:
    """Run the named benchmarks and print one table."""
    listing = "\n".join(f"  {name:12} {text}" for name, (_, text) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=listing, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):  # threads are fixed when libraries load
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **ENVIRONMENT}))
    rows: list[dict[str, Any]] = []
    for name in BENCHMARKS if arguments.name == "all" else [arguments.name]:
        print(f"{name}: {BENCHMARKS[name][1]} ...", file=sys.stderr, flush=True)
        rows += [{"benchmark": name, **row} for row in importlib.import_module(BENCHMARKS[name][0]).run()]
    _print(rows)
    if arguments.json:
        machine = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "torch": _version("torch"),
        }
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ratios in one run, one thread, CPU time")
    for column in ("benchmark", "what"):
        table.add_column(column, overflow="fold")
    for column in ("ours", "peer", "unit", "ratio", "target"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row.get(c, "") for c in ("benchmark", "what", "ours", "peer", "unit", "ratio", "target")]
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=max(Console().width, 140)).print(table)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
