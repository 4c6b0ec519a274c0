"""Checkpoints that are damaged, hostile or of something else: one sentence each, wherever a file is read."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import class_table
from panoptic_ibs import load, weight_files
from panoptic_ibs.checkpoints import check_resume, check_start, load_weights, read_checkpoint
from panoptic_ibs.construction import build_model
from panoptic_ibs.descriptions import check_run, step_of
from panoptic_ibs.errors import CheckpointError, ConfigError, UserError
from panoptic_ibs.weight_files import read_tensors

MODEL: dict[str, Any] = {
    "backbone": {
        "_target_": "panoptic_ibs.backbones.TimmBackbone",
        "name": "resnet18",
        "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    },
    "head": {
        "_target_": "panoptic_ibs.heads.panoptic_fcn.PanopticFCN",
        "channels": 8,
        "feature_channels": 8,
        "depth": 1,
        "inference": {"mask_threshold": 0.5},
    },
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "channel_order": "rgb",
    "test_size": [64, None],
}


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    """A checkpoint as training writes it, but for its weights."""
    torch.manual_seed(0)
    model = build_model(MODEL, class_table())
    entry = {"version": "0.1.0", "model": MODEL, "classes": class_table().to_list(), "data": {}, "run": {}}
    weights = {f"model.{k}": v for k, v in model.state_dict().items()}
    return {"state_dict": weights, "global_step": 7, "panoptic_ibs": entry, "optimizer_states": []}


def changed(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    """A copy with one entry replaced, or taken out when ``new`` is ``...``; numbers in the path are positions."""
    first, _, rest = path.partition("/")
    key: Any = int(first) if first.isdigit() else first
    copy = value.copy()
    if rest:
        copy[key] = changed(value[key], rest, new)
    elif new is ...:
        del copy[key]
    else:
        copy[key] = new
    return copy


ENTRIES = [
    ("", 5, r"panoptic_ibs is 5; expected: an object"),
    ("", {}, r"panoptic_ibs\.model is missing"),
    ("classes", ..., r"panoptic_ibs\.classes is missing"),
    ("classes", [], r"panoptic_ibs\.classes is \[\]"),
    ("classes", [1], r"panoptic_ibs\.classes\[0\] is 1"),
    ("classes/1/color", ..., r"panoptic_ibs\.classes\[1\]\.color is missing"),
    ("classes/1/color", [1, 2], r"panoptic_ibs\.classes\[1\]\.color is \[1, 2\]"),
    ("classes/1/color", [1, 2, 256], r"panoptic_ibs\.classes\[1\]\.color\[2\] is 256"),
    ("classes/1/is_thing", "false", r"panoptic_ibs\.classes\[1\]\.is_thing is \"false\""),
    ("classes/0/dataset_id", float("nan"), r"panoptic_ibs\.classes\[0\]\.dataset_id is nan"),
    ("classes/0/name", None, r"panoptic_ibs\.classes\[0\]\.name is null"),
    ("classes/1/name", "stuff0", "the same name twice: stuff0"),
    ("model", ..., r"panoptic_ibs\.model is missing"),
    ("model", {"backbone": 1, "head": 2}, r"2 faults(.|\n)*model\.backbone is 1(.|\n)*model\.head is 2"),
    ("model/head", ..., r"panoptic_ibs\.model\.head is missing"),
    ("model/head/loss", 1, r"head: PanopticFCN .* unexpected keyword argument 'loss'.*version 0\.1\.0"),
    ("model/head/channels", "many", r"head\.channels is \"many\"; expected: a whole number"),
    ("model/head/channels", 16, r"are of another shape \('head\.\S+ is \(8, .*\) in the file and \(16, "),
    ("model/head/inference", {"mask": 1}, "has no option mask"),
    ("model/head/inference", 5, r"head\.inference is 5; expected: an object"),
    ("model/head/inference/mask_threshold", "high", r"head\.inference\.mask_threshold is \"high\"; expected: a number"),
    ("model/head/inference/mask_threshold", float("nan"), r"head\.inference\.mask_threshold is nan"),
    ("model/head/inference/top_num", 2.5, r"head\.inference\.top_num is 2\.5; expected: a whole number"),
    ("model/head/instance_ranges", [[1, 2], [3]], r"head\.instance_ranges"),
    ("model/head/deform", "no", r"head\.deform is \"no\"; expected: true or false"),
    ("model/head/classes", [1], r"head\.classes is \[1\]"),
    ("model/classes", [1], r"description: classes is \[1\]"),
    (
        "model/head/inference/_target_",
        "os.system",
        r"model\.head\.inference\._target_ is there; only backbone and head",
    ),
    ("model/head/_target_", "os.system", "made by code of 'os', which was not named"),
    ("model/head/_target_", "panoptic_ibs.heads.next.Next", "does not exist in this version"),
    ("model/head/_target_", "panoptic_ibs.backbones.TimmBackbone", "TimmBackbone is no head"),
    ("model/backbone/_target_", ..., "backbone: _target_ '' does not exist"),
    ("model/backbone/name", "resnet18d_next", "timm has no model"),
    ("model/backbone/options", 5, r"backbone\.options is 5; expected: an object"),
    ("model/backbone/options/checkpoint_path", "second.pth", r"backbone\.options\.checkpoint_path"),
    ("model/backbone/options/pretrained", True, r"backbone\.options\.pretrained"),
    ("model/backbone/options/pretrained_cfg", {"file": "x"}, r"backbone\.options\.pretrained_cfg"),
    ("model/backbone/options/pretrained_cfg_overlay", {"url": "x"}, r"backbone\.options\.pretrained_cfg_overlay"),
    ("model/backbone/options/cache_dir", "x", r"backbone\.options\.cache_dir"),
    ("model/backbone/options/weights_file", "second", r"backbone\.options\.weights_file: 'second' is text"),
    ("model/backbone/options/act_layer", "../second.pth", r"backbone\.options\.act_layer"),
    ("model/backbone/options/block_args", {"init": "x.pth"}, r"backbone\.options\.block_args\.init"),
    ("model/dropout", 0.5, "unexpected keyword argument 'dropout'"),
    ("model/channel_order", "BGR", r"channel_order is \"BGR\"; expected: rgb or bgr"),
    ("model/pixel_std", [1.0, 0.0, 1.0], r"panoptic_ibs\.model\.pixel_std\[1\] is 0\.0"),
    ("model/pixel_mean", [1.0, float("nan"), 1.0], r"panoptic_ibs\.model\.pixel_mean\[1\] is nan"),
    ("model/test_size", [0, 0], r"test_size\[0\] is 0"),
    ("model/test_size", [5], r"test_size is \[5\]; expected: a list of 2 values"),
    ("model/test_size", "large", r"test_size is \"large\""),
    ("model/size_divisor", 0, r"size_divisor is 0"),
]


@pytest.mark.parametrize(("path", "value", "message"), ENTRIES)
def test_descriptions_that_are_damaged_or_of_another_version(
    path: str, value: Any, message: str, sound: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "bad.ckpt"
    torch.save(changed(sound, f"panoptic_ibs/{path}".rstrip("/"), value), file)
    with pytest.raises(UserError, match=message) as caught:
        load(file)
    assert "bad.ckpt" in str(caught.value)


def test_a_sound_one_loads(sound: dict[str, Any], tmp_path: Path) -> None:
    torch.save(sound, tmp_path / "ok.ckpt")
    model = load(
        tmp_path / "ok.ckpt", overrides={"head": {"inference": {"mask_threshold": 0.25}}, "test_size": [32, 64]}
    )
    assert model.head.inference.mask_threshold == 0.25  # type: ignore[union-attr]
    assert model.test_size == (32, 64)
    assert step_of(read_checkpoint(tmp_path / "ok.ckpt"), "ok.ckpt") == 7


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.sampled_from(
        [[], {}, [1], [1, 2], [0, 0], {"a": 1}, [[]], "panoptic_ibs.construction.load", "../x.pth", float("nan")]
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all entries of nested containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(way for key, inner in items for way in places(inner, (*path, key)))]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_of_a_description_is_a_sentence(data: st.DataObject, sound: dict[str, Any]) -> None:
    """Loaded, resumed or started from: never anything else than an error of ours."""
    entry = copy.deepcopy(sound["panoptic_ibs"])
    entry["settings"] = {"head.channels": 8, "seed": 0}
    entry["model"]["head"]["instance_ranges"] = [[1, 128], [64, 256], [128, 512], [256, 1024], [512, 2048]]
    whole = copy.deepcopy(entry)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(entry)[1:]))
        place: Any = entry
        for key in way:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(JUNK)
        else:
            del place[last]
            break  # positions may have moved
        if not isinstance(entry, dict) or data.draw(st.booleans()):
            break
    state = {**sound, "panoptic_ibs": entry}
    for read in (
        lambda: weights_into_model(state),
        lambda: check_state(state, whole),
        lambda: check_start_of(state, whole["model"]),
    ):
        with contextlib.suppress(UserError):
            read()


def weights_into_model(state: dict[str, Any]) -> None:
    """:func:`load` without the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("panoptic_ibs.construction.read_checkpoint", lambda *_: state)
        load("x.ckpt")


