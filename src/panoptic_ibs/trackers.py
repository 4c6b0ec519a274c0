"""The loggers that a run gets beside ``metrics.csv``: Weights & Biases, TensorBoard, MLflow, any other of Lightning's.

None of them asks for a login, or needs a server: without one they write into the run's folder.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from .errors import ConfigError
from .loggers import wandb_logger

MLFLOW_RUN_ID = "mlflow_run_id.txt"
_NOT_IN_MLFLOW = re.compile(r"[^\w\-. :/]")  # names of its metrics lack these


@dataclass(frozen=True)
class Described:
    """What loggers are told of a run.

    Attributes:
        run_dir: its folder.
        name: what it is called where an option does not say so.
        group: its sweep, or None.
        config: its resolved configuration.
        ckpt_path: the checkpoint that it resumes, or None.
        resume_step: the step of that checkpoint, or None.
        trains: it is a training, which may be resumed.
    """

    run_dir: Path
    name: str
    group: str | None
    config: Mapping[str, Any]
    ckpt_path: Path | None = None
    resume_step: int | None = None
    trains: bool = True


class TensorBoard(TensorBoardLogger):
    """TensorBoard's files in a folder of the run: numbers, pictures, and tables as text.

    A resumed run goes on in the folder; what had been logged after its checkpoint is hidden.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        super().__init__(str(folder), name="", version="", default_hp_metric=False, purge_step=resume_step)

    def log_table(
        self, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int | None = None
    ) -> None:
        """Log a table as text in Markdown."""
        rows = [columns, ["-"] * len(columns), *data]
        self.experiment.add_text(key, "\n".join(f"|{'|'.join(map(_cell, row))}|" for row in rows), step)

    def log_image(
        self, key: str, images: Sequence[Image.Image], step: int | None = None, caption: Sequence[str] | None = None
    ) -> None:
        """Log pictures; TensorBoard has no captions."""
        for number, image in enumerate(images):
            name = key if len(images) == 1 else f"{key}/{number}"
            self.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write out what came after training."""
        self.finalize("success")


class MLflow(MLFlowLogger):
    """MLflow: numbers and settings of the run; pictures and tables are its artifacts.

    Where no address of a tracking server or database is given, the run's folder gets its own ``mlflow.db``.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers; in their names ``_`` stands for what MLflow refuses (``confusion_50`` for ``confusion@50``)."""
        super().log_metrics({_NOT_IN_MLFLOW.sub("_", name): value for name, value in metrics.items()}, step)

    def log_table(
        self, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int | None = None
    ) -> None:
        """Keep a table as ``KEY.csv``."""
        text = io.StringIO()
        csv.writer(text).writerows([columns, *data])
        self.experiment.log_text(self.run_id, text.getvalue(), f"{key}.csv")

    def log_image(
        self, key: str, images: Sequence[Image.Image], step: int | None = None, caption: Sequence[str] | None = None
    ) -> None:
        """Keep pictures as ``KEY_STEP.png``."""
        stem = key if step is None else f"{key}_{step:06d}"
        for number, image in enumerate(images):
            name = stem if len(images) == 1 else f"{stem}_{number}"
            self.experiment.log_image(self.run_id, image.convert("RGB"), f"{name}.png")


def chosen(options: Mapping[str, Any], run: Described, make: Callable[[Any], Any]) -> list[Logger]:
    """The loggers of ``conf/logger``.

    Args:
        options: name -> options of that logger, None for one that is off; unknown names hold a ``_target_``.
        run: the run.
        make: makes an object of a node with ``_target_``.

    Raises:
        ConfigError: MLflow cannot be reached.
    """
    made: list[Logger] = []
    for name, given in options.items():
        if given is None:
            continue
        if name == "wandb":
            own = {**given, "group": given.get("group") or run.group, "name": given.get("name") or run.name}
            made.append(wandb_logger(run.run_dir, own, dict(run.config), run.ckpt_path, keep_id=run.trains))
            continue
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            continue  # the first process logs for all
        if name == "tensorboard":
            logger: Logger = TensorBoard(Path(given.get("folder") or run.run_dir / "tensorboard"), run.resume_step)
        elif name == "mlflow":
            logger = _mlflow(given, run)
        else:
            logger = make(given)
        if run.ckpt_path is None:
            logger.log_hyperparams(dict(run.config))
        made.append(logger)
    return made


def close_loggers(loggers: Sequence[Any]) -> None:
    """Finish them, whatever happened before."""
    for logger in loggers:
        if logger.__class__.__name__ == "WandbLogger":
            import wandb

            wandb.finish()
        elif isinstance(logger, TensorBoard):
            logger.close()


def _mlflow(options: Mapping[str, Any], run: Described) -> MLflow:
    """A logger whose run exists; its id is kept beside the checkpoints, so that a resumed run continues its curves."""
    from mlflow.exceptions import MlflowException

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    folder = run.run_dir.resolve()
    address = options.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")
    kept = run.ckpt_path.parent / MLFLOW_RUN_ID if run.ckpt_path else None
    try:
        logger = MLflow(
            experiment_name=options.get("experiment_name") or "panoptic-ibs",
            run_name=options.get("run_name") or run.name,
            tracking_uri=address or f"sqlite:///{folder}/mlflow.db",
            tags={**(options.get("tags") or {}), **({"sweep": run.group} if run.group else {})} or None,
            run_id=kept.read_text().strip() if kept and kept.is_file() else None,
            artifact_location=None if address else (folder / "mlflow").as_uri(),
        )
        run_id = logger.run_id
        logger.experiment.update_run(run_id, status="RUNNING")  # a resumed one had ended
    except MlflowException as error:
        told = " ".join(str(error).split())
        raise ConfigError(
            f"logger.mlflow: no run can be made at {address or folder} ({told}). Set "
            "logger.mlflow.tracking_uri=ADDRESS, or the environment's MLFLOW_TRACKING_URI."
        ) from None
    if run.trains:
        mine = run.run_dir / "checkpoints" / MLFLOW_RUN_ID
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(f"{run_id}\n")
    return logger


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "\\|")
