"""Files: read only if they are regular ones, written all or nothing."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DataError, UserError


def read_bytes(path: Path, what: str, remedy: str, kind: type[UserError] = DataError) -> bytes:
    """The content of a regular file. Pipes and devices are refused: reading them may wait for ever.

    Args:
        path: the file.
        what: names it in messages, e.g. "the annotation JSON".
        remedy: a sentence for a file that is missing.
        kind: the error that is raised.

    Raises:
        UserError: of ``kind``: missing, no regular file, or not readable.
    """
    check_regular(path, what, remedy, kind)
    try:
        return path.read_bytes()
    except OSError as error:
        raise kind(f"{path}: {what} cannot be read ({error.strerror or error}).") from None


def check_regular(path: Path, what: str, remedy: str, kind: type[UserError] = DataError) -> None:
    """Make sure that a path names a regular file; arguments and errors as :func:`read_bytes`."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise kind(f"{path}: {what} is missing. {remedy}") from None
    except (OSError, ValueError) as error:  # no permission, too long a name, a zero byte in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise kind(f"{path}: {what} cannot be read ({reason}). {remedy}") from None
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise kind(f"{path}: {what} must be a regular file, this is {found}. {remedy}")


def inside(name: str) -> bool:
    """Whether a file name, taken from a folder on, stays in that folder: no absolute path, no ``..`` (nor with ``\\``).

    Links are not followed: they are the user's own.
    """
    parts = name.replace("\\", "/").split("/")
    return bool(parts[0]) and not parts[0].endswith(":") and ".." not in parts and "\0" not in name


def read_json_or_none(path: Path) -> Any:
    """The content of a file of our own, None where it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename: nobody ever sees half a file. The umask holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=".", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o666 & ~umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The process's umask."""
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomically(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))
