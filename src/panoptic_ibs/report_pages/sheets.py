"""The same image as every setting of a sweep sees it, on one sheet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from panoptic_ibs.fonts import font_for, plottable

from .collection import Collection, short_label
from .embed import PHOTOGRAPH_BUDGET, Embedder
from .gallery import Gallery, read_gallery

IMAGES = 3  # sheets a head and data set
TILE = 512  # pixels wide at most
_FONT = 15
_GAP = 4


@dataclass
class _Shown:
    """A setting by its first run with pictures: what it is called, its gallery, the gallery's items by image."""

    title: str
    gallery: Gallery
    items: dict[str, dict[str, Any]]


def write_sheets(collection: Collection, folder: Path) -> list[dict[str, Any]]:
    """Write ``folder/pictures_HEAD_DATA_1.png`` and so on: truth, then the prediction of each setting.

    One run stands for a setting, the one with the lowest seed that has a gallery. Images are those that all of them
    show, first those that were not chosen for their errors.

    Returns:
        ``title`` and ``data`` (an address to be inlined) of each sheet; none where no head has two settings that
        show the same image.
    """
    for old in folder.glob("pictures_*.png"):
        old.unlink()
    sheets = []
    for label, group in collection.groups().items():
        for number, (image_id, sheet) in enumerate(_sheets(_shown(group)), 1):
            name = re.sub(r"[^A-Za-z0-9._-]", "_", "_".join(label))  # names come from files of any origin
            sheet.save(folder / f"pictures_{name}_{number}.png")
            sheets.append((f"{label[0]}, {label[1]}: {image_id}", sheet))
    data = Embedder(PHOTOGRAPH_BUDGET).photographs([sheet for _, sheet in sheets])
    return [{"title": title, "data": one} for (title, _), one in zip(sheets, data, strict=True)]


def _shown(group: Collection) -> list[_Shown]:
    found = []
    for setting in group.settings:
        for run in setting.runs:
            gallery = read_gallery(run.path)
            items = {str(i.get("image_id")): i for i in gallery.items if "prediction" in i} if gallery else {}
            if gallery and items:
                found.append(_Shown(short_label(setting, group), gallery, items))
                break
    return found


def _sheets(shown: Sequence[_Shown]) -> Iterator[tuple[str, Image.Image]]:
    if len(shown) < 2:
        return
    first = shown[0]
    common = [i for i in first.items if all(i in s.items for s in shown)]
    common.sort(key=lambda i: (first.items[i].get("selection") != "first", i))
    for image_id in common[:IMAGES]:
        tiles = [(s.title, s.gallery.open(s.items[image_id], "prediction")) for s in shown]
        if "truth" in first.items[image_id]:
            tiles.insert(0, ("ground truth", first.gallery.open(first.items[image_id], "truth")))
        yield image_id, _compose(tiles)


def _compose(tiles: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Tiles in rows, each under its title; all are scaled to the size of the first."""
    width = min(TILE, tiles[0][1].width)
    height = max(1, round(tiles[0][1].height * width / tiles[0][1].width))
    bar = _FONT + 8
    columns = min(3 if len(tiles) > 4 else 2, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + bar)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, tile) in enumerate(tiles):
        x, y = (i % columns) * (width + _GAP), (i // columns) * (height + bar)
        title = title if font_for(title, _FONT) else plottable(title)
        font = font_for(title, _FONT) or ImageFont.load_default(_FONT)
        draw.text((x + 4, y + bar / 2), _shorten(title, font, width - 8), "black", font, "lm")
        sheet.paste(tile.resize((width, height), Image.Resampling.LANCZOS), (x, y + bar))
    return sheet


def _shorten(text: str, font: Any, width: float) -> str:
    """The text with an ellipsis where it is too long."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
