"""Folders of runs: whose they are, what they hold, what is still owed to them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, processes
from .errors import ConfigError
from .files import read_json_or_none as read_json

if TYPE_CHECKING:
    from omegaconf import DictConfig

MEMBER_FILE = "member.json"  # a sweep's: the configuration that the folder was made with
RESULTS = ("metrics.json", "timing.json", "baselines.json", "report/index.html")  # what training ends with

_locks: set[int] = set()  # descriptors of this process, not of those that it forks


def _leave_locks() -> None:
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)  # a loader process that outlives us must not keep the folder


@contextmanager
def claimed(run_dir: Path) -> Iterator[bool]:
    """Whether the folder is ours until we leave. The lock is the system's: a process that dies leaves none."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield True
        return
    if not keeper():
        yield True
        return
    lock = os.open(run_dir / ".lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _locks.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        if lock in _locks:  # not in a fork
            _locks.remove(lock)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def first_process() -> bool:
    """Whether this is the first of the processes of one run."""
    return all(os.environ.get(key, "0") == "0" for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def keeper() -> bool:
    """Whether this process looks after the run's folder: the first one, or the one that watches over several."""
    return first_process() and not processes.supervised()


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Keep a folder for this command.

    Raises:
        ConfigError: another command is at work in it.
    """
    with claimed(run_dir) as mine:
        if not mine:
            raise ConfigError(f"{run_dir}: another command is at work in this folder. Choose another run_dir=.")
        yield


def keep_configuration(config: DictConfig, run_dir: Path) -> None:
    """Write ``.hydra/`` of a run folder as Hydra does, but only once the folder is known to be free."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not keeper():
        return
    folder = run_dir / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    hydra = OmegaConf.create({"hydra": HydraConfig.get()})
    for name, content in (("config", config), ("hydra", hydra), ("overrides", HydraConfig.get().overrides.task)):
        OmegaConf.save(content, folder / f"{name}.yaml")


def check_unused(run_dir: Path, ckpt_path: str | Path | None = None) -> None:
    """Make sure that training does not write over another run or evaluation.

    Args:
        run_dir: the folder of the run that is about to start.
        ckpt_path: the checkpoint that it resumes; if it is one of this folder the run goes on here.

    Raises:
        ConfigError: the folder holds one already.
    """
    held = [*(f"checkpoints/{p.name}" for p in sorted((run_dir / "checkpoints").glob("*.ckpt"))), "metrics.json"]
    held = [name for name in held if (run_dir / name).is_file()]
    if not keeper() or not held or (ckpt_path and of_folder(ckpt_path, run_dir)):
        return
    last = run_dir / "checkpoints" / "last.ckpt"
    resume = f"go on with that run by ckpt_path={last}, " if last.is_file() else ""
    raise ConfigError(
        f"{run_dir}: holds a run or evaluation already ({', '.join(held)}). Choose another run_dir=, {resume}or delete "
        "the folder."
    )


def check_no_training(run_dir: Path) -> None:
    """Make sure that an evaluation does not write over the results of a training run.

    Raises:
        ConfigError: the folder is one's.
    """
    traces = ("checkpoints", "metrics.csv", MEMBER_FILE)
    if keeper() and any((run_dir / name).exists() for name in traces):
        raise ConfigError(
            f"{run_dir}: holds a run of training, whose metrics.json and report would be written over. Choose another "
            "run_dir=."
        )


def of_folder(ckpt_path: str | Path, run_dir: Path) -> bool:
    """Whether a checkpoint is one of this run folder."""
    return Path(ckpt_path).resolve().parent == (run_dir / "checkpoints").resolve()


def owed(run_dir: Path, baselines: bool = False, step: int | None = None) -> list[str]:
    """What a trained run still lacks of its evaluation: names of files.

    Args:
        run_dir: its folder.
        baselines: whether they were asked for.
        step: the step that it was trained to; results of an earlier one are not its own. None takes any.
    """
    metrics = read_json(run_dir / "metrics.json")
    complete = isinstance(metrics, dict) and not metrics.get("interrupted")
    complete = complete and (step is None or metrics.get("step") == step)
    wanted = [name for name in RESULTS[1:] if baselines or name != "baselines.json"]
    return [*([] if complete else ["metrics.json"]), *(name for name in wanted if not (run_dir / name).is_file())]


def clear_results(run_dir: Path) -> None:
    """Remove what an earlier evaluation left, so that being killed in this one cannot look like its end."""
    for name in RESULTS:
        (run_dir / name).unlink(missing_ok=True)


def former_settings(run_dir: Path) -> Mapping[str, Any] | None:
    """The configuration of the run that a folder holds."""
    settings = read_json(run_dir / MEMBER_FILE) or (read_json(run_dir / "metrics.json") or {}).get("config")
    return settings if isinstance(settings, dict) else None


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy", "albumentations")
    found = {"python": platform.python_version(), "platform": platform.platform(), "panoptic-ibs": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
