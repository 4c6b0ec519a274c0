"""How a network is computed while it is trained: formats, memory against time, compiled parts. What it learns stays.

Names of weights, and checkpoints, are the same with all of it and without; afterwards the network is as it was before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers.pyramid import FeaturePyramid, SemanticPyramid

Matmul = Literal["highest", "high", "medium"]


@dataclass(frozen=True)
class Execution:
    """Choices of ``trainer``.

    Attributes:
        float32_matmul: on a GPU, products of float32 matrices and convolutions: ``highest`` in float32, ``high`` in
            TF32 (ten bits of mantissa), ``medium`` in bfloat16 where torch has that, else TF32. Nothing elsewhere.
        compile: ``torch.compile`` for the backbone and convolutional pyramids in training steps; with
            ``checkpoint_activations`` for the pyramids alone.
        checkpoint_activations: keep no activations inside of the backbone's stages; the backward pass computes them
            again. Less memory, more time.
        channels_last: the backbone's images, activations and weights with channels innermost in memory.
    """

    float32_matmul: Matmul = "high"
    compile: bool = False
    checkpoint_activations: bool = False
    channels_last: bool = False

    @contextmanager
    def applied(self, network: nn.Module, device: torch.device) -> Iterator[None]:
        """Within its block ``network``, which has a ``backbone``, is computed so on ``device``."""
        backbone: nn.Module = network.backbone  # type: ignore[assignment]
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(float32_products(self.float32_matmul))
            if self.channels_last:
                stack.enter_context(channels_innermost(backbone))
            if self.checkpoint_activations:
                for stage in stages(backbone):
                    stack.enter_context(replaced(stage, partial(_recomputed, stage, stage.forward)))
            if self.compile:
                pyramids = [m for m in network.modules() if isinstance(m, FeaturePyramid | SemanticPyramid)]
                for part in pyramids if self.checkpoint_activations else (backbone, *pyramids):
                    stack.enter_context(replaced(part, Compiled(part)))
            yield


@contextmanager
def float32_products(precision: Matmul) -> Iterator[None]:
    """Within its block float32 products and convolutions on CUDA devices have this precision."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def channels_innermost(backbone: nn.Module) -> Iterator[None]:
    """Within its block the backbone's weights, and the images that it gets, have their channels innermost."""

    def convert(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) else x for x in inputs)

    backbone.to(memory_format=torch.channels_last)
    hook = backbone.register_forward_pre_hook(convert)
    try:
        yield
    finally:
        hook.remove()
        backbone.to(memory_format=torch.contiguous_format)


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within its block ``forward`` computes the module; its children and the names of its weights stay."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def stages(backbone: nn.Module) -> list[nn.Module]:
    """The parts of a backbone that have layers inside, from the outermost level that has several of them."""
    parts: list[nn.Module] = [backbone]
    while len(parts) == 1:
        inner = [c for child in parts[0].children() for c in (child if isinstance(child, nn.ModuleList) else [child])]
        parts, before = [c for c in inner if any(True for _ in c.children())], parts
        if not parts:
            return before
    return parts


def _recomputed(stage: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """Run a stage; where gradients are wanted nothing inside of it is kept."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, stage))


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around the first and the second computation of a stage."""
    return nullcontext(), _statistics_kept(stage)


@contextmanager
def _statistics_kept(stage: nn.Module) -> Iterator[None]:
    """Within its block training does not move the running statistics of batch norms: it has done so already."""
    norms: list[Any] = [m for m in stage.modules() if getattr(m, "track_running_stats", False)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, seen) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, seen


class Compiled:
    """A module's ``forward``, compiled for steps with gradients; as it stands where compiling fails.

    Args:
        module: shapes of its input should be the same in every step: each new one is compiled again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.name = type(module).__name__
        self.plain: Callable[..., Any] = module.forward
        self.quick: Callable[..., Any] | None = torch.compile(module.forward, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        """The module's output."""
        if self.quick is None or not torch.is_grad_enabled():
            return self.plain(*args)
        try:
            return self.quick(*args)
        except Exception as error:
            result = self.plain(*args)  # an error of the network itself comes again, and goes its way
            self.quick = None
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"trainer.compile: {self.name} cannot be compiled here and runs as it is, at the same results "
                f"({type(error).__name__}: {reason}).",
                stacklevel=2,
            )
            return result
