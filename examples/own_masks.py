"""Make a data set to train on from one PNG of ids an image and a small table of classes.

python examples/own_masks.py IMAGES MASKS CLASSES.csv OUT SPLIT

CLASSES.csv has a header and a row a class:  id,name,thing
                                             1,road,0
                                             2,car,1
A pixel of MASKS/NAME.png is 1000 x class + number of the object (2001 is the first car, 1000 road); 0 is nothing.
16 bits hold 65 classes. IMAGES/NAME.* is the photograph.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.data.writing import LabelledImage, write_coco_panoptic


def read_classes(path: Path) -> ClassTable:
    """The table of classes; colours are made."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{"id": int(r["id"]), "name": r["name"], "isthing": int(r["thing"])} for r in csv.DictReader(file)]
    return ClassTable.from_coco(rows, source=path)


def labelled(images: Path, masks: Path, classes: ClassTable) -> Iterator[LabelledImage]:
    """Every image with its ids, one at a time."""
    row_of = {info.dataset_id: row for row, info in enumerate(classes)}
    for path in sorted(masks.glob("*.png")):
        photograph = next(file for file in sorted(images.glob(f"{path.stem}.*")) if file.suffix != ".txt")
        ids = np.asarray(Image.open(path)).astype(np.int64)
        found, id_map = np.unique(ids, return_inverse=True)
        segments = found[found > 0]
        id_map = id_map.reshape(ids.shape) + (0 if 0 in found else 1)  # 0 is nothing, k is row k - 1
        yield LabelledImage(path.stem, photograph, id_map, [row_of[int(i) // 1000] for i in segments])


def main(images: str, masks: str, classes: str, out: str, split: str) -> Path:
    """Write the split; returns its JSON."""
    table = read_classes(Path(classes))
    path = write_coco_panoptic(out, split, labelled(Path(images), Path(masks), table), table)
    print(path)
    print(
        f"python -m panoptic_ibs.prepare check data=coco_panoptic data.root={out} data.train={split} data.val={split}"
    )
    print(f"python -m panoptic_ibs.train data=coco_panoptic data.root={out} data.train={split} data.val=VAL")
    return path


if __name__ == "__main__":
    main(*sys.argv[1:])
