"""Lightning callbacks: checkpoints, prediction files, pictures, cost, interruption, progress, a repeated epoch."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from .classes import ClassTable
from .functional.embedding_views import PrincipalColors
from .reporting import GalleryWriter
from .reporting.embeddings import choose_query, describe, draw_view, fit_colors, side_by_side
from .results import PanopticWriter
from .structures import Batch, Prediction
from .visualize import Picture, overlay


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


def image_of(batch: Batch, i: int) -> Picture:
    """Image ``i`` of a batch as (H, W, 3) uint8 at its original size, without padding."""
    size = batch.sizes[i]
    pixels = batch.images[i, :, : size.valid[0], : size.valid[1]].permute(1, 2, 0).cpu().numpy()
    if size.valid == size.original:
        return np.ascontiguousarray(pixels)
    return np.asarray(Image.fromarray(pixels).resize(size.original[::-1], Image.Resampling.BILINEAR))


class WritePredictions(Callback):
    """Writes every validated image to ``predictions/`` (COCO panoptic format) and offers it to the report's gallery.

    Args:
        run_dir: the run folder.
        classes: the class table.
        integer_ids: write image ids as numbers.
        gallery: pictures for the report; with several processes they are chosen from the first one's images.
    """

    def __init__(self, run_dir: Path, classes: ClassTable, integer_ids: bool = False, gallery: int = 8) -> None:
        self.run_dir, self.classes, self.integer_ids, self.limit = Path(run_dir), classes, integer_ids, gallery

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the writers."""
        self.writer = PanopticWriter(self.run_dir / "predictions", self.classes, self.integer_ids)
        self.gallery = GalleryWriter(self.run_dir, self.classes, self.limit)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the PNGs."""
        self.add(outputs, batch, pictures=trainer.is_global_zero)

    def add(self, predictions: Sequence[Prediction], batch: Batch, pictures: bool = True) -> None:
        """Write the predictions of a batch."""
        for i, prediction in enumerate(predictions):
            prediction = prediction.cpu()
            self.writer.add(prediction)
            if pictures:
                self.gallery.add(image_of(batch, i), prediction, batch.targets[i].to("cpu"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the segments of all processes and write the JSON."""
        entries = [self.writer.entries]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self.writer.entries)
            entries = gathered
        if trainer.is_global_zero:
            self.writer.close([entry for part in entries for entry in part])
            self.gallery.close()
        trainer.strategy.barrier("predictions")


class LogPictures(Callback):
    """Logs overlays of the same images at every validation to Weights & Biases; does nothing without it.

    From heads that have a view of their embeddings a panel of it too, in colours fit to the validation's first image.

    Args:
        images: how many, from the start of the split.
    """

    def __init__(self, images: int = 4) -> None:
        self.images = images
        self._colors: PrincipalColors | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log one picture: input with ground truth, and with prediction; and one of the embeddings."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or batch_idx >= self.images or not outputs or not trainer.is_global_zero:
            return
        image, prediction, target = image_of(batch, 0), outputs[0].cpu(), batch.targets[0].to("cpu")
        classes: ClassTable = pl_module.model.classes  # type: ignore[union-attr, assignment]
        pair = [
            overlay(image, target.id_map.numpy(), target.class_ids.tolist(), classes),
            overlay(image, prediction.id_map.numpy(), prediction.class_ids.tolist(), classes, labels=True),
        ]
        picture = Image.fromarray(np.concatenate(pair, axis=1))
        name = f"val/{batch_idx:02d}_{target.image_id}"
        for logger in loggers:
            logger.log_image(name, [picture], step=trainer.global_step)
        view = prediction.view() if prediction.view is not None else None
        if view is None:
            return
        if batch_idx == 0 or self._colors is None:
            self._colors = fit_colors(view)
        chosen = choose_query(view, target)
        panel = Image.fromarray(side_by_side(draw_view(image, view, self._colors, chosen, target.id_map.numpy())))
        caption = [describe(view, chosen, classes, target)]
        for logger in loggers:
            logger.log_image(f"{name}_embedding", [panel], step=trainer.global_step, caption=caption)


class SeedSteps(Callback):
    """Makes the dice of a batch (IBS partners, points) follow from seed, rank and the number of the batch alone.

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


class StepProgress(TQDMProgressBar):
    """One bar over all steps of training, in place of one an epoch."""

    def on_train_start(self, *_: Any) -> None:
        """Open the bar."""
        trainer = self.trainer
        self.train_progress_bar = self.init_train_tqdm()
        self.train_progress_bar.reset(trainer.max_steps if trainer.max_steps > 0 else None)
        self.train_progress_bar.initial = trainer.global_step
        self._show(trainer)
        self.train_progress_bar.set_description("training")

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
