"""Masks of boxes: cut out of id maps as targets, and pasted into the image as late as possible.

Both are products with one small matrix a side, since bilinear sampling on a grid is separable: rows of the grid times
mask times columns of the grid. On a CPU each product is of the box alone; elsewhere some masks are done at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .forms import batched

CHUNKS = 8  # of full-size masks for targets, where few large operations are wanted: as many for any batch


def _bins(start: Tensor, end: Tensor, bins: int, size: int, aligned: bool) -> Tensor:
    """Weights (N, bins, size) of the pixels along one axis in RoIAlign's bins.

    As RoIAlign with an adaptive number of samples: a bin of length d is the mean of ceil(d) bilinear samples.

    Args:
        start: (N,) first coordinate of the boxes; end: (N,) their last.
        bins: number of bins.
        size: pixels of the axis.
        aligned: pixel k has its centre at k + 0.5; else at k, and a box has at least one pixel, as before ROIAlign was
            corrected.
    """
    start = start - 0.5 if aligned else start
    length = end - (start + 0.5) if aligned else (end - start).clamp(min=1)
    samples = (length / bins).ceil().clamp(min=1)  # of a bin
    most = math.ceil((size + 1) / bins) + 1
    k = torch.arange(most, device=start.device)
    inner = (k + 0.5) / samples[:, None]  # (N, most) place in the bin
    place = torch.arange(bins, device=start.device)[:, None] + inner[:, None]
    place = start[:, None, None] + place * (length / bins)[:, None, None]  # (N, bins, most)
    share = ((k < samples[:, None]) / samples[:, None])[:, None] * ((place >= -1) & (place <= size))
    place = place.clamp(0, size - 1)
    low = place.floor()
    high_share = place - low
    low = low.long()
    weights = place.new_zeros(len(start), bins, size)
    weights.scatter_add_(2, low, share * (1 - high_share))
    return weights.scatter_add_(2, (low + 1).clamp(max=size - 1), share * high_share)


def mask_targets(
    id_maps: Tensor, image: Tensor, rows: Tensor, boxes: Tensor, size: int, aligned: bool = False
) -> Tensor:
    """Masks of instances inside boxes, straight from the id maps.

    Equals ``roi_align(masks, boxes, size, aligned=aligned)`` of the full-size binary masks (torchvision's targets,
    soft at the borders).

    Args:
        id_maps: (B, H, W) integer; 0 is void, k >= 1 is row k - 1 of the crop's table.
        image: (N,) int64, crop of each box.
        rows: (N,) int64, row of each instance in the crop's table.
        boxes: (N, 4) inside of the crops.
        size: M, side of the masks.
        aligned: see :func:`_bins`.

    Returns:
        (N, M, M) float32 in [0, 1].
    """
    height, width = id_maps.shape[-2:]
    down = _bins(boxes[:, 1], boxes[:, 3], size, height, aligned)
    across = _bins(boxes[:, 0], boxes[:, 2], size, width, aligned).mT
    ids = (rows + 1).to(id_maps.dtype)
    result = boxes.new_zeros(len(boxes), size, size)
    if not batched(boxes.device):
        for n, (y, x) in enumerate(_windows(boxes, (height, width))):
            mask = (id_maps[image[n], y, x] == ids[n]).float()
            result[n] = down[n, :, y] @ mask @ across[n, x]
        return result
    step = max(-(-len(boxes) // CHUNKS), 1)
    for start in range(0, len(boxes), step):
        part = slice(start, start + step)
        masks = (id_maps.index_select(0, image[part]) == ids[part, None, None]).float()
        result[part] = down[part] @ masks @ across[part]
    return result


def _windows(boxes: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of an image that boxes (N, 4) on the CPU touch, with one pixel around them."""
    for x1, y1, x2, y2 in boxes.tolist():
        y, x = ((math.floor(a) - 1, math.ceil(b) + 2) for a, b in ((y1, y2), (x1, x2)))
        yield tuple(slice(max(min(a, n - 1), 0), max(min(b, n), 1)) for (a, b), n in zip((y, x), size, strict=True))  # type: ignore[misc]


def _grid(start: Tensor, end: Tensor, size: int, cells: int) -> Tensor:
    """Weights (N, size, cells) of a mask's cells in the pixels of one axis: bilinear, zeros outside of the mask."""
    centres = torch.arange(size, device=start.device) + 0.5
    place = (centres - start[:, None]) / (end - start).clamp(min=1e-6)[:, None] * cells - 0.5
    return (1 - (place[..., None] - torch.arange(cells, device=start.device)).abs()).clamp(min=0)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes at full size, zero outside of their boxes.

    A pixel gets the bilinear value of the mask at its centre; beyond the mask's outer cells it falls to zero, as
    detectron2 pastes probabilities. For logits: :func:`paste_logits`.

    Args:
        masks: (N, M, M) float.
        boxes: (N, 4) in pixels of the image.
        size: (H, W) of the image.

    Returns:
        (N, H, W).
    """
    cells = masks.shape[-2:]
    masks, boxes = masks.float(), boxes.float()
    down = _grid(boxes[:, 1], boxes[:, 3], size[0], cells[0])
    across = _grid(boxes[:, 0], boxes[:, 2], size[1], cells[1]).mT
    if batched(masks.device):
        return down @ masks @ across
    result = masks.new_zeros(len(masks), *size)
    for n, (y, x) in enumerate(_windows(boxes, size)):
        result[n, y, x] = down[n, y] @ masks[n] @ across[n, :, x]
    return result


def paste_logits(masks: Tensor, boxes: Tensor, size: tuple[int, int], outside: float = -10.0) -> Tensor:
    """:func:`paste`, with ``outside`` in place of zero beyond the boxes."""
    return paste(masks - outside, boxes, size).add_(outside)