def check_state(state: dict[str, Any], description: dict[str, Any]) -> None:
    """:func:`check_resume` without the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("panoptic_ibs.checkpoints.read_checkpoint", lambda *_: state)
        check_resume("x.ckpt", description)


def check_start_of(state: dict[str, Any], model: dict[str, Any]) -> None:
    """:func:`check_start` without the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("panoptic_ibs.checkpoints.read_checkpoint", lambda *_: state)
        check_start("x.ckpt", model)


@pytest.mark.parametrize("step", ["many", -1, 1.5, None, True])
def test_steps(step: Any) -> None:
    with pytest.raises(CheckpointError, match=r"x\.ckpt: global_step is"):
        step_of({"global_step": step}, "x.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, k: {**w, k: w[k] * float("nan")}, r"1 of its \d+ tensors hold NaN or infinity, first 'head"),
        (lambda w, k: {**w, k: w[k] / 0}, "NaN or infinity"),
        (lambda w, k: {n: v for n, v in w.items() if n != k}, r"1 tensors are missing \('head"),
        (lambda w, k: {**w, "model.head.other": w[k]}, r"1 tensors are not known \('head\.other'"),
        (lambda w, k: {**w, k: w[k][:1]}, "1 tensors are of another shape"),
        (lambda w, k: {**w, k: w[k].int()}, "1 tensors are of another type"),
        (lambda w, k: {**w, k: w[k].to_sparse()}, "1 of its tensors hold no plain numbers"),
        (lambda w, k: {}, "tensors are missing"),
        (lambda w, k: 5, "tensors are missing"),
    ],
)
def test_weights_that_are_damaged_or_of_another_network(
    change: Callable[..., Any], message: str, sound: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "bad.ckpt"
    torch.save({**sound, "state_dict": change(sound["state_dict"], "model.head.thing_generator.embed.weight")}, file)
    with pytest.raises(CheckpointError, match=rf"bad\.ckpt: .*{message}"):
        load(file)


def test_fine_tuning_and_resuming_look_as_well(sound: dict[str, Any], tmp_path: Path) -> None:
    file, key = tmp_path / "nan.ckpt", "model.head.thing_generator.embed.weight"
    torch.save({**sound, "state_dict": {**sound["state_dict"], key: sound["state_dict"][key] * float("inf")}}, file)
    for read in (lambda f: load_weights(build_model(MODEL, class_table()), f), lambda f: check_resume(f, {})):
        with pytest.raises(CheckpointError, match=r"nan\.ckpt: .*NaN or infinity"):
            read(file)
    torch.save({**sound, "panoptic_ibs": {"model": 3}}, file)
    with pytest.raises(CheckpointError, match=r"panoptic_ibs\.model is 3"):
        check_resume(file, {})


def test_weights_of_a_backbone(tmp_path: Path) -> None:
    """They are fetched or copied as well: damage and NaN are found before anything is trained on them."""
    backbone = build_model(MODEL, class_table()).backbone.model.state_dict()
    file = tmp_path / "resnet.pth"
    torch.save({**backbone, "conv1.weight": backbone["conv1.weight"] * torch.nan}, file)
    weights = {**MODEL, "backbone": {**MODEL["backbone"], "weights": str(file)}}
    with pytest.raises(CheckpointError, match=r"resnet\.pth: 1 of its \d+ tensors hold NaN"):
        build_model(weights, class_table())
    torch.save(backbone, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"resnet\.pth: is damaged"):
        build_model(weights, class_table())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"channel_order": "BGR"}, r"channel_order is \"BGR\"; expected: rgb or bgr"),
        ({"test_size": [0, 0]}, r"test_size\[0\] is 0"),
        ({"test_size": 5}, "test_size is 5"),
        ({"head": {"inference": {"mask_threshold": float("nan")}}}, r"head\.inference\.mask_threshold is nan"),
        ({"head": 5}, r"head=5 is a group of options"),
        ({"backbone": None}, r"backbone=None is a group of options"),
        ({"refine": 5}, r"refine is 5; expected: a list of steps"),
        ({"refine": [5]}, r"refine is \[5\]; expected: a list of steps"),
        ({"head": {"inference": 5}}, r"head\.inference=5 is a group of options"),
        ({"head": {"depht": 1}}, r"head\.depht is no option of this model"),
        ({"backbone": {"options": {"checkpoint_path": "x"}}}, r"backbone\.options\.checkpoint_path is no option"),
    ],
)
def test_overrides(overrides: dict[str, Any], message: str, sound: dict[str, Any], tmp_path: Path) -> None:
    torch.save(sound, tmp_path / "ok.ckpt")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "ok.ckpt", overrides=overrides)


