"""Checkpoints on the hub: huggingface_hub itself over a folder as its cache, and what would be uploaded."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

import panoptic_ibs
from cli_helpers import compose, run
from helpers import class_table
from panoptic_ibs import hub, instantiation
from panoptic_ibs.checkpoints import read_checkpoint
from panoptic_ibs.construction import build_model
from panoptic_ibs.errors import CheckpointError

CLASSES = class_table()


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a run leaves it: weights, a moving average that differs, and an optimiser."""
    config = compose("recipe=none", "backbone=tiny", "head.channels=8", "head.feature_channels=8", "head.depth=1")
    description = instantiation.model_config(config)
    torch.manual_seed(0)
    model = build_model(description, CLASSES)
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    average = {key: value * 0.5 if value.is_floating_point() else value for key, value in weights.items()}
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "metrics.json").write_text('{"pq": 0.123, "num_images": 7}')
    entry = {"version": "0", "model": description, "classes": CLASSES.to_list(), "run": {"head": "panoptic_fcn"}}
    state = {"state_dict": weights, "ema_state_dict": average, "optimizer_states": [{"state": {}}], "global_step": 9}
    torch.save({**state, "panoptic_ibs": entry}, run_dir / "checkpoints" / "last.ckpt")
    return run_dir / "checkpoints" / "last.ckpt"


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's own cache, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def keep(folder: Path, repo: str, file: Path, name: str = hub.FILE, revision: str = "main") -> None:
    """Lay a file into the cache as the library lays it there."""
    place = folder / f"models--{repo.replace('/', '--')}"
    commit = "a" * 40
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place / "snapshots" / commit / name)


def test_a_name_of_the_hub_is_loaded_as_its_file(ckpt: Path, hub_folder: Path) -> None:
    keep(hub_folder, "owner/street-1.0", ckpt)
    keep(hub_folder, "owner/street-1.0", ckpt, "other.ckpt", "v2")
    expected = panoptic_ibs.load(ckpt).state_dict()
    for name in ("hf://owner/street-1.0", "hf://owner/street-1.0@main", "hf://owner/street-1.0@v2/other.ckpt"):
        found = panoptic_ibs.load(name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_commands_take_names_of_the_hub(ckpt: Path, hub_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    keep(hub_folder, "owner/street", ckpt)
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(tmp_path / "a.png")
    words = (f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}", "device=cpu")
    done = run("predict", "ckpt_path=hf://owner/street", *words)
    assert done.code == 0, done.err
    assert (tmp_path / "out/panoptic/a.png").is_file()
    done = run("predict", "ckpt_path=hf://owner/nothing", *words)
    assert (done.code, "hf://owner/nothing: was never fetched to this machine" in done.message) == (2, True)


def test_a_file_of_the_hub_is_not_executed(hub_folder: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": {}, "panoptic_ibs": Code()}, tmp_path / "bad.ckpt")
    keep(hub_folder, "owner/bad", tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError):
        panoptic_ibs.load("hf://owner/bad")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["hf://owner", "hf://", "hf://a/b@", "hf://a b/c", "hf:///a/b"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="is no name on the Hugging Face hub; they are hf://OWNER/NAME"):
        panoptic_ibs.load(name)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "there is no such repository, or you may not see it"),
        ("GatedRepoError", "there is no such repository, or you may not see it"),
        ("RevisionNotFoundError", "no such revision"),
        ("RemoteEntryNotFoundError", "no such file"),
        ("HfHubHTTPError", "the hub refuses, or cannot be reached"),
    ],
)
def test_what_the_hub_says_is_one_sentence(error: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(huggingface_hub.errors, error)
    raised = kind.__new__(kind)
    Exception.__init__(raised, "said\nso")

    def refuse(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=words):
        hub.fetch("hf://owner/street")


def test_what_is_pushed_is_the_network_alone_and_loads(
    ckpt: Path, hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, real = tmp_path / "sent", huggingface_hub.HfApi

    class Api:
        """The library's, as far as its signatures go."""

        def __getattr__(self, name: str) -> Any:
            signature = inspect.signature(getattr(real, name))

            def call(*arguments: Any, **named: Any) -> str:
                given = signature.bind(self, *arguments, **named).arguments
                assert given["repo_id"] == "owner/street"
                if name == "create_repo":
                    assert given["private"]
                    return "https://hub/owner/street"
                shutil.copytree(given["folder_path"], sent)
                return ""

            return call

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert panoptic_ibs.push(ckpt, "owner/street", private=True) == "https://hub/owner/street"
    assert sorted(path.name for path in sent.iterdir()) == ["README.md", "model.ckpt"]
    state = read_checkpoint(sent / "model.ckpt")
    assert set(state) == {"panoptic_ibs", "state_dict", "global_step"}
    keep(hub_folder, "owner/street", sent / "model.ckpt")
    ours, theirs = panoptic_ibs.load(ckpt).state_dict(), panoptic_ibs.load("hf://owner/street").state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    text = (sent / "README.md").read_text()
    assert 'panoptic_ibs.load("hf://owner/street")' in text
    assert "Things: thing0, thing1, thing2." in text
    assert "| pq |\n|---|\n| 12.3 |" in text
    with pytest.raises(CheckpointError, match="is no name on the Hugging Face hub"):
        panoptic_ibs.push(ckpt, "street")
