"""Operations of a whole step in the form for GPUs: few, and as many for eight crops as for two."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("head", "part", "most"), [("mask2former", "step", 5000), ("ciae", "losses", 1000), ("panoptic_fcn", "step", 3000)]
)
def test_a_step_has_few_operations_whatever_the_batch(
    head: str, part: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    bench = importlib.import_module("bench_operations")
    few, many = bench.step_and_losses(head, bench.class_table())[part]
    assert 100 < few <= most
    assert many <= 1.1 * few
