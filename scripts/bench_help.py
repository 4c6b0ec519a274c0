"""How long ``python -m panoptic_ibs.train --help`` takes, beside importing everything that training needs."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

HEAVY = "import torch, lightning, timm, torchmetrics, albumentations, wandb"


def _seconds(command: list[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def run() -> list[dict[str, Any]]:
    """One row: wall-clock seconds, median of three."""
    ours = _seconds([sys.executable, "-m", "panoptic_ibs.train", "--help"], 3)
    peer = _seconds([sys.executable, "-c", HEAVY], 3)
    what = "train --help beside the heavy imports (wall clock)"
    return [{"what": what, "ours": ours, "peer": peer, "unit": "s", "ratio": ours / peer, "target": "ours < 1 s"}]
