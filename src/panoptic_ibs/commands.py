"""How a command runs: Hydra, one-line errors, its run folder. Nothing heavy is imported at the top."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from . import cores, processes, signals
from .configuration import options, recipes
from .configuration.ending import BAD_INPUT, reported
from .configuration.options import conf_dir
from .configuration.resolvers import Resolvers, register_resolvers
from .errors import ConfigError
from .streams import start_command

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig


_called: ContextVar[tuple[str, list[str]] | None] = ContextVar("called", default=None)
STOPPED = 128  # a status above it says by which signal a command was ended


def help_text(usage: str, config_name: str) -> str:
    """Usage, the options of every configuration group, and the commented keys; Hydra needs far longer for this."""
    root = conf_dir()
    text = (root / f"{config_name}.yaml").read_text(encoding="utf-8")
    groups = ["data", "logger", "sampling", "trainer", "paths", "refine"] if config_name == "evaluate" else []
    if config_name == "predict":
        groups = ["refine"]
    if config_name == "config":
        groups = [group for group in options.groups() if group != "refine"]
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
    cores.start_command()
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


def program() -> str:
    """How this package's commands are started from here: ``python -m panoptic_ibs.``, their names to follow."""
    python = "python" if shutil.which("python") == sys.executable else str(from_here(sys.executable))
    return f"{shlex.quote(python)} -m panoptic_ibs."


def from_here(path: Path | str) -> Path:
    """A path as one would type it: relative where it is below the current folder."""
    return Path(path).relative_to(Path.cwd()) if Path(path).is_relative_to(Path.cwd()) else Path(path)


def command_line() -> str:
    """What was typed."""
    if typed := processes.typed_command():
        return typed
    if (here := _called.get()) is not None:
        return shlex.join(["python", "-m", f"panoptic_ibs.{here[0]}", *here[1]])
    name = Path(sys.argv[0]).stem
    program = f"python -m panoptic_ibs.{name}" if sys.argv[0].endswith(".py") else name
    return " ".join([program, *sys.argv[1:]])
