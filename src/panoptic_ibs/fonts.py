"""Letters on pictures: which font has those of a name, and what stands there where none has."""

from __future__ import annotations

import os
import unicodedata
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from PIL import ImageFont, features

from .errors import printable
from .extras import lack

VARIABLE = "PANOPTIC_IBS_FONT"  # environment variable: a font file of the user's, for scripts that ours lack
_told: list[str] = []


@cache
def font_files() -> list[tuple[str, frozenset[int]]]:
    """Font files and the letters that they have: matplotlib's DejaVu Sans, and the user's own; none without it."""
    if lack("matplotlib"):
        return []
    import matplotlib
    from matplotlib.ft2font import FT2Font

    found = []
    paths = [os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), os.environ.get(VARIABLE, "")]
    for path in filter(None, paths):
        try:
            found.append((path, frozenset(FT2Font(path).get_charmap())))
        except (OSError, RuntimeError, ValueError) as error:
            warnings.warn(f"{VARIABLE}={path}: this font cannot be read ({error}).", stacklevel=2)
    return found


def font_for(text: str, size: float) -> Any:
    """A font of Pillow's that has all letters of a text; None without one."""
    if text.isascii():
        return ImageFont.load_default(size)
    if _needs_shaping(text) and not features.check("raqm"):
        return None
    return next((_opened(path, size) for path, letters in font_files() if not _missing(text, letters)), None)


@cache
def _all_letters() -> frozenset[int]:
    return frozenset().union(*(letters for _, letters in font_files()))


@cache
def _opened(path: str, size: float) -> Any:
    return ImageFont.truetype(path, size)


def _missing(text: str, letters: frozenset[int]) -> set[str]:
    """Letters without a glyph; format characters (joiners, marks of direction) need none."""
    return {c for c in text if ord(c) not in letters and unicodedata.category(c) not in ("Cf", "Cc")}


def _needs_shaping(text: str) -> bool:
    """Whether letters change with their neighbours or run from right to left: then one after the other is wrong."""
    return any(unicodedata.bidirectional(c) in ("R", "AL", "AN") or unicodedata.combining(c) for c in text)


def legible(name: str, number: int) -> str:
    """What stands for a class on a picture: its name, or its number where no font has the letters.

    The first time in a process that it is a number, a warning says why.
    """
    name = " ".join(printable(name).split())  # one line, whatever a file says
    if font_for(name, 10) is not None:
        return name
    _tell(f"no font here has all letters of the class name {name!r}, so its number {number} stands on pictures.")
    return str(number)


def plottable(name: str, number: int | None = None) -> str:
    """The same for matplotlib, which sets letters one after the other; other texts get ``?`` for what is missing."""
    name, letters = " ".join(printable(name).split()), _all_letters()
    missing = {c for c in name if _needs_shaping(c)} | _missing(name, letters)
    if not missing:
        return name
    instead = "question marks stand for them" if number is None else f"its number {number} stands there"
    _tell(f"figures cannot show all letters of {name!r}, so {instead}.")
    return "".join("?" if c in missing else c for c in name) if number is None else str(number)


def figure_families() -> list[str]:
    """Names of the font families for matplotlib, best first."""
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    for path, _ in font_files()[1:]:
        font_manager.fontManager.addfont(path)
        families.append(font_manager.FontProperties(fname=Path(path)).get_name())
    return families


def _tell(what: str) -> None:
    if not _told:
        _told.append(what)
        remedy = f"Name a font that has them: set the environment variable {VARIABLE} to a TTF or OTF file."
        if lacking := lack("matplotlib"):
            remedy = f"Letters beyond ASCII need matplotlib's fonts: {lacking}."
        warnings.warn(f"{what[0].upper()}{what[1:]} {remedy}", stacklevel=3)
