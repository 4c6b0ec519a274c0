"""Reading checkpoints without executing anything in them, and loading what fits of their weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError
from .hub import fetch, on_hub
from .settings import differences, flat
from .weight_files import ENTRY, check_numbers, read_tensors

RESUMABLE = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "callbacks")
RESUME_REMEDY = (
    "Resume with the configuration of the run that made it, or start from what fits of its weights with init_from= "
    "instead of ckpt_path=."
)
WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a file of tensors and plain containers: ``.safetensors``, ``torch.save``, a pickle of arrays.

    Args:
        path: a file, or ``hf://OWNER/NAME`` on the Hugging Face hub.
        map_location: where the tensors go.

    Raises:
        CheckpointError: no such file, a folder, damaged, not a checkpoint, or one that holds Python objects: those
            could run code when they are read, so they are refused.
    """
    if on_hub(path):
        path = fetch(str(path))
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: there is no such checkpoint file.")
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: is a folder; give the checkpoint file itself.")
    return read_tensors(path, map_location)


def model_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's weights in a checkpoint: the moving average if there is one, without the prefix ``model.``.

    Takes our checkpoints, plain state dicts, and state dicts wrapped in one of the usual entries.
    """
    averaged = state.get("ema_state_dict")
    if isinstance(averaged, Mapping) and averaged:
        state = averaged
    for key in WRAPPERS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    if any(k.startswith(("model.backbone.", "model.head.")) for k in tensors):
        return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return tensors


def sound_weights(state: Mapping[str, Any], source: object) -> dict[str, Tensor]:
    """:func:`model_weights` of numbers that a network can compute with.

    Args:
        state: a checkpoint.
        source: the file, for messages.

    Raises:
        CheckpointError: see :func:`panoptic_ibs.weight_files.check_numbers`.
    """
    weights = model_weights(state)
    check_numbers(weights, source)
    return weights


def misfit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What keeps weights from being those of a model, as a part of a sentence; empty when they are."""
    missing = [f"{name!r}" for name in own if name not in weights]
    unknown = [f"{name!r}" for name in weights if name not in own]
    shapes = [
        f"{name!r} is {tuple(weights[name].shape)} in the file and {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    kinds = [
        f"{name!r} is {weights[name].dtype} in the file"
        for name, value in own.items()
        if name in weights and weights[name].is_floating_point() != value.is_floating_point()
    ]
    groups = {"missing": missing, "not known": unknown, "of another shape": shapes, "of another type": kinds}
    return "; ".join(
        f"{len(found)} tensors are {what} ({found[0]}{', ...' * (len(found) > 1)})"
        for what, found in groups.items()
        if found
    )


@dataclass
class LoadReport:
    """What came of loading weights; names as in the model.

    Attributes:
        path: the file.
        loaded: names with the file's values.
        missing: names that the file lacks, which keep their values.
        unexpected: names that only the file has.
        misshapen: (name, shape in the file, shape in the model); these keep the model's values.
    """

    path: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every weight of the model came from the file."""
        return not self.missing and not self.misshapen

    def rows(self) -> list[tuple[str, int, str]]:
        """(state, number of tensors, examples): a table of what was loaded and what was skipped."""
        skipped = [f"{name} {tuple(theirs)} in the file, {tuple(ours)} here" for name, theirs, ours in self.misshapen]
        groups = [("loaded", self.loaded), ("missing", self.missing), ("unexpected", self.unexpected)]
        groups.append(("misshapen", skipped))
        return [(name, len(found), "; ".join(found[:3]) + (" ..." if len(found) > 3 else "")) for name, found in groups]

    def __str__(self) -> str:
        return "\n".join(f"{name:>11} {count:>5}  {examples}" for name, count, examples in self.rows())


def load_weights(model: nn.Module, path: str | Path, strict: bool = False) -> LoadReport:
    """Load the weights of a file into ``model`` where names and shapes agree.

    Args:
        strict: demand that every weight of the model be in the file.

    Raises:
        CheckpointError: an unreadable file; no tensor that fits; convolutions that are deformable there and not here,
            or the other way round; with ``strict``, a missing or misshapen tensor.
    """
    weights = sound_weights(read_checkpoint(path), path)
    own = model.state_dict()
    if differs := _other_convolutions(weights, own):
        raise CheckpointError(
            f"{path}: {differs}. Set head.deform, head.deform_features or the backbone's deform_stages as in the run "
            "that the file comes from."
        )
    report = LoadReport(str(path))
    for name, value in own.items():
        if name not in weights:
            report.missing.append(name)
        elif weights[name].shape != value.shape:
            report.misshapen.append((name, tuple(weights[name].shape), tuple(value.shape)))
        else:
            report.loaded.append(name)
    report.unexpected = [name for name in weights if name not in own]
    if not any(own[name].ndim > 0 for name in report.loaded):
        raise CheckpointError(
            f"{path}: none of its {len(weights)} tensors fits the model by name and shape (the file has "
            f"{_examples(list(weights))}; the model has {_examples(list(own))}). Give a checkpoint of this head and "
            "backbone; a backbone's own weights go to backbone.weights=FILE."
        )
    if strict and not report.complete:
        raise CheckpointError(f"{path}: does not fit the model:\n{report}")
    model.load_state_dict({name: weights[name] for name in report.loaded}, strict=False)
    return report


_OFFSETS = (".offset_mask.weight", ".offset.weight")  # what only deformable convolutions have


def _other_convolutions(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Which convolutions are deformable in one of two networks alone, as a part of a sentence; empty if none is."""

    def places(names: Mapping[str, Tensor]) -> set[str]:
        return {name.removesuffix(end) for name in names for end in _OFFSETS if name.endswith(end)}

    theirs, ours = places(weights), places(own)
    told = []
    for kind, found in (
        ("deformable in the file and plain here", {p for p in theirs - ours if f"{p}.weight" in own}),
        ("plain in the file and deformable here", {p for p in ours - theirs if f"{p}.weight" in weights}),
    ):
        if found:
            told.append(f"{len(found)} of the convolutions are {kind}, first {min(found)!r}")
    return " and ".join(told)


