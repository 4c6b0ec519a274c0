"""Several processes of one run: started, watched over, and spoken for by the command that was typed.

That command takes no part in the work. It starts itself once a device, passes signals on, ends the others when one has
failed, and says once what happened. So no message is lost when a process is killed, and none is said by all of them.
Processes that somebody else started (``torchrun``, SLURM) speak for themselves.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, UserError

if TYPE_CHECKING:
    from lightning import Trainer

OUTCOMES, PARENT, COMMAND = "PANOPTIC_IBS_OUTCOMES", "PANOPTIC_IBS_PARENT", "PANOPTIC_IBS_COMMAND"
BAD_INPUT, FAILED = 2, 1
STOPPED = (129, 130, 143)  # SIGHUP, SIGINT, SIGTERM: each process ends by itself, the first one with its report
GRACE_SECONDS = 5.0  # from the first failure, or a second signal, until what is left is killed
LAST_SECONDS = 60.0  # that the others may take after the first process is done
_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport|NCCL (error|communicator)")
_PASSED_ON = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class LostProcessError(UserError):
    """Another process of this run is gone."""


def part() -> None:
    """Leave the group of processes: what follows is done by the first one alone and must not wait for the others."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


# In one of several processes


def supervised() -> bool:
    """Whether this process was started by :func:`supervise`."""
    return OUTCOMES in os.environ and "LOCAL_RANK" in os.environ


def typed_command() -> str | None:
    """The command that was typed, in a process that :func:`supervise` started."""
    return os.environ.get(COMMAND) if supervised() else None


def end_with_parent() -> None:
    """In a supervised process: end when the command that started it is gone."""
    if not supervised():
        return
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # it may hang where nothing else reaches it

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def tell(text: str, status: int) -> int:
    """Say why this process ends, and return its exit status; a supervised one leaves the saying to its supervisor."""
    if not supervised():
        print(text, file=sys.stderr, flush=True)
        return status
    rank = int(os.environ["LOCAL_RANK"])
    path = Path(os.environ[OUTCOMES]) / f"{rank}.json"
    temporary = path.with_suffix(".tmp")
    with suppress(OSError):  # the folder is gone with the supervisor
        temporary.write_text(json.dumps(asdict(Outcome(rank, status, text, time.monotonic()))), encoding="utf-8")
        os.replace(temporary, path)
    return status


@dataclass(frozen=True)
class Outcome:
    """Why a process ended: its local rank, exit status and what there is to say, at a moment of the system's clock."""

    rank: int
    status: int
    text: str
    moment: float


def explained(error: BaseException) -> UserError | None:
    """What an error means that another process caused: one of a loader, or of this run. None for other errors."""
    from .data.loading import explained as of_a_loader

    if (told := of_a_loader(error)) is not None:
        return told
    from torch import distributed

    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and isinstance(error, RuntimeError) and (_LOST.search(str(error)) or "Dist" in type(error).__name__):
        return LostProcessError(
            "The connection to another process of this run is lost: that process has ended, its own message says why. "
            f"The last checkpoint is kept: resume with ckpt_path=RUN/checkpoints/last.ckpt. ({_first_line(error)})"
        )
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# In the command that was typed


def needed(trainer: Trainer) -> bool:
    """Whether this run wants several processes on this machine, and nobody has started them yet.

    Raises:
        ConfigError: it wants them by a strategy that would fork them, or start them without the command.
    """
    launcher: Any = trainer.strategy.launcher
    if launcher is None:
        return False
    environment = getattr(launcher, "cluster_environment", None)
    if environment is None:
        raise ConfigError("trainer.strategy must be one whose processes run this command anew, such as ddp.")
    return not environment.creates_processes_externally and launcher.num_processes > 1


def supervise(module: str, arguments: Sequence[str], trainer: Trainer, run_dir: Path, command: str) -> int:
    """Run a command once a device, and return the exit status of all.

    Args:
        module: its module.
        arguments: its command line.
        trainer: knows how many, and where they meet; it is not run here.
        run_dir: the run folder, for messages.
        command: what the user typed.
    """
    from .sweeps import CHILD_ARGUMENTS

    launcher: Any = trainer.strategy.launcher
    place = launcher.cluster_environment
    count = int(launcher.num_processes)
    with tempfile.TemporaryDirectory(prefix="panoptic_ibs-") as folder:
        shared = {
            "MASTER_ADDR": place.main_address, "MASTER_PORT": place.main_port, "NODE_RANK": place.node_rank(),
            "WORLD_SIZE": count * launcher.num_nodes, OUTCOMES: folder, PARENT: os.getpid(), COMMAND: command,
            CHILD_ARGUMENTS: os.environ.get(CHILD_ARGUMENTS) or json.dumps(list(arguments)),
        }  # fmt: skip
        members = []
        for rank in range(count):
            own = {**shared, "LOCAL_RANK": rank, "RANK": place.node_rank() * count + rank}
            members.append(
                subprocess.Popen(
                    [sys.executable, "-m", module],
                    env={**os.environ, **{key: str(value) for key, value in own.items()}},
                    stdin=subprocess.DEVNULL,
                    process_group=0 if os.name == "posix" else None,  # signals come once, from here
                )
            )
        return _Watch(members, Path(folder), run_dir).run()