# --- what Lightning keeps of a run -------------------------------------------------------------------------------


def run_state() -> dict[str, Any]:
    """After two steps, as Lightning writes it."""
    counts = {"ready": 2, "completed": 2}
    progress = {"total": counts, "current": counts}
    fit = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": 2},
        "epoch_loop.batch_progress": {**progress, "is_last_batch": False},
        "epoch_loop.scheduler_progress": progress,
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": progress, "zero_grad": progress}},
        "epoch_progress": progress,
    }
    moment = {"step": torch.tensor(2.0), "exp_avg": torch.ones(3)}
    return {
        "state_dict": {},
        "optimizer_states": [{"state": {0: moment}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 2}],
        "loops": {"fit_loop": fit},
        "callbacks": {"SeedSteps": {"batches": 2}},
        "epoch": 0,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "PanopticDataModule": {"epoch": 0, "items": 4},
    }


STEPS = "loops/fit_loop/epoch_loop.automatic_optimization.optim_progress/optimizer/step/total/completed"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("global_step", "many", 'global_step is "many"'),
        ("global_step", 3, "global_step is 3; but the loop's counter is at 2"),
        ("epoch", "x", 'epoch is "x"'),
        ("state_dict", 5, "state_dict is 5"),
        ("optimizer_states", 5, "optimizer_states is 5"),
        ("optimizer_states", [5], r"optimizer_states\[0\] is 5"),
        ("optimizer_states", [], r"optimizer_states is \[\]"),
        ("optimizer_states/0/state/0/exp_avg", torch.tensor([1.0, torch.nan]), "1 of its 2 tensors hold NaN.*exp_avg"),
        ("lr_schedulers", [5], r"lr_schedulers\[0\] is 5"),
        ("lr_schedulers", [], r"lr_schedulers is \[\]"),
        ("lr_schedulers/0/base_lrs", [float("nan")], r"base_lrs\[0\] is nan"),
        ("loops", {}, r"loops\.fit_loop is missing"),
        ("loops/fit_loop", {}, "5 faults"),
        (STEPS, -1, "completed is -1"),
        (STEPS, ..., "completed is missing"),
        ("callbacks", 5, "callbacks is 5"),
        ("callbacks/SeedSteps", 5, r"callbacks\.SeedSteps is 5"),
        ("pytorch-lightning_version", "none", 'pytorch-lightning_version is "none"'),
        ("PanopticDataModule", 5, "PanopticDataModule is 5"),
        ("PanopticDataModule/items", None, r"PanopticDataModule\.items is null"),
    ],
)
def test_what_a_run_goes_on_from(path: str, value: Any, message: str) -> None:
    check_run(run_state(), "x.ckpt")
    with pytest.raises(CheckpointError, match=rf"x\.ckpt: (.|\n)*{message}"):
        check_run(changed(run_state(), path, value), "x.ckpt")


