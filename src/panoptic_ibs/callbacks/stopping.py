"""Ending training in order when it is told to."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self

from lightning import Callback, LightningModule, Trainer


class StopOnInterrupt(Callback):
    """Within its ``with`` block Ctrl-C ends training after the current step; a second Ctrl-C ends the program.

    Loader processes inherit the handler and go on serving. With several processes they agree on the step at which
    to stop.

    Attributes:
        interrupted: whether Ctrl-C was pressed.
    """

    def __init__(self, agree_every_n_steps: int = 10) -> None:
        self.agree_every_n_steps = agree_every_n_steps
        self.interrupted = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._former)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this step. No validation then: the evaluation that follows training is one."""
        if trainer.world_size > 1 and trainer.global_step % self.agree_every_n_steps == 0:
            self.interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        if trainer.world_size == 1 or trainer.global_step % self.agree_every_n_steps == 0:
            trainer.should_stop = trainer.should_stop or self.interrupted
        if trainer.should_stop or trainer.global_step == trainer.max_steps:
            trainer.limit_val_batches = 0
