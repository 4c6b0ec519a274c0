"""Id PNGs, fast and strict: OpenCV decodes, but a file must be whole before it is let near."""

from __future__ import annotations

import os
import stat
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _RGBA = 0, 2, 6  # colour types of the format
_COLOURS = {0: "grey", 2: "RGB", 3: "of a palette", 4: "grey with alpha", 6: "RGB with alpha"}
# Newer versions decode to RGB at once, older ones turn libpng's RGB into BGR first.
_RGB_AT_ONCE = hasattr(cv2, "IMREAD_COLOR_RGB")
_FLAGS = (cv2.IMREAD_COLOR_RGB if _RGB_AT_ONCE else cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION
_TO_RGB = [0, 0, 1, 1, 2, 2] if _RGB_AT_ONCE else [2, 0, 1, 1, 0, 2]


class PngError(Exception):
    """What is wrong with a PNG."""


class SizeError(PngError):
    """A PNG of another size.

    Attributes:
        found: its (height, width).
    """

    def __init__(self, found: tuple[int, int], expected: tuple[int, int]) -> None:
        super().__init__(f"{found[0]}x{found[1]}, the image {expected[0]}x{expected[1]}")
        self.found = found


class ModeError(PngError):
    """A PNG whose values are no ids."""


class Canvases(threading.local):
    """Memory that a thread decodes into again and again; fresh pages for every image cost a tenth of the time."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def get(self, name: str, size: tuple[int, int]) -> Array:
        """(height, width, 4) uint8, with whatever is in it; valid until the same name is asked for again."""
        if name not in self._kept or self._kept[name].shape[:2] != size:
            self._kept[name] = np.empty((*size, 4), np.uint8)
        return self._kept[name]


def read_png_ids(path: Path, size: tuple[int, int], grey: bool = False, canvas: Array | None = None) -> Array:
    """Read an id PNG.

    Decoders fill what a truncated file lacks with zeros, which would be void, and keep the high byte of 16 bits; so the
    file's parts, their check sums and its mode are looked at first.

    Args:
        path: the file.
        size: expected (height, width).
        grey: also take grey PNGs of 8 or 16 bits, whose values are the ids.
        canvas: (height, width, 4) uint8 that the result may be a view of, see :class:`Canvases`.

    Returns:
        (H, W) uint32: R + 256 G + 256^2 B, or the grey values.

    Raises:
        SizeError: another size.
        ModeError: another mode or depth.
        PngError: no PNG, truncated, damaged, or no regular file.
        FileNotFoundError: no such file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise PngError("no regular file")
    data, (width, height, depth, kind) = _checked(path.read_bytes())
    if (height, width) != size:
        raise SizeError((height, width), size)
    colour = kind in (_RGB, _RGBA) and depth == 8
    if not colour and not (grey and kind == _GREY and depth in (8, 16)):
        rgb = "" if kind in (_RGB, _RGBA) else "not RGB: "
        found = f"{rgb}{_COLOURS.get(kind, 'of an unknown kind')}, {depth} bits"
        raise ModeError(f"{found}; ids are RGB of 8 bits (R + 256 G + 65536 B)")
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS if colour else cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        limit = "; set OPENCV_IO_MAX_IMAGE_PIXELS, OpenCV's limit" if "MAX_IMAGE_PIXELS" in str(error) else ""
        raise PngError(f"OpenCV cannot decode it: {' '.join(str(error).split())}{limit}") from None
    if pixels is None or pixels.shape[:2] != size:
        raise PngError("cannot be decoded")
    if not colour:
        return np.asarray(pixels).astype(np.uint32)
    if canvas is None:
        canvas = np.empty((*size, 4), np.uint8)
    cv2.mixChannels([pixels], [canvas], _TO_RGB)  # as fast as cvtColor, which starts threads: fatal after a fork
    ids: Array = canvas.view("<u4")[..., 0]
    ids &= 0xFFFFFF  # the fourth byte is not ours
    return ids


def _checked(data: bytes) -> tuple[bytes, tuple[int, int, int, int]]:
    """A PNG whose parts are all there, without those that say no pixels; its width, height, bits and colour type.

    Backgrounds, transparent colours, gamma and animation make decoders change values, or refuse a sound file.
    """
    if not data.startswith(_SIGNATURE):
        raise PngError("no PNG file")
    view, start, header = memoryview(data), len(_SIGNATURE), (0, 0, 0, -1)
    needed = [view[:start]]
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            break
        if zlib.crc32(view[start + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise PngError(f"damaged: check sum of {name.decode('latin1')}")
        if not name[0] & 32:  # a capital letter: a decoder must understand it
            needed.append(view[start:end])
        if name == b"IHDR" and length == 13:
            header = struct.unpack_from(">IIBB", data, start + 8)
        if name == b"IEND":
            return data if sum(map(len, needed)) == len(data) else b"".join(needed), header
        start = end
    raise PngError("truncated")
