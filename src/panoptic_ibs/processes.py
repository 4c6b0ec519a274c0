"""Several processes of one run: starting them, watching over them, saying once why they ended."""

from __future__ import annotations


def part() -> None:
    """Leave the group of processes: what follows is done by the first one alone and must not wait for the others."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
