"""The heads still compute what ``recorded_heads.json`` says (``python tests/recorder.py``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recorder import HEADS, record

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("recorded_heads.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("head", HEADS)
def test_losses_gradients_and_segments_are_as_recorded(head: str) -> None:
    """To rounding only: other processors round otherwise. The command compares bit for bit, on one machine."""
    found, wanted = record(head), RECORDED[head]
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4, abs=1e-6)
    assert all(value > 0 for value in wanted["losses"].values())
    assert found["gradients"] == pytest.approx(wanted["gradients"], rel=1e-3, abs=1e-6)
    for ours, theirs in zip(found["segments"], wanted["segments"], strict=True):
        assert len(theirs["classes"]) > 1
        assert ours["classes"] == theirs["classes"]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-4)
        assert ours["areas"] == pytest.approx(theirs["areas"], abs=3)
