"""Work in other threads: read ahead of who needs it, write behind who made it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Pending:
    """Jobs of threads, a limited number of them at a time; what they raise is raised here."""

    def __init__(self, threads: ThreadPoolExecutor, most: int) -> None:
        self.threads, self.most = threads, most
        self._jobs: deque[Future[None]] = deque()

    def add(self, function: Callable[..., None], *arguments: object) -> None:
        """Have a function called; waits for the first of the others where they are too many."""
        while self._jobs and (len(self._jobs) >= self.most or self._jobs[0].done()):
            self._jobs.popleft().result()
        self._jobs.append(self.threads.submit(function, *arguments))

    def wait(self) -> None:
        """Until all are done."""
        while self._jobs:
            self._jobs.popleft().result()


def ahead(
    threads: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], count: int
) -> Iterator[Future[T]]:
    """A function's results for items in their order; up to ``count`` are being computed at a time."""
    jobs: deque[Future[T]] = deque()
    for item in items:
        jobs.append(threads.submit(function, item))
        if len(jobs) >= count:
            yield jobs.popleft()
    yield from jobs
