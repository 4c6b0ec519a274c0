"""What the commands share: Hydra, one-line errors, the run folder. Nothing heavy is imported at the top."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import processes, signals
from .configuration import options, recipes
from .configuration.ending import BAD_INPUT, reported
from .configuration.options import conf_dir
from .errors import ConfigError, UserError
from .streams import start_command

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from .classes import ClassTable
    from .data.datamodule import PanopticDataModule

QUIET = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")  # loggers
_called: ContextVar[tuple[str, list[str]] | None] = ContextVar("called", default=None)
STOPPED = 128  # a status above it says by which signal a command was ended


def user_cache() -> str:
    """The user's cache folder of this package."""
    import platformdirs

    return str(platformdirs.user_cache_path("panoptic_ibs"))


def register_resolvers(swept: Sequence[str] = ()) -> None:
    """Make the resolvers of the configurations known to OmegaConf, and the options that stand in tables to Hydra.

    Args:
        swept: keys that the command line gives several values.
    """
    from omegaconf import OmegaConf

    from .sweeps import member_name

    recipes.register()
    options.register()
    OmegaConf.register_new_resolver("user_cache", user_cache, replace=True)
    OmegaConf.register_new_resolver("member", lambda *, _root_: member_name(_root_, swept), replace=True)


class Resolvers:
    """Registers the resolvers when it is made, so also in a launcher's worker process that unpickles it."""

    def __init__(self, swept: Sequence[str]) -> None:
        self.swept = swept
        register_resolvers(swept)

    def __reduce__(self) -> tuple[type[Resolvers], tuple[Sequence[str]]]:
        return Resolvers, (self.swept,)


def help_text(usage: str, config_name: str) -> str:
    """Usage, the options of every configuration group, and the commented keys; Hydra needs far longer for this."""
    root = conf_dir()
    text = (root / f"{config_name}.yaml").read_text(encoding="utf-8")
    groups = ["data", "logger", "sampling", "trainer", "paths"] if config_name == "evaluate" else []
    if config_name == "config":
        groups = options.groups()
    lines = [f"  {group}={', '.join(options.options(group))}" for group in groups]
    listed = ["Groups (GROUP=OPTION):", "", *lines, ""] if lines else []
    keys = ["Keys (KEY=VALUE); --cfg job prints all of them, composed:", "", text.split("\nhydra:")[0]]
    return "\n".join([usage.strip(), "", *listed, *keys])


def run_command(config_name: str, job: Callable[[DictConfig], int | float | None], usage: str = "") -> int:
    """Compose the configuration from the command line, run ``job`` and return the exit status.

    ``job`` returns its exit status, or a float for the sweeper. A :class:`UserError` and a mistake on the command line
    give one message on stderr and status 2; Ctrl-C gives 130, SIGTERM 143; anything else is a defect of the program:
    traceback and status 1.
    """
    start_command()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(usage, config_name))
        return 0
    typed = dict(word.lstrip("+").partition("=")[::2] for word in sys.argv[1:])
    return int(reported(lambda: _through_hydra(config_name, job), typed))


def _through_hydra(config_name: str, job: Callable[[DictConfig], int | float | None]) -> int:
    import hydra

    from . import sweeps
    from .configuration.arguments import prepared
    from .configuration.packages import as_list, named, searched

    processes.end_with_parent()
    for group in _groups_set_to_null(sys.argv[1:]):
        raise ConfigError(f"{group}=null: choose one of {', '.join(options.options(group))}, or ~{group} for none.")
    sys.argv[1:] = prepared(as_list(sweeps.child_arguments() or sys.argv[1:]), config_name, options.options)
    if config_name == "config":
        sys.argv[1:] = recipes.with_own_data(sys.argv[1:])
    resolvers = Resolvers(sweeps.swept_keys(sys.argv[1:]))
    status: list[int] = []

    def guarded(config: DictConfig) -> int | float:
        register_resolvers(resolvers.swept)
        result = _guarded(config_name, job, config)
        status.append(result if isinstance(result, int) else 0)
        if status[-1] > STOPPED:
            raise SystemExit(status[-1])  # the rest of a sweep is not wanted either
        if status[-1] and in_sweep():
            raise hydra.errors.CompactHydraException(  # the launcher takes the word to the sweep's process
                "This run of the sweep failed, see above; the same command runs what is left."
            )
        return result

    try:
        with _errors_as_they_are(), searched(named(sys.argv[1:])):
            hydra.main(config_path=str(conf_dir()), config_name=config_name, version_base="1.3")(guarded)()
    except signals.Stopped:
        raise
    except SystemExit as leave:
        if not any(status):  # it was said what is wrong with the command line, or another process's run failed
            return (leave.code if leave.code == 1 else BAD_INPUT) if leave.code else 0
    except hydra.errors.HydraException as error:
        if not any(status):
            raise
        print(error, file=sys.stderr)
    return max(status, default=0)


def _groups_set_to_null(arguments: Sequence[str]) -> list[str]:
    """Hydra would answer these with a traceback."""
    groups = [a.removesuffix("=null") for a in arguments if a.endswith("=null")]
    return [group for group in groups if options.options(group)]


@contextmanager
def _errors_as_they_are() -> Iterator[None]:
    """Hydra gives its errors on, in place of printing them and leaving."""
    former = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if former is not None:
            os.environ["HYDRA_FULL_ERROR"] = former


def _guarded(config_name: str, job: Callable[[DictConfig], int | float | None], config: DictConfig) -> int | float:
    """The job's result, or the status of what went wrong; members of a sweep are checked here."""
    from omegaconf import OmegaConf

    from .configuration.checking import check_configuration

    def checked() -> int | float:
        if in_sweep():
            check_configuration(config, config_name)
        return job(config) or 0

    return reported(checked, {str(k): v for k, v in OmegaConf.to_container(config).items()})  # type: ignore[union-attr]


