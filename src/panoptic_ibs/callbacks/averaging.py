"""The moving average of the weights."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from panoptic_ibs.errors import CheckpointError, ConfigError
from panoptic_ibs.ranges import Bounds


class MovingAverage(Callback):
    """Exponential moving average of the weights; validation uses it, checkpoints hold it as ``ema_state_dict``.

    Buffers (the running statistics of batch norms) are copied, not averaged.

    Args:
        decay: share of the old average; early on it is at most ``(1 + step) / (10 + step)``.
    """

    def __init__(self, decay: Annotated[float, Bounds(least=0, below=1)] = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"callbacks.ema.decay={decay} must be in [0, 1).")
        self.decay = decay
        self.average: dict[str, Tensor] | None = None
        self._step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, unless a checkpoint brought an average."""
        own = _weights(pl_module)
        if self.average is None:
            self.average = {k: v.clone() for k, v in own.items()}
        self.average = {k: v.to(own[k].device) for k, v in self.average.items()}
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after every optimiser step."""
        if trainer.global_step == self._step or self.average is None:
            return  # gradients were only accumulated
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        own = _weights(pl_module)
        floats = [k for k, v in pl_module.named_parameters() if k in own and v.is_floating_point()]
        get_ema_multi_avg_fn(decay)([self.average[k] for k in floats], [own[k] for k in floats], self._step)
        for k in own.keys() - set(floats):
            self.average[k].copy_(own[k])

    def swap(self, module: nn.Module) -> None:
        """Exchange the weights of the module and the average."""
        if self.average is not None:
            own = {k: v.clone() for k, v in _weights(module).items()}
            module.load_state_dict(self.average, strict=False)
            self.average = own

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self.swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights."""
        self.swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add ``ema_state_dict``."""
        if self.average is not None:
            checkpoint["ema_state_dict"] = {k: v.cpu() for k, v in self.average.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average up again; a run that had none starts it from its weights."""
        saved = checkpoint.get("ema_state_dict")
        if saved is None:
            return
        if saved.keys() != _weights(pl_module).keys():
            raise CheckpointError("The checkpoint's moving average (ema_state_dict) is of another model.")
        self.average = {k: v.clone() for k, v in saved.items()}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The network's weights, and learnt loss weights, by their names in the checkpoint; metrics keep none."""
    return {k: v for k, v in module.state_dict().items() if k.startswith(("model.", "weigh."))}
