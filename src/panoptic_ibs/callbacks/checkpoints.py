"""Saving checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class SaveCheckpoints(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` of the run folder up to date, and ``epoch_NNN.ckpt`` on request.

    A file is written beside its goal and then renamed, so that being killed leaves the former one.

    Args:
        every_n_steps: steps between two; the end of training, or its interruption, saves in any case.
        every_n_epochs: keep the checkpoint of every n-th epoch, or None.
    """

    def __init__(self, every_n_steps: int = 500, every_n_epochs: int | None = None) -> None:
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self._saved = -1

    def save(self, trainer: Trainer, name: str = "last") -> None:
        """Save now; all processes call it."""
        path = Path(trainer.default_root_dir) / "checkpoints" / f"{name}.ckpt"
        temporary = path.with_name(f".{path.name}.tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, path)
        trainer.strategy.barrier("saved")
        if name == "last":
            self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at multiples of ``every_n_steps``, and at the last step: here an epoch is still open, so that the
        position in it is right.
        """
        step = trainer.global_step
        last = trainer.should_stop or step == trainer.max_steps
        if step != self._saved and step > 0 and (last or step % self.every_n_steps == 0):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint of an epoch."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.save(trainer, f"epoch_{trainer.current_epoch:03d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was reached, unless the last step did."""
        if trainer.global_step != self._saved:
            self.save(trainer)
