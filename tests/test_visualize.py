from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers import class_table, random_target, target_from_map
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target
from panoptic_ibs.visualize import boundaries, draw_confused, find_confused, overlay, segment_colors

CLASSES = class_table(things=3, stuff=2)  # contiguous 0, 1 stuff; 2, 3, 4 things


def prediction(id_map: torch.Tensor, class_ids: list[int], scores: list[float] | None = None) -> Prediction:
    return Prediction(
        id_map.int(), torch.tensor(class_ids, dtype=torch.long), torch.tensor(scores or [0.5] * len(class_ids)), "image"
    )


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_boundaries_equal_a_naive_loop() -> None:
    id_map = np.random.default_rng(0).integers(0, 3, (9, 13)).repeat(2, 0).repeat(3, 1)
    h, w = id_map.shape
    expected = np.zeros((h, w), bool)
    for y in range(h):
        for x in range(w):
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                if 0 <= y + dy < h and 0 <= x + dx < w and id_map[y + dy, x + dx] != id_map[y, x]:
                    expected[y, x] = True
    assert np.array_equal(boundaries(id_map), expected)
    assert 0 < expected.sum() < expected.size


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1)])
def test_boundaries_of_thin_maps(size: tuple[int, int]) -> None:
    assert not boundaries(np.ones(size, int)).any()


def test_overlay_changes_boundaries_only_where_contours_are_asked_for() -> None:
    target = random_target(CLASSES, seed=3)
    id_map, image = target.id_map.numpy(), noise((64, 128))
    plain = overlay(image, id_map, target.class_ids.tolist(), CLASSES, contours=False)
    drawn = overlay(image, id_map, target.class_ids.tolist(), CLASSES)
    assert drawn.dtype == np.uint8
    assert drawn.shape == image.shape
    changed = (plain != drawn).any(-1)
    assert not changed[~boundaries(id_map)].any()
    thing_edge = boundaries(id_map) & np.isin(id_map, 1 + np.flatnonzero(target.is_thing.numpy()))
    assert changed[thing_edge].mean() > 0.95
    assert drawn[thing_edge].mean() > plain[thing_edge].mean()  # light around things


def test_overlay_with_full_weight_shows_the_class_colours() -> None:
    id_map = np.array([[1, 1, 2, 2]] * 4)
    out = overlay(noise((4, 4)), id_map, [0, 2], CLASSES, alpha=1.0, contours=False)
    assert (out[:, :2] == CLASSES[0].color).all()
    assert (out[:, 2:] == segment_colors(id_map, [0, 2], CLASSES)[2]).all()


def test_void_is_dark_and_hatched() -> None:
    out = overlay(np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), int), [], CLASSES)
    assert out.max() < 110
    assert len(np.unique(out)) == 2


def test_touching_instances_of_a_class_have_distinct_shades() -> None:
    id_map = np.arange(1, 13).reshape(3, 4).repeat(20, 0).repeat(20, 1)  # twelve tiles of one class
    colors = segment_colors(id_map, [2] * 12, CLASSES).astype(int)
    for a, b in [(id_map[y, x], id_map[y, x + 1]) for y in range(59) for x in range(79)]:
        assert a == b or np.abs(colors[a] - colors[b]).sum() > 40
    for a, b in [(id_map[y, x], id_map[y + 1, x]) for y in range(59) for x in range(79)]:
        assert a == b or np.abs(colors[a] - colors[b]).sum() > 40


def test_stuff_segments_keep_the_class_colour() -> None:
    colors = segment_colors(np.array([[1, 2]]), [1, 0], CLASSES)
    assert tuple(colors[1]) == CLASSES[1].color
    assert tuple(colors[2]) == CLASSES[0].color


def test_labels_are_written_inside_large_segments_only() -> None:
    id_map = np.ones((120, 200), int)
    id_map[:3, :3] = 2
    plain, named = (overlay(noise((120, 200)), id_map, [0, 2], CLASSES, labels=flag) for flag in (False, True))
    changed = np.argwhere((plain != named).any(-1))
    assert len(changed) > 50
    assert changed.min() > 20


