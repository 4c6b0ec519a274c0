"""Lightning's trainer with the options of :mod:`panoptic_ibs.execution`."""

from __future__ import annotations

from typing import Any

import lightning

from .execution import Execution, Matmul


class Trainer(lightning.Trainer):
    """Trains and validates a :class:`panoptic_ibs.task.PanopticTask`.

    Args:
        float32_matmul: on a GPU, products of float32 matrices and convolutions: ``highest`` in float32, ``high`` in
            TF32, ``medium`` in bfloat16 where torch has that. A CPU computes in float32 whatever this says.
        compile: compile the backbone and convolutional pyramids for training; suits crops of one size.
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
        """As Lightning's."""
        with self.execution.applied(model.model, self.strategy.root_device):
            super().fit(model, *args, **options)

    def validate(self, model: Any = None, *args: Any, **options: Any) -> Any:
        """As Lightning's."""
        task: Any = model or self.lightning_module
        with self.execution.applied(task.model, self.strategy.root_device):
            return super().validate(model, *args, **options)
