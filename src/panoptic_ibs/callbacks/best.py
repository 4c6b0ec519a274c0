"""The best checkpoint of a run, and ending it when nothing gets better any more."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from panoptic_ibs.errors import CheckpointError
from panoptic_ibs.files import read_json_or_none, write_json
from panoptic_ibs.loggers import MetricsCSV
from panoptic_ibs.metrics.names import named
from panoptic_ibs.ranges import AtLeastOne, NonNegative

from .checkpoints import SaveCheckpoints

Monitored = Literal[
    "val/pq", "val/pq_things", "val/pq_stuff", "val/sq", "val/rq", "val/acc_things", "val/prec_things",
    "val/confusion@50",
]  # fmt: skip


def lower_is_better(monitor: str) -> bool:
    """Whether a number that is logged is good when it is small."""
    return named(monitor.removeprefix("val/")).lower


def counts(trainer: Trainer, module: Any) -> bool:
    """Whether a validation has ended that says something: no check before training, and none that was broken off."""
    return not trainer.sanity_checking and not module.left_out


class KeepBest(Callback):
    """Keeps ``checkpoints/best.ckpt`` of the run folder: the weights with the best validation so far.

    It is another name of the checkpoint that was saved before that validation, and takes no time to write.
    ``best.json`` beside it says which step it is of, and what its number is. Both stay when a run is resumed.
    Only validations of equally many images are compared.

    Args:
        monitor: the number; the earlier checkpoint is kept where two are equal.
    """

    def __init__(self, monitor: Monitored = "val/pq") -> None:
        self.monitor = monitor
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the run's own checkpoint is meant."""
        self._trained = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint of this validation if it is the best one."""
        module: Any = pl_module
        if not counts(trainer, module) or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "checkpoints"
        former = best_of(folder)
        value, images = module.logged_values()[self.monitor], module.results["num_images"]
        comparable = former is not None and former["monitor"] == self.monitor and former["images"] == images
        source, step = self._validated(trainer, module, folder, comparable or former is None)
        if source is None or not math.isfinite(value):
            return
        sign = -1 if lower_is_better(self.monitor) else 1
        if former is not None and comparable and sign * value <= sign * former["value"]:
            return
        name_again(source, folder / "best.ckpt")
        write_json(folder / "best.json", {"monitor": self.monitor, "value": value, "step": step, "images": images})

    def _validated(self, trainer: Trainer, module: Any, folder: Path, comparable: bool) -> tuple[Path | None, int]:
        """The checkpoint that was validated, or None, and its step."""
        last = folder / "last.ckpt"
        if trainer.state.fn == TrainerFn.FITTING:
            savers = [c for c in trainer.callbacks if isinstance(c, SaveCheckpoints)]  # type: ignore[attr-defined]
            saved = any(saver.saved_step == trainer.global_step for saver in savers)
            return last if saved else None, trainer.global_step
        step = int(module.place.get("step", trainer.global_step))
        if not self._trained:  # a validation that the resumed run had been ended in
            return Path(trainer.ckpt_path) if trainer.ckpt_path else None, step
        # The evaluation after training: it may be of other images, or of a few.
        stopped = any(getattr(c, "interrupted", False) for c in trainer.callbacks)  # type: ignore[attr-defined]
        return last if comparable and not stopped and last.is_file() else None, step


def best_of(folder: Path) -> dict[str, Any] | None:
    """What ``best.json`` of a folder of checkpoints says; None without the checkpoint."""
    found = read_json_or_none(folder / "best.json")
    sound = isinstance(found, dict) and {"monitor", "value", "step", "images"} <= found.keys()
    return found if sound and (folder / "best.ckpt").is_file() else None


def name_again(source: Path, goal: Path) -> None:
    """Give a file a second name, or copy it where the system has one name a file; ``goal`` is never half a file.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    temporary = goal.with_name(f".{goal.name}.tmp")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, goal)
    except OSError as error:
        raise CheckpointError(
            f"{goal}: cannot be written ({error.strerror or error}). Make room, choose a run_dir= on another disk, or "
            "go without it: callbacks.best=null."
        ) from None


class StopEarly(Callback):
    """Ends training when a number has not got better for some validations; the checkpoint and evaluation follow.

    What it has seen is in every checkpoint and in ``metrics.csv``: a resumed run ends where it would have ended.

    Args:
        monitor: the number.
        patience: validations without a better one that end training; None never does.
        least: it has to be better by more than this.
    """

    def __init__(
        self, monitor: Monitored = "val/pq", patience: AtLeastOne | None = None, least: NonNegative = 0.0
    ) -> None:
        self.monitor, self.patience, self.least = monitor, patience, least
        self.seen: dict[int, float] = {}  # by step
        self._trained = self._stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that had ended by this does not go on: its last checkpoint is older than its last validation."""
        self._trained = True
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                rows = {
                    step + 1: row[self.monitor]
                    for step, row in logger.rows.items()
                    if row.get(self.monitor) not in (None, "")
                }
                self.seen = {**{step: float(value) for step, value in rows.items()}, **self.seen}
        self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether this validation was better."""
        module: Any = pl_module
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not counts(trainer, module) or (self._trained and not fitting):  # the evaluation after training is none
            return
        step = trainer.global_step if fitting else int(module.place.get("step", trainer.global_step))
        self.seen[step] = module.logged_values()[self.monitor]
        if fitting:
            self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why training ends."""
        if self._stopped:
            step, value = self._best()
            rank_zero_only(print)(
                f"training ends after step {trainer.global_step}: {self.monitor} has not been better than {value:.4f} "
                f"(step {step}) for {self.patience} validation(s); callbacks.early_stopping.patience",
                flush=True,
            )

    def _look(self, trainer: Trainer) -> None:
        if self.patience is None or not self.seen:
            return
        since = sum(step > self._best()[0] for step in self.seen)
        self._stopped = since >= self.patience
        trainer.should_stop = trainer.should_stop or self._stopped

    def _best(self) -> tuple[int, float]:
        """Step and value of the last one that was better than all before it by more than ``least``."""
        sign = -1 if lower_is_better(self.monitor) else 1
        best: tuple[int, float] | None = None
        for step, value in sorted(self.seen.items()):
            if math.isfinite(value) and (best is None or sign * (value - best[1]) > self.least):
                best = step, value
        return best or (0, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """What was seen, and of what."""
        return {"monitor": self.monitor, "seen": {str(step): value for step, value in self.seen.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the former run had seen, unless it watched another number."""
        if state_dict.get("monitor") == self.monitor:
            self.seen = {**{int(step): value for step, value in state_dict["seen"].items()}, **self.seen}
