from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import class_table, random_batch
from panoptic_ibs.classes import ClassInfo, ClassTable
from panoptic_ibs.construction import build_model, overridden
from panoptic_ibs.errors import CheckpointError, ConfigError, DataError
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.structures import ImageSize

CONFIG = {
    "backbone": {
        "_target_": "panoptic_ibs.backbones.TimmBackbone",
        "name": "resnet18",
        "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    },
    "head": {
        "_target_": "panoptic_ibs.heads.panoptic_fcn.PanopticFCN",
        "channels": 16,
        "feature_channels": 8,
        "depth": 1,
        "inference": {"center_threshold": 0.0, "instance_threshold": 0.0, "min_score": 0.0, "stuff_area": 1},
    },
}


def make(**options) -> PanopticModel:
    torch.manual_seed(0)
    return build_model({**CONFIG, **options}, class_table())


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_normalisation_by_hand(order: str) -> None:
    model = make(pixel_mean=[10, 20, 30], pixel_std=[1, 2, 4], channel_order=order)
    images = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    result = model.normalize(images, [ImageSize((30, 45), (30, 45))])
    assert result.shape == (1, 3, 64, 64)
    for channel, (mean, std) in enumerate([(10, 1), (20, 2), (30, 4)]):
        place = channel if order == "rgb" else 2 - channel
        expected = (images[0, channel, :30, :45].float() - mean) / std
        assert torch.equal(result[0, place, :30, :45], expected)
    assert result[..., 30:, :].abs().sum() == 0
    assert result[..., 45:].abs().sum() == 0


def test_crops_of_odd_size_train() -> None:
    model = make()
    batch = random_batch(model.classes, (52, 70))
    losses, _ = model.losses(batch)
    assert torch.isfinite(sum(losses.values()))
    assert batch.targets[0].id_map.shape == (52, 70)


def test_predict_takes_arrays_tensors_and_pictures() -> None:
    model = make(test_size=[64, 100])
    pixels = np.random.default_rng(0).integers(0, 256, (48, 90, 3), dtype=np.uint8)
    results = model.predict([pixels, torch.from_numpy(pixels).permute(2, 0, 1), Image.fromarray(pixels)])
    assert len(results) == 3
    assert not model.training
    for prediction in results:
        assert prediction.id_map.shape == (48, 90)
        assert torch.equal(prediction.id_map, results[0].id_map)
        assert prediction.id_map.max() == len(prediction) > 0
    (alone,) = model.predict(pixels)
    assert torch.equal(alone.id_map, results[0].id_map)
    with pytest.raises(ValueError, match="uint8 RGB"):
        model.predict(pixels.astype(np.float32))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "made by code of 'os', which was not named"),
        ("panoptic_ibs.nowhere.Net", "does not exist"),
        ("panoptic_ibs.construction.load", "is no"),
        ("panoptic_ibs", "does not exist"),
    ],
)
def test_a_description_cannot_name_any_code(target: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make(head={"_target_": target})


def test_class_table() -> None:
    categories = [
        {"id": 7, "name": "road", "isthing": 0, "color": [128, 64, 128]},
        {"id": 26, "name": "car", "isthing": 1},
    ]
    table = ClassTable.from_coco(categories)
    assert (table.thing_ids, table.stuff_ids, table.contiguous[26]) == ((1,), (0,), 1)
    assert ClassTable.from_list(table.to_list()) == table == ClassTable.from_coco(table.to_coco())
    with pytest.raises(DataError, match="same id twice: 7"):
        ClassTable.from_coco([categories[0], {**categories[1], "id": 7}])
    with pytest.raises(DataError, match=r"some\.json: \[1\]\.isthing is missing"):
        ClassTable.from_coco([categories[0], {"id": 1, "name": "x"}], "some.json")
    with pytest.raises(DataError, match=r"some\.json: the list is empty"):
        ClassTable([], "some.json")
    assert len({c.color for c in ClassTable(ClassInfo(str(i), i, True, (i, 0, 0)) for i in range(5)).classes}) == 5


def test_options_are_changed_however_deep_and_nothing_else() -> None:
    changed = overridden(CONFIG, {"head": {"depth": 2, "inference": {"min_score": 0.5}}})
    assert changed["head"] == {
        **CONFIG["head"],
        "depth": 2,
        "inference": {**CONFIG["head"]["inference"], "min_score": 0.5},
    }
    assert changed["backbone"] == CONFIG["backbone"]
    assert CONFIG["head"]["depth"] == 1
    with pytest.raises(ConfigError, match=r"head.inference.minscore is no option of this model; it has: .*min_score"):
        overridden(CONFIG, {"head": {"inference": {"minscore": 0.5}}})
