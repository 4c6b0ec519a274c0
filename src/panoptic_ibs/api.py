"""The commands as functions: ``fit`` trains as ``panoptic_ibs.train``, ``score_files`` scores as ``evaluate``.

What is wrong is raised as a :class:`panoptic_ibs.errors.UserError`, where the commands print it.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import commands, evaluate, instantiation, signals, streams, train
from .configuration import resolvers
from .configuration.arguments import quote
from .errors import CheckpointError, ConfigError, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from .model import PanopticModel

_PLAIN = re.compile(r"(?!(?i:null|true|false|nan|inf)$)/?[A-Za-z_]\w*([/.-]\w+)*", re.ASCII)  # Hydra takes it as it is
_NOT_HERE = ("sweep", "launcher", "hydra")  # of the command line alone


class RunError(UserError):
    """A run that several processes did, and that did not end well; what is wrong was printed on stderr."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        run_dir: its folder, with checkpoints, metrics, predictions and report.
        packages: of the user's own, that its network needs.
    """

    run_dir: Path
    packages: tuple[str, ...] = ()

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What ``metrics.json`` holds, see docs/metrics.md."""
        found: dict[str, Any] = json.loads((self.run_dir / "metrics.json").read_text(encoding="utf-8"))
        return found

    @cached_property
    def model(self) -> PanopticModel:
        """The trained network, read from the last checkpoint when it is asked for, on the CPU.

        Raises:
            CheckpointError: the run wrote none (``callbacks.checkpoint`` is off), or it was deleted.
        """
        from .construction import load

        last = self.run_dir / "checkpoints" / "last.ckpt"
        if not last.is_file():
            raise CheckpointError(f"{last}: the run has no checkpoint. Train with callbacks.checkpoint.")
        return load(last, packages=self.packages)


def fit(
    data: str | Mapping[str, Any] | None = None,
    head: str | Mapping[str, Any] | None = None,
    ibs: str | Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    **overrides: Any,
) -> Run:
    """Train, evaluate and report as ``python -m panoptic_ibs.train`` does with the same arguments: the same numbers.

    Examples:
        >>> run = fit("lots", "ciae", trainer={"max_steps": 10}, **{"optim.lr": 1e-3})  # doctest: +SKIP
        >>> run.metrics["pq"], run.model.predict(image)  # doctest: +SKIP

    Args:
        data: an option of the group ``data`` (``"lots"``), or keys of it (``{"root": DIR}``); the default when None.
        head: the same of ``head``.
        ibs: the same of ``ibs``.
        run_dir: the run's folder; ``runs/DATE_TIME`` when None.
        overrides: other groups, and keys as nested mappings or dotted (``**{"optim.lr": 1e-3}``); values are Python's.
            ``packages=["own_head"]`` makes heads of other packages known.

    Raises:
        UserError: what the command would print.
        KeyboardInterrupt: it was interrupted; the run's folder then has a checkpoint and a report of what was reached.
    """
    given = {"data": data, "head": head, "ibs": ibs, "run_dir": run_dir}
    given = {key: value for key, value in given.items() if value is not None}
    _check_script("fit")
    with _as_command("fit", "train", "config", {**given, **overrides}) as config:
        status = int(train.train(config))
        folder = commands.run_folder()
    if status > commands.STOPPED:
        raise KeyboardInterrupt
    if status:
        raise RunError(f"{folder}: training ended with status {status}; its message stands above.")
    return Run(folder, tuple(instantiation.packages(config)))


