"""Being told to stop: Ctrl-C, SIGTERM and SIGHUP end a command with one line and the status 128 + number."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Handler = Callable[[int, Any], object]
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_in_force: dict[int, Any] = {}  # the handlers that are ours at the moment


class Stopped(SystemExit):
    """The process was told to stop; ``code`` is the exit status that shells give for the signal.

    A :class:`SystemExit`, so that libraries that tidy up let it pass and nothing takes it for an error.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return "interrupted" if self.number == signal.SIGINT else f"stopped by {signal.Signals(self.number).name}"


def stop(number: int, frame: Any = None) -> None:
    """The handler that ends a command at once.

    Raises:
        Stopped: always.
    """
    raise Stopped(number)


@contextmanager
def handled(handler: Handler = stop) -> Iterator[None]:
    """Within its block the signals go to ``handler``; does nothing outside of the main thread.

    What a program around this one set up (``nohup``, a cluster's launcher) stays, but for Ctrl-C, which shells let
    background jobs ignore: training heeds it there, too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = dict(_in_force)
    former = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {n: handler for n, f in former.items() if _may_replace(n, f, handler)}
    _in_force.update(ours)
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, former[number])
        _in_force.clear()
        _in_force.update(outer)


def _may_replace(number: int, former: Any, handler: Handler) -> bool:
    free = (signal.SIG_DFL, signal.default_int_handler, *_in_force.values())
    return former in free or (number == signal.SIGINT and former == signal.SIG_IGN and handler is not stop)


def take_back() -> None:
    """Set our handlers again, after a library has put its own in front of them."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in _in_force.items():
            signal.signal(number, handler)


def let_first_pass() -> None:
    """For a process that serves ours, such as a loader's: outlive the signals that a whole group of processes gets.

    The one that is at work ends its helpers in order. SIGTERM from that very process is heeded; where the system does
    not say who sent it, the second one is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_heed, args=[os.getppid()], daemon=True).start()
        return
    seen: list[int] = []

    def again(number: int, frame: Any) -> None:
        if seen:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        seen.append(number)

    signal.signal(signal.SIGTERM, again)


def _heed(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
