"""Masks as COCO run lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco
from torch import Tensor


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """(N, H, W) bool masks as N compressed run lengths, ``{"size": [H, W], "counts": bytes}``."""
    columns = np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    encoded: list[dict[str, Any]] = coco.encode(columns)
    return encoded


def encode_id_map(id_map: np.ndarray, count: int) -> list[dict[str, Any]]:
    """Ids 1 to ``count`` of an (H, W) id map as ``count`` compressed run lengths; those that do not occur are empty.

    The map is cut into runs once, whatever the number of segments; no mask is made.

    Raises:
        ValueError: if an id lies outside 0 to ``count``.
    """
    height, width = id_map.shape
    flat = id_map.T.ravel()  # COCO counts down the columns
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))[: flat.size]
    ids, lengths = flat[starts], np.diff(starts, append=flat.size)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > count):
        raise ValueError(f"The id map holds ids from {ids.min()} to {ids.max()}; expected 0 to {count}.")
    order = np.argsort(ids, kind="stable")
    edges = np.stack([starts[order], starts[order] + lengths[order]], 1)
    limits = np.searchsorted(ids[order], np.arange(1, count + 2))
    if not count:
        return []
    runs = [edges[a:b].ravel() for a, b in pairwise(limits)]
    # Background and segment in turn, from the first pixel on; a last run of no pixels is not written.
    ends = [[] if r.size and r[-1] == flat.size else [flat.size] for r in runs]
    counts = [np.diff(np.concatenate(([0], r, end))).astype(np.uint32) for r, end in zip(runs, ends, strict=True)]
    encoded: list[dict[str, Any]] = coco.frPyObjects(
        [{"size": [height, width], "counts": c} for c in counts], height, width
    )
    return encoded
