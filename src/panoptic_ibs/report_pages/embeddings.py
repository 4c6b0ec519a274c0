"""Pictures of what a head's pixel embeddings hold: proposals, principal components, similarity to one query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.functional.embedding_views import PrincipalColors, similarity_map
from panoptic_ibs.functional.fusion import upsample
from panoptic_ibs.segments import EmbeddingView
from panoptic_ibs.structures import ImageSize, Target
from panoptic_ibs.visualize import OUTLINES, IdMap, Picture, boundaries

VIEW_KINDS = ("proposals", "embedding", "similarity")
STRIDE = 4
NAN = float("nan")
MIN_CELLS = 16  # of stride 4: an instance with fewer in a query's box is too small to compare
# Dark to light without a turn: more similar is lighter, also without colour vision and in print.
_RAMP = np.array(
    [(16, 14, 34), (44, 52, 110), (34, 112, 142), (62, 168, 128), (180, 212, 84), (252, 228, 96)], np.float64
)
_OWN, _OTHER, _RIM = (255, 255, 255), (255, 60, 80), (14, 16, 20)


@dataclass(frozen=True)
class Chosen:
    """The query that is shown, and how similar true instances are to it on average (within its box, if it has one).

    Attributes:
        query: its row in the view.
        anchor: x and y in pixels of the original image: where it was read, else the pixel most similar to it.
        own: row of the true instance at the anchor, None without one.
        other: row of the other true instance most similar to it, None without one.
        own_similarity: mean over the pixels of ``own``.
        other_similarity: mean over the pixels of ``other``.
    """

    query: int
    anchor: tuple[float, float]
    own: int | None = None
    other: int | None = None
    own_similarity: float = NAN
    other_similarity: float = NAN


def cells(view: EmbeddingView) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the map that holds the image: (D, h, w), and x (w,) and y (h,) of its cells in original pixels."""
    (height, width), (full_height, full_width) = view.size
    h, w = -(-height // STRIDE), -(-width // STRIDE)
    maps = view.embeddings[:, :h, :w]
    x = (torch.arange(w, device=maps.device) + 0.5) * STRIDE * full_width / width
    y = (torch.arange(h, device=maps.device) + 0.5) * STRIDE * full_height / height
    return maps, x.clamp(max=full_width - 0.5), y.clamp(max=full_height - 0.5)


def choose_query(view: EmbeddingView, target: Target) -> Chosen | None:
    """The query most at risk of confusion; None without queries.

    Of the queries on a true instance it is the one to which *another* true instance, inside its box, is most similar
    on average over its pixels; where there is no such other, the best-scored query.
    """
    if not len(view):
        return None
    maps, x, y = cells(view)
    ids = target.id_map.to(maps.device)[y.long()[:, None], x.long()].long()
    instance = (target.is_thing & ~target.is_crowd).tolist()
    found = []
    unit = _unit(maps, view.cosine)  # once for all queries
    for k, query in enumerate(_unit(view.queries.T, view.cosine).T):
        similarity = similarity_map(unit, query, cosine=False)
        anchor = _anchor(view, k, similarity, x, y)
        own = int(target.id_map[int(anchor[1]), int(anchor[0])]) - 1
        if own < 0 or not instance[own]:
            found.append(Chosen(k, anchor))
            continue
        means = _instance_means(similarity, ids, _inside(view, k, x, y), len(target))
        others = [(value, row) for row, value in means.items() if row != own and instance[row]]
        value, other = max(others, default=(NAN, None))
        found.append(Chosen(k, anchor, own, other, means.get(own, NAN), value))
    risky = [chosen for chosen in found if chosen.other is not None]
    return max(risky, key=lambda chosen: chosen.other_similarity) if risky else found[0]


def _anchor(view: EmbeddingView, k: int, similarity: Tensor, x: Tensor, y: Tensor) -> tuple[float, float]:
    height, width = view.size.original
    if view.points is not None:
        px, py = view.points[k].tolist()
    else:
        row, column = divmod(int(similarity.argmax()), similarity.shape[1])
        px, py = float(x[column]), float(y[row])
    return min(max(px, 0.0), width - 0.5), min(max(py, 0.0), height - 0.5)


def _inside(view: EmbeddingView, k: int, x: Tensor, y: Tensor) -> Tensor:
    """(h, w) bool: cells in the query's box; all without boxes."""
    if view.boxes is None:
        return torch.ones(len(y), len(x), dtype=torch.bool, device=x.device)
    left, top, right, bottom = view.boxes[k]
    return ((y >= top) & (y <= bottom))[:, None] & (x >= left) & (x <= right)


def _instance_means(similarity: Tensor, ids: Tensor, inside: Tensor, rows: int) -> dict[int, float]:
    """Mean similarity of the cells of each row of the target that has enough of them inside."""
    label = ids[inside]
    counts = torch.bincount(label, minlength=rows + 1)[1:]
    sums = torch.bincount(label, similarity[inside], rows + 1)[1:]
    means = (sums / counts).tolist()
    return {row: means[row] for row, count in enumerate(counts.tolist()) if count >= MIN_CELLS}


def fit_colors(view: EmbeddingView) -> PrincipalColors:
    """Principal components of one image, to be used for the others too: equal colours are then equal embeddings."""
    return PrincipalColors.fit(_unit(cells(view)[0], view.cosine))


def _unit(maps: Tensor, cosine: bool) -> Tensor:
    """Only directions count where similarity is the cosine."""
    return F.normalize(maps, dim=0) if cosine else maps


def draw_view(
    image: Picture,
    view: EmbeddingView,
    colors: PrincipalColors,
    chosen: Chosen | None = None,
    true: IdMap | None = None,
) -> dict[str, Picture]:
    """Pictures by their kind, each (H, W, 3) uint8; kinds that the view has nothing for are left out.

    Args:
        image: (H, W, 3) uint8, RGB; the original image or a scaled copy.
        view: of the same image.
        colors: of the embedding, see :func:`fit_colors`.
        chosen: the query whose similarity is shown.
        true: (H, W) id map of the ground truth for the outlines of ``chosen``'s instances.
    """
    height, width = image.shape[:2]
    size = ImageSize(view.size.valid, (height, width))
    scale = (width / view.size.original[1], height / view.size.original[0])
    pictures = {}
    if view.boxes is not None:
        pictures["proposals"] = _draw_proposals(image, view, scale)
    rgb = upsample(colors(_unit(view.embeddings, view.cosine)), size)
    pictures["embedding"] = _to_picture(rgb)
    if chosen is not None:
        similarity = upsample(similarity_map(view.embeddings, view.queries[chosen.query], view.cosine)[None], size)[0]
        pictures["similarity"] = _draw_similarity(similarity.cpu().numpy(), view, chosen, scale, true)
    return pictures


def side_by_side(pictures: dict[str, Picture]) -> Picture:
    """The pictures of :func:`draw_view` as one panel (H, 3 W, 3)."""
    return np.concatenate([pictures[kind] for kind in VIEW_KINDS if kind in pictures], axis=1)


def describe(view: EmbeddingView, chosen: Chosen | None, classes: ClassTable, target: Target) -> str:
    """What the pictures of one image show, in words."""
    found = "proposal" if view.boxes is not None else "instance"
    count = f"{len(view)} {found}{'' if len(view) == 1 else 's'}" if len(view) else f"No {found}s"
    if chosen is None:
        return f"{count}: there is no query to show."
    name = classes[int(view.class_ids[chosen.query])].name
    text = f"{count}. Query (dot): {name}, score {float(view.scores[chosen.query]):.2f}"
    if chosen.other is None:
        return f"{text}; the best-scored one, as no query has another true instance to be confused with."
    where = " inside its box" if view.boxes is not None else ""
    kind = "cosine" if view.cosine else "inner product"
    other = classes[int(target.class_ids[chosen.other])].name
    own = f", {chosen.own_similarity:.2f} on its own instance (white)" if np.isfinite(chosen.own_similarity) else ""
    return (
        f"{text}; of all, the one that another true instance{where} resembles most: mean {kind} "
        f"{chosen.other_similarity:.2f} on that {other} (red){own}."
    )


def _draw_proposals(image: Picture, view: EmbeddingView, scale: tuple[float, float]) -> Picture:
    """Boxes on the dimmed image, each with the pixel of its query in the same colour; best-scored ones on top."""
    assert view.boxes is not None
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    canvas = Image.fromarray(np.rint(0.55 * image + 0.25 * grey[..., None]).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    thick = max(1, round(min(image.shape[:2]) / 320))
    factor = np.array(scale * 2)
    boxes = (view.boxes.cpu().numpy() * factor).tolist()
    for k in reversed(range(len(boxes))):
        left, top, right, bottom = boxes[k]
        if right - left >= 1 and bottom - top >= 1:
            draw.rectangle((left, top, right - 1, bottom - 1), outline=OUTLINES[k % len(OUTLINES)], width=thick)
    if view.points is not None:
        points = (view.points.cpu().numpy() * factor[:2]).tolist()
        for k in reversed(range(len(points))):
            _dot(draw, points[k], 1.6 * thick + 1, OUTLINES[k % len(OUTLINES)])
    return np.asarray(canvas)


def _dot(draw: ImageDraw.ImageDraw, point: Any, radius: float, color: tuple[int, int, int]) -> None:
    """A disc with a dark rim, centred on a point in continuous coordinates."""
    x, y = point[0] - 0.5, point[1] - 0.5
    draw.ellipse((x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1), fill=_RIM)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _draw_similarity(
    similarity: NDArray[Any], view: EmbeddingView, chosen: Chosen, scale: tuple[float, float], true: IdMap | None
) -> Picture:
    low, high = 0.0, 1.0  # of a cosine: what is below 0 is as far away as it need be
    if not view.cosine:
        # Of a logit the part around 0 matters; far below it may go on for long.
        high = max(float(np.percentile(similarity, 99.5)), 1.0)
        low = -high
    out = _ramp((similarity - low) / (high - low))
    thick = max(1, round(min(similarity.shape) / 320))
    if true is not None:
        for row, color in ((chosen.own, _OWN), (chosen.other, _OTHER)):
            if row is not None:
                edge = boundaries(true == row + 1)
                grown = (true == row + 1) | edge
                out[boundaries(grown) & ~grown] = _RIM  # visible on light and on dark
                out[edge] = color
    canvas = Image.fromarray(out)
    draw = ImageDraw.Draw(canvas)
    if view.boxes is not None:
        left, top, right, bottom = (view.boxes[chosen.query].cpu().numpy() * np.array(scale * 2)).tolist()
        if right - left >= 1 and bottom - top >= 1:
            draw.rectangle((left, top, right - 1, bottom - 1), outline=(200, 205, 215), width=thick)
    _dot(draw, (chosen.anchor[0] * scale[0], chosen.anchor[1] * scale[1]), 2 * thick + 1, _OWN)
    _color_bar(draw, canvas.size, (f"<{low:.2g}", f"{(low + high) / 2:.2g}", f"{high:.2g}"))
    return np.asarray(canvas)


def _ramp(values: NDArray[Any]) -> Picture:
    place = np.clip(values, 0, 1) * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _color_bar(draw: ImageDraw.ImageDraw, size: tuple[int, int], texts: tuple[str, str, str]) -> None:
    """A bar with its ends' and middle's values, in the lower right corner."""
    font_size = max(11, min(size) // 26)
    font = ImageFont.load_default(font_size)
    length, thickness, pad = max(60, size[0] // 5), max(4, font_size // 2), font_size // 2
    right, bottom = size[0] - 2 * pad, size[1] - 2 * pad
    left, top = right - length - 2 * pad, bottom - thickness - font_size - 2 * pad
    draw.rounded_rectangle((left - pad, top - pad // 2, right + pad, bottom + pad // 2), pad, fill=(16, 18, 24))
    start = left + pad
    for i, color in enumerate(_ramp(np.linspace(0, 1, length)).tolist()):
        draw.line((start + i, top + pad // 2, start + i, top + pad // 2 + thickness), fill=tuple(color))
    for share, text in zip((0.0, 0.5, 1.0), texts, strict=True):
        draw.text((start + share * (length - 1), bottom), text, (225, 228, 235), font, "ms")


def _to_picture(rgb: Tensor) -> Picture:
    return (rgb.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