def in_sweep() -> bool:
    """Whether this job is one of a sweep's."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def job_overrides() -> list[str]:
    """What was typed, or chosen by the sweep, for this job."""
    from hydra.core.hydra_config import HydraConfig

    return [str(override) for override in HydraConfig.get().overrides.task]


def run_folder() -> Path:
    """The run folder that Hydra made for this job."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def instantiate(config: Any, **extra: Any) -> Any:
    """``hydra.utils.instantiate`` with readable errors; None for a node without ``_target_``.

    Raises:
        UserError: what the constructor raised; ConfigError for an option it does not know.
    """
    import hydra.errors
    import hydra.utils

    if config is None or config.get("_target_") is None:
        return None
    try:
        return hydra.utils.instantiate(config, _convert_="all", **extra)
    except hydra.errors.InstantiationException as error:
        from .configuration.translation import sentence

        cause: BaseException | None = error.__cause__
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            root, cause = cause, cause.__cause__
        where = re.search(r"full_key: (\S+)", str(error))
        name = where[1] if where else config["_target_"]
        if error.__cause__ is None:
            raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
        text = sentence(root) or f"{type(root).__name__}: {' '.join(str(root).split())}"
        raise ConfigError(f"{name}: {text.removeprefix(f'{name}: ')}") from error


@contextmanager
def called(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Within the block a command runs that nobody typed: its arguments come from Python."""
    token = _called.set((command, list(arguments)))
    try:
        yield
    finally:
        _called.reset(token)


def in_several_processes(module: str, trainer: Trainer) -> int | None:
    """Run this command once a device and return its exit status; None if this very process is to do the work."""
    if not processes.needed(trainer):
        return None
    run_dir = run_folder()
    hydra_keys = {"hydra.run.dir": run_dir}
    if not any(override.startswith("run_dir=") for override in job_overrides()):
        hydra_keys["run_dir"] = run_dir  # its default has the time of day
    quoted = ["{}='{}'".format(key, str(value).replace("'", r"\'")) for key, value in hydra_keys.items()]
    here = _called.get()
    arguments = [*(sys.argv[1:] if here is None else here[1]), *quoted, "hydra.output_subdir=null"]
    return processes.supervise(module, arguments, trainer, run_dir, command_line())


def plain(config: Any) -> Any:
    """A configuration node as resolved plain containers."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def packages(config: DictConfig) -> list[str]:
    """Packages beside this one whose classes the user lets us make."""
    return list(config.packages or ())


def model_config(config: DictConfig, eval_resize: Any = None) -> dict[str, Any]:
    """The plain description of the network that goes into checkpoints, see :func:`panoptic_ibs.model.build_model`.

    Args:
        config: the composed configuration.
        eval_resize: the data's size policy in evaluation, which becomes the model's ``test_size``.
    """
    model = dict(plain(config.get("model", {})))
    model["backbone"] = plain(config.backbone)
    model["head"] = {k: v for k, v in plain(config.head).items() if k != "name"}
    if eval_resize is not None:
        shortest = max(eval_resize.choices or eval_resize.range)
        longest = eval_resize.longest
        model["test_size"] = [int(shortest), None if longest == float("inf") else int(longest)]
    return model


def make_data(config: DictConfig) -> PanopticDataModule:
    """The data module of the configuration."""
    data: PanopticDataModule = instantiate(config.data)
    return data


def check_classes(ckpt_path: Path | str, have: ClassTable, data: PanopticDataModule) -> None:
    """Make sure that a checkpoint and a data set have the same classes.

    Raises:
        CheckpointError: they differ.
    """
    from .errors import CheckpointError

    want = data.classes
    if have.names == want.names and have.is_thing == want.is_thing:
        return
    differ = sorted(set(have.names) ^ set(want.names))
    raise CheckpointError(
        f"{ckpt_path}: was trained on {len(have)} classes, data={data.layout} at {data.root} has {len(want)} (first "
        f"differences: {', '.join(differ[:4]) or 'order or thing flags'}). Give the data set that it was trained on."
    )


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("panoptic-ibs", "torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy", "albumentations")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """What was typed."""
    if typed := processes.typed_command():
        return typed
    if (here := _called.get()) is not None:
        return shlex.join(["python", "-m", f"panoptic_ibs.{here[0]}", *here[1]])
    name = Path(sys.argv[0]).stem
    program = f"python -m panoptic_ibs.{name}" if sys.argv[0].endswith(".py") else name
    return " ".join([program, *sys.argv[1:]])


def progress_bar(refresh_rate: int = 5) -> Any:
    """Lightning's progress bar."""
    from lightning.pytorch.callbacks import TQDMProgressBar

    return TQDMProgressBar(refresh_rate=refresh_rate)


def quiet() -> None:
    """Leave out Lightning's remarks that do not concern a user of this program; warnings of ours stay."""
    import logging
    import warnings

    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*LeafSpec.*",
        ".*your dataloader is not resumable.*",  # ours is: the data module keeps the position
        ".*overridden `transfer_batch_to_device`.*",
        ".*called before the ``update`` method.*",  # no image of this process could be read
        ".*sync_dist=True.*",  # validation results are computed over all processes already
    ):
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def close_loggers(loggers: list[Any]) -> None:
    """Finish Weights & Biases, whatever happened before."""
    for logger in loggers:
        if logger.__class__.__name__ == "WandbLogger":
            import wandb

            wandb.finish()
