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


def file_path(image_id: str) -> str:
    """The same for ids with slashes, which stay folders."""
    return "/".join(map(file_stem, image_id.split("/")))


def find_images(path: Path | str, without: Sequence[Path] = ()) -> list[Path]:
    """The image itself, or the images of a folder and of all folders in it, by name.

    Hidden files and folders have none (macOS writes ``._a.jpg``). Links to folders are not followed.

    Args:
        path: a file or folder.
        without: folders that are left out, such as one for results.

    Raises:
        DataError: nothing there, neither a file nor a folder, or a folder that cannot be read.
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
    left_out = {folder.resolve() for folder in without}
    found: list[Path] = []
    for folder, inner, names in os.walk(path, onerror=_unreadable):
        here = Path(folder)
        inner[:] = [name for name in inner if not name.startswith(".") and (here / name).resolve() not in left_out]
        images = (here / name for name in names if not name.startswith("."))
        found += [image for image in images if image.suffix.lower() in IMAGE_TYPES and not image.is_dir()]
    if not found:
        raise DataError(f"{path}: the folder, with all folders in it, holds no image ({', '.join(IMAGE_TYPES)}).")
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}).") from None


def image_names(paths: Sequence[Path], folder: Path | None = None) -> list[str]:
    """A name for each image: its stem; with the suffix, and then a number made of the name, where two would be alike.

    Alike are names whose files would be one where capitals do not count, see :func:`file_path`.

    Args:
        paths: the images.
        folder: the names begin with the folders between it and the image, as in ``street/left/a``.
    """
    level = [0] * len(paths)
    places = [path.relative_to(folder).parent if folder else Path() for path in paths]
    forms = [
        tuple(
            (place / name).as_posix()
            for name in (path.stem, path.name, f"{path.name}_{_digest(f'{place / path.name}')}")
        )
        for path, place in zip(paths, places, strict=True)
    ]
    while True:
        names = [form[k] for form, k in zip(forms, level, strict=True)]
        keys = [file_path(name).casefold() for name in names]
        count = Counter(keys)
        raised = [k + 1 if count[key] > 1 and k < 2 else k for k, key in zip(level, keys, strict=True)]
        if raised == level:
            return names
        level = raised
