"""Results of many files that belong together: written aside, then moved into their folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .signals import handled

PREFIX = ".partial-"
_ours: set[Path] = set()  # of this process


class Staging:
    """A hidden folder inside of ``folder``, for files that are moved there together later.

    What ended processes left behind is taken away first; ``abandoned`` gives such folders to look at before.

    Args:
        folder: where the files will be; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=folder))
        self.path.chmod(folder.stat().st_mode & 0o777)
        _ours.add(self.path)

    def __truediv__(self, name: str) -> Path:
        """The path of a file in the hidden folder; its own folder is made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def move(self, *names: str) -> None:
        """Move files (or all files of a folder) to the same place in ``folder``; what is there is replaced."""
        for name in names:
            source = self.path / name
            if source.is_dir():
                self.move(*(f"{name}/{child.name}" for child in sorted(source.iterdir())))
            elif source.exists():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)

    def discard(self) -> None:
        """Take the hidden folder away, with all that is still in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        _ours.discard(self.path)


def _prefix() -> str:
    return f"{PREFIX}{socket.gethostname()}-"


def abandoned(folder: Path) -> list[Path]:
    """Hidden folders of processes of this machine that have ended."""
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(_prefix()).partition("-")[0]
        if path.name.startswith(_prefix()) and number.isdigit() and path not in _ours and not _runs(int(number)):
            found.append(path)
    return found


def _runs(pid: int) -> bool:
    if pid == os.getpid():  # a number that was given away again: in a container it is always the same
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within its block Ctrl-C, SIGTERM and SIGHUP wait; they have their effect at its end."""
    seen: list[int] = []
    with handled(lambda number, _: seen.append(number)):
        yield
    for number in seen[:1]:
        signal.raise_signal(number)
