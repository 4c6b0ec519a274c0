"""Where each data set keeps its images, PNGs and JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from panoptic_ibs.errors import ConfigError, DataError

from .panoptic import PanopticReader


def _root(root: Path | str | None) -> Path:
    if not root:
        raise ConfigError("data.root is not set. Name the data set's folder: data.root=DIR.")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataError(f"{path}: no such folder (data.root). Name the data set's folder: data.root=DIR.")
    return path


def _first_existing(*paths: Path) -> Path:
    return next((p for p in paths if p.exists()), paths[0])


def coco_panoptic(root: Path | str | None, split: str, **options: Any) -> PanopticReader:
    """COCO panoptic: ``SPLIT/``, ``annotations/panoptic_SPLIT.json``, PNGs beside the JSON or in ``panoptic_SPLIT/``.

    ``options`` go to :class:`PanopticReader`, here and below.
    """
    root = _root(root)
    name = f"panoptic_{split}"
    png_dir = _first_existing(root / "annotations" / name, root / name)
    return PanopticReader(root / split, root / "annotations" / f"{name}.json", png_dir, **options)


def cityscapes_image_name(file_name: str) -> str:
    """``X_gtFine_leftImg8bit.png``, as createPanopticImgs writes it, lives at ``CITY/X_leftImg8bit.png``."""
    name = file_name.replace("_gtFine_leftImg8bit", "_leftImg8bit")
    return f"{name.split('_')[0]}/{name}"


def cityscapes(root: Path | str | None, split: str, **options: Any) -> PanopticReader:
    """Cityscapes: ``leftImg8bit/SPLIT/CITY/``, ``gtFine/cityscapes_panoptic_SPLIT{.json,/}`` (also ``..._trainId``)."""
    root = _root(root)
    folder = root / "gtFine"
    names = (f"cityscapes_panoptic_{split}", f"cityscapes_panoptic_{split}_trainId")
    json_path = _first_existing(*(folder / f"{name}.json" for name in names))
    if not json_path.exists():
        raise DataError(
            f"{json_path}: the annotation JSON is missing. Check data.root and the split's name; "
            "for Cityscapes itself, make it with cityscapesscripts' createPanopticImgs."
        )
    images = root / "leftImg8bit" / split
    return PanopticReader(images, json_path, json_path.with_suffix(""), image_name=cityscapes_image_name, **options)


def vistas(root: Path | str | None, split: str, **options: Any) -> PanopticReader:
    """Mapillary Vistas 1.2: ``SPLIT/images/*.jpg``, ``SPLIT/panoptic/{*.png,panoptic_2018.json}``."""
    folder = _root(root) / split
    labels = folder / "panoptic"
    return PanopticReader(folder / "images", labels / "panoptic_2018.json", labels, **options)


LAYOUTS: dict[str, Callable[..., PanopticReader]] = {
    "coco_panoptic": coco_panoptic,
    "cityscapes": cityscapes,
    "vistas": vistas,
    "synthetic": cityscapes,  # written in the Cityscapes layout, so that it runs the same reader
}
DEFAULT_SPLITS = {
    "coco_panoptic": ("train2017", "val2017"),
    "cityscapes": ("train", "val"),
    "vistas": ("training", "validation"),
    "synthetic": ("train", "val"),
}


def make_reader(name: str, root: Path | str | None, split: str, **options: Any) -> PanopticReader:
    """The reader of the layout ``name``.

    Raises:
        ConfigError: if the layout is unknown.
        DataError: as :class:`PanopticReader`.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"data={name} is unknown. Choose one of: {', '.join(LAYOUTS)}.")
    return LAYOUTS[name](root, split, **options)


def different_classes(first: PanopticReader, second: PanopticReader) -> str | None:
    """Why two splits cannot be used together, as a sentence; None if they can. Colours may differ."""
    found = first.classes.difference(second.classes)
    if found is None:
        return None
    return (
        f"{first.json_path} and {second.json_path} have different 'categories': {found}. Ids, names, order and isthing "
        "must agree; write both JSONs with the same list."
    )
