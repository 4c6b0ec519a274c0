"""What both forms of Mask2Former's losses share: weights and sampling, and matched queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossOptions:
    """Weights and sampling, with the published values; matching costs have the same weights as the losses."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75


@dataclass
class Matches:
    """Matched queries of one prediction, the crops one after another; all (S,) on the CPU."""

    image: Tensor
    query: Tensor
    row: Tensor
