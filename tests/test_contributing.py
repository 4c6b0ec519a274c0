"""The walks of CONTRIBUTING.md, done as they stand in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = "data.synthetic.num_train=4 data.synthetic.num_val=2 data.synthetic.size=[96,192]"


def walk(title: str) -> list[str]:
    """The blocks of commands of a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    body = re.split(rf"^## {title}$", text, flags=re.M)[1]
    return re.findall(r"^```bash\n(.*?)^```$", re.split(r"^## ", body, flags=re.M)[0], flags=re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("src", "conf", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def follow(blocks: list[str], copy: Path, small: str = "") -> str:
    """Run the blocks with the copy's package; what they print. ``small`` is added to trainings and evaluations."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PANOPTIC_IBS_CACHE": str(copy / "cache")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    printed = []
    for block in blocks:
        script = re.sub(r"(-m panoptic_ibs\.(train|evaluate) .*)", rf"\1 {small}", block)
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed.append(done.stdout)
    return "".join(printed)


@pytest.mark.skipif(shutil.which("bash") is None, reason="the walk's commands need bash")
def test_the_walk_that_adds_a_head(copy: Path) -> None:
    blocks = walk("Add a head")
    assert len(blocks) == 3
    follow(blocks, copy, SMALL)
    for run in ("my_head", "my_head_again"):
        assert (copy / "runs" / run / "metrics.json").is_file()
    assert "panoptic_ibs.heads.own_head.OwnHead" in (copy / "runs" / "my_head" / ".hydra" / "config.yaml").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="the walk's commands need bash")
def test_the_walk_that_adds_a_data_set(copy: Path) -> None:
    blocks = walk("Add a data set")
    assert len(blocks) == 3
    printed = follow(blocks, copy)
    assert "run folder:" in printed
    assert (copy / "runs" / "squares" / "checkpoints" / "last.ckpt").is_file()
    assert "square" in (copy / "runs" / "squares" / "metrics.json").read_text()


def test_every_file_that_the_page_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Where things are")[1].split("## Add a head")[0]
    names = re.findall(r"`([\w/]+(?:\.py|/))`", table)
    assert len(names) > 40
    assert [name for name in names if not (ROOT / "src" / "panoptic_ibs" / name).exists()] == []