def score_files(
    predictions: str | Path | Sequence[str | Path],
    data: str = "coco_panoptic",
    root: str | Path | None = None,
    val: str | None = None,
    run_dir: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score predictions of any program as ``python -m panoptic_ibs.evaluate predictions=...`` does.

    Args:
        predictions: a file or folder, or several for the same images; the first is the reference.
        data: an option of the group ``data``.
        root: the data set's folder.
        val: its validation split.
        run_dir: where metrics, pictures and a report are written; nothing is written when None.
        options: of :class:`panoptic_ibs.prediction_files.sets.ScoringOptions`: ``limit``, ``bootstrap``, ``boundary``,
            ``ap_from_panoptic``, ``gallery``, ``workers``, ``seed``.

    Returns:
        Metrics as in docs/metrics.md; of several sets, metrics by the set's name. Images that could not be scored are
        told in ``faults``, and ``complete`` is then false.

    Raises:
        UserError: what the command would print, but for images that are left out.
    """
    from .prediction_files.sets import ScoringOptions, evaluate_predictions

    known = [field.name for field in fields(ScoringOptions)]
    if unknown := [key for key in options if key not in known]:
        raise ConfigError(f"score_files({unknown[0]}=...): {_nearest(unknown[0], known)}")
    one = not isinstance(predictions, list | tuple)
    paths: list[Any] = [predictions] if one else list(predictions)  # type: ignore[arg-type]
    if not paths or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ConfigError(f"score_files(predictions={predictions!r}): give a file or folder, or a list of them.")
    places = {"root": root, "val": val}
    settings: dict[str, Any] = {f"data.{key}": value for key, value in places.items() if value is not None}
    settings |= {"seed": options.pop("seed")} if "seed" in options else {}
    settings |= {f"evaluation.{key}": value for key, value in options.items()}
    settings |= {"data": data, "predictions": [os.fspath(path) for path in paths]}
    with tempfile.TemporaryDirectory() as nowhere:
        settings["run_dir"] = nowhere if run_dir is None else run_dir
        with _as_command("score_files", "evaluate", "evaluate", settings) as config:
            if run_dir is not None:
                with evaluate.own_folder(config) as folder:
                    results, _ = evaluate.score_predictions(config, evaluate.validation_data(config), folder)
            else:
                given, chosen = evaluate.prediction_paths(config), replace(evaluate.scoring_options(config), gallery=0)
                place, split = Path(nowhere), evaluate.validation_data(config)
                results = evaluate_predictions(given, split, place, chosen, tell=lambda _: None)
    return next(iter(results.values())) if len(results) == 1 else results


def _check_script(function: str) -> None:
    """Make sure that no further process, which imports the script it belongs to, starts over.

    Raises:
        ConfigError: it would.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "__mp_main__":
            raise ConfigError(
                f"{function}(...) is called while a further process imports your script. Put the call under "
                "if __name__ == '__main__':"
            )


def _checked(function: str, command: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments whose first names are known; a name of packages becomes a list.

    Raises:
        ConfigError: an unknown name, or a group whose choice is no text.
    """
    from . import expectations
    from .configuration import options, schema

    groups = {group.partition("/")[0] for group in options.groups()}
    known = sorted(({*expectations.fields_of(schema.COMMANDS[command])} | groups) - {*_NOT_HERE})
    found = dict(values)
    for key, value in values.items():
        first = key.lstrip("+").partition(".")[0].partition("/")[0].partition("@")[0]
        if first in _NOT_HERE:
            raise ConfigError(f"{function}({first}=...): one run alone; sweeps are started on the command line.")
        if first not in known:
            raise ConfigError(f"{function}({key}=...): {_nearest(key, known)}")
        several = key == "logger" and isinstance(value, list | tuple)
        if key in groups and not several and not isinstance(value, str | Mapping):
            raise ConfigError(f"{function}({key}=...) is {value!r}; give an option's name, or a mapping of keys.")
        if key == "packages" and isinstance(value, str):
            found[key] = value.split(",")
    return found


def _arguments(function: str, values: Mapping[str, Any], config: Any = None) -> list[str]:
    """Keyword arguments as the command line has them, text quoted for Hydra where it must be.

    Args:
        function: names them in messages.
        values: the arguments.
        config: tells how far mappings are groups of keys; what lies deeper, or is no mapping there, is a value.

    Raises:
        ConfigError: a value that no configuration can hold.
    """
    leaves = [leaf for key, value in values.items() for leaf in _leaves(key, value, config)]
    return [f"{key}={_text(f'{function}({key}=...)', value)}" for key, value in leaves]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
    return f"there is no such name; {hint}"


def _leaves(key: str, value: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; nodes with ``_target_`` stay whole."""
    if isinstance(value, Mapping) and "_target_" not in value and _is_group(config, key):
        for name, child in value.items():
            yield from _leaves(f"{key}.{name}", child, config)
    else:
        yield key, value


def _is_group(config: Any, key: str) -> bool:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return isinstance(OmegaConf.select(config, key), DictConfig)
    except OmegaConfBaseException:
        return False


def _text(where: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of numpy or torch
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return text if _PLAIN.fullmatch(text) else quote(text)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text(where, child)}" for key, child in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_text(where, child) for child in value) + "]"
    raise ConfigError(
        f"{where} is {value!r}; give a finite number, text, true or false, None, or lists and mappings of those."
    )


@contextmanager
def _as_command(function: str, command: str, config_name: str, values: Mapping[str, Any]) -> Iterator[DictConfig]:
    """A command's configuration and, within the block, all that the command has around its job; nothing stays of it.

    Args:
        function: names the arguments in messages.
        command: the command.
        config_name: its configuration.
        values: the keyword arguments.

    Raises:
        UserError: in place of what libraries raise for something that a user can put right.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict, read_write

    from .configuration.checking import check_configuration
    from .configuration.hooks import make_folder
    from .configuration.packages import named, searched
    from .configuration.recipes import with_own_data
    from .configuration.translation import sentence

    settings: Any = {}
    former = HydraConfig.instance().cfg
    values = _checked(function, config_name, values)
    choices = {
        key: value for key, value in values.items() if isinstance(value, str) and (commands.conf_dir() / key).is_dir()
    }
    packages = named(_arguments(function, {key: value for key, value in values.items() if key == "packages"}))
    try:
        with signals.handled(), _own_remarks(), searched(packages):
            resolvers.register_resolvers()
            with ExitStack() as stack:
                stack.enter_context(
                    initialize_config_dir(str(commands.conf_dir()), version_base="1.3", job_name=command)
                )
                words = _arguments(function, values, compose(config_name, _arguments(function, choices)))
                words = with_own_data(words) if config_name == "config" else words
                stack.enter_context(commands.called(command, words))
                config = compose(config_name, words, return_hydra_config=True)
                settings = OmegaConf.to_container(config, resolve=False)
                check_configuration(config, config_name)
                make_folder(config, "hydra.run.dir")
                with read_write(config), open_dict(config):
                    config.hydra.runtime.output_dir = os.path.abspath(config.hydra.run.dir)
                    HydraConfig.instance().set_config(config)
                    del config["hydra"]
                yield config
    except signals.Stopped as stopped:
        if stopped.number == signals.SIGNALS[0]:
            raise KeyboardInterrupt from None
        raise
    except UserError:
        raise
    except Exception as error:
        text = sentence(error, settings)
        if text is None:
            raise
        raise ConfigError(text) from error
    finally:
        HydraConfig.instance().cfg = former


@contextmanager
def _own_remarks() -> Iterator[None]:
    """Warnings and log levels are afterwards as they were."""
    formatter = warnings.formatwarning
    loggers = [logging.getLogger(name) for name in streams.QUIET]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        try:
            yield
        finally:
            warnings.formatwarning = formatter
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
