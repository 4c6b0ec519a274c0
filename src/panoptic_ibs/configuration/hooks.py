"""Hydra's callback that looks at a configuration before anything is made or run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.processes import tell
from panoptic_ibs.schemas import shown

from .checking import check_configuration
from .ending import message

if TYPE_CHECKING:
    from omegaconf import DictConfig


class CheckFirst(Callback):
    """Ends the program with status 2 and all faults of the configuration, before the run's folder is made.

    In a sweep it looks at the folder alone; each member is checked when it starts.
    """

    def on_run_start(self, config: DictConfig, **options: Any) -> None:
        """Check the configuration of a single run, and make its folder."""
        self._check(config, str(options.get("config_name")), "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Make the sweep's folder."""
        self._check(config, None, "hydra.sweep.dir")

    def _check(self, config: DictConfig, command: str | None, folder: str) -> None:
        settings: Any = {}
        try:
            settings = OmegaConf.to_container(config, resolve=False)
            if command is not None:
                check_configuration(config, command.removesuffix(".yaml"))
            make_folder(config, folder)
        except Exception as error:
            raise SystemExit(tell(*message(error, settings))) from None


def make_folder(config: DictConfig, key: str) -> None:
    """Make the folder that a key of Hydra's names.

    Raises:
        ConfigError: it has no name.
        OSError: it cannot be made.
    """
    folder = OmegaConf.select(config, key)
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"run_dir is {shown(folder)}; expected: the name of a folder.")
    Path(folder).mkdir(parents=True, exist_ok=True)
