"""Running the commands inside the test process: much faster than a new interpreter each time."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback
from omegaconf import OmegaConf

from panoptic_ibs import commands
from panoptic_ibs.configuration import resolvers
from panoptic_ibs.configuration.checking import faults_in_configuration


@dataclass
class Result:
    """Exit status and output of a command."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The last line on stderr; there must be no traceback."""
        assert "Traceback" not in self.err, self.err
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


def run(command: str, *arguments: str | Path) -> Result:
    """``python -m panoptic_ibs.<command> <arguments>`` in this process."""
    module = importlib.import_module(f"panoptic_ibs.{command}")
    out, err, former = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(module.__file__), *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = module.main()
    finally:
        sys.argv = former
    return Result(code, out.getvalue(), err.getvalue())


def compose(*overrides: str, name: str = "config") -> Any:
    """The composed configuration."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    resolvers.register_resolvers()
    with initialize_config_dir(str(commands.conf_dir()), version_base="1.3"):
        return hydra_compose(name, list(overrides))


def assert_sound(config: Any) -> None:
    """No fault in a composed configuration of train, but a device that this machine lacks."""
    own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    found = faults_in_configuration(OmegaConf.to_container(own, resolve=True), OmegaConf.to_container(own), "config")
    assert [str(fault) for fault in found if "no such device" not in str(fault)] == []


TINY = (
    "recipe=none",
    "debug=fast",
    "data.synthetic.num_train=4",
    "data.synthetic.num_val=2",
    "data.synthetic.size=[96,192]",
    "data.presets.crop_size=[64,96]",
    "head.channels=16",
    "head.feature_channels=16",
    "head.depth=1",
    "head.inference.stuff_area=64",
    "callbacks.progress=null",
)


class PressCtrlC(Callback):
    """Sends SIGINT to this process in the middle of a step (counted from one)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


class Poison(Callback):
    """Makes the loss of a step infinite."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            pl_module.model.head.feature_encoder.requires_grad_(True)
            next(pl_module.model.head.feature_encoder.parameters()).data.fill_(float("nan"))
