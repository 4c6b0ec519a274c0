"""Two processes: normalisers and IBS must weigh segments as one process would."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from panoptic_ibs.functional.distributed import mean_over_ranks, normalizer
from panoptic_ibs.heads.ciae.memory import CategoryMemory
from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.structures import SegmentEmbeddings


def _outputs(rank: int) -> SegmentEmbeddings:
    """Rank 0 has three things in its two crops, rank 1 none."""
    g = torch.Generator().manual_seed(rank)
    count = 3 if rank == 0 else 2
    return SegmentEmbeddings(
        torch.randn(count, 4, generator=g, requires_grad=True),
        torch.randn(2, 4, 3, 3, generator=g, requires_grad=True),
        torch.tensor([0, 0, 1][:count]),
        torch.full((count,), rank == 0),
    )


def _category_sums(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Category 1 is on rank 1 only, category 2 on neither."""
    sums = torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))
    return sums * torch.tensor([1.0, rank, 0.0])[:, None], torch.tensor([7.0, 3.0 * rank, 0.0])


def _worker(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        loss = IntraBatchSupervision()(_outputs(rank), partners=torch.tensor([1, 0]))
        loss.backward()
        torch.manual_seed(0)
        memory = CategoryMemory(3, 4, momentum=0.5)
        memory.update(*_category_sums(rank))
        result = {"mean": normalizer(4 * rank + 2, loss), "loss": loss.detach(), "memory": memory.state_dict()}
        torch.save(result, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, args=(folder,), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert first["mean"].item() == second["mean"].item() == 4.0
    alone = IntraBatchSupervision()(_outputs(0), partners=torch.tensor([1, 0]))
    torch.testing.assert_close(first["loss"], alone.detach() * 3 / 1.5)  # 3 things on rank 0, 1.5 on average
    assert second["loss"].item() == 0
    torch.manual_seed(0)
    memory = CategoryMemory(3, 4, momentum=0.5)
    (a, m), (b, n) = _category_sums(0), _category_sums(1)
    memory.update(a + b, m + n)  # as one process with all crops
    for name, value in memory.state_dict().items():
        torch.testing.assert_close(first["memory"][name], value)
        torch.testing.assert_close(second["memory"][name], value)
    assert memory.seen.tolist() == [True, True, False]


def test_one_process_is_left_alone() -> None:
    value = torch.tensor(3.0, requires_grad=True)
    assert mean_over_ranks(value).item() == 3.0
    assert not mean_over_ranks(value).requires_grad
    assert normalizer(0, value).item() == 1.0
