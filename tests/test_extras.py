"""What needs an optional library says how to get it: each is taken away in turn. test_wheel.py goes without all."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from cli_helpers import TINY, run
from panoptic_ibs import extras, fonts
from panoptic_ibs.data.transforms import ColorJitter
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.interactive import show
from panoptic_ibs.loggers import share_summary, wandb_logger

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~!;]", text)[0].strip().removesuffix("-skinny") for text in requirements}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> object:
    """Takes a library away, as if it were not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def test_every_extra_brings_what_its_sentence_says() -> None:
    optional = PROJECT["optional-dependencies"]
    for library, extra in extras.EXTRAS.items():
        assert library in _names(optional[extra]), library
        assert library not in _names(PROJECT["dependencies"]), library
    (everything,) = optional["all"]
    assert set(extras.EXTRAS.values()) <= set(re.split(r"[\[\],]", everything))


def test_lack_is_one_sentence(without) -> None:  # type: ignore[no-untyped-def]
    assert extras.lack("jinja2", "matplotlib") == ""
    without("matplotlib")
    assert extras.lack("jinja2", "matplotlib") == 'matplotlib is not installed: pip install "panoptic-ibs[report]"'
    without("jinja2")
    text = 'jinja2 and matplotlib are not installed: pip install "panoptic-ibs[report]"'
    assert extras.lack("jinja2", "matplotlib") == text
    with pytest.raises(ConfigError, match=re.escape(f"reports: {text}.")):
        extras.require("reports", "jinja2", "matplotlib")


def test_without_albumentations(without, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    without("albumentations")
    sentence = r'data\.transforms.*albumentations is not installed: pip install "panoptic-ibs\[augment\]", or set'
    with pytest.raises(ConfigError, match=sentence):
        ColorJitter()
    jitter = "data.transforms={_target_:panoptic_ibs.data.transforms.ColorJitter}"
    result = run("train", *TINY, "trainer.max_steps=1", jitter, f"run_dir={tmp_path}")
    assert result.code == 2
    assert re.search(sentence, result.message), result.err


def test_without_wandb(without, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    without("wandb")
    sentence = r'logger.wandb.*wandb is not installed: pip install "panoptic-ibs\[wandb\]"'
    result = run("train", *TINY, "trainer.max_steps=1", "logger=wandb", f"run_dir={tmp_path / 'run'}")
    assert result.code == 2
    assert re.search(sentence, result.message), result.err
    assert not (tmp_path / "run").exists()  # before anything is made
    for call in (lambda: share_summary(tmp_path), lambda: wandb_logger(tmp_path, {}, {})):
        with pytest.raises(ConfigError, match=r'wandb is not installed: pip install "panoptic-ibs\[wandb\]"'):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_without_reports(without, tmp_path: Path, library: str) -> None:  # type: ignore[no-untyped-def]
    without(library)
    result = run("report", f"run={tmp_path}")
    assert result.code == 2
    assert result.message == f'error: reports: {library} is not installed: pip install "panoptic-ibs[report]".'
    assert not list(tmp_path.iterdir())


def test_pictures_without_matplotlib(without) -> None:  # type: ignore[no-untyped-def]
    without("matplotlib")
    with pytest.raises(ConfigError, match=r'show: matplotlib is not installed: pip install "panoptic-ibs\[report\]"'):
        show([{"a": np.zeros((2, 2))}])
    fonts.font_files.cache_clear()
    fonts._told.clear()
    try:
        assert fonts.legible("car", 3) == "car"  # Pillow's own font has ASCII
        with pytest.warns(UserWarning, match=r'matplotlib is not installed: pip install "panoptic-ibs\[report\]"'):
            assert fonts.legible("rør", 3) == "3"
    finally:
        fonts.font_files.cache_clear()
        fonts._told.clear()
