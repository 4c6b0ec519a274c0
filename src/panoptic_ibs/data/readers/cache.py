"""The parsed JSON in the user's cache folder: a large one is parsed once. Never in the data set's folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from panoptic_ibs.files import write_atomically

from .parsing import Parsed, parse, read_annotations
from .records import TABLE_FIELDS, RecordTable

FORMAT = 2  # raise it whenever RecordTable changes, or what is taken for sound


def default_cache_dir() -> Path:
    """The user's cache folder for this package."""
    import platformdirs

    return platformdirs.user_cache_path("panoptic_ibs")


def cache_file(json_path: Path, cache_dir: Path | None = None) -> Path:
    """One cache file per JSON path; a changed JSON overwrites it, so old ones do not pile up."""
    name = hashlib.sha256(str(json_path.resolve()).encode(errors="surrogateescape")).hexdigest()[:20]
    return (cache_dir or default_cache_dir()) / f"records-{name}.npz"


def parse_cached(json_path: Path, cache_dir: Path | None = None) -> Parsed:
    """Parse a panoptic JSON, or take the result of an earlier call from the cache folder.

    The cache is used when path, format, times, inode, size and a check sum of the content are the same: a file may be
    rewritten within its time stamp, or get its old one back. A damaged cache is written anew; a folder that cannot be
    written is gone without. Only sound tables are kept.

    Raises:
        DataError: as :func:`panoptic_ibs.data.readers.parsing.parse`.
    """
    raw = read_annotations(json_path)
    path, key = cache_file(json_path, cache_dir), _key(json_path, raw)
    table = _load(path, key)
    if table is not None:
        return Parsed(table, [])
    parsed = parse(json_path, raw)
    if not parsed.defects:
        with contextlib.suppress(OSError):
            write_atomically(path, lambda p: _save(p, key, parsed.table))
    return parsed


def _key(json_path: Path, raw: bytes) -> np.ndarray:
    try:
        state = os.stat(json_path)
    except OSError:  # gone since it was read
        return np.zeros(0, dtype=np.int64)
    times = (state.st_mtime_ns, state.st_ctime_ns, state.st_ino & (2**63 - 1))
    return np.array([FORMAT, *times, len(raw), zlib.crc32(raw)], dtype=np.int64)


def _load(path: Path, key: np.ndarray) -> RecordTable | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not np.array_equal(arrays["key"], key):
                return None
            return RecordTable(**{name: arrays[name] for name in TABLE_FIELDS})
    except Exception:  # missing, damaged or of another format, in whatever way: it is written anew
        return None


def _save(path: Path, key: np.ndarray, table: RecordTable) -> None:
    with path.open("wb") as file:
        np.savez(file, key=key, **{name: getattr(table, name) for name in TABLE_FIELDS})
