"""Images that a user names: files, or all of a folder."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .errors import DataError

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def file_stem(image_id: str) -> str:
    """A file name for an image id; ids that differ get names that differ."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", image_id)[-150:]
    return stem if stem and stem == image_id else f"{stem}_{_digest(image_id)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def find_images(path: Path | str) -> list[Path]:
    """The image itself, or the images of a folder by name. Hidden files are none (macOS writes ``._a.jpg``).

    Raises:
        DataError: nothing there, or neither a file nor a folder.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: there is no such image or folder ({reason}; input=).") from None
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        raise DataError(f"{path}: this is a pipe, socket or device. Give an image or a folder of images (input=).")
    named = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_TYPES and not p.name.startswith("."))
    found = sorted(p for p in named if not p.is_dir())
    if not found:
        raise DataError(f"{path}: the folder holds no image ({', '.join(IMAGE_TYPES)}).")
    return found


def image_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image: its stem; with the suffix, and then a number made of the name, where two would be alike.

    Alike are names whose files would be one where capitals do not count, see :func:`file_stem`.
    """
    level = [0] * len(paths)
    forms = [(path.stem, path.name, f"{path.name}_{_digest(path.name)}") for path in paths]
    while True:
        names = [form[k] for form, k in zip(forms, level, strict=True)]
        keys = [file_stem(name).casefold() for name in names]
        count = Counter(keys)
        raised = [k + 1 if count[key] > 1 and k < 2 else k for k, key in zip(level, keys, strict=True)]
        if raised == level:
            return names
        level = raised