# --- bytes -----------------------------------------------------------------------------------------------------


def big(path: Path) -> bytes:
    torch.save({"state_dict": {f"w{i}": torch.randn(500) for i in range(8)}}, path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl"])
def test_every_changed_byte_of_a_tensor_is_found(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"w{suffix}"
    content = bytearray(big(file))
    read_tensors(file)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.\w+: is damaged: the bytes of w/data/\d are not those"):
        read_tensors(file)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_damaged_files_are_one_sentence_or_read_alike(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut off, overwritten, repeated: either every tensor is what was written, or the file is refused by name."""
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    suffix = data.draw(st.sampled_from([".ckpt", ".safetensors", ".pkl"]))
    file, tensors = folder / f"w{suffix}", {"a": torch.arange(40.0), "b": torch.ones(3, 2)}
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, file)
    elif suffix == ".pkl":
        file.write_bytes(pickle.dumps({k: v.numpy() for k, v in tensors.items()}))
    else:
        torch.save(tensors, file)
    content = bytearray(file.read_bytes())
    at, length = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 40))
    kind = data.draw(st.sampled_from(["cut", "overwrite", "double", "remove"]))
    if kind == "cut":
        content = content[:at]
    elif kind == "overwrite":
        content[at : at + length] = data.draw(st.binary(min_size=length, max_size=length))
    elif kind == "double":
        content[at:at] = content[at : at + length]
    else:
        del content[at : at + length]
    file.write_bytes(content)
    try:
        found = read_tensors(file)
    except CheckpointError as error:
        found, message = None, str(error)
    if found is None:
        assert message.startswith(str(file))
        return
    if suffix == ".ckpt":  # the other formats have no check sums
        for name, value in tensors.items():
            assert torch.equal(found[name], value)


def test_check_sums_are_looked_at_once_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.ckpt"
    content = bytearray(big(file))
    opened: list[Any] = []
    monkeypatch.setattr(
        weight_files.zipfile, "ZipFile", lambda *a, kind=weight_files.zipfile.ZipFile: opened.append(a) or kind(*a)
    )
    read_tensors(file)
    read_tensors(file)
    assert len(opened) == 1
    content[len(content) // 2] ^= 1  # same size; written again, so the time of change differs
    time.sleep(0.01)
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_tensors(file)


def test_files_without_check_sums_are_read(tmp_path: Path) -> None:
    """``torch.serialization.set_crc32_options(False)`` writes zeros in their place."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(5)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_tensors(tmp_path / "w.pt")["a"].sum() == 5


def test_pipes_folders_and_names(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    for name, message in {
        "pipe.ckpt": "must be a regular file, this is a pipe",
        "folder.ckpt": "is a folder",
        "x" * 300: "no such checkpoint",
        "none\0.ckpt": "no such checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="is a pipe"):
        read_tensors(tmp_path / "pipe.ckpt")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not a valid JSON"),
        ("[]", "'weight_map' does not give"),
        ('{"weight_map": {}}', "'weight_map' does not give"),
        ('{"weight_map": {"a": 5}}', "'weight_map' does not give"),
        ('{"weight_map": {"a": ".."}}', "(is a folder|no such file|neither)"),
        ('{"weight_map": {"a": "none.safetensors"}}', r"none\.safetensors: there is no such file"),
    ],
)
def test_folders_in_parts(index: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(folder)


# --- convolutions of the other kind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            {"deform": True},
            {},
            r"1 of the convolutions are deformable in the file and plain here, first 'head\.position",
        ),
        ({}, {"deform": True}, "1 of the convolutions are plain in the file and deformable here"),
        ({"deform": True}, {"deform_features": True}, "deformable in the file .* and 1 of the convolutions are plain"),
        ({"deform": True, "deform_features": True}, {"deform": True, "deform_features": True}, ""),
        ({"depth": 2, "deform": True}, {"depth": 1}, "1 of the convolutions are deformable in the file"),
    ],
)
def test_fine_tuning_with_convolutions_of_the_other_kind(
    theirs: dict[str, Any], ours: dict[str, Any], message: str, tmp_path: Path
) -> None:
    networks = [build_model({**MODEL, "head": {**MODEL["head"], **o}}, class_table()) for o in (theirs, ours)]
    torch.save(networks[0].state_dict(), tmp_path / "start.pth")
    if not message:
        assert load_weights(networks[1], tmp_path / "start.pth").complete
        return
    with pytest.raises(CheckpointError, match=rf"start\.pth: .*{message}.*Set head\.deform"):
        load_weights(networks[1], tmp_path / "start.pth")


def test_fine_tuning_on_classes_in_another_order(
    sound: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.save(sound, tmp_path / "start.ckpt")
    names = class_table().names
    check_start(tmp_path / "start.ckpt", MODEL, names)
    check_start(tmp_path / "start.ckpt", MODEL, names[:2])  # the shapes say it
    assert not [w for w in recwarn if "init_from" in str(w.message)]
    with pytest.warns(UserWarning, match=r"first, 1: 'stuff1' there, 'thing1' here"):
        check_start(tmp_path / "start.ckpt", MODEL, [names[0], names[3], names[2], names[1], names[4]])


def test_fine_tuning_with_a_deformable_backbone(tmp_path: Path) -> None:
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    plain: dict[str, Any] = {"_target_": "panoptic_ibs.backbones.TimmBackbone", "name": "resnet50", "options": options}
    deformable = {**plain, "_target_": "panoptic_ibs.backbones.deformable.DeformableBackbone", "deform_stages": 1}
    networks = [build_model({**MODEL, "backbone": b}, class_table()) for b in (plain, deformable)]
    torch.save(networks[0].state_dict(), tmp_path / "start.pth")
    with pytest.raises(
        CheckpointError, match=r"plain in the file and deformable here, first 'backbone\..*deform_stages"
    ):
        load_weights(networks[1], tmp_path / "start.pth")