@pytest.mark.parametrize(("shape", "ids", "words"), [((4, 5), [0], "do not fit"), ((4, 4), [], "segment table")])
def test_overlay_rejects_what_does_not_fit(shape: tuple[int, int], ids: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        overlay(noise((4, 4)), np.ones(shape, int), ids, CLASSES)


def naive_confused(p: Prediction, target, threshold: float) -> dict[int, dict[int, float]]:
    """Predicted row -> {true row: share}, mask by mask."""
    found = {}
    for k in range(len(p)):
        shares = {}
        for j in range(len(target)):
            mask = target.id_map == j + 1
            if target.is_thing[j] and not target.is_crowd[j] and mask.any():
                share = float(((p.id_map == k + 1) & mask).sum()) / float(mask.sum())
                if share > threshold:
                    shares[j] = share
        if CLASSES[int(p.class_ids[k])].is_thing and len(shares) >= 2:
            found[k] = shares
    return found


@pytest.mark.parametrize("threshold", [0.05, 0.25, 0.5])
def test_confused_rows_equal_a_naive_computation(threshold: float) -> None:
    total = 0
    for seed in range(12):
        target = random_target(CLASSES, seed=seed, segments=12)
        target.is_crowd[4] = bool(target.is_thing[4])
        other = random_target(CLASSES, seed=100 + seed, segments=5)
        p = prediction(other.id_map, other.class_ids.tolist())
        rows = find_confused(p, target, CLASSES, threshold)
        expected = naive_confused(p, target, threshold)
        total += len(expected)
        assert {r.row: {s.row: pytest.approx(s.share) for s in r.swallowed} for r in rows} == expected
        for r in rows:
            shares = [s.share for s in r.swallowed]
            assert shares == sorted(shares, reverse=True)
            assert all(s.area == int((target.id_map == s.row + 1).sum()) for s in r.swallowed)
    assert total > 3


def hand_made():
    """Two true things side by side on stuff, one prediction over both."""
    true = torch.ones(20, 40, dtype=torch.int32)
    true[5:15, 5:15], true[5:15, 20:35] = 2, 3
    target = target_from_map(true, [0, 2, 3], CLASSES)
    predicted = torch.ones(20, 40, dtype=torch.int32)
    predicted[5:15, 5:28] = 2
    return prediction(predicted, [0, 4], [0.9, 0.7]), target


def test_hand_made_confusion() -> None:
    p, target = hand_made()
    (row,) = find_confused(p, target, CLASSES, 0.5)
    assert (row.row, row.class_name, row.score) == (1, "thing2", pytest.approx(0.7))
    assert [(s.number, s.row, s.class_name, s.area) for s in row.swallowed] == [
        (1, 1, "thing0", 100),
        (2, 2, "thing1", 150),
    ]
    assert [s.share for s in row.swallowed] == [1.0, pytest.approx(80 / 150)]
    assert find_confused(p, target, CLASSES, 80 / 150) == []  # more than, not at least
    target.is_crowd[2] = True
    assert find_confused(p, target, CLASSES, 0.25) == []


def mark_confused(image: np.ndarray, p: Prediction, target: Target) -> tuple[np.ndarray, list[Any]]:
    rows = find_confused(p, target, CLASSES, 0.25)
    return draw_confused(image, p.id_map.numpy(), target.id_map.numpy(), rows), rows


def test_marked_picture_lights_the_prediction_and_dims_the_rest() -> None:
    p, target = hand_made()
    image = np.full((20, 40, 3), (200, 120, 40), np.uint8)
    picture, rows = mark_confused(image, p, target)
    assert len(rows) == 1
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert (picture[0, 0] == picture[0, 0, 0]).all()
    assert picture[0, 0, 0] < 100  # grey and dim
    assert (picture[5, 17] == 255).all()  # outline of the prediction between the instances
    first, second = picture[5, 7].astype(int), picture[5, 33].astype(int)
    assert np.abs(first - second).sum() > 60  # every swallowed instance has its own colour


def test_a_picture_without_confusion_is_only_dimmed() -> None:
    _, target = hand_made()
    picture, rows = mark_confused(noise((20, 40)), prediction(target.id_map, [0, 2, 3]), target)
    assert rows == []
    assert (picture[..., 0] == picture[..., 1]).all()


def test_sizes_must_agree() -> None:
    p, target = hand_made()
    with pytest.raises(ValueError, match="differ in size"):
        find_confused(prediction(p.id_map[:10], [0, 4]), target, CLASSES)
