"""Reading checkpoints without executing anything in them, and loading what fits of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError
from .weight_files import read_tensors

ENTRY = "panoptic_ibs"  # our description of the model, beside Lightning's own entries
WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a file of tensors and plain containers: ``.safetensors``, ``torch.save``, a pickle of arrays.

    Raises:
        CheckpointError: no such file, truncated, not a checkpoint, or one that holds Python objects: those could run
            code when they are read, so they are refused.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint file.")
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
        CheckpointError: an unreadable file; no tensor that fits; with ``strict``, a missing or misshapen one.
    """
    weights = model_weights(read_checkpoint(path))
    own = model.state_dict()
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


def _examples(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names[:2]) + (", ..." if len(names) > 2 else "") if names else "none"


def check_start(path: str | Path, model: Mapping[str, Any]) -> None:
    """Make sure that weights to start from will see what they were trained on: images in the same form, same strides.

    Args:
        path: the file; only checkpoints of this package say what they need.
        model: this run's network, see :func:`panoptic_ibs.model.build_model`.

    Raises:
        ConfigError: the network normalises images in another way, or places its strides elsewhere.
    """
    entry = read_checkpoint(path).get(ENTRY)
    if not isinstance(entry, Mapping):
        return
    theirs, defaults = entry["model"], {"channel_order": "rgb", "stride_in_1x1": False, "output_norm": False}
    wanted = []
    for key in ("pixel_mean", "pixel_std", "channel_order"):
        if theirs.get(key, defaults.get(key)) != model.get(key, defaults.get(key)):
            wanted.append(f"model.{key}={theirs.get(key, defaults.get(key))}".replace(" ", ""))
    if theirs["backbone"].get("name") == model["backbone"].get("name"):
        for key in ("stride_in_1x1", "output_norm"):
            value = theirs["backbone"].get(key, False)
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
        CheckpointError: another head, backbone or class table; a file of weights only.
    """
    state = read_checkpoint(path)
    theirs = state.get(ENTRY)
    if not isinstance(theirs, Mapping) or "optimizer_states" not in state:
        raise CheckpointError(
            f"{path}: cannot be resumed, it is not a checkpoint of panoptic_ibs.train with its optimiser. To start "
            "from its weights only, use init_from= instead of ckpt_path=."
        )
    for part in ("head", "backbone"):
        have, want = (_part(d, part) for d in (theirs, description))
        if have != want:
            raise CheckpointError(
                f"{path}: was trained with {part} {have!r}, this run has {want!r}. Resume with the configuration of "
                "the run that made it, or start from what fits of its weights with init_from= instead of ckpt_path=."
            )
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
    return state


def _part(description: Mapping[str, Any], part: str) -> str:
    """Name of a head or backbone in a model description."""
    config = description["model"][part]
    return str(config.get("name") or str(config.get("_target_", "")).rpartition(".")[2])