class _Watch:
    """Watches over processes until the last one has ended."""

    def __init__(self, members: Sequence[subprocess.Popen[bytes]], folder: Path, run_dir: Path) -> None:
        self.members, self.folder, self.run_dir = members, folder, run_dir
        self.signals: list[int] = []  # that came from outside
        self.killed: set[int] = set()  # ranks that were ended from here
        self.failed = False

    def run(self) -> int:
        """Wait; returns the exit status of the command."""
        deadline: float | None = None
        with self._signals():
            try:
                while any(member.poll() is None for member in self.members):
                    wait = self._patience()
                    if wait is not None and deadline is None:
                        deadline = time.monotonic() + wait
                    if deadline is not None and time.monotonic() > deadline:
                        self._kill()
                    time.sleep(0.1)
            finally:
                self._kill()
        self._patience()
        return self._verdict()

    def _patience(self) -> float | None:
        """Seconds that the others still have, or None while all is well."""
        codes = [member.poll() for member in self.members]
        bad = [c for rank, c in enumerate(codes) if c and c not in STOPPED and rank not in self.killed]
        self.failed = self.failed or bool(bad) or any(o.status not in STOPPED for o in self._outcomes())
        if self.failed or len(self.signals) > 1:
            return GRACE_SECONDS
        return LAST_SECONDS if codes[0] is not None else None

    def _outcomes(self) -> list[Outcome]:
        """What was left by processes that have something to say, in order of time."""
        found = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in self.folder.glob("*.json")]
        return sorted(found, key=lambda outcome: outcome.moment)

    def _verdict(self) -> int:
        """Say what happened, once: bad input first, then who was killed, then a defect."""
        outcomes = self._outcomes()
        dead = [(r, m) for r, m in enumerate(self.members) if (m.returncode or 0) < 0 and r not in self.killed]
        if not self.failed:
            status = self.members[0].returncode
            if said := [o for o in outcomes if o.status == status]:
                print(said[0].text, file=sys.stderr, flush=True)
            return status if status >= 0 else 128 + self.signals[-1]
        if named := [o for o in outcomes if o.status == BAD_INPUT]:
            return self._end(named[0].text, BAD_INPUT)
        if len(self.signals) > 1:
            return self._end("interrupted", 128 + self.signals[-1])
        if dead:
            return self._end(f"error: {self._death(*dead[0])}", FAILED)
        if defects := [o for o in outcomes if o.status not in STOPPED]:
            return self._end(defects[0].text, defects[0].status)
        status = next(m.returncode for r, m in enumerate(self.members) if m.returncode and r not in self.killed)
        return self._end(f"error: one of {len(self.members)} processes ended with status {status}, see above.", status)

    @staticmethod
    def _end(text: str, status: int) -> int:
        print(text, file=sys.stderr, flush=True)
        return status

    def _death(self, rank: int, member: subprocess.Popen[bytes]) -> str:
        number = -member.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        cause = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        last = self.run_dir / "checkpoints" / "last.ckpt"
        kept = f"The last checkpoint is kept: resume with ckpt_path={last}" if last.is_file() else "Start it again"
        return (
            f"process {rank + 1} of {len(self.members)} (pid {member.pid}) was ended by {name}{cause}; so the others "
            f"were ended, too. {kept}."
        )

    def _kill(self) -> None:
        """End what is left, loader processes included."""
        for rank, member in enumerate(self.members):
            if member.poll() is None:
                self.killed.add(rank)
            elif not self.failed:
                continue
            with suppress(OSError):
                os.killpg(member.pid, signal.SIGKILL) if os.name == "posix" else member.kill()
        for member in self.members:
            member.wait()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass on what comes from outside; Ctrl-Z and ``fg`` hold for all."""

        def pass_on(number: int, frame: Any) -> None:
            self.signals.append(number)
            for member in self.members:
                member.send_signal(number)

        def pause(number: int, frame: Any) -> None:
            self._all(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._all(signal.SIGCONT)

        handlers: dict[int, Any] = dict.fromkeys(_PASSED_ON, pass_on)
        if hasattr(signal, "SIGTSTP"):
            handlers[signal.SIGTSTP] = pause
        former = {}
        if threading.current_thread() is threading.main_thread():
            kept = [n for n in handlers if n != signal.SIGINT and signal.getsignal(n) == signal.SIG_IGN]  # nohup
            former = {n: signal.signal(n, handler) for n, handler in handlers.items() if n not in kept}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _all(self, number: int) -> None:
        for member in self.members:
            with suppress(OSError):
                os.killpg(member.pid, number)
