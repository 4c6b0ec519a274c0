"""Metrics of plain tensors: the same numbers as of this package's own types, and as torchmetrics' where those agree."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.detection import PanopticQuality as Peer

import panoptic_ibs.metrics.panoptic
from helpers import class_table, random_target
from panoptic_ibs.metrics import PanopticMetrics
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

CLASSES = class_table()


def test_the_examples_of_the_docstrings_hold() -> None:
    result = doctest.testmod(panoptic_ibs.metrics.panoptic)
    assert result.attempted > 8
    assert not result.failed


def categories(target: Target, shift: int = 0) -> Tensor:
    """(H, W, 2): data set ids and instance ids of a target; void is -1."""
    table = torch.tensor([-1, *(CLASSES[int(c)].dataset_id for c in target.class_ids)])
    ids = target.id_map.long()
    return torch.stack([table[ids], (ids + shift) % 7 if shift else ids], -1)


def pair(seed: int) -> tuple[Target, Target]:
    truth, other = (random_target(CLASSES, (48, 64), 6, seed=s) for s in (seed, seed + 100))
    mixed = truth.id_map.clone()
    mixed[:, 20:40] = 0
    return truth, other if seed % 2 else Target(**{**vars(truth), "id_map": mixed})


@pytest.mark.parametrize("seed", range(4))
def test_all_forms_give_the_same_numbers(seed: int) -> None:
    truth, found = pair(seed)
    results = []
    for predictions, targets in (
        ([Prediction(found.id_map, found.class_ids, torch.ones(len(found)))], [truth]),
        ([_table(found)], [_table(truth) | {"is_crowd": truth.is_crowd}]),
        (categories(found)[None], categories(truth)[None]),
    ):
        metric = PanopticMetrics(CLASSES)
        metric.update(predictions, targets)
        results.append(metric.compute())
    assert results[0] == results[1]
    # Rows without a pixel are missed in a table; a map of categories has none.
    if all((t.areas > 0).all() for t in (truth, found)):
        assert results[0] == results[2]
    assert 0 < results[2]["pq"] < 1


def _table(target: Target) -> dict[str, Any]:
    return {"id_map": target.id_map, "class_ids": target.class_ids}


def test_equal_to_torchmetrics_without_void_in_the_prediction() -> None:
    things = {CLASSES[c].dataset_id for c in CLASSES.thing_ids}
    stuff = {CLASSES[c].dataset_id for c in CLASSES.stuff_ids}
    peer = Peer(things=things, stuffs=stuff)
    ours = PanopticMetrics(CLASSES)
    for seed in range(3):
        truth, found = (categories(random_target(CLASSES, (48, 64), 6, seed=s))[None] for s in (seed, seed + 50))
        found = torch.where(found[..., :1] < 0, torch.tensor([CLASSES[0].dataset_id, 0]), found)
        moved = torch.where(torch.arange(64)[:, None] < 40, truth, found)
        moved = torch.where(moved[..., :1] < 0, torch.tensor([CLASSES[0].dataset_id, 0]), moved)
        ours.update(moved, truth)
        peer.update(moved, truth)
    assert ours.compute()["pq"] == pytest.approx(float(peer.compute()), abs=1e-6)


def test_instance_ids_of_stuff_do_not_matter() -> None:
    truth = random_target(CLASSES, (48, 64), 1, seed=5)
    stuff = torch.tensor([False, *(~truth.is_thing).tolist()])[truth.id_map.long()]
    found = categories(truth)
    found[..., 1] += torch.randint(0, 9, stuff.shape) * stuff
    metric = PanopticMetrics(CLASSES)
    metric.update(found[None], categories(truth)[None])
    assert metric.compute()["pq"] == 1.0


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        (torch.zeros(2, 4, 4), r"\(B, H, W, 2\) integers"),
        (torch.zeros(1, 4, 4, 2), "float32"),
        (torch.full((1, 4, 4, 2), 255), "category 255 is not in the class table; write -1 for void"),
        ([{"id_map": torch.zeros(4, 4, dtype=torch.int64)}], "expected id_map"),
        ([{"id_map": torch.ones(4, 4, dtype=torch.int64), "class_ids": [99]}], "contiguous ids"),
        ([], "0 predictions for 1 targets"),
    ],
)
def test_what_is_none_of_the_forms(predictions: Any, said: str) -> None:
    metric = PanopticMetrics(CLASSES)
    with pytest.raises(ValueError, match=said):
        metric.update(predictions, torch.full((1, 4, 4, 2), CLASSES[0].dataset_id))
