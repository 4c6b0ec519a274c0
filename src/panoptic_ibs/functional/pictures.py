"""Photographs as Pillow opens them: which files are taken, any mode to RGB, and EXIF orientation.

One policy for the orientation: labels lie on stored pixels, so where there are labels pictures are read as stored;
where there are none (prediction) they are turned upright, as viewers show them.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor

from panoptic_ibs.errors import DataError, UserError
from panoptic_ibs.files import check_regular

Picture = Tensor | np.ndarray | Image.Image
# Not EPS and the like, for which Pillow starts another program on the file.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "DDS", "SGI", "PCX", "ICO")
MAX_PIXELS = "PANOPTIC_IBS_MAX_PIXELS"  # environment variable
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for damaged files."""
_TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _PillowLimit:
    """Lifts Pillow's limit on pixels while any thread reads; the files are the user's own, and ours is larger."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a child must not inherit a lock that is held

    def _reset(self) -> None:
        self._lock, self._readers, self._former = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            if not self._readers:
                self._former, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                Image.MAX_IMAGE_PIXELS = self._former


_unlimited = _PillowLimit()


def max_pixels() -> int:
    """The largest picture that is read: 16 bytes a pixel fit into memory, or what the environment variable says.

    Raises:
        DataError: the variable is no whole number above 0.
    """
    text = os.environ.get(MAX_PIXELS, "")
    if not text:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    if not text.isdecimal() or int(text) < 1:
        raise DataError(f"{MAX_PIXELS}={text} is no whole number of pixels above 0.")
    return int(text)


def check_pixels(height: int, width: int, path: Path, what: str) -> None:
    """Refuse pictures that memory does not hold.

    Raises:
        DataError: more than :func:`max_pixels`.
    """
    limit = max_pixels()
    if height * width > limit:
        raise DataError(
            f"{path}: {what} is {height}x{width} (height x width), {height * width} pixels; the limit is {limit}. "
            f"If memory allows it, raise the limit: set the environment variable {MAX_PIXELS}."
        )


@contextmanager
def opened(
    path: Path, what: str = "the image", where: str = "", missing: str = "Check its path."
) -> Iterator[Image.Image]:
    """A picture of a regular file; decoding inside the block is guarded as well.

    Args:
        path: the file.
        what: names it in messages.
        where: who asks for the file, for messages.
        missing: the remedy when there is none.

    Raises:
        DataError: missing, a pipe or a folder, no picture, damaged, or too large for memory.
    """
    by = f"; {where} names it" if where else ""
    check_regular(path, what, f"{f'{where} names it. ' if where else ''}{missing}".strip())
    try:
        with _unlimited, Image.open(path, formats=FORMATS) as image:
            check_pixels(image.height, image.width, path, what)
            yield _as_stored(image) if image.format == "TIFF" else image
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{path}: {what} cannot be decoded (no image format that is known{by}). Fetch the file again."
        ) from None
    except MemoryError:
        raise DataError(f"{path}: {what} does not fit into memory. Cut it into parts.") from None
    except BROKEN as error:
        raise DataError(f"{path}: {what} cannot be decoded ({error}{by}). Fetch the file again.") from None


def _as_stored(image: Image.Image) -> Image.Image:
    """Pillow turns TIFFs while it decodes them; turn them back, so that they say and mean what other formats do."""
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    image.load()
    method = _TURNS.get(8 if turn == 6 else 6 if turn == 8 else turn)  # the others undo themselves
    if method is None:
        return image
    stored = image.transpose(method)
    stored.getexif()[ExifTags.Base.Orientation] = turn
    return stored


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (as stored) to 8; 1 where there is none, or none that can be read.

    The picture is decoded for it: a PNG may have its metadata at its end.
    """
    image.load()
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except BROKEN:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def to_rgb(image: Image.Image, source: object = "the image") -> Image.Image:
    """Any mode to RGB: alpha is dropped, 16-bit grey keeps its high byte (as Pillow does for 16-bit colour).

    Raises:
        DataError: floating-point pixels; the message names ``source``.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{source}: images of floating-point pixels have no fixed range. Store 8 or 16 bit integers.")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def upright_rgb(image: Image.Image, source: object = "the image") -> Image.Image:
    """RGB, turned as viewers show it (EXIF orientation). Errors as :func:`to_rgb`."""
    turn = _TURNS[orientation(image)]
    rgb = to_rgb(image, source)
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    turned.info = {}  # the metadata still say that it must be turned
    return turned


def as_pil(picture: Picture) -> Image.Image:
    """A picture in any of its forms as an upright RGB image of 8 bits a channel.

    Raises:
        ValueError: an array or tensor of another type or shape than uint8 RGB.
        DataError: a PIL image of floating-point pixels, or one that cannot be decoded.
    """
    if isinstance(picture, Image.Image):
        try:
            return upright_rgb(picture, "The image")
        except BROKEN as error:
            raise DataError(f"The image cannot be decoded ({error}).") from error
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"A tensor must be uint8 RGB of shape (3, H, W); got {picture.dtype} {picture.shape}.")
        picture = picture.permute(1, 2, 0).cpu().numpy()
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"An image must be uint8 RGB of shape (H, W, 3); got {picture.dtype} {picture.shape}.")
    return Image.fromarray(np.ascontiguousarray(picture))
