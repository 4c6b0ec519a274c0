"""The parsed JSON in the user's cache folder: a large one is parsed once. Never in the data set's folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from .records import TABLE_FIELDS, RecordTable, parse

FORMAT = 1  # raise it whenever RecordTable changes


def default_cache_dir() -> Path:
    """The user's cache folder for this package."""
    import platformdirs

    return platformdirs.user_cache_path("panoptic_ibs")


def cache_file(json_path: Path, cache_dir: Path | None = None) -> Path:
    """One cache file per JSON path; a changed JSON overwrites it, so old ones do not pile up."""
    name = hashlib.sha256(str(json_path.resolve()).encode()).hexdigest()[:20]
    return (cache_dir or default_cache_dir()) / f"records-{name}.npz"


def cached_table(json_path: Path, cache_dir: Path | None = None) -> RecordTable:
    """Parse a panoptic JSON, or take the result of an earlier call from the cache folder.

    The cache is used when path, modification time, size and format are the same. A damaged cache is written anew; a
    folder that cannot be written is gone without.

    Raises:
        DataError: as :func:`panoptic_ibs.data.readers.records.parse`.
    """
    try:
        state = json_path.stat()
    except OSError:
        return parse(json_path)  # raises the proper message
    key = np.array([FORMAT, state.st_mtime_ns, state.st_size], dtype=np.int64)
    path = cache_file(json_path, cache_dir)
    table = _load(path, key)
    if table is None:
        table = parse(json_path)
        with contextlib.suppress(OSError):
            _save(path, key, table)
    return table


def _load(path: Path, key: np.ndarray) -> RecordTable | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not np.array_equal(arrays["key"], key):
                return None
            return RecordTable(**{name: arrays[name] for name in TABLE_FIELDS})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, key: np.ndarray, table: RecordTable) -> None:
    """Write beside the goal, then rename: a reader never sees half a file, whoever else writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, key=key, **{name: getattr(table, name) for name in TABLE_FIELDS})
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
