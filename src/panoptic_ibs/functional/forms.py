"""Which of two shapes of one computation runs: small pieces that stay in a CPU's caches, or few large operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forced: list[bool] = []


def batched(device: torch.device) -> bool:
    """Whether a computation should be a few operations over the whole batch: everywhere but on the CPU.

    A GPU starves on many small operations; on a CPU they are the faster ones, since their data stays in its caches.
    Both shapes give the same values; the tests hold them against each other.
    """
    return _forced[-1] if _forced else device.type != "cpu"


@contextmanager
def forced(value: bool) -> Iterator[None]:
    """Within it :func:`batched` says ``value`` whatever the device: for tests, and for counting a GPU's operations."""
    _forced.append(value)
    try:
        yield
    finally:
        _forced.pop()
