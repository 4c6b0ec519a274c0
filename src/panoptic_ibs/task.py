"""The LightningModule: steps, losses, metrics and the optimiser's hook-up. No network code, no file formats."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .checkpoints import RESUME_REMEDY, misfit
from .errors import CheckpointError, ConfigError, UserError, out_of_memory
from .heads.base import Head
from .ibs import IntraBatchSupervision
from .metrics import InstanceAP, PanopticMetrics
from .metrics.names import HEADLINE
from .model import PanopticModel
from .optim import Recipe, build_optimizer, clip_gradients, set_rates
from .structures import Batch
from .weighing import Fixed, Weighing

LOGGED = (*HEADLINE, "sq", "rq", "ap", "ap_small", "ap_medium", "ap_large")


class NonFiniteLossError(UserError):
    """The loss is not a number or infinite: the message names the images of the step."""


class LossGuard:
    """Finds non-finite losses without stopping a GPU: each loss is copied in the background and read once it is there.

    On a GPU an error may come a few steps late; it names the images of its own step all the same.
    """

    def __init__(self, patience: int = 16) -> None:
        self.patience = patience
        self._pending: deque[tuple[Tensor, Any, int, Sequence[str], Mapping[str, Tensor]]] = deque()

    def watch(self, loss: Tensor, step: int, names: Sequence[str], terms: Mapping[str, Tensor]) -> None:
        """Take up the loss of a step; raise if this or an earlier one is not finite.

        Raises:
            NonFiniteLossError: names the step, its images and the terms.
        """
        loss, event = loss.detach(), None
        kept = {name: term.detach() for name, term in terms.items()}
        if loss.is_cuda:
            loss = loss.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((loss, event, step, list(names), kept))
        while self._pending:
            first, event, step, names, terms = self._pending[0]
            if event is not None and not event.query():
                if len(self._pending) <= self.patience:
                    return
                event.synchronize()
            self._pending.popleft()
            if not torch.isfinite(first):
                values = ", ".join(f"{name} {term.item():.4g}" for name, term in terms.items())
                raise NonFiniteLossError(
                    f"The loss of step {step} is {first.item()} ({values}) on the images {', '.join(names)}. Look at "
                    "them with panoptic_ibs.prepare check; else lower optim.lr, lengthen optim.warmup_steps or set "
                    "trainer.precision=32-true. The last checkpoint is from before."
                )


def check_supervision(ibs: IntraBatchSupervision | None, crops_per_device: int, paired: bool) -> None:
    """Make sure at start-up that the batch has what intra-batch supervision needs.

    Args:
        ibs: the loss, or None.
        crops_per_device: crops in the batch of one device.
        paired: whether the sampler draws pairs.

    Raises:
        ConfigError: one crop a device, too few for the number of target crops, or ``ibs=paired`` without pairs.
    """
    if ibs is None:
        return
    if ibs.partners == "paired" and not paired:
        raise ConfigError("ibs=paired needs crop pairs: use sampling=paired_crop, or ibs=random with this sampler.")
    if crops_per_device <= ibs.num_targets:
        raise ConfigError(
            f"ibs={ibs.partners} with {ibs.num_targets} target crop(s) needs at least {ibs.num_targets + 1} crops a "
            f"device, but sampling.batch_size={crops_per_device}: raise sampling.batch_size, lower ibs.num_targets or "
            "set ibs=none."
        )


def check_embeddings(ibs: IntraBatchSupervision | None, head: Head | type[Head]) -> None:
    """Make sure at start-up that the head has segment embeddings for intra-batch supervision.

    Raises:
        ConfigError: it says that it has none.
    """
    if ibs is not None and not head.embeds:
        name = (head if isinstance(head, type) else type(head)).__name__
        raise ConfigError(
            f"ibs={ibs.partners}: the head {name} has no segment embeddings, so there is nothing to "
            "supervise: set ibs=none, or choose another head."
        )


def check_precision(precision: str) -> None:
    """Make sure that weights stay in float32: matching, losses and deformable sampling are computed in it.

    Raises:
        ConfigError: a precision that converts the weights.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise ConfigError(
            f"trainer.precision={precision} would convert the weights, but they stay in single precision here: choose "
            "32-true, bf16-mixed or 16-mixed."
        )


