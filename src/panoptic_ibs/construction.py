"""Networks made from their descriptions: of configurations and of checkpoints."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import misfit, read_checkpoint, sound_weights
from .classes import ClassTable
from .errors import CheckpointError, ConfigError, UserError
from .heads.base import Head
from .model import PanopticModel
from .refine import Refinement

OWN_PACKAGE = __name__.partition(".")[0]
PARTS = ("backbone", "head", "refine")  # of a description, made from _target_


def foreign_packages(config: Any) -> list[str]:
    """Packages beside this one that the ``_target_`` in plain containers name, however deep, sorted."""
    found = set()
    if isinstance(config, Mapping):
        if isinstance(target := config.get("_target_"), str):
            found.add(target.partition(".")[0])
        found.update(name for value in config.values() for name in foreign_packages(value))
    elif isinstance(config, list | tuple):
        found.update(name for value in config for name in foreign_packages(value))
    return sorted(found - {OWN_PACKAGE, ""})


def check_packages(config: Mapping[str, Any], packages: Sequence[str]) -> None:
    """Make sure that a network's description names no package but those that the user named: it may be a file's, and
    importing is running.

    Raises:
        CheckpointError: it does.
    """
    unnamed = [name for name in foreign_packages(config) if name not in packages]
    if unnamed:
        listed = [*packages, *unnamed]
        was, it = ("was", "it") if len(unnamed) == 1 else ("were", "them")
        raise CheckpointError(
            f"the network is made by code of {' and '.join(map(repr, unnamed))}, which {was} not named. If you trust "
            f"{it}, give packages={','.join(listed)} (in Python packages={listed})."
        )


def _target(part: str, config: Mapping[str, Any]) -> Callable[..., Any]:
    """The class that a ``_target_`` names, once :func:`check_packages` has passed; it can be made and is what it must.

    Raises:
        CheckpointError: there is no such class, or it is of another kind.
        ConfigError: it lacks methods.
    """
    kind, word = {"backbone": (nn.Module, "network"), "head": (Head, "head")}.get(part, (Refinement, "refine step"))
    target = str(config.get("_target_", ""))
    module, _, name = target.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{part}: _target_ {target!r} does not exist in this version of the package.") from error
    if not (isinstance(made, type) and issubclass(made, kind)):
        raise CheckpointError(f"{part}: {target} is no {word} ({kind.__module__}.{kind.__name__}).")
    if lacks := sorted(getattr(made, "__abstractmethods__", ())):
        raise ConfigError(
            f"{part}: {target} lacks {', '.join(lacks)}; every {kind.__name__} has them, see {kind.__module__}."
        )
    return made


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "_target_"}


def _build(part: str, config: Mapping[str, Any], **extra: Any) -> Any:
    """Call a ``_target_`` with its options."""
    return _made(part, partial(_target(part, config), **extra), _options(config))


def _steps(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The refine steps of a description by what messages call them."""
    steps = config.get("refine") or ()
    if not isinstance(steps, list | tuple) or not all(isinstance(step, Mapping) for step in steps):
        raise ConfigError(f"refine is {steps}; expected: a list of steps, each a group of options with _target_.")
    return {f"refine[{i}]": step for i, step in enumerate(steps)}


def _nodes(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """All that is made from ``_target_`` in a description."""
    return {"backbone": config["backbone"], "head": config["head"], **_steps(config)}


def _check_options(config: Mapping[str, Any]) -> None:
    """Make sure that the options of a network's description are of the types and in the ranges of its constructors.

    Raises:
        CheckpointError: a ``_target_`` that may not be imported.
        ConfigError: all faults, by key.
    """
    from .expectations import faults_in_options
    from .schemas import told

    faults = []
    for part, node in _nodes(config).items():
        faults += faults_in_options(_target(part, node), _options(node), (part,))
    rest = {k: v for k, v in config.items() if k not in PARTS}
    faults += faults_in_options(PanopticModel, rest)
    if faults:
        raise ConfigError(told("the network's description", faults))


def _made(part: str, kind: partial[Any], options: Mapping[str, Any]) -> Any:
    """Call a constructor; each has its own ways to fail on values that it does not expect."""
    if twice := sorted(set(kind.keywords) & set(options)):
        raise ConfigError(f"{part}.{twice[0]} is no option: the program itself gives it.")
    try:
        return kind(**options)
    except UserError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{part}: {kind.func.__name__} cannot be made with these options ({type(error).__name__}: {detail})."
        ) from error


