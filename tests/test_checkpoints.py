"""Checkpoints: nothing in a file is executed, damage is named, and what does not fit is reported."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers import class_table
from panoptic_ibs.checkpoints import check_resume, check_start, load_weights, model_weights, read_checkpoint
from panoptic_ibs.errors import CheckpointError, ConfigError


class Hostile:
    """Runs a shell command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def net(classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, classes))


def description(
    classes: int = 3, head: str = "panoptic_ibs.heads.x.Head", backbone: str = "resnet18"
) -> dict[str, Any]:
    model = {
        "backbone": {"_target_": "panoptic_ibs.backbones.TimmBackbone", "name": backbone},
        "head": {"_target_": head},
    }
    return {"model": model, "classes": class_table(things=classes).to_list()}


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    marker, file = tmp_path / "ran", tmp_path / "evil.ckpt"
    if zipped:
        torch.save({"state_dict": Hostile(marker)}, file)
    else:
        file.write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.ckpt.*Python objects"):
        read_checkpoint(file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # the attack itself works, so its absence above means something


@pytest.mark.parametrize("content", [b"", b"hello world", None])
def test_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: (cannot be read|is no plain file)"):
        read_checkpoint(file)


def test_missing_and_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_weights_from_every_wrapping(tmp_path: Path) -> None:
    value = torch.ones(2)
    ours = {"state_dict": {"model.head.w": value, "ibs.x": value, "model.backbone.w": value}, "epoch": 1}
    assert set(model_weights(ours)) == {"head.w", "backbone.w"}
    averaged = {**ours, "ema_state_dict": {"model.head.w": 2 * value, "model.backbone.w": value}}
    assert model_weights(averaged)["head.w"].tolist() == [2, 2]
    assert set(model_weights({"model": {"module.w": value}})) == {"w"}
    assert set(model_weights({"w": value, "step": 3})) == {"w"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_all(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    source, model, file = net(), net(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), file)
    report = load_weights(model, file, strict=True)
    assert report.complete
    assert len(report.loaded) == 4
    x = torch.randn(2, 3)
    torch.testing.assert_close(model(x), source(x))


def test_other_class_count_loads_what_fits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, model, file = net(7), net(4), tmp_path / "seven.pth"
    torch.save({**source.state_dict(), "extra": torch.zeros(3)}, file)
    kept = model[1].weight.clone()
    report = load_weights(model, file)
    assert report.loaded == ["0.weight", "0.bias"]
    assert report.misshapen == [("1.weight", (7, 5), (4, 5)), ("1.bias", (7,), (4,))]
    assert report.unexpected == ["extra"]
    assert not report.missing
    torch.testing.assert_close(model[0].weight, source[0].weight)
    torch.testing.assert_close(model[1].weight, kept)
    assert "(7, 5) in the file, (4, 5) here" in str(report)
    with pytest.raises(CheckpointError, match=r"seven\.pth: does not fit"):
        load_weights(model, file, strict=True)


def test_nothing_fits(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(1, 1, 1).state_dict(), tmp_path / "conv.pth")
    with pytest.raises(CheckpointError, match=r"conv\.pth: none of its 2 tensors.*backbone\.weights"):
        load_weights(net(), tmp_path / "conv.pth")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (description(head="y.Other"), "trained with head 'Other', this run has 'Head'"),
        (description(backbone="resnet50"), "trained with backbone 'resnet50'"),
        (description(classes=5), "has 7 classes, this run's data set has 5"),
        (None, "init_from="),
    ],
)
def test_resume_of_another_run_fails(tmp_path: Path, theirs: dict[str, Any] | None, message: str) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"optimizer_states": [], "state_dict": {}, **({"panoptic_ibs": theirs} if theirs else {})}, file)
    with pytest.raises(CheckpointError, match=f"last.ckpt.*{message}.*init_from=" if theirs else message):
        check_resume(file, description())


def test_resume_of_renamed_classes_fails(tmp_path: Path) -> None:
    theirs = description()
    theirs["classes"][0]["name"] = "zebra"
    torch.save({"optimizer_states": [], "panoptic_ibs": theirs}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="zebra"):
        check_resume(tmp_path / "last.ckpt", description())


def test_resume_of_the_same_run(tmp_path: Path) -> None:
    state = {"optimizer_states": [], "panoptic_ibs": description(), "global_step": 7}
    torch.save(state, tmp_path / "torn.ckpt")
    with pytest.raises(CheckpointError, match=r"torn\.ckpt: cannot be resumed, it lacks state_dict, lr_schedulers"):
        check_resume(tmp_path / "torn.ckpt", description())
    torch.save({**state, "state_dict": {}, "lr_schedulers": [], "loops": {}, "callbacks": {}}, tmp_path / "last.ckpt")
    assert check_resume(tmp_path / "last.ckpt", description())["global_step"] == 7


def test_weights_to_start_from_keep_their_view_of_images(tmp_path: Path) -> None:
    """A network with BGR input and strides in the 1 x 1 convolutions must not be fine-tuned as if it were another."""
    caffe = {
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [1.0, 1.0, 1.0],
        "channel_order": "bgr",
        "backbone": {"name": "resnet50", "stride_in_1x1": True},
    }
    usual = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.0, 57.0, 57.0], "backbone": {"name": "resnet50"}}
    torch.save({"state_dict": {}, "panoptic_ibs": {"model": caffe}}, tmp_path / "c.ckpt")
    check_start(tmp_path / "c.ckpt", caffe)
    with pytest.raises(ConfigError, match=r"model\.channel_order=bgr \+\+backbone\.stride_in_1x1=true"):
        check_start(tmp_path / "c.ckpt", usual)
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    check_start(tmp_path / "weights.pth", usual)  # says nothing of itself