class PanopticTask(LightningModule):
    """Trains and validates a :class:`PanopticModel`.

    Logs ``train/loss``, ``train/loss_<term>`` (weighted: they add up to the loss), ``train/loss_ibs``, ``train/lr`` and
    ``val/...`` at every validation; with learnt weights ``train/raw_<group>`` and ``train/log_variance_<group>`` too.

    Attributes:
        results: of the last validation.
        left_out: whether the validation that is going on is to be broken off, and says nothing.
        place: ``step`` and ``epoch`` that a validation outside of training is logged at.

    Args:
        model: the network.
        recipe: the optimisation; not needed for validation.
        ibs: intra-batch supervision, or None.
        weigh: makes one loss of the head's terms; the head's fixed weights when None.
        description: plain containers that go into every checkpoint as ``panoptic_ibs`` (see
            :func:`panoptic_ibs.construction.load`).

    Raises:
        ConfigError: ``ibs`` with a head without segment embeddings.
    """

    def __init__(
        self,
        model: PanopticModel,
        recipe: Recipe | None = None,
        ibs: IntraBatchSupervision | None = None,
        description: Mapping[str, Any] | None = None,
        weigh: Weighing | None = None,
    ) -> None:
        super().__init__()
        check_embeddings(ibs, model.head)
        self.model, self.recipe, self.ibs = model, recipe or Recipe(), ibs
        self.weigh = weigh or Fixed()
        self.weigh.prepare(model.head.weights)
        self.description = dict(description or {})
        self.metrics = PanopticMetrics(model.classes)
        self.average_precision = InstanceAP(model.classes) if model.head.makes_instances else None
        self.results: dict[str, Any] = {}
        self.faults: list[str] = []
        self.left_out = False
        self.place: dict[str, float] = {}
        self._guard = LossGuard()
        self._steps = 1

    def setup(self, stage: str) -> None:
        """Look at the trainer's precision before anything is converted.

        Raises:
            ConfigError: one that the network cannot compute in.
        """
        check_precision(self.trainer.precision)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the head's loss terms and the intra-batch loss. No host-device synchronisation."""
        terms, segments = self.model.losses(batch, self.weigh)
        if self.ibs is not None:
            terms["ibs"] = self.ibs(segments, batch.pairs, batch.targets)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        self._guard.watch(loss, self.global_step, batch.file_names, terms)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/loss_{k}": v.detach() for k, v in terms.items()}, batch_size=len(batch))
        self.log_dict({f"train/{k}": v for k, v in self.weigh.report().items()}, batch_size=len(batch))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=len(batch))
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tell the head how much of the training is done; after a resume it is as if it had never stopped."""
        self.model.head.progress(self.global_step / self._steps)

    def on_train_start(self) -> None:
        """Let the rates follow this run's schedule from its first step on: a checkpoint brings those of its own."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                set_rates(config.scheduler)

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self.faults = []
        self.left_out = False
        self.metrics.reset()
        if self.average_precision is not None:
            self.average_precision.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:  # Lightning's type has no lists
        """Count one batch of whole images; callbacks get the list of predictions.

        Images that cannot be read, or that memory does not suffice for, are left out and told in ``results``.
        """
        self.faults += batch.faults
        try:
            predictions = self.model.predict_batch(batch, views=True)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.faults += [f"{name}: memory does not suffice for this image." for name in batch.file_names]
            predictions = []
        if not predictions:
            return predictions
        self.metrics.update(predictions, batch.targets)
        if self.average_precision is not None:
            self.average_precision.update(predictions, batch.targets)
        return predictions

    def on_validation_epoch_end(self) -> None:
        """Compute over all processes, keep in ``results`` and log; nothing of a validation that was broken off."""
        if self.left_out:
            return
        self.results = self.metrics.compute()
        if self.average_precision is not None:
            self.results |= self.average_precision.compute()
        faults = self._all_faults()
        if faults:
            self.results |= {"complete": False, "faults": faults}
        self.log_dict({**self.logged_values(), **self.place}, batch_size=1)

    def logged_values(self) -> dict[str, float]:
        """What is logged of the last validation."""
        values = {f"val/{name}": float(self.results[name]) for name in LOGGED if self.results.get(name) is not None}
        values["val/confusion@50"] = float(self.results["confusion"]["50"])
        return values

    def check_fits(self, path: str | Path, checkpoint: Mapping[str, Any]) -> None:
        """Make sure, before training, that a checkpoint has this network's weights and this recipe's optimiser.

        Args:
            path: names it in messages.
            checkpoint: its content.

        Raises:
            CheckpointError: it has not.
        """
        from .descriptions import check_run  # pydantic

        check_run(checkpoint, path)
        if wrong := misfit(checkpoint["state_dict"], self.state_dict()):
            raise CheckpointError(f"{path}: {wrong}. {RESUME_REMEDY}")
        optimizer, _ = build_optimizer(self.model, self.recipe, 1, list(self.weigh.parameters()))
        ours = optimizer.state_dict()["param_groups"]
        try:
            groups = checkpoint["optimizer_states"][0]["param_groups"]
            same = [(set(g), len(g["params"])) for g in groups] == [
                (set(g) | {"initial_lr"}, len(g["params"])) for g in ours
            ]
        except (TypeError, KeyError, IndexError):
            raise CheckpointError(f"{path}: its optimiser's parameter groups are missing. {RESUME_REMEDY}") from None
        lost = any("betas" in g or g.get("momentum") for g in groups) and not checkpoint["optimizer_states"][0]["state"]
        if lost and checkpoint.get("global_step"):
            raise CheckpointError(f"{path}: what its optimiser had gathered is missing. {RESUME_REMEDY}")
        if not same:
            raise CheckpointError(
                f"{path}: its optimiser's parameter groups are others than this run's. {RESUME_REMEDY}"
            )

    def _all_faults(self) -> list[str]:
        """Those of all processes, in the order of their words."""
        gathered: list[Any] = [self.faults]
        if self.trainer.world_size > 1:
            gathered = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.faults)
        return sorted(fault for part in gathered for fault in part)

    def configure_optimizers(self) -> Any:
        """The recipe over ``trainer.max_steps`` optimiser steps."""
        trainer = self.trainer
        self._steps = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        learnt, scaled = list(self.weigh.parameters()), trainer.precision.startswith("16")
        optimizer, scheduler = build_optimizer(self.model, self.recipe, self._steps, learnt, fused=not scaled)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip as the recipe says; under mixed precision gradients are unscaled by now."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        clip_gradients(parameters, self.recipe.clip_value, self.recipe.clip_norm)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy without waiting."""
        return batch.to(device, non_blocking=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the model, so that the checkpoint is all that :func:`panoptic_ibs.load` needs."""
        checkpoint["panoptic_ibs"] = self.description
