"""Commands, configurations and tables from Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from panoptic_files import write_coco
from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.interactive import CommandError, Table, compose, data_module, override, run, show


def test_a_command_and_its_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path)
    words = ["check", "data=coco_panoptic", f"data.root={tmp_path}", "data.val=null", f"run_dir={tmp_path}"]
    former = list(sys.argv)
    run("prepare", *words)
    assert json.loads((tmp_path / "check.json").read_text())["defects"] == 0
    with pytest.raises(CommandError, match="status 2"):
        run("prepare", "chek")
    assert "'chek' is unknown" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no command 'os'"):
        run("os")
    assert sys.argv == former


def test_any_text_is_an_override() -> None:
    texts = {
        "data.root": "/data/my set",
        "data.train": "a,b=c",
        "data.val": "it's",
        "data.name": "{x: 1}",
        "paths.cache": "[1]",
        "run_dir": "null",
        "init_from": "a\\b",
    }
    config = compose("data=coco_panoptic", *(override(key, text) for key, text in texts.items()))
    for key, text in texts.items():
        assert OmegaConf.select(config, key) == text


def test_configurations_follow_their_overrides(tmp_path: Path) -> None:
    write_coco(tmp_path)
    config = compose("data=coco_panoptic", override("data.root", tmp_path), "ibs=none", "sampling.batch_size=6")
    assert (config.data.name, config.ibs.partners, config.data.batch_size) == ("coco_panoptic", "none", 6)
    data = data_module("data=coco_panoptic", override("data.root", tmp_path), override("data.cache_dir", tmp_path))
    assert len(data.reader("train")) == 4
    with pytest.raises(DataError, match="no such folder"):
        data_module("data=coco_panoptic", override("data.root", tmp_path / "none")).reader("train")


def test_the_demo_is_judged_on_its_own_images_without_naming_them() -> None:
    """``evaluate ckpt_path=...`` takes the default data set; the images of a synthetic set depend on its size."""
    assert compose("experiment=demo").data.synthetic == compose("data=synthetic").data.synthetic


def test_the_notebooks_size_composes() -> None:
    config = compose("experiment=demo", "debug=notebooks")
    assert (config.trainer.max_steps, config.data.synthetic.num_train, config.data.num_workers) == (3, 6, 0)


def test_table() -> None:
    table = Table([{"name": "<a>", "value": 0.12345}, {"name": "b", "value": float("nan"), "count": 3}])
    assert repr(table).splitlines() == ["name  value  count", "<a>   0.123", "b            3"]
    assert "<td>&lt;a&gt;</td><td>0.123</td><td></td>" in table._repr_html_()
    assert "<tbody></tbody>" in Table([])._repr_html_()


def test_show() -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    picture = np.zeros((4, 8, 3), np.uint8)
    figure = show([{"one": picture, "two": picture[..., 0]}, {"three": picture}], vmin=0, vmax=1)
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == ["one", "two", "three"]
    assert drawn[1].images[0].get_clim() == (0, 1)
    pyplot.close(figure)
