"""What both forms of Mask2Former's losses share: weights and sampling, and matched queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from panoptic_ibs.ranges import AtLeastOne, Bounds, NonNegative, Share


@dataclass(frozen=True)
class LossOptions:
    """Weights and sampling, with the published values; matching costs have the same weights as the losses."""

    class_weight: NonNegative = 2.0
    mask_weight: NonNegative = 5.0
    dice_weight: NonNegative = 5.0
    no_object: NonNegative = 0.1
    points: AtLeastOne = 12544
    oversample: Annotated[float, Bounds(least=1)] = 3.0
    importance: Share = 0.75


@dataclass
class Matches:
    """Matched queries of one prediction, the crops one after another; all (S,) on the CPU."""

    image: Tensor
    query: Tensor
    row: Tensor
