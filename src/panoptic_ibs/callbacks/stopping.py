"""Ending training in order when it is told to."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any, Self

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from panoptic_ibs import signals


class StopOnInterrupt(Callback):
    """Within its ``with`` block Ctrl-C, SIGTERM and SIGHUP end training after the current step, with a checkpoint.

    A validation that is going on is left, its step's checkpoint is there. A second signal, and any before the first
    step or after the last, ends the program at once. With several processes they agree on the step at which to stop.

    Attributes:
        number: the signal that ended training, 0 for none.
    """

    def __init__(self, agree_every_n_steps: int = 10) -> None:
        self.agree_every_n_steps = agree_every_n_steps
        self.number = 0
        self._training = False
        self._step = 0
        self._between = False  # of two steps
        self._handlers = ExitStack()

    @property
    def interrupted(self) -> bool:
        """Whether training was told to stop."""
        return self.number != 0

    @property
    def status(self) -> int:
        """Exit status: 128 + the signal's number, 0 without one."""
        return 128 + self.number if self.number else 0

    def __enter__(self) -> Self:
        self._handlers.enter_context(signals.handled(self._on_signal))
        return self

    def __exit__(self, *_: object) -> None:
        self._training = False
        self._handlers.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted or not self._training:
            signals.stop(number)
        self.number = number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning, which ends at SIGTERM without a checkpoint and without a status."""
        signals.take_back()
        self._training, self._step = True, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this step. No validation then: the evaluation that follows training is one."""
        step, former = trainer.global_step, self._step
        self._step, self._between = step, step != former
        if not self._between:  # gradients are still being accumulated: stopping here would lose them
            return
        if trainer.world_size == 1:
            trainer.should_stop = trainer.should_stop or self.interrupted
        elif step % self.agree_every_n_steps == 0:
            self._agree(trainer)
        if trainer.should_stop or step == trainer.max_steps:
            trainer.limit_val_batches = 0

    def _agree(self, trainer: Trainer) -> None:
        number = torch.tensor(float(self.number), device=trainer.strategy.root_device)
        self.number = int(trainer.strategy.reduce(number, reduce_op="max"))
        trainer.should_stop = trainer.should_stop or self.interrupted

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back, see :meth:`on_train_start`."""
        signals.take_back()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave a validation within training. With several processes it is done to the end, as all take part in it."""
        if self._training and self.interrupted and trainer.world_size == 1:
            pl_module.left_out = True  # type: ignore[assignment]
            raise StopIteration  # Lightning's word for the end of a validation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a validation that was left."""
        if self._training and self.interrupted and self._between and trainer.world_size == 1:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why training ends before its time."""
        self._training = False
        if self.interrupted:
            said = f"{signals.Stopped(self.number)} after step {trainer.global_step}; a short evaluation follows"
            below = "\n" if sys.stderr.isatty() else ""  # of the progress bar
            rank_zero_only(print)(f"{below}{said}", file=sys.stderr, flush=True)