def build_model(config: Mapping[str, Any], classes: ClassTable, packages: Sequence[str] = ()) -> PanopticModel:
    """Build a model from plain containers.

    Args:
        config: ``backbone`` and ``head``, each with ``_target_`` and options, and the options of
            :class:`PanopticModel`: ``pixel_mean``, ``pixel_std``, ``channel_order``, ``size_divisor``, ``test_size``
            and ``refine``, a list of ``_target_`` with options.
        classes: the class table.
        packages: packages beside this one that ``_target_`` may name.

    Raises:
        CheckpointError: a ``_target_`` outside ``packages`` or unknown, or one that is no backbone or head.
        ConfigError: options that a part does not know, or that contradict each other.
    """
    check_packages(config, packages)
    options = {k: v for k, v in config.items() if k not in PARTS}
    backbone = _build("backbone", config["backbone"])
    if not hasattr(backbone, "levels"):
        raise CheckpointError(f"backbone: {config['backbone']['_target_']} is no backbone (it has no levels).")
    head = _build("head", config["head"], classes=classes, levels=backbone.levels)
    refine = [_build(part, step) for part, step in _steps(config).items()]
    made = partial(PanopticModel, backbone=backbone, head=head, classes=classes, refine=refine)
    return _made("model", made, options)


@contextmanager
def _named(ckpt: str | Path, version: str | None) -> Iterator[None]:
    """Errors get the file's name, and the version that wrote it; without a version they are about changes to it."""
    try:
        yield
    except UserError as error:
        if version is None:
            raise ConfigError(f"{ckpt}: {error}") from error
        raise CheckpointError(f"{ckpt}: {error} (The file was written by version {version}.)") from error


def overridden(options: Mapping[str, Any], changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options with some of them changed, however deep: ``{"head": {"inference": {"mask_threshold": 0.4}}}``.

    Raises:
        ConfigError: a change of something that is no option.
    """
    result = dict(options)
    for key, value in changes.items():
        if key not in options:
            raise ConfigError(f"{prefix}{key} is no option of this model; it has: {', '.join(map(str, options))}.")
        old = options[key]
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        if isinstance(old, Mapping) and not nested and not (value is None and prefix):
            raise ConfigError(f"{prefix}{key}={value} is a group of options; it has: {', '.join(map(str, old))}.")
        result[key] = overridden(old, value, f"{prefix}{key}.") if nested else value
    return result


def changed_network(description: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The network's options in a checkpoint's description, changed as :func:`overridden` does.

    Raises:
        ConfigError: a change of something that is no option.
    """
    return overridden({"refine": [], **description["model"]}, changes)


def load(
    ckpt: str | Path,
    map_location: str | torch.device = "cpu",
    packages: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], None] | None = None,
) -> PanopticModel:
    """A ready model, in evaluation mode, from a checkpoint of ``panoptic_ibs.train`` and no other file.

    Weights are the moving average if the run kept one. Nothing in the file is executed.

    Args:
        ckpt: the file, or ``hf://OWNER/NAME`` on the Hugging Face hub.
        map_location: where the model goes.
        packages: packages beside this one whose classes the file may name; they are imported.
        overrides: options of the model to change, e.g. thresholds of inference; see :func:`overridden`.
        check: raises an error for options, and the changes in them, that are not sound; called before it is built.

    Raises:
        CheckpointError: not such a checkpoint, damaged, diverged, or of a model this version does not know.
        ConfigError: ``overrides`` names something that is no option, or gives it a value that it cannot have.
    """
    from .descriptions import described  # pydantic is not needed for networks that are built here

    state = read_checkpoint(ckpt)
    description = described(state, ckpt)
    weights = sound_weights(state, ckpt)
    config = changed_network(description, overrides or {})
    config["backbone"] = {**config["backbone"], "pretrained": False, "weights": None}
    version = None if overrides else str(description.get("version", "unknown"))
    packages = [packages] if isinstance(packages, str) else packages
    try:
        check_packages(config, packages)  # first of all: nothing is imported that only the file names
    except CheckpointError as error:
        raise CheckpointError(f"{ckpt}: {error}") from None
    with _named(ckpt, version):
        for part, node in _nodes(config).items():
            _target(part, node)
    if check is not None:
        check(config, overrides or {})
    with _named(ckpt, version):
        _check_options(config)
        model = build_model(config, ClassTable.from_list(description["classes"]), packages)
    if differs := misfit(weights, model.state_dict()):
        raise CheckpointError(f"{ckpt}: its weights are not those of the network that it describes: {differs}.")
    model.load_state_dict(weights)
    return model.to(map_location).eval()
