"""Lightning's trainer with the options of :mod:`panoptic_ibs.execution`."""

from __future__ import annotations

from typing import Any

import lightning

from .callbacks import TrainingCost
from .errors import UserError, out_of_memory
from .execution import Execution, Matmul


class MemoryShortError(UserError):
    """Memory did not suffice for a training step: the message says how much was in use, and what helps."""


class Trainer(lightning.Trainer):
    """Trains and validates a :class:`panoptic_ibs.task.PanopticTask`.

    Args:
        float32_matmul: on a GPU, products of float32 matrices and convolutions: ``highest`` in float32, ``high`` in
            TF32, ``medium`` in bfloat16 where torch has that. A CPU computes in float32 whatever this says.
        compile: compile the backbone (not with ``checkpoint_activations``) and convolutional pyramids for training;
            suits crops of one size.
        checkpoint_activations: compute what is inside of the backbone's stages again in the backward pass, and do not
            keep it: less memory, more time.
        channels_last: the backbone's images, activations and weights with channels innermost in memory.
        options: of ``lightning.Trainer``.
    """

    def __init__(
        self,
        float32_matmul: Matmul = "high",
        compile: bool = False,
        checkpoint_activations: bool = False,
        channels_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.execution = Execution(float32_matmul, compile, checkpoint_activations, channels_last)

    def fit(self, model: Any, *args: Any, **options: Any) -> None:
        """As Lightning's.

        Raises:
            MemoryShortError: memory did not suffice for a step.
        """
        try:
            with self.execution.applied(model.model, self.strategy.root_device):
                super().fit(model, *args, **options)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise MemoryShortError(self._what_helps()) from error

    def _what_helps(self) -> str:
        """Where memory ran out, and settings that need less of it."""
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        costs = (callback.state_dict() for callback in callbacks if isinstance(callback, TrainingCost))
        peak = next((cost["megabytes"] for cost in costs if cost["megabytes"]), None)
        used = f" (peak so far: {peak / 1e3:.1f} GB)" if peak else ""
        last = "trainer.checkpoint_activations=true"
        if self.execution.checkpoint_activations:
            last = "another backbone"
        elif self.precision.startswith("32") and self.strategy.root_device.type != "cpu":
            last += " or trainer.precision=bf16-mixed"
        return (
            f"The memory of {self.strategy.root_device} does not suffice for step {self.global_step}{used}. Lower "
            "sampling.batch_size (trainer.accumulate_grad_batches makes up for it), take smaller crops by "
            f"sampling.crop_size, or set {last}."
        )

    def validate(self, model: Any = None, *args: Any, **options: Any) -> Any:
        """As Lightning's."""
        task: Any = model or self.lightning_module
        with self.execution.applied(task.model, self.strategy.root_device):
            return super().validate(model, *args, **options)
