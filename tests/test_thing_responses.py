"""Responses of things' embeddings on all crops, against loops over pixels, for every head."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import class_table, random_batch, target_from_map
from panoptic_ibs.functional.thing_responses import mean_responses, merge_things, responses
from panoptic_ibs.structures import SegmentEmbeddings, Target

CLASSES = class_table(things=2, stuff=1)  # 0 stuff; 1, 2 things


def example() -> tuple[SegmentEmbeddings, list[Target]]:
    """Two crops at stride 2: crop 0 has things of classes 1 and 2, crop 1 one of class 1 and stuff."""
    g = torch.Generator().manual_seed(0)
    maps = [torch.tensor([[1, 1, 2, 0], [1, 0, 2, 2]]), torch.tensor([[2, 2, 1, 1], [2, 2, 1, 1]])]
    targets = [
        target_from_map(m.repeat_interleave(2, 0).repeat_interleave(2, 1), ids, CLASSES, image_index=k)
        for k, (m, ids) in enumerate(zip(maps, ([1, 2], [0, 1]), strict=True))
    ]
    targets[1].segment_ids += 50
    output = SegmentEmbeddings(
        embeddings=torch.randn(6, 3, generator=g),
        features=torch.randn(2, 3, 2, 4, generator=g),
        image_index=torch.tensor([1, 0, 0, 0, 0, 1]),
        is_thing=torch.tensor([True, True, True, True, True, False]),
        weight=torch.tensor([0.5, 0.25, 0.75, 0.0, 0.0, 1.0]),
        segment_index=torch.tensor([1, 0, 0, 1, 1, 0]),
    )
    return output, targets


def sigmoid(output: SegmentEmbeddings, row: int, crop: int, y: int, x: int) -> float:
    logit = float(output.embeddings[row] @ output.features[crop, :, y, x])
    return 1 / (1 + math.exp(-logit))


MEMBERS = {(0, 0): {1: 0.25, 2: 0.75}, (0, 1): {3: 0.5, 4: 0.5}, (1, 1): {0: 1.0}}  # weights of zero only: the mean


def test_things_are_merged() -> None:
    output, _ = example()
    things = merge_things(output)
    assert list(zip(things.crop.tolist(), things.row.tolist(), strict=True)) == list(MEMBERS)
    for t, weights in enumerate(MEMBERS.values()):
        wanted = sum(w * output.embeddings[k] for k, w in weights.items())
        torch.testing.assert_close(things.embeddings[t], wanted)


def test_responses_of_every_pixel() -> None:
    output, _ = example()
    things = merge_things(output)
    for crop in (0, 1):
        maps = responses(output, things, crop)
        for t, weights in enumerate(MEMBERS.values()):
            for y in range(2):
                for x in range(4):
                    wanted = sum(w * sigmoid(output, k, crop, y, x) for k, w in weights.items())
                    assert float(maps[t, y, x]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("same_instance", [False, True])
def test_means_over_sets_of_pixels(same_instance: bool) -> None:
    output, targets = example()
    if same_instance:  # thing (0, 0) is (1, 1), seen in another crop of the same image
        targets[1].image_index = targets[0].image_index
        targets[1].segment_ids[1] = targets[0].segment_ids[0]
    found = mean_responses(output, targets)
    for t, ((home, row), weights) in enumerate(MEMBERS.items()):
        values: dict[str, list[float]] = {name: [] for name in found}
        for crop, target in enumerate(targets):
            if crop != home and same_instance and (home, row) in ((0, 0), (1, 1)):
                continue
            for y in range(2):
                for x in range(4):
                    value = sum(w * sigmoid(output, k, crop, y, x) for k, w in weights.items())
                    k = int(target.id_map[2 * y, 2 * x]) - 1
                    if crop == home:
                        values["own mask" if k == row else "own crop, rest"].append(value)
                        continue
                    values["other crops"].append(value)
                    if k >= 0 and target.class_ids[k] == targets[home].class_ids[row]:
                        values["other crops, same class"].append(value)
        for name, listed in values.items():
            mean = float(found[name][t])
            assert mean == pytest.approx(sum(listed) / len(listed), abs=1e-6) if listed else math.isnan(mean)


def test_unknown_segments() -> None:
    output, _ = example()
    output.segment_index = None
    with pytest.raises(ValueError, match="segment_index"):
        merge_things(output)


@pytest.mark.parametrize("head", ["panoptic_fcn", "mask2former", "ciae"])
def test_every_head(head: str) -> None:
    from panoptic_ibs import instantiation
    from panoptic_ibs.construction import build_model
    from panoptic_ibs.interactive import compose

    classes = class_table()
    model = build_model(instantiation.model_config(compose("experiment=demo", f"head={head}")), classes).eval()
    batch = random_batch(classes)
    with torch.inference_mode():
        output = model.losses(batch)[1][-1]
    things = merge_things(output)
    assert len(things) > 0
    found = mean_responses(output, batch.targets)
    for name in ("own mask", "own crop, rest", "other crops"):
        assert float(found[name].nanmean()) == pytest.approx(0.5, abs=0.5)
    assert responses(output, things, 1).shape == (len(things), *output.features.shape[-2:])