def _examples(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names[:2]) + (", ..." if len(names) > 2 else "") if names else "none"


def check_start(path: str | Path, model: Mapping[str, Any], classes: Sequence[str] = ()) -> None:
    """Make sure that weights to start from will see what they were trained on: images in the same form, same strides.

    Warns when they tell as many classes apart as this run, but others or in another order: they are loaded by position.

    Args:
        path: the file; only checkpoints of this package say what they need.
        model: this run's network, see :func:`panoptic_ibs.construction.build_model`.
        classes: this run's names of classes.

    Raises:
        ConfigError: the network normalises images in another way, or places its strides elsewhere.
    """
    state = read_checkpoint(path)
    if ENTRY not in state:
        return
    from .descriptions import started_from

    entry = started_from(state, f"init_from={path}")
    theirs, names = entry["model"], [c["name"] for c in entry.get("classes", ())]
    if len(names) == len(classes) and names != list(classes):
        first = next(i for i, (a, b) in enumerate(zip(names, classes, strict=True)) if a != b)
        warnings.warn(
            f"init_from={path}: its classes are others than the data set's or in another order (first, {first}: "
            f"{names[first]!r} there, {classes[first]!r} here); their outputs start from those of other classes.",
            stacklevel=2,
        )
    defaults = {"channel_order": "rgb", "stride_in_1x1": False, "output_norm": False}
    wanted = []
    for key in ("pixel_mean", "pixel_std", "channel_order"):
        if theirs.get(key, defaults.get(key)) != model.get(key, defaults.get(key)):
            wanted.append(f"model.{key}={theirs.get(key, defaults.get(key))}".replace(" ", ""))
    backbone: Mapping[str, Any] = theirs.get("backbone", {})
    if backbone.get("name") == model["backbone"].get("name"):
        for key in ("stride_in_1x1", "output_norm"):
            value = backbone.get(key, False)
            if value != model["backbone"].get(key, False):
                wanted.append(f"++backbone.{key}={str(value).lower()}")
    if wanted:
        raise ConfigError(
            f"init_from={path}: its weights were trained with other settings, which this network must share. Add: "
            f"{' '.join(repr(w) if '[' in w else w for w in wanted)} (backbone=resnet50_msra holds those of the "
            "published Panoptic FCN)."
        )


def check_resume(path: str | Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint to resume from and make sure, before training starts, that it is of this very model.

    Args:
        path: the file.
        description: what this run would write into its own checkpoints (entry ``panoptic_ibs``).

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: another head, backbone, class table, data set, or another value of any key that decides
            training; a file of weights only.
    """
    from .descriptions import described, step_of

    state = read_checkpoint(path)
    if ENTRY not in state or "optimizer_states" not in state:
        raise CheckpointError(
            f"{path}: cannot be resumed, it is not a checkpoint of panoptic_ibs.train with its optimiser. To start "
            "from its weights only, use init_from= instead of ckpt_path=."
        )
    theirs = described(state, path)
    sound_weights(state, path)
    for part in ("head", "backbone"):
        have, want = (_part(d, part) for d in (theirs, description))
        if have != want:
            raise CheckpointError(f"{path}: was trained with {part} {have!r}, this run has {want!r}. {RESUME_REMEDY}")
    have_names, want_names = ([c["name"] for c in d["classes"]] for d in (theirs, description))
    if have_names != want_names:
        differ = (
            f"{len(have_names)} classes, this run's data set has {len(want_names)}"
            if len(have_names) != len(want_names)
            else f"classes that differ from the data set's: {', '.join(sorted(set(have_names) ^ set(want_names))[:4])}"
        )
        raise CheckpointError(
            f"{path}: has {differ}. Resume with the data set it was trained on (data=, data.root=), or start from what "
            "fits of its weights with init_from= instead of ckpt_path=."
        )
    if lacks := [name for name in RESUMABLE if name not in state]:
        raise CheckpointError(f"{path}: cannot be resumed, it lacks {', '.join(lacks)}. {RESUME_REMEDY}")
    step_of(state, path)
    if differ := _other_settings(theirs, description):
        raise CheckpointError(
            f"{path}: its run had other settings ({differ}). {RESUME_REMEDY} Steps, devices, evaluation and logging "
            "may differ."
        )
    return state


def _other_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What decides training and differs, in words. Checkpoints of earlier versions say less of it."""
    if not isinstance(theirs.get("settings"), Mapping):
        free = ("backbone.pretrained", "backbone.weights", "test_size")
        both = [{**flat(d.get("model") or {}, free), **flat(d.get("run") or {})} for d in (theirs, ours)]
        shared = both[0].keys() & both[1].keys()
        return differences(
            *({k: v for k, v in values.items() if k in shared and "memory." not in k} for values in both)
        )
    data = [
        {f"data.{k}": v for k, v in (d.get("data") or {}).items() if k in ("train_images", "train_ids")}
        for d in (theirs, ours)
    ]
    return differences({**theirs["settings"], **data[0]}, {**ours["settings"], **data[1]})


def _part(description: Mapping[str, Any], part: str) -> str:
    """Name of a head or backbone in a model description."""
    config = description["model"][part]
    return str(config.get("name") or str(config.get("_target_", "")).rpartition(".")[2])
