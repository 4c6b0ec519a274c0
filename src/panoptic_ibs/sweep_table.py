"""What a sweep ends with: the table of its members. Apart from ``sweeps.py``, which works without Hydra."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from .errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


class TableAtTheEnd(Callback):
    """Hydra's callback that ends a sweep with its table and its page, whatever launched the members."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Report on all members in the sweep's folder, those of earlier calls of the command as well.

        With ``logger=wandb`` the tables go there, too.
        """
        from .report_pages import print_settings, write_summary

        folder = Path(config.hydra.sweep.dir)
        try:
            page = write_summary(folder)
            print_settings(folder)
            print(f"table: {page}", flush=True)
        except (UserError, OSError) as error:  # the runs are done and stay
            print(f"no table: {error}", file=sys.stderr)
            return
        if OmegaConf.select(config, "logger.wandb") is None:
            return
        from .loggers import share_summary

        try:
            print(f"Weights & Biases: {share_summary(folder)}", flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
