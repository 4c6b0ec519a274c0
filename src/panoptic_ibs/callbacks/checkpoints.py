"""Saving checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from panoptic_ibs.errors import CheckpointError, ConfigError
from panoptic_ibs.loggers import MetricsCSV
from panoptic_ibs.ranges import AtLeastOne


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its goal, then renames it: nobody ever sees half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written to; a former file is still there.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")  # always the same: being killed leaves one at most
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
            os.replace(temporary, path)
        except BaseException as error:
            _remove(temporary)
            reason = _reason(error) if isinstance(error, Exception) else None
            if reason is None:
                raise
            kept = "The former checkpoint is kept. " if path.is_file() else ""
            raise CheckpointError(
                f"{path}: cannot be written ({reason}). {kept}Make room, or choose a run_dir= on another disk."
            ) from None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # its folder is none, or not ours: then there is nothing to remove
        return


def _reason(error: BaseException | None) -> str | None:
    """What the system says, also where torch's writer of archives speaks of it in its own words; else None."""
    first = error
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    words = str(first)
    return "the file was cut short" if isinstance(first, RuntimeError) and "inline_container" in words else None


class SaveCheckpoints(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` of the run folder up to date, and ``epoch_NNN.ckpt`` on request.

    Before a validation it is saved, too, so that whoever ends the run in it loses nothing. The row of ``metrics.csv``
    of that step is written first; a validation that was not done by then is made up by the resumed run.

    Args:
        every_n_steps: steps between two; the end of training, or its interruption, saves in any case.
        every_n_epochs: keep the checkpoint of every n-th epoch, or None.
    """

    def __init__(self, every_n_steps: AtLeastOne = 500, every_n_epochs: AtLeastOne | None = None) -> None:
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self._saved = self._step = -1
        self._validates = self._due = False
        self._accumulated, self._processes = 1, 1
        self._former: dict[str, Any] = {}

    @property
    def saved_step(self) -> int:
        """The step of ``last.ckpt``; -1 before the first."""
        return self._saved

    def save(self, trainer: Trainer, name: str = "last") -> None:
        """Save now; all processes call it."""
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / f"{name}.ckpt")
        if name == "last":
            self._saved = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the run validates; at its last step others switch that off.

        Raises:
            ConfigError: a resumed run accumulates another number of batches, and not because of other devices.
        """
        self._validates, self._step = trainer.enable_validation, trainer.global_step
        self._accumulated, self._processes = trainer.accumulate_grad_batches, trainer.world_size
        batches = self._accumulated * self._processes
        theirs, others = self._former.get("accumulated", self._accumulated), self._former.get("processes", 1)
        if theirs != self._accumulated and theirs * others != batches:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={self._accumulated}: a step of this run is of {batches} batches, one "
                f"of the run that it resumes was of {theirs * others} (trainer.accumulate_grad_batches={theirs}, "
                f"{others} processes). Set it so that they agree."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at multiples of ``every_n_steps``, before a validation and at the last step: here an epoch is still
        open, so that the position in it is right.
        """
        step, former = trainer.global_step, self._step
        self._step = step
        if step == former:  # gradients are still being accumulated, and no checkpoint holds them
            return
        self._due = self._validates and validation_is_due(trainer)
        wanted = trainer.should_stop or step == trainer.max_steps or step % self.every_n_steps == 0 or self._due
        if step != self._saved and step > 0 and wanted:
            log_step(trainer)
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint of an epoch."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.save(trainer, f"epoch_{trainer.current_epoch:03d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was reached, unless the last step did."""
        if trainer.global_step != self._saved:
            self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation follows the step of this checkpoint, and of how many batches a step is."""
        return {"validation_due": self._due, "accumulated": self._accumulated, "processes": self._processes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the former run did."""
        self._former = dict(state_dict)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether Lightning validates after the batch that has just been trained; not known of intervals of time."""
    every = trainer.check_val_every_n_epoch
    interval = trainer.val_check_batch
    if interval is None or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    if interval == float("inf"):
        return bool(trainer.is_last_batch)
    batches = trainer.fit_loop.total_batch_idx if every is None else trainer.fit_loop.batch_idx
    return (batches + 1) % interval == 0


def validation_owed(checkpoint: dict[str, Any], rows: dict[int, dict[str, Any]]) -> bool:
    """Whether a run was ended in, or just before, the validation of the step that a checkpoint was saved at.

    Args:
        checkpoint: its content.
        rows: those of the run's ``metrics.csv``; without any the run's curve is elsewhere, and nothing is owed here.
    """
    state = checkpoint.get("callbacks", {}).get("SaveCheckpoints") or {}
    row = rows.get(int(checkpoint["global_step"]) - 1, {})
    return bool(rows) and bool(state.get("validation_due")) and not any(str(k).startswith("val/") for k in row)


def log_step(trainer: Trainer) -> None:
    """Write this step's row of ``metrics.csv`` now, if there will be one, and not only when all callbacks are done.

    A run that is killed after its checkpoint then lacks no row. Lightning writes the same row over it.
    """
    step = trainer.global_step
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if not every or (step % every and not trainer.should_stop):
        return
    values = {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("train/")}
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step - 1)
