"""Members of a sweep: names that stay, and the same command again finishes what is left.

A member is one run of a sweep, in a folder of its own. Met again it is skipped when it has
all that it owes (metrics, cost, report, baselines if asked for), resumed when it has
a checkpoint, started when it has none, and refused when its folder holds a run of another configuration.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import runs
from .errors import ConfigError
from .settings import differences, flat

if TYPE_CHECKING:
    from omegaconf import DictConfig

CHILD_ARGUMENTS = "PANOPTIC_IBS_CHILD_ARGUMENTS"  # command line of the further processes of a member's run

# Where a run lies, whom it reports to and how many helpers load its data: none of it changes the result.
_ELSEWHERE = (
    "run_dir", "paths", "logger", "ckpt_path", "sweep_name", "objective", "data.cache_dir", "data.num_workers",
    "data.memory_mb", "callbacks.progress", "callbacks.pictures", "callbacks.checkpoint",
    "callbacks.best",
)  # fmt: skip


def swept_keys(arguments: Sequence[str]) -> list[str]:
    """Keys that a command line gives several values: ``seed=0,1,2``, ``ibs.weight=range(1,4)``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    keys = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:  # an option of Hydra's, or a mistake that Hydra will name
            continue
        if override.is_sweep_override():
            keys.append(override.key_or_group)
    return keys


def member_name(config: DictConfig, swept: Sequence[str]) -> str:
    """Folder of a member: head, the values along the axes, seed. No other member has a say in it.

    Args:
        config: the member's configuration with its ``hydra`` node.
        swept: axes given on the command line; those of ``hydra.sweeper.params`` come first.
    """
    split = (override.lstrip("+~").partition("=") for override in config.hydra.overrides.task)
    typed = {key: value.strip("'\"") for key, _, value in split}
    params = config.hydra.sweeper.get("params") or {}
    axes = [*params, *sorted(set(swept) - set(params))]
    groups = config.hydra.runtime.choices
    values = [
        typed[axis] if axis in groups else f"{axis}-{typed[axis]}"
        for axis in axes
        if axis in typed and axis not in ("head", "seed")
    ]
    head = config.head.name
    parts = [*([] if any(head in value for value in values) else [head]), *values, f"seed{config.seed}"]
    name = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "_", part).strip("_") for part in parts)
    return name if len(name) <= 150 else f"{name[:140]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_member(config: DictConfig, run_dir: Path, run: Callable[[DictConfig], int], overrides: Sequence[str]) -> Any:
    """Do what is left of a member.

    Args:
        config: its configuration.
        run_dir: its folder.
        run: trains and evaluates; returns an exit status. ``config.ckpt_path`` says what it resumes.
        overrides: those of this member, for further processes that ``run`` may start.

    Returns:
        The exit status of a run that failed; else the metric that ``config.objective`` names, or 0.

    Raises:
        ConfigError: the folder holds a run of another configuration.
    """
    from omegaconf import OmegaConf

    from .files import write_json

    settings: Any = OmegaConf.to_container(config, resolve=True)
    with runs.claimed(run_dir) as mine:
        if not mine:
            print(f"another process is at work on it, skipped: {run_dir}", flush=True)
            return 0
        check_same(run_dir, settings)
        if not runs.owed(run_dir, bool(OmegaConf.select(config, "evaluation.baselines"))):
            print(f"finished already, skipped (delete the folder to run it again): {run_dir}", flush=True)
        else:
            if runs.first_process():
                write_json(run_dir / runs.MEMBER_FILE, settings)
            last = run_dir / "checkpoints" / "last.ckpt"
            if last.is_file():
                config.ckpt_path, config.init_from = str(last), None
                print(f"resumed: {last}", flush=True)
            with _for_children(run_dir, overrides, config.ckpt_path):
                status = run(config)
            if status:
                return status
    return _objective(run_dir, config.get("objective"))


def check_same(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Make sure that a folder is empty or holds a run of this configuration, wherever it lay.

    Raises:
        ConfigError: it holds another; the message names the keys that differ.
    """
    former = runs.former_settings(run_dir)
    if former is None:
        return
    if differ := differences(_flat(former), _flat(settings)):
        raise ConfigError(
            f"{run_dir}: holds a run of another configuration ({differ}). Choose another run_dir=, go back to those "
            "settings, or delete the folder."
        )


def own_start_method() -> None:
    """Let processes start as this Python does by default. A worker of joblib's has a start method of its own, which
    starts neither loader processes nor a process pool.
    """
    methods = multiprocessing.get_all_start_methods()  # the default first
    if multiprocessing.get_start_method() not in methods:
        multiprocessing.set_start_method(methods[0], force=True)


def child_arguments() -> list[str] | None:
    """Command line of this process if it is a further one of a member's run, such as the second GPU's."""
    if "LOCAL_RANK" in os.environ and CHILD_ARGUMENTS in os.environ:
        arguments: list[str] = json.loads(os.environ[CHILD_ARGUMENTS])
        return arguments
    return None


@contextmanager
def _for_children(run_dir: Path, overrides: Sequence[str], ckpt_path: str | None) -> Iterator[None]:
    """Further processes run this member alone, not the sweep; afterwards the next member finds a clean environment."""
    from .configuration.arguments import quote

    quoted = [
        f"{key}={quote(str(value))}" for key, value in (("hydra.run.dir", run_dir), ("ckpt_path", ckpt_path)) if value
    ]
    resumed = ["init_from=null"] if ckpt_path else []
    former = dict(os.environ)
    arguments = [*overrides, *resumed, *quoted, "hydra.mode=RUN", "hydra.output_subdir=null"]
    os.environ[CHILD_ARGUMENTS] = json.dumps(arguments)
    try:
        yield
    finally:
        if "torch.distributed" in sys.modules:
            from torch import distributed

            if distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()
        for key in os.environ.keys() - former.keys():
            del os.environ[key]
        os.environ.update(former)


def _objective(run_dir: Path, name: str | None) -> float | int:
    """The metric for the sweeper."""
    if not name:
        return 0
    metrics = runs.read_json(run_dir / "metrics.json") or {}
    table, _, key = name.partition("@")  # confusion@50
    value = metrics.get(table, {}).get(key) if key else metrics.get(table)
    if not isinstance(value, int | float):
        raise ConfigError(f"objective={name}: {run_dir}/metrics.json has no such number, e.g. pq_things, confusion@50.")
    return float(value)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that decide the result, by dotted key; folders that may lie anywhere are named by what they are."""
    return flat(settings, _ELSEWHERE, [(settings.get("paths") or {}).get("cache"), settings.get("run_dir")])
