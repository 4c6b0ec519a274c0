"""What goes on with the steps of training: their random numbers, their cost, the progress bar, a repeated epoch."""

from __future__ import annotations

import ctypes
import gc
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class SeedSteps(Callback):
    """Makes what is random in a batch (IBS partners, points) follow from seed, rank and the number of the batch alone.

    So a resumed run throws what a straight one would have thrown.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.batches = seed, 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Seed torch's generators; no synchronisation."""
        root = np.random.SeedSequence([self.seed, trainer.global_rank, self.batches])
        torch.manual_seed(int(root.generate_state(1, np.uint64)[0] >> 1))
        self.batches += 1

    def state_dict(self) -> dict[str, int]:
        """Batches seen, for the checkpoint."""
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with the next batch."""
        self.batches = state_dict["batches"]


class TrainingCost(Callback):
    """Measures time and peak of memory of training, validations in it included; a resumed run goes on counting.

    Checkpoints hold what was counted up to them, so steps that are trained again after a crash count once.

    Attributes:
        megabytes: the peak in MB (1e6 bytes), allocated on the CUDA device, else resident in this process; None where
            the system cannot tell that of this run alone.
        steps: optimisation steps that were counted.
    """

    def __init__(self) -> None:
        self.megabytes: float | None = None
        self.steps = 0
        self._steps_before = 0
        self._first_step = 0
        self._seconds = 0.0
        self._started: float | None = None
        self._device = torch.device("cpu")

    @property
    def seconds(self) -> float:
        """Counted so far."""
        return self._seconds + (0 if self._started is None else time.perf_counter() - self._started)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; forget earlier peaks, those of a sweep's earlier runs for one."""
        self._started, self._first_step = time.perf_counter(), trainer.global_step
        self._device = pl_module.device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        gc.collect()
        with suppress(OSError, AttributeError, TypeError):  # not glibc, which keeps what earlier runs freed
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # not Linux, or not allowed
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count steps; a batch whose gradients are only accumulated is none."""
        self.steps = self._steps_before + trainer.global_step - self._first_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and read the peak."""
        self._seconds, self._started = self.seconds, None
        self._read_peak()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        if self._started is not None:
            self._read_peak()
        return {"seconds": self.seconds, "steps": self.steps, "megabytes": self.megabytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._seconds, self.steps, self.megabytes = (state_dict[k] for k in ("seconds", "steps", "megabytes"))
        self._steps_before = self.steps

    def _read_peak(self) -> None:
        peak: float | None = None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) / 1e6
        else:
            with suppress(OSError):
                lines = Path("/proc/self/status").read_text().splitlines()
                peak = next((int(x.split()[1]) * 1024 / 1e6 for x in lines if x.startswith("VmHWM:")), None)
        self.megabytes = max((x for x in (self.megabytes, peak) if x is not None), default=None)


class StepProgress(TQDMProgressBar):
    """One bar over all steps of training, in place of one an epoch; it says how long is left."""

    def on_train_start(self, *_: Any) -> None:
        """Open the bar."""
        trainer = self.trainer
        self.train_progress_bar = self.init_train_tqdm()
        self.train_progress_bar.bar_format = (
            "{desc}{percentage:3.0f}% |{bar}| step {n_fmt} of {total_fmt}, {remaining} left, {rate_fmt}{postfix}"
        )
        self.train_progress_bar.reset(trainer.max_steps if trainer.max_steps > 0 else None)
        self.train_progress_bar.initial = trainer.global_step
        self._show(trainer)
        self.train_progress_bar.set_description_str("training")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Go on with the bar."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show step and loss."""
        if self._should_update(trainer.global_step, trainer.max_steps):
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            self._show(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the bar."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar at the last step."""
        self._show(trainer)
        super().on_train_end(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The loss alone."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}

    def _show(self, trainer: Trainer) -> None:
        self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.refresh()


class RepeatEpoch(Callback):
    """Makes every epoch the first one: the same crops again and again, to see a network overfit."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the sampler back."""
        trainer.datamodule.set_epoch(0)  # type: ignore[attr-defined]


def progress_bar(refresh_rate: int = 5) -> Any:
    """Lightning's progress bar."""
    from lightning.pytorch.callbacks import TQDMProgressBar

    return TQDMProgressBar(refresh_rate=refresh_rate)
