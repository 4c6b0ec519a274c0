"""A head of somebody else: installed, named with packages=, trained with IBS, evaluated, loaded; what it may lack."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import panoptic_ibs
from cli_helpers import run
from panoptic_ibs import processes
from panoptic_ibs.checkpoints import read_checkpoint
from panoptic_ibs.errors import CheckpointError

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_head"
SETS = ("data.synthetic.num_train=4", "data.synthetic.num_val=2", "data.synthetic.size=[96,192]", "data.num_workers=0")
TRAIN = (
    "debug=fast", *SETS, "data.presets.crop_size=[64,96]", "callbacks.progress=null", "callbacks.pictures=null",
    "evaluation.baselines=false",
)  # fmt: skip
OWN = ("packages=own_head", "head=own_head")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANOPTIC_IBS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def own_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example, installed into a folder of its own."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, and pip must not fetch it")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", site, EXAMPLE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield site
    sys.modules.pop("own_head", None)


@pytest.fixture(scope="module")
def trained(own_head: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    result = run("train", *TRAIN, *OWN, f"run_dir={folder}", "trainer.max_steps=1")
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def last(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


def test_it_is_small() -> None:
    (code,) = EXAMPLE.glob("own_head/*.py")
    assert len(code.read_text().splitlines()) < 80
    assert len(list(EXAMPLE.rglob("*.yaml"))) == 1


def test_it_trains_with_ibs(own_head: Path, cache: Path, trained: Path, tmp_path: Path) -> None:
    random = ("sampling=random_crop", "ibs=random", f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1")
    result = run("train", *TRAIN, *OWN, *random)
    assert result.code == 0, result.err
    for folder in (trained, tmp_path / "run"):  # ibs=paired by default
        header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"train/loss_ibs", "train/loss_class", "train/loss_dice"} <= set(header)


def test_a_checkpoint_says_what_it_needs_and_is_loaded(last: Path) -> None:
    assert read_checkpoint(last)["panoptic_ibs"]["packages"] == ["own_head"]
    model = panoptic_ibs.load(last, packages=["own_head"])
    assert type(model.head).__module__ == "own_head"
    with pytest.raises(CheckpointError, match=r"'own_head', which was not named.*packages=own_head "):
        panoptic_ibs.load(last)


def test_it_resumes(own_head: Path, cache: Path, last: Path, tmp_path: Path) -> None:
    settings = (*TRAIN, *OWN, f"ckpt_path={last}", f"run_dir={tmp_path / 'more'}", "trainer.max_steps=2")
    result = run("train", *settings)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "more" / "metrics.json").read_text())["step"] == 2


def test_it_is_evaluated_and_predicts(cache: Path, last: Path, trained: Path, tmp_path: Path) -> None:
    both = (f"ckpt_path={last}", "+overrides.head.score_threshold=0.05")
    settings = (*both, *SETS, "trainer=cpu", "evaluation.bootstrap=0", f"run_dir={tmp_path / 'e'}")
    result = run("evaluate", *settings, "packages=own_head")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["num_images"] == 2
    (picture, _) = sorted(cache.rglob("val/**/*_leftImg8bit.png"))
    settings = (*both, f"input={picture}", f"output={tmp_path / 'p'}", "device=cpu")
    result = run("predict", *settings, "packages=own_head")
    assert result.code == 0, result.err
    (annotation,) = json.loads((tmp_path / "p" / "panoptic.json").read_text())["annotations"]
    assert annotation["segments_info"]
    result = run("predict", *settings)
    assert result.code == 2
    assert "made by code of 'own_head', which was not named" in result.message


def test_further_processes_get_the_packages(
    own_head: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(processes, "supervise", lambda module, arguments, *_: seen.append((module, arguments)) or 0)
    several = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    result = run("train", *TRAIN, *several, "packages=own_head,json", "head=own_head", f"run_dir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    ((module, arguments),) = seen
    assert module == "panoptic_ibs.train"
    assert "packages=[own_head,json]" in arguments
    monkeypatch.setenv("LOCAL_RANK", "0")
    alone = [word for word in arguments if not word.startswith("trainer")]
    monkeypatch.setenv("PANOPTIC_IBS_CHILD_ARGUMENTS", json.dumps([*alone, "trainer.max_steps=1"]))
    assert run("train").code == 0
    assert (tmp_path / "run" / "metrics.json").is_file()


# --- what is wrong, in one sentence


BAD = """
import torch
from panoptic_ibs.heads.base import Head
from panoptic_ibs.refine import Refinement
from panoptic_ibs.segments import Prediction, SoftSegments


class NoFuse(Head):
    weights = {"one": 1.0}

    def forward(self, features):
        return features[0]

    def losses(self, output, targets):
        return {"one": output.sum() * 0}, []

    def segments(self, output, sizes, targets=None):
        return []


class Whole(NoFuse):
    embeds = False

    def __init__(self, classes, levels):
        super().__init__(classes, levels)
        self.one = torch.nn.Conv2d(levels[0].channels, 1, 1)

    def forward(self, features):
        return self.one(features[0])

    def fuse(self, soft):
        return Prediction(torch.zeros(soft.size.original, dtype=torch.uint8), soft.class_ids, soft.scores)


class NoWeights(Whole):
    weights = {}


