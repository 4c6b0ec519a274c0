"""Names of images and PNGs, COCO's and Cityscapes'."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

# Endings of PNGs in a folder of Cityscapes, best first; others (colour pictures, class maps) are not panoptic.
ENDINGS = ("panoptic", "instanceIds", "leftImg8bit", "")


def match_image(name: str, known: Collection[str]) -> str | None:
    """The image id that a name stands for, or None.

    The name itself; without endings such as ``_gtFine_panoptic`` or ``_leftImg8bit``; a number without its zeros; or
    what follows the last ``/`` of a name with folders, as ``predict`` names the images of folders in a folder.
    """
    stem = name
    while stem not in known:
        number = stem.lstrip("0") or "0"
        if stem.isascii() and stem.isdigit() and number in known:
            return number
        stem, found, _ = stem.rpartition("_")
        if not found:
            folders, _, last = name.rpartition("/")
            return match_image(last, known) if folders else None
    return stem


def ending(name: str, image_id: str) -> str:
    """The last part of a PNG's stem beyond the image id: ``panoptic`` of ``aachen_000000_000019_gtFine_panoptic``."""
    return name[len(image_id) :].rpartition("_")[2] if name.startswith(image_id) else ""


def pngs_by_image(files: Iterable[Path], known: Collection[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """PNGs of each image, those of the best ending alone; and PNGs that belong to no image."""
    found: dict[str, list[tuple[int, Path]]] = {}
    strangers = []
    for file in sorted(files):
        image_id = match_image(file.stem, known)
        if image_id is None:
            strangers.append(file)
            continue
        kind = ending(file.stem, image_id)
        if kind in ENDINGS:
            found.setdefault(image_id, []).append((ENDINGS.index(kind), file))
    best = {image: [f for rank, f in ranked if rank == min(ranked)[0]] for image, ranked in found.items()}
    return best, strangers
