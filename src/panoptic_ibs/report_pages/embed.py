"""Pictures as base64 inside the page, within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

# Of the photographs of a page, before base64 makes them a third larger: the page stays below 10 MB with its figures.
PHOTOGRAPH_BUDGET = 5_500_000
_STEPS = ((1000, 86), (1000, 75), (800, 74), (640, 70), (480, 65), (320, 60))


class Embedder:
    """Makes ``data:`` addresses; ``budget`` is in bytes, for one call of :meth:`photographs`."""

    def __init__(self, budget: int = PHOTOGRAPH_BUDGET) -> None:
        self.budget = budget

    def png(self, data: bytes) -> str:
        """Address of a PNG file; flat figures lose half their bytes to a palette of 256 colours."""
        with Image.open(io.BytesIO(data)) as picture:
            buffer = io.BytesIO()
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        return _address("png", min(buffer.getvalue(), data, key=len))

    def photographs(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Addresses of JPEGs at most 1000 pixels wide; all get smaller alike until they fit the budget together."""
        encoded: list[bytes] = []
        for width, quality in _STEPS:
            encoded = [_jpeg(picture, width, quality) for picture in pictures]
            if sum(map(len, encoded)) <= self.budget:
                break
        return [_address("jpeg", data) for data in encoded]


def _jpeg(picture: Image.Image, width: int, quality: int) -> bytes:
    if picture.width > width:
        picture = picture.resize(
            (width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    # Full chroma resolution: thin coloured outlines survive.
    picture.convert("RGB").save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
