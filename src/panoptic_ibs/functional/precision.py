"""Computing later under the mixed precision of now."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


def under_this_precision(device: str, function: Callable[[], T]) -> Callable[[], T]:
    """``function``, which whenever it is called runs under the autocast that holds now on ``device``, or none."""
    precision = partial(torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    return partial(_call_under, precision, function)


def _call_under(context: Callable[[], torch.autocast], function: Callable[[], T]) -> T:
    with context():
        return function()