class NotFinite(Whole):
    weights = {"one": float("nan")}


class NoTerm(Whole):
    weights = {"one": 1.0, "two": 1.0}


class NoWeightOfATerm(Whole):
    weights = {"two": 1.0}


class Early(Refinement):
    def __call__(self, image, soft):
        return soft


class Late(Early):
    after = ("Early",)
"""


@pytest.fixture(scope="module")
def bad_heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package with heads that lack something."""
    site = tmp_path_factory.mktemp("bad")
    (site / "bad_heads" / "conf" / "head").mkdir(parents=True)
    (site / "bad_heads" / "__init__.py").write_text(BAD)
    for name in ("NoFuse", "Whole", "NoWeights", "NotFinite", "NoTerm", "NoWeightOfATerm"):
        text = f"_target_: bad_heads.{name}\nname: {name}\n"
        (site / "bad_heads" / "conf" / "head" / f"{name}.yaml").write_text(text)
    (site / "broken_package.py").write_text("raise RuntimeError('out of order')")
    (site / "spy_package.py").write_text("open(__file__ + '.ran', 'w').close()\nclass Net: pass\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield site
    sys.modules.pop("bad_heads", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head=NoFuse"], "head: bad_heads.NoFuse lacks fuse; every Head has them, see panoptic_ibs.heads.base."),
        (["head=NoWeights"], "head=NoWeights: it has no loss weights. Its constructor sets self.weights"),
        (["head=NotFinite"], "head=NotFinite: its loss weight of one is nan; it must be a finite number."),
        (["head=NoTerm"], "must have the same names: its weight two has no loss term."),
        (["head=NoWeightOfATerm"], "must have the same names: its loss term one has no weight."),
        (["head=Whole", "ibs=random"], "ibs=random: the head Whole has no segment embeddings"),
        (["head=Whole", "weigh=uncertainty", "weigh.groups={a:[nothing]}"],
         "weigh.groups.a: the head has no loss term nothing; it has one."),
        (["head=Whole", "+model.refine=[{_target_:bad_heads.Late},{_target_:bad_heads.Early}]"],
         "refine: Late must come after Early; change their order."),
        (["head=Whole", "+model.refine=[{_target_:bad_heads.Whole}]"],
         "refine[0]: bad_heads.Whole is no refine step (panoptic_ibs.refine.Refinement)."),
        (["head=Nowhere"], "head=Nowhere: there is no such option; choose one of NoFuse, NoTerm"),
    ],
    ids=lambda value: "_".join(value).replace("=", "-")[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_a_head_lacks(bad_heads: Path, cache: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    given = {word.partition("=")[0] for word in arguments}
    none = [] if "ibs" in given else ["ibs=none"]
    result = run("train", *TRAIN, "packages=bad_heads", *none, *arguments, f"run_dir={tmp_path / 'run'}")
    assert result.code == 2, result.err
    assert message in result.message


@pytest.fixture(scope="module")
def refined(bad_heads: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose network has refine steps."""
    steps, folder = "+model.refine=[{_target_:bad_heads.Early},{_target_:bad_heads.Late}]", tmp_path_factory.mktemp("r")
    settings = (*TRAIN, "packages=bad_heads", "head=Whole", "ibs=none", steps, f"run_dir={folder}")
    assert run("train", *settings, "trainer.max_steps=1").code == 0
    return folder / "checkpoints" / "last.ckpt"


def test_refine_steps_of_a_configuration(refined: Path) -> None:
    model = panoptic_ibs.load(refined, packages="bad_heads")
    assert [type(step).__name__ for step in model.refine] == ["Early", "Late"]


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ("nowhere_at_all", "packages=nowhere_at_all: the package cannot be imported (ModuleNotFoundError"),
        ("broken_package", "packages=broken_package: the package cannot be imported (RuntimeError: out of order)"),
        ("own-head", "packages=own-head: give the name that Python imports the package by"),
    ],
)
def test_packages_that_cannot_be_imported(bad_heads: Path, tmp_path: Path, packages: str, message: str) -> None:
    for command, own in (("train", ()), ("predict", ("ckpt_path=a", "input=b", "output=c"))):
        result = run(command, *own, f"packages={packages}")
        assert result.code == 2
        assert message in result.message


def test_no_file_makes_us_import_a_package(bad_heads: Path, cache: Path, refined: Path, tmp_path: Path) -> None:
    state = read_checkpoint(refined)
    state["panoptic_ibs"]["model"]["head"] = {"_target_": "spy_package.Net"}
    torch.save(state, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="made by code of 'bad_heads' and 'spy_package', which were not named"):
        panoptic_ibs.load(tmp_path / "foreign.ckpt")
    (picture, _) = sorted(cache.rglob("val/**/*_leftImg8bit.png"))
    changed = (f"ckpt_path={tmp_path / 'foreign.ckpt'}", f"input={picture}", f"output={tmp_path / 'p'}", "device=cpu")
    for more in ((), ("+overrides.backbone.freeze_norm=true",), ("packages=bad_heads",)):
        result = run("predict", *changed, *more)
        assert result.code == 2
        assert "'spy_package'" in result.message
    assert not list(bad_heads.glob("*.ran"))
    importlib.import_module("spy_package")  # the spy works
    assert list(bad_heads.glob("*.ran"))
