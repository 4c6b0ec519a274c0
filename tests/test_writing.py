"""Plain masks written as COCO panoptic files: read back by Pillow, by the package's reader, and checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import class_table
from panoptic_ibs.classes import ClassTable
from panoptic_ibs.data.check import check
from panoptic_ibs.data.readers import coco_panoptic
from panoptic_ibs.data.writing import LabelledImage, panoptic_from_masks, write_coco_panoptic
from panoptic_ibs.errors import DataError

CLASSES = class_table(things=2, stuff=2)  # 0, 1 stuff; 2, 3 things
SEMANTIC = np.array([[0, 0, 0, 255], [0, 2, 2, 255], [255, 3, 1, 1]], np.uint8)


def mask(*pixels: tuple[int, int]) -> np.ndarray:
    found = np.zeros(SEMANTIC.shape, bool)
    for pixel in pixels:
        found[pixel] = True
    return found


def test_masks_over_the_semantic_map() -> None:
    # Mask 1 hides mask 0 altogether; the thing pixels (1, 1) and (2, 1) belong to no mask.
    masks = [mask((1, 2)), mask((1, 2), (1, 3)), mask((0, 0)).astype(np.uint8) * 255]
    id_map, class_ids = panoptic_from_masks(SEMANTIC, masks, [2, 3, 2], CLASSES)
    assert id_map.tolist() == [[4, 1, 1, 0], [1, 0, 3, 3], [0, 0, 2, 2]]
    assert class_ids == [0, 1, 3, 2]


def test_stuff_that_is_hidden_has_no_row() -> None:
    id_map, class_ids = panoptic_from_masks(np.zeros((1, 2), int), [np.ones((1, 2))], [3], CLASSES)
    assert (id_map.tolist(), class_ids) == ([[1, 1]], [3])


@pytest.mark.parametrize(
    ("semantic", "masks", "labels", "message"),
    [
        (SEMANTIC, [np.ones((2, 2))], [2], "Mask 0 has shape"),
        (SEMANTIC, [mask((0, 0))], [1], "stuff"),
        (SEMANTIC, [mask((0, 0))], [4], "Class 4"),
        (SEMANTIC, [mask((0, 0))], [], "1 masks, but 0 classes"),
        (np.full((2, 2), 7), [], [], "Class 7"),
        (np.zeros((2, 2)), [], [], "integers"),
    ],
)
def test_masks_that_do_not_fit(semantic: np.ndarray, masks: list[np.ndarray], labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        panoptic_from_masks(semantic, masks, labels, CLASSES)


def images(folder: Path, count: int = 3) -> list[LabelledImage]:
    """Noise with random segments; more than 256 of them in the first, and a file in place of pixels in the last."""
    rng = np.random.default_rng(0)
    made = []
    for k in range(count):
        n = 300 if k == 0 else 5
        id_map = rng.integers(0, n + 1, (40, 60 + k))
        pixels = rng.integers(0, 256, (*id_map.shape, 3), dtype=np.uint8)
        image: np.ndarray | Path = pixels
        if k == count - 1:
            image = folder / "photo.jpg"
            Image.fromarray(pixels).save(image)
        made.append(LabelledImage(f"picture {k}", image, id_map, [i % 4 for i in range(n)], crowd=[3]))
    return made


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = images(tmp_path)
    path = write_coco_panoptic(tmp_path / "set", "train", made, CLASSES)
    content = json.loads(path.read_text())
    reader = coco_panoptic(tmp_path / "set", "train", cache_dir=tmp_path)
    assert reader.classes == CLASSES
    for k, item in enumerate(made):
        wanted = np.asarray(item.id_map)
        entry = content["annotations"][k]
        rgb = np.asarray(Image.open(path.with_suffix("") / entry["file_name"])).astype(np.int64)
        assert np.array_equal(rgb @ [1, 256, 65536], wanted)
        record = reader.records[k]
        present = np.unique(wanted[wanted > 0])
        assert record.segments.ids.tolist() == present.tolist()
        assert record.segments.class_ids.tolist() == [item.class_ids[i - 1] for i in present]
        assert record.segments.iscrowd.tolist() == [i == 4 for i in present]
        assert record.segments.areas.tolist() == [(wanted == i).sum() for i in present]
        read, id_map = reader.read(k)
        assert np.array_equal(np.append(0, present)[id_map], wanted)
        if isinstance(item.image, np.ndarray):
            assert np.array_equal(read, item.image)
    assert (tmp_path / "set/train/picture 2.jpg").read_bytes() == (tmp_path / "photo.jpg").read_bytes()
    assert check(coco_panoptic(tmp_path / "set", "train", strict=False)) == []


def test_contradictions(tmp_path: Path) -> None:
    pixels, ids = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), int)
    good = LabelledImage("a", pixels, ids, [])
    turned, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(turned, exif=exif)
    for bad, message in (
        ([good, good], "'a' is empty, a path or taken"),
        ([LabelledImage("../a", pixels, ids, [])], "a path"),
        ([LabelledImage("a", pixels, ids + 2, [0])], "ids from 2 to 2"),
        ([LabelledImage("a", pixels, ids - 1, [0])], "ids from -1 to -1"),
        ([LabelledImage("a", pixels, ids, [9])], "class 9"),
        ([LabelledImage("a", pixels, ids, [1.5])], "class 1.5"),
        ([LabelledImage("a", pixels, ids, [1], crowd=[1])], "crowd names the row 1, but the table has 1 rows"),
        ([LabelledImage("a", turned, ids.T, [])], r"turned\.png: the image is 4x6 .* EXIF orientation is 6"),
        ([LabelledImage("a", pixels[:3], ids, [])], "image is 3x6"),
        ([LabelledImage("a", pixels[..., 0], ids, [])], "uint8 RGB"),
        ([LabelledImage("a", tmp_path / "none.png", ids, [])], "is missing. Check its path"),
        ([], "no image"),
    ):
        with pytest.raises(DataError, match=message):
            write_coco_panoptic(tmp_path / "bad", "train", bad, CLASSES)
        assert not (tmp_path / "bad/annotations/panoptic_train.json").exists()
    write_coco_panoptic(tmp_path, "train", [good], CLASSES)
    with pytest.raises(DataError, match="exists already"):
        write_coco_panoptic(tmp_path, "train", [good], CLASSES)


def test_void_is_no_class() -> None:
    classes = ClassTable.from_coco({"id": i, "name": f"c{i}", "isthing": 0} for i in range(300))
    semantic = np.array([[255, 299, 3]])
    with pytest.raises(DataError, match="void=255 is also the id of class 'c255'"):
        panoptic_from_masks(semantic, [], [], classes)
    ids, found = panoptic_from_masks(np.array([[255, 299, 3, -1]]), [], [], classes, void=-1)
    assert [found[k - 1] if k else None for k in ids[0]] == [255, 299, 3, None]
