"""The wheel, in an environment of its own outside the repository: what it declares is all that it has there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import panoptic_ibs

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SMALL = (
    "data=lots", "data.synthetic.num_train=4", "data.synthetic.num_val=2", "data.synthetic.size=[64,128]",
    "data.num_workers=0",
)  # fmt: skip
pytestmark = pytest.mark.slow


def _closure(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions that pip would install for some requirements, by what the installed ones declare."""
    found: set[tuple[str, str]] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in found:
                found.add((requirement.name, wanted))
                left += [(Requirement(text), wanted) for text in distribution(requirement.name).requires or ()]
    return {name for name, _ in found}


def _link(names: Iterable[str], site: Path) -> None:
    """Put installed distributions into another environment, by links."""
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}:
            place = Path(str(installed.locate_file(top)))
            if place.exists() and not (site / top).exists():
                (site / top).symlink_to(place)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, and pip must not fetch it")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", folder, REPOSITORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of a fresh environment that has the wheel and nothing else yet."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    place = next(folder.glob("lib/python*/site-packages"))
    command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--no-index", wheel], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def site(bare: Path) -> Path:
    """The same with what the wheel depends on, without any extra."""
    _link(_closure(PROJECT["dependencies"]), bare)
    return bare


@pytest.fixture(scope="module")
def away(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, far from the repository."""
    return tmp_path_factory.mktemp("away")


def _run(site: Path, away: Path, program: str, *arguments: str | Path) -> str:
    """What a command of the environment prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PANOPTIC_IBS_CACHE": str(away / "cache"), "OMP_NUM_THREADS": "1"}
    command = [site.parents[2] / "bin" / program, *arguments]
    done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_the_package_and_the_configurations(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    here = {f.relative_to(REPOSITORY / "src") for f in (REPOSITORY / "src" / "panoptic_ibs").rglob("*") if f.is_file()}
    here |= {Path("panoptic_ibs") / f.relative_to(REPOSITORY) for f in (REPOSITORY / "conf").rglob("*.yaml")}
    assert inside == {path.as_posix() for path in here if "__pycache__" not in path.parts}
    assert {"panoptic_ibs/py.typed", "panoptic_ibs/conf/config.yaml"} <= inside
    assert wheel.name.startswith(f"panoptic_ibs-{panoptic_ibs.__version__}-py3-none-any")


SCRIPT = """
from pathlib import Path
import panoptic_ibs
from panoptic_ibs.structures import SegmentEmbeddings

def overlay(checkpoint: Path, picture: str) -> list[Path]:
    model = panoptic_ibs.load(checkpoint)
    (prediction,) = model.predict(picture)
    prediction.plot(picture).save("overlay.png")
    return [prediction.save("predictions", name=f"{model.classes.names[0]}.png")]

ibs = panoptic_ibs.IntraBatchSupervision(weight=1.0, partners="random")
"""
MISTAKES = """
panoptic_ibs.load(3)
panoptic_ibs.load("file").classes.nothing
panoptic_ibs.IntraBatchSupervision(weight="much")
"""


def test_a_user_gets_its_types(bare: Path, tmp_path: Path) -> None:
    """``py.typed`` holds: mypy, outside of the repository, takes sound code and finds wrong arguments and names."""
    pytest.importorskip("mypy")
    (tmp_path / "sound.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text("import panoptic_ibs\n" + MISTAKES)
    python = bare.parents[2] / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        python,
        "--cache-dir",
        tmp_path / "cache",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([*command, "sound.py", "wrong.py"], **options)  # type: ignore[call-overload]
    found = [line.partition(": error: ") for line in done.stdout.splitlines() if ": error: " in line]
    assert [place for place, _, _ in found] == ["wrong.py:3", "wrong.py:4", "wrong.py:5"], done.stdout + done.stderr
    assert [text.rpartition("[")[2] for _, _, text in found] == ["arg-type]", "attr-defined]", "arg-type]"]


def test_it_declares_what_it_needs(site: Path, away: Path) -> None:
    """Every module can be imported with the declared dependencies alone: no optional library, nothing of the tests'."""
    code = (
        "import pkgutil, importlib, panoptic_ibs as p; print(p.__file__)\n"
        "for found in pkgutil.walk_packages(p.__path__, 'panoptic_ibs.'): importlib.import_module(found.name)\n"
        "print(*p.extras.missing('wandb', 'matplotlib', 'albumentations'))"
    )
    origin, absent = _run(site, away, "python", "-c", code).splitlines()
    assert Path(origin).is_relative_to(site)
    assert absent == "wandb matplotlib albumentations"


def test_it_trains_and_evaluates(site: Path, away: Path) -> None:
    assert "data=cityscapes, coco_panoptic" in _run(site, away, "panoptic-ibs-train", "--help")
    training = ("head=ciae", "trainer.max_steps=10", "callbacks.progress=null", "sampling.batch_size=2")
    said = _run(site, away, "panoptic-ibs-train", *SMALL, *training, "evaluation.baselines=false", "run_dir=run")
    assert 'matplotlib is not installed: pip install "panoptic-ibs[report]"' in said
    assert said.splitlines()[-1] == f"run folder: {away / 'run'}"
    assert "\nthree things to try next:\n" in said
    assert "\nreport: " not in said
    assert not (away / "run" / "report").exists()
    _link(_closure(PROJECT["optional-dependencies"]["report"]), site)  # pip install "panoptic-ibs[report]"
    files = f"predictions={away / 'run' / 'predictions' / 'panoptic.json'}"
    scoring = ("data.val=val", "evaluation.bootstrap=0", "run_dir=scored")
    said = _run(site, away, "panoptic-ibs-evaluate", *SMALL, files, *scoring)
    assert "not installed" not in said
    assert (away / "scored" / "report" / "index.html").is_file()
    both = [json.loads((away / name / "metrics.json").read_text(encoding="utf-8")) for name in ("run", "scored")]
    assert both[0]["pq"] == both[1]["pq"]
    assert both[0]["versions"]["panoptic-ibs"] == panoptic_ibs.__version__
