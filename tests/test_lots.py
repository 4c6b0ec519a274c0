"""The easier embedded set, car parks from above: same bytes, labels that lie on what is drawn, things of known size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from panoptic_ibs.data.synthetic import LOT_CLASSES, MIN_PIXELS, SyntheticImage, render_lot, write_dataset
from panoptic_ibs.errors import DataError
from panoptic_ibs.prepare import main

SIZE = (128, 256)
THINGS = {"car": (0.1, 0.2), "truck": (0.125, 0.37), "bus": (0.12, 0.45)}


@pytest.fixture(scope="module")
def pictures() -> list[SyntheticImage]:
    return [render_lot(0, i, SIZE) for i in range(12)]


def whole(picture: SyntheticImage) -> list[tuple[str, np.ndarray]]:
    """Class and mask of the things that do not touch the picture's border."""
    inner = np.zeros(picture.id_map.shape, bool)
    inner[1:-1, 1:-1] = True
    masks = [(name, picture.id_map == k + 1) for k, (name, _) in enumerate(picture.segments) if name in THINGS]
    return [(name, mask) for name, mask in masks if not (mask & ~inner).any()]


def test_classes_are_six_of_cityscapes() -> None:
    ids = {c.name: (c.dataset_id, c.is_thing) for c in LOT_CLASSES.classes}
    assert ids == {
        "road": (7, False), "sidewalk": (8, False), "terrain": (22, False),
        "car": (26, True), "truck": (27, True), "bus": (28, True),
    }  # fmt: skip


def test_same_picture_for_the_same_arguments(pictures: list[SyntheticImage]) -> None:
    again = render_lot(0, 5, SIZE)
    assert np.array_equal(again.image, pictures[5].image)
    assert np.array_equal(again.id_map, pictures[5].id_map)
    assert again.segments == pictures[5].segments
    assert len({p.image.tobytes() for p in [*pictures, render_lot(1, 0, SIZE)]}) == len(pictures) + 1


def test_every_picture_is_full_of_look_alikes(pictures: list[SyntheticImage]) -> None:
    for i, picture in enumerate(pictures):
        names = [name for name, _ in picture.segments]
        assert 4 <= picture.num_things <= 40
        assert "road" in names
        assert tuple(THINGS)[i % 3] in names, "every kind has the middle row in turn"
        assert len({n for n in names if n not in THINGS}) == sum(n not in THINGS for n in names), "stuff is one segment"
    assert {name for p in pictures for name, _ in p.segments} == set(LOT_CLASSES.names)


def test_things_have_the_size_of_their_kind(pictures: list[SyntheticImage]) -> None:
    """No vehicle lies over another but by jitter, so a whole one has its outline's area, at the picture's one scale."""
    seen = 0
    for picture in pictures:
        scales = []
        for name, mask in whole(picture):
            width, length = THINGS[name]
            scales.append((mask.sum() / (0.95 * width * length * SIZE[0] ** 2)) ** 0.5)
        seen += len(scales)
        if scales:
            assert 1.1 <= np.median(scales) <= 2.0
            assert np.quantile(np.abs(scales / np.median(scales) - 1), 0.9) < 0.15
    assert seen > 40


def test_labels_lie_on_what_is_drawn() -> None:
    """Terrain is green, the other ground grey, and a vehicle's edge is an edge of the picture."""
    for index in range(6):
        picture = render_lot(3, index, SIZE)
        image = picture.image.astype(np.float64)
        means = {
            name: image[picture.id_map == k + 1].mean(0)
            for k, (name, _) in enumerate(picture.segments)
            if name not in THINGS
        }
        for name, (r, g, b) in means.items():
            assert ((2 * g - r - b) / (r + g + b) > 0.08) == (name == "terrain"), (name, r, g, b)
        slope = np.abs(np.diff(image, axis=1)).sum(2)
        edge = picture.id_map[:, 1:] != picture.id_map[:, :-1]
        assert slope[edge].mean() > 2 * slope[~edge].mean()


@pytest.mark.parametrize("size", [(64, 64), (256, 512), (100, 60)])
def test_sizes(size: tuple[int, int]) -> None:
    picture = render_lot(2, 1, size)
    assert picture.image.shape == (*size, 3)
    assert picture.image.dtype == np.uint8
    assert picture.id_map.shape == size
    area = np.bincount(picture.id_map.ravel(), minlength=len(picture.segments) + 1)
    assert len(area) == len(picture.segments) + 1
    assert area[1:].min() >= MIN_PIXELS
    with pytest.raises(ValueError, match="32 x 32"):
        render_lot(0, 0, (16, 256))


def test_written_set_is_sound(tmp_path: Path) -> None:
    root = tmp_path / "lots"
    words = ["num_train=3", "num_val=1", "height=64", "width=128", "scenes=lots"]
    assert main(["synthetic", f"root={root}", *words]) == 0
    assert main(["check", "data=synthetic", f"data.root={root}", f"run_dir={tmp_path}"]) == 0
    content = json.loads((root / "gtFine" / "cityscapes_panoptic_train.json").read_text())
    assert [c["name"] for c in content["categories"]] == list(LOT_CLASSES.names)
    with pytest.raises(DataError, match=r"other arguments \(scenes=lots, now street\)"):
        write_dataset(root, 3, 1, (64, 128), progress=False)
    with pytest.raises(DataError, match=r"scenes=moon is unknown\. Choose one of: street, lots"):
        write_dataset(tmp_path / "other", 1, 1, (64, 128), progress=False, scenes="moon")
