"""The one table of metric names covers the numbers that there are, and the page that explains metrics.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import class_table, random_target
from panoptic_ibs.metrics import BoundaryQuality, InstanceAP, PanopticMetrics, instances_from_panoptic
from panoptic_ibs.metrics.names import METRICS, columns, named
from panoptic_ibs.segments import Prediction

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
CLASSES = class_table()
# Of these the table has some: tables of thresholds, factors by size and by class are shown in figures of their own.
NOT_ALL = ("confusion.", "confusion_by_size.", "pq_by_size.", "boundary_")


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and "per_class" not in key:
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, float | int) and key not in ("num_images", "step"):
            yield f"{prefix}{key}".replace("confusion.", "confusion@")


@pytest.fixture(scope="module")
def computed() -> dict[str, Any]:
    found: dict[str, Any] = {}
    truth = random_target(CLASSES)
    whole = Prediction(truth.id_map, truth.class_ids, torch.ones(len(truth)))
    prediction = Prediction(
        truth.id_map, truth.class_ids, torch.ones(len(truth)), instances=instances_from_panoptic(whole, CLASSES)
    )
    for metric in (PanopticMetrics(CLASSES), InstanceAP(CLASSES), BoundaryQuality(CLASSES)):
        metric.update([prediction], [truth])
        found |= metric.compute()
    return found


def test_every_number_has_a_name_and_every_name_a_number(computed: dict[str, Any]) -> None:
    keys = {m.key for m in METRICS}
    assert len(keys) == len(METRICS)
    have = {*numbers(computed), "ap_large"}  # null here: no thing of the scene is large
    of_other_results = {key for key in keys if key.startswith("ap_from_panoptic.")}
    assert {k.removeprefix("ap_from_panoptic.") for k in of_other_results} <= have
    assert keys - have == of_other_results
    some = ("confusion@", *NOT_ALL)
    assert {key for key in have - keys if not key.startswith(some)} == set()


def test_the_page_explains_every_key() -> None:
    explained = set(re.findall(r"`([a-z0-9_]+)`", PAGE.read_text(encoding="utf-8")))
    assert {re.split(r"[.@]", m.key)[0] for m in METRICS} <= explained


def test_names_are_told_apart_and_unknown_keys_raise() -> None:
    for field in ("name", "short"):
        shown = [getattr(m, field) for m in METRICS if not m.key.startswith("ap_from_panoptic.")]
        assert len(set(shown)) == len(shown), field
    assert columns("pq_things", "confusion@50") == (("pq_things", "PQ_th"), ("confusion@50", "Conf@50"))
    assert named("confusion@50").lower
    assert not named("pq").lower
    with pytest.raises(KeyError):
        named("panoptic quality")
