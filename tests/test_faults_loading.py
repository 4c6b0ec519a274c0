"""Loader processes that die, or for which memory or files do not suffice: one sentence, and never a wait for ever."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from helpers import class_table, random_batch
from panoptic_ibs.data import loading
from panoptic_ibs.data.loading import Loader, LoaderError, Packing
from panoptic_ibs.errors import DataError, UserError
from panoptic_ibs.structures import Batch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes and limits of POSIX")
BATCH = random_batch(class_table(), (32, 64), 2)


class OddError(UserError):
    """Cannot be made from its message alone."""

    def __init__(self, name: str, line: int) -> None:
        super().__init__(f"{name}: line {line} is odd.")


class Numbers(Dataset[int]):
    """Six numbers; ``meet`` is called in the loader's process for each."""

    def __init__(self, meet: Any = lambda i: None) -> None:
        self.meet = meet

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> int:
        self.meet(i)
        return i


def batch_of(items: list[int]) -> Batch:
    return BATCH


def loader(meet: Any = lambda i: None, **options: Any) -> Loader:
    return Loader(Numbers(meet), batch_size=1, collate_fn=Packing(batch_of), num_workers=2, **options)


def test_a_batch_arrives_as_it_was_sent() -> None:
    batches = list(loader())
    assert len(batches) == 6
    for batch in batches:
        assert torch.equal(batch.images, BATCH.images)
        assert torch.equal(batch.pairs, BATCH.pairs)
        assert (batch.sizes, batch.file_names) == (BATCH.sizes, BATCH.file_names)
        for found, sent in zip(batch.targets, BATCH.targets, strict=True):
            for name, value in vars(sent).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(getattr(found, name), value), name
                    assert getattr(found, name).dtype == value.dtype
                else:
                    assert getattr(found, name) == value
    batches[0].targets[0].boxes.fill_(7)  # tensors do not share their places
    assert torch.equal(batches[0].images, BATCH.images)
    assert torch.equal(batches[0].targets[1].boxes, BATCH.targets[1].boxes)


def test_a_batch_is_pinned_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = loading.pack(BATCH).pin_memory().unpack()
    assert len(pinned) == 1
    assert torch.equal(batch.images, BATCH.images)


def _raise(error: BaseException) -> Any:
    def meet(i: int) -> None:
        if i == 3:
            raise error

    return meet


def _die(number: int) -> Any:
    def meet(i: int) -> None:
        if i == 3:
            os.kill(os.getpid(), number)
            time.sleep(60)

    return meet


def _few_files(i: int) -> None:
    if i == 3:
        opened = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 4, opened + 4))


@pytest.mark.parametrize(
    ("meet", "kind", "message"),
    [
        (_raise(DataError("a.png: DataError: is cut off.")), DataError, "a.png: DataError: is cut off."),
        (_raise(OddError("a.json", 3)), UserError, "a.json: line 3 is odd."),
        (_raise(MemoryError()), LoaderError, "ran out of memory"),
        (_raise(OSError(24, "Too many open files", "a.png")), LoaderError, "too few open files .*ulimit -n"),
        (_raise(OSError(12, "Cannot allocate memory")), LoaderError, "ran out of memory"),
        (_die(signal.SIGKILL), LoaderError, r"A loader process \(pid \d+\) was ended by a signal \(killed\)"),
        (_die(signal.SIGBUS), LoaderError, "does not fit into shared memory"),
        (_few_files, LoaderError, "too few open files"),
        (_raise(ZeroDivisionError("a defect")), ZeroDivisionError, "Traceback(.|\n)*a defect"),
    ],
    ids=["sentence", "constructor", "memory", "files", "number", "killed", "bus", "descriptors", "defect"],
)
def test_what_a_process_meets(meet: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as met:
        list(loader(meet))
    if kind is DataError:
        assert str(met.value) == message
    if kind is LoaderError:
        assert "data.num_workers=0" in str(met.value)


def test_shared_memory_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_free_bytes", lambda: 1000)
    with pytest.raises(LoaderError, match=r"A batch of 0\.0 MB does not fit .*0\.0 MB of /dev/shm are free.*shm-size"):
        list(loader())


def test_torch_has_no_shared_memory_left() -> None:
    text = "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
    told = loading.explained(RuntimeError(text))
    assert isinstance(told, LoaderError)
    assert "does not fit into shared memory" in str(told)
    assert loading.explained(RuntimeError("shapes cannot be multiplied (24) and (28)")) is None
    assert loading.explained(FileNotFoundError(2, "No such file", "/dev/shm/a.png")) is None
    assert loading.explained(RuntimeError("out of resource: shared memory, Required: 2, Hardware limit: 1")) is None


def test_a_process_that_dies_while_the_main_one_computes() -> None:
    """torch raises wherever the main process happens to be; the command's translator knows the words."""
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    former = set(children.read_text().split())  # of other tests: a service of Weights & Biases, say
    batches = iter(loader(persistent_workers=True))
    next(batches)
    worker = next(pid for pid in children.read_text().split() if pid not in former)
    os.kill(int(worker), signal.SIGKILL)
    with pytest.raises(RuntimeError) as met:
        time.sleep(20)
    told = loading.explained(met.value)
    assert isinstance(told, LoaderError)
    assert "ended by a signal (killed)" in str(told)


def test_a_command_ends_whose_loader_is_still_open() -> None:
    code = """
from panoptic_ibs import signals
from test_faults_loading import loader
batches = iter(loader(persistent_workers=True, worker_init_fn=lambda number: signals.let_first_pass()))
next(batches)
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("error", [ConnectionResetError(), EOFError(), FileNotFoundError()])
def test_a_process_that_dies_while_its_batch_is_on_its_way(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(self: Any) -> None:
        raise error

    monkeypatch.setattr(loading.Packed, "unpack", unpack)
    monkeypatch.setattr(loading.time, "sleep", lambda seconds: None)
    with pytest.raises(LoaderError, match="A loader process"):
        list(loader())
    alone = Loader(Numbers(_raise(error)), batch_size=1, collate_fn=Packing(batch_of), num_workers=0)
    with pytest.raises(type(error)):
        list(alone)
