"""Loader processes: a batch crosses in one piece of shared memory, and what goes wrong there is one sentence here.

torch's own way is a file descriptor and a message for every tensor of a batch, sent by a thread of the loader process
that loses the batch without a word if shared memory or descriptors run out; the other side then waits for ever.
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from panoptic_ibs.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
_ALIGN = 64  # bytes
_SPARE_FILES = 8
_KILLED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: (.+?)\. |exited unexpectedly)"
)
_ELSEWHERE = "data.num_workers=0 reads in the main process"


class LoaderError(UserError):
    """The machine does not give loader processes what they need; the message names it and the remedy."""


class Loader(DataLoader[Any]):
    """A DataLoader over :class:`Packing` that turns what went wrong in its processes into one sentence.

    Raises:
        UserError: while iterating; the very sentence that a process met, or a :class:`LoaderError`.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                yield batch.unpack() if isinstance(batch, Packed) else batch
            return
        except Exception as error:
            told = explained(error)
            if told is None and self.num_workers and isinstance(error, ConnectionError | EOFError | FileNotFoundError):
                told = _gone()
            if told is None:
                raise
            traceback.clear_frames(error.__traceback__)  # they keep the processes, which leave slowly
        raise told


class Packing:
    """Collates, and packs the batch if that happens in a loader process.

    Args:
        collate: makes a batch of samples.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> Any:
        """The batch of these items, or a :class:`Packed` one.

        Raises:
            LoaderError: shared memory or file descriptors do not suffice.
        """
        batch = self.collate(items)
        return batch if get_worker_info() is None else pack(batch)


@dataclass(frozen=True)
class Packed:
    """Any object whose tensors lie in one piece of memory, which may be pinned.

    Attributes:
        memory: bytes of all tensors.
        places: type, shape and first byte of each.
        rest: the object without them, pickled.
    """

    memory: Tensor
    places: list[tuple[torch.dtype, torch.Size, int]]
    rest: bytes

    def pin_memory(self) -> Self:
        """Pin it in one go (called by the DataLoader)."""
        return replace(self, memory=self.memory.pin_memory())

    def unpack(self) -> Any:
        """The object; its tensors are views."""
        return _Unpickler(self.rest, [_view(self.memory, *place) for place in self.places]).load()


def pack(batch: Any) -> Packed:
    """Move all tensors of an object, on the CPU, into one piece of shared memory.

    Raises:
        LoaderError: shared memory or file descriptors do not suffice.
    """
    rest = io.BytesIO()
    pickler = _Pickler(rest)
    pickler.dump(batch)
    places, size = [], 0
    for tensor in pickler.tensors:
        places.append((tensor.dtype, tensor.shape, size))
        size += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
    memory = _shared(max(size, 1))
    for tensor, place in zip(pickler.tensors, places, strict=True):
        _view(memory, *place).copy_(tensor)
    return Packed(memory, places, rest.getvalue())


def _view(memory: Tensor, dtype: torch.dtype, shape: torch.Size, first: int) -> Tensor:
    return memory[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _shared(size: int) -> Tensor:
    if _free_files() < _SPARE_FILES:  # what sends the batch needs some, and would wait for them for ever
        raise _few_files()
    free = _free_bytes()
    if free is not None and free < size:  # without this some systems give the memory, and kill who writes to it
        raise _too_small(size)
    try:
        return torch.empty(size, dtype=torch.uint8).share_memory_()
    except (RuntimeError, OSError) as error:
        if (told := _exhausted(error, size)) is None:
            raise
        raise told from None


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def explained(error: BaseException) -> UserError | None:
    """What an error of a DataLoader means for the user; None if it is a defect of the program."""
    text = str(error)
    if found := re.match(r"Caught (\w+) in DataLoader worker process", text):
        return _of_a_process(type(error), found[1], text)
    if deaths := [found for cause in _causes(error) if (found := _KILLED.search(str(cause)))]:
        return _ended(*max(deaths, key=lambda found: found[3] is not None).group(1, 3))  # torch says it twice
    if isinstance(error, OSError | RuntimeError):
        return _exhausted(error)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_a_process(kind: type[BaseException], name: str, text: str) -> UserError | None:
    """An error raised in a loader process, which comes back with its traceback as its text."""
    *_, sentence = re.split(rf"^(?:\w+\.)*{name}: ", text, flags=re.MULTILINE)  # as a traceback's last line begins
    known = {cls.__name__: cls for cls in _kinds(UserError)}
    if issubclass(kind, UserError) or name in known:
        try:
            return known.get(name, UserError)(sentence.strip())
        except TypeError:  # a constructor of its own
            return UserError(sentence.strip())
    if issubclass(kind, MemoryError) or name == "MemoryError":
        return _no_memory()
    return _exhausted(OSError(sentence)) if issubclass(kind, OSError | RuntimeError) else None


def _kinds(kind: type[UserError]) -> Iterator[type[UserError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)


def _ended(pids: str, signal_name: str | None) -> LoaderError:
    if signal_name and "Bus" in signal_name:
        return _too_small()
    how = f"was ended by a signal ({signal_name.lower()})" if signal_name else "ended"
    return LoaderError(
        f"A loader process (pid {pids}) {how}, as the system does when memory runs out. Lower data.num_workers, "
        f"data.memory_mb or the batch; {_ELSEWHERE}."
    )


def _gone() -> UserError:
    """Of a batch that was on its way from a process that is not there any more."""
    try:
        time.sleep(1)  # torch's word for it comes as a signal, a moment later
    except RuntimeError as error:
        return explained(error) or _ended("not known", None)
    return _ended("not known", None)


def _no_memory() -> LoaderError:
    return LoaderError(
        "A loader process ran out of memory. Lower data.num_workers, data.memory_mb, sampling.batch_size or the sizes "
        f"of crops; {_ELSEWHERE}."
    )


def _exhausted(error: BaseException, size: int | None = None) -> LoaderError | None:
    """The sentence for what the system has no more of, or None for other errors. torch has only the system's words."""
    text = str(error)
    if _says(error, errno.EMFILE, errno.ENFILE) or "items of ancdata" in text:
        return _few_files()
    if re.search(r"shared memory\(shm\)|shared memory object|</torch_", text):
        return _too_small(size)
    return _no_memory() if _says(error, errno.ENOMEM, errno.EAGAIN) else None


def _says(error: BaseException, *numbers: int) -> bool:
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def _few_files() -> LoaderError:
    return LoaderError(
        "Loader processes have too few open files (limit: ulimit -n). Raise it, e.g. ulimit -n 4096, or lower "
        f"data.num_workers; {_ELSEWHERE}."
    )


def _too_small(size: int | None = None) -> LoaderError:
    batch = "A batch" if size is None else f"A batch of {size / 1e6:.1f} MB"
    free = _free_bytes()
    left = "" if free is None else f" ({free / 1e6:.1f} MB of {SHARED_MEMORY} are free)"
    return LoaderError(
        f"{batch} does not fit into shared memory{left}. Give it more, e.g. docker run --shm-size=8g, lower "
        f"data.num_workers or the batch; {_ELSEWHERE}."
    )


def _free_files() -> float:
    """Files that this process may still open."""
    try:
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # not a POSIX system
        return math.inf


def _free_bytes() -> int | None:
    """Of shared memory; None where that is no file system."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):
        return None
    return state.f_bavail * state.f_frsize
