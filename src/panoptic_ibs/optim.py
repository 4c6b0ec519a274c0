"""Parameter groups, the learning-rate schedule, gradient clipping and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import FrozenBatchNormAct2d
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchvision.ops import FrozenBatchNorm2d

from .errors import ConfigError
from .ranges import AtLeastOne, NonNegative, Positive, Whole

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
)
KINDS = ("norm", "embedding", "bias")
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # have one kernel for all parameters, on CPUs as well
OptimizerFactory = Callable[..., Optimizer]
SGD: OptimizerFactory = partial(torch.optim.SGD, momentum=0.9)


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    backbone_lr_factor: float = 1.0,
    no_decay: Sequence[str] = ("norm", "embedding"),
) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: backbone or not, decayed or not.

    What a parameter is follows from the type of the module that owns it, never from its name. The table of relative
    positions of a Swin block counts as an embedding.

    Args:
        model: its child ``backbone``, if any, gets ``lr * backbone_lr_factor``.
        lr: learning rate.
        weight_decay: weight decay of the decayed groups.
        backbone_lr_factor: factor of the backbone's learning rate.
        no_decay: kinds of parameters without decay: ``norm``, ``embedding`` (``nn.Embedding``), ``bias`` (of any other
            module).

    Raises:
        ConfigError: an unknown kind; nothing to train.
    """
    unknown = set(no_decay) - set(KINDS)
    if unknown:
        raise ConfigError(f"optim.no_decay holds {sorted(unknown)}; choose from {', '.join(KINDS)}.")
    backbone = getattr(model, "backbone", None)
    inside = set(map(id, backbone.parameters())) if isinstance(backbone, nn.Module) else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for kind, parameter in _by_kind(model):
        groups.setdefault((id(parameter) in inside, kind not in no_decay), []).append(parameter)
    if not groups:
        raise ConfigError("The model has no trainable parameter: lower backbone.frozen_stages.")
    return [
        {
            "params": parameters,
            "lr": lr * (backbone_lr_factor if is_backbone else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
            "name": f"{'backbone' if is_backbone else 'rest'}{'' if decayed else '_no_decay'}",
        }
        for (is_backbone, decayed), parameters in sorted(groups.items())
    ]


def _by_kind(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(kind, parameter) of every trainable parameter, each once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, NORMS):
                yield "norm", parameter
            elif isinstance(module, nn.Embedding | WindowAttention):
                yield "embedding", parameter
            else:
                yield ("bias" if name == "bias" else "weight"), parameter


def warmup_poly(
    step: int, max_steps: int, warmup_steps: int = 1000, factor: float = 0.001, power: float = 0.9
) -> float:
    """Factor of the learning rate at a step: ``(1 - step / max_steps) ** power``, from ``factor`` in a linear warm-up.

    During the warm-up the polynomial is multiplied by a ramp from ``factor`` at step 0 to 1 at ``warmup_steps``, as in
    the published Panoptic FCN configuration.
    """
    ramp = 1.0
    if step < warmup_steps:
        ramp = factor + (1.0 - factor) * step / warmup_steps
    return ramp * max(0.0, 1.0 - step / max_steps) ** power


def warmup_steps_down(
    step: int, milestones: Sequence[int], warmup_steps: int = 0, factor: float = 0.001, gamma: float = 0.1
) -> float:
    """Factor of the learning rate at a step: ``gamma`` for each milestone passed, behind the same linear warm-up."""
    ramp = factor + (1.0 - factor) * step / warmup_steps if step < warmup_steps else 1.0
    return ramp * gamma ** sum(step >= m for m in milestones)


@dataclass(frozen=True)
class Recipe:
    """How to optimise; ``conf/optim`` holds the published ones.

    Attributes:
        optimizer: makes the optimiser of parameter groups, e.g. ``functools.partial(torch.optim.SGD, momentum=0.9)``.
        lr: learning rate at the recipe's batch size.
        weight_decay: weight decay.
        backbone_lr_factor: factor of the backbone's learning rate.
        no_decay: kinds of parameters without weight decay, see :func:`parameter_groups`.
        power: power of the polynomial decay; 0 keeps the rate.
        warmup_steps: steps of linear warm-up.
        warmup_factor: factor at step 0.
        milestones: steps at which the rate falls, in place of the polynomial decay.
        milestone_factor: to this share of it.
        clip_value: gradients are clamped to plus or minus this, or None.
        clip_norm: the norm of the whole gradient is held under this, or None.
    """

    optimizer: OptimizerFactory = SGD
    lr: NonNegative = 0.02
    weight_decay: NonNegative = 1e-4
    backbone_lr_factor: NonNegative = 1.0
    no_decay: Sequence[Literal["norm", "embedding", "bias"]] = ("norm", "embedding")
    power: NonNegative = 0.9
    warmup_steps: Whole = 1000
    warmup_factor: NonNegative = 0.001
    milestones: Sequence[AtLeastOne] = ()
    milestone_factor: Positive = 0.1
    clip_value: Positive | None = 5.0
    clip_norm: Positive | None = None


def build_optimizer(
    model: nn.Module, recipe: Recipe, max_steps: int, undecayed: Sequence[nn.Parameter] = (), fused: bool = True
) -> tuple[Optimizer, LambdaLR]:
    """Optimiser and its per-step schedule over ``max_steps`` optimiser steps.

    Args:
        model: the network.
        recipe: how to optimise it.
        max_steps: of the schedule.
        undecayed: parameters outside of the network, without weight decay: learnt loss weights.
        fused: take torch's fused form of the optimiser where it has one and the recipe does not say ``fused`` or
            ``foreach`` itself. It must not where a gradient scaler is at work: it would unscale gradients after they
            are clipped.
    """
    groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.backbone_lr_factor, recipe.no_decay)
    if undecayed:
        groups.append({"params": list(undecayed), "lr": recipe.lr, "weight_decay": 0.0, "name": "loss_weights"})
    quick = {"fused": True} if fused and _can_be_fused(recipe.optimizer, groups) else {}
    optimizer = recipe.optimizer(groups, lr=recipe.lr, **quick)
    optimizer.register_load_state_dict_post_hook(lay_out_alike)

    def schedule(step: int) -> float:
        if recipe.milestones:
            return warmup_steps_down(
                step, recipe.milestones, recipe.warmup_steps, recipe.warmup_factor, recipe.milestone_factor
            )
        return warmup_poly(step, max_steps, recipe.warmup_steps, recipe.warmup_factor, recipe.power)

    return optimizer, LambdaLR(optimizer, schedule)


def _can_be_fused(factory: OptimizerFactory, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch has a fused form for these parameters, and the maker of the optimiser leaves the choice to us."""
    made, given = (factory.func, factory.keywords) if isinstance(factory, partial) else (factory, {})
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return made in FUSED and devices <= {"cpu", "cuda"} and not {"fused", "foreach", "differentiable"} & set(given)


def lay_out_alike(optimizer: Optimizer) -> None:
    """Give what an optimiser has gathered the memory layout of its parameters, values unchanged.

    Fused kernels walk through memory and look at no strides: with a checkpoint of a run without
    ``trainer.channels_last`` they would pair wrong numbers.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_rates(scheduler: LambdaLR) -> None:
    """Give the optimiser the rates that the schedule has at its step; without a resume they are these already."""
    step = scheduler.last_epoch
    for group, base, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(step)


def clip_gradients(parameters: Iterable[nn.Parameter], value: float | None, norm: float | None) -> None:
    """Clip gradients in place: each number to plus or minus ``value``, then the norm of all of them to ``norm``."""
    parameters = list(parameters)
    if value is not None:
        nn.utils.clip_grad_value_(parameters, value)
    if norm is not None:
        nn.utils.clip_grad_norm_(parameters, norm)
