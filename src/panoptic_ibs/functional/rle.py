"""Masks as COCO run lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco
from torch import Tensor


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """(N, H, W) bool masks as N compressed run lengths, ``{"size": [H, W], "counts": bytes}``."""
    columns = np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    encoded: list[dict[str, Any]] = coco.encode(columns)
    return encoded
