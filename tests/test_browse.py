"""Browsing predictions: hand-made confusion, its order, and windows around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import class_table
from panoptic_ibs.coco_writer import PanopticWriter
from panoptic_ibs.data.readers import coco_panoptic
from panoptic_ibs.data.writing import LabelledImage, write_coco_panoptic
from panoptic_ibs.errors import DataError
from panoptic_ibs.prediction_files import PredictionSet, confused_segments, open_predictions, read_pair, window_around
from panoptic_ibs.segments import Prediction

CLASSES = class_table(things=2, stuff=1)  # 0 stuff; 1, 2 things


def columns(*ids: int) -> np.ndarray:
    """An id map of vertical stripes, 10 pixels wide."""
    return np.repeat(np.array(ids), 10)[None].repeat(8, 0)


@pytest.fixture
def found(tmp_path: Path) -> PredictionSet:
    """Image 1: two things in one. Image 2: three things in one, and stuff over two things. Image 3: all right."""
    truth = columns(1, 2, 3, 4)
    pixels = np.zeros((8, 40, 3), np.uint8)
    labels = [LabelledImage(f"{k}", pixels, truth, [1, 2, 1, 0]) for k in range(3)]
    write_coco_panoptic(tmp_path, "val", labels, CLASSES)
    reader = coco_panoptic(tmp_path, "val", cache_dir=tmp_path)
    writer = PanopticWriter(tmp_path / "predictions", CLASSES, integer_ids=True)
    cut = columns(1, 1, 2, 3)
    cut[:6, :10] = 3  # a quarter of the first thing is left to the prediction: not more than a quarter
    maps = [(columns(1, 1, 2, 3), [2, 1, 0]), (columns(1, 1, 1, 2), [1, 0]), (cut, [2, 1, 0])]
    for k, (id_map, class_ids) in enumerate(maps, 1):
        scores = torch.linspace(0.5, 0.75, len(class_ids))
        writer.add(Prediction(torch.from_numpy(id_map), torch.tensor(class_ids), scores, str(k)))
    writer.close()
    opened = open_predictions(tmp_path / "predictions", reader)
    assert isinstance(opened, PredictionSet)
    return opened


def test_the_worst_come_first(found: PredictionSet) -> None:
    listed = confused_segments(found)
    assert [(s.index, s.image_id, len(s.segment.swallowed), s.segment.row) for s in listed] == [
        (1, "2", 3, 0),
        (0, "1", 2, 0),
    ]
    assert [(w.class_name, w.share, w.area) for w in listed[1].segment.swallowed] == [
        ("thing0", 1.0, 80),
        ("thing1", 1.0, 80),
    ]
    assert listed[1].segment.score == pytest.approx(0.5)
    assert listed[0].error == (3, 3.0)
    assert [s.index for s in confused_segments(found, 0.2)] == [1, 0, 2]  # a quarter is more than a fifth


def test_a_pair_is_read(found: PredictionSet) -> None:
    prediction, target = read_pair(found, 0)
    assert np.array_equal(prediction.id_map.numpy(), columns(1, 1, 2, 3))
    assert np.array_equal(target.id_map.numpy(), columns(1, 2, 3, 4))
    assert (prediction.image_id, target.image_id, target.class_ids.tolist()) == ("1", "1", [1, 2, 1, 0])


def test_predictions_that_cannot_be_used(found: PredictionSet) -> None:
    (found.folder / "2.png").unlink()
    with pytest.raises(DataError, match="image 2"):
        confused_segments(found)
    few = open_predictions(found.source, found.reader, [0])
    assert isinstance(few, PredictionSet)
    assert len(confused_segments(few)) == 1  # the missing file is of no image that is asked for
    found.source.write_text(found.source.read_text().replace('"image_id": 3', '"image_id": 9'))
    with pytest.raises(DataError, match="image 3"):
        read_pair(open_predictions(found.source, found.reader), 2)  # type: ignore[arg-type]


def test_windows() -> None:
    mask = np.zeros((100, 200), bool)
    mask[40:60, 100:110] = True
    assert window_around(mask, margin=0.5, least=1) == (slice(30, 70), slice(90, 120))
    assert window_around(mask, margin=0, least=40) == (slice(30, 70), slice(85, 125))
    assert window_around(mask, margin=9) == (slice(0, 100), slice(0, 200))
    assert window_around(np.zeros((5, 7), bool)) == (slice(0, 5), slice(0, 7))
