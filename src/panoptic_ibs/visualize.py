"""Pictures of panoptic maps: coloured overlays, and the predicted segments that swallow several instances."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.fonts import font_for, legible
from panoptic_ibs.functional.overlap import joint_histogram
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

Picture = NDArray[np.uint8]
IdMap = NDArray[np.integer[Any]]

# Shades of one class: (turn of the hue, place in the lightness range that suits the class colour, 0 dark to 1 light).
# Neighbours in this list are far apart in lightness, so that they differ without colour vision too.
_SHADES = ((0.0, 0.45), (0.035, 1.0), (-0.035, 0.0), (0.07, 0.72), (-0.07, 0.25), (0.0, 0.9), (0.035, 0.1))
# Okabe and Ito's colour-blind-safe set without black, brightened where it has to show on a dimmed photograph.
OUTLINES = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 190, 140),
    (240, 228, 66),
    (70, 140, 255),
    (255, 110, 40),
    (225, 130, 190),
)
_PREDICTION_OUTLINE = (255, 255, 255)


@dataclass(frozen=True)
class Swallowed:
    """One true instance inside a confused prediction: ``share`` of its ``area`` (pixels) is covered."""

    number: int
    row: int
    class_name: str
    share: float
    area: int


@dataclass(frozen=True)
class Confused:
    """One predicted thing segment (``row`` of the prediction's table) that covers several true instances."""

    row: int
    class_name: str
    score: float
    swallowed: tuple[Swallowed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for JSON."""
        return asdict(self)


def boundaries(id_map: IdMap) -> NDArray[np.bool_]:
    """(H, W) bool: pixels with another id to the left, right, above or below. Two pixels wide, one on either side."""
    edge = np.zeros(id_map.shape, bool)
    right = id_map[:, 1:] != id_map[:, :-1]
    below = id_map[1:] != id_map[:-1]
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    edge[1:] |= below
    edge[:-1] |= below
    return edge


def segment_colors(id_map: IdMap, class_ids: Iterable[int], classes: ClassTable) -> Picture:
    """Colours (N + 1, 3) uint8 of an id map's ids; row 0 is void (black).

    Stuff has its class colour. Things have shades of it, so chosen that instances of one class within a few pixels of
    each other differ (greedy colouring of the neighbour graph; with more mutual neighbours than shades some repeat).

    Raises:
        ValueError: if the map holds an id above N.
    """
    ids = [int(c) for c in class_ids]
    if id_map.size and int(id_map.max()) > len(ids):
        raise ValueError(f"The id map holds id {int(id_map.max())}, but its segment table has {len(ids)} rows.")
    colors = np.zeros((len(ids) + 1, 3), np.uint8)
    for k, c in enumerate(ids, 1):
        colors[k] = classes[c].color
    is_thing = np.array([False, *(classes[c].is_thing for c in ids)])
    class_of = np.array([-1, *ids])
    neighbours: dict[int, list[int]] = {k: [] for k in range(1, len(ids) + 1) if is_thing[k]}
    for a, b in _neighbour_pairs(id_map, is_thing, class_of):
        neighbours[a].append(b)
        neighbours[b].append(a)
    shade: dict[int, int] = {}
    for k, others in neighbours.items():
        taken = [shade[o] for o in others if o in shade]
        shade[k] = min(range(len(_SHADES)), key=lambda s: (taken.count(s), s))
        colors[k] = _shade(classes[ids[k - 1]].color, shade[k])
    return colors


def _neighbour_pairs(id_map: IdMap, is_thing: NDArray[Any], class_of: NDArray[Any]) -> Sequence[tuple[int, int]]:
    """Pairs of thing ids of one class that lie within about 2 % of the image's longer side of each other."""
    reach = max(2, max(id_map.shape, default=0) // 50)
    n = len(class_of)
    codes = []
    for step in (1, reach // 2, reach):
        for a, b in ((id_map[:, step:], id_map[:, :-step]), (id_map[step:], id_map[:-step])):
            differs = (a != b) & is_thing[a] & is_thing[b]
            x, y = a[differs].astype(np.int64), b[differs].astype(np.int64)
            same = class_of[x] == class_of[y]
            codes.append(np.unique(np.minimum(x, y)[same] * n + np.maximum(x, y)[same]))
    return [(int(c) // n, int(c) % n) for c in np.unique(np.concatenate(codes))]


def _shade(color: tuple[int, int, int], index: int) -> tuple[int, int, int]:
    hue, lightness, saturation = colorsys.rgb_to_hls(*(c / 255 for c in color))
    turn, place = _SHADES[index]
    low, high = max(0.22, lightness - 0.18), min(0.78, max(lightness, 0.35) + 0.24)
    r, g, b = colorsys.hls_to_rgb((hue + turn) % 1.0, low + place * (high - low), saturation)
    return round(r * 255), round(g * 255), round(b * 255)


def overlay(
    image: Picture,
    id_map: IdMap,
    class_ids: Iterable[int],
    classes: ClassTable,
    alpha: float = 0.55,
    contours: bool = True,
    labels: bool = False,
) -> Picture:
    """Colour an image by its segments.

    Args:
        image: (H, W, 3) uint8, RGB.
        id_map: (H, W) integer; 0 is void, k >= 1 is row k - 1 of ``class_ids``.
        class_ids: (N,) contiguous class ids.
        classes: the class table; its colours are used, shaded per instance for things.
        alpha: weight of the colour, 0 to 1.
        contours: draw boundaries, light around things and dark between stuff.
        labels: write the class name on every segment with room for it; the class's number in the data set where no font
            has the name's letters (then a warning says so).

    Returns:
        (H, W, 3) uint8. Void is shown as a dark hatch.

    Raises:
        ValueError: if sizes differ or the map holds an id above N.
    """
    _check_sizes(image, id_map)
    ids = [int(c) for c in class_ids]
    colors = segment_colors(id_map, ids, classes)
    # Segments keep the photograph's light and dark but little of its hue: class colours stay comparable.
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    base = 0.5 * image + 0.5 * grey[..., None]
    out = base * (1 - alpha) + colors[id_map].astype(np.float32) * alpha
    void = id_map == 0
    ys, xs = np.nonzero(void)
    stripe = ((xs + ys) // max(3, min(id_map.shape) // 128)) % 2
    out[void] = 0.16 * grey[void][:, None] + np.where(stripe, 58, 22)[:, None]
    if contours:
        edge = boundaries(id_map)
        is_thing = np.array([False, *(classes[c].is_thing for c in ids)])
        thing_edge = edge & is_thing[id_map]
        out[edge & ~thing_edge] *= 0.55
        out[thing_edge] = 0.25 * out[thing_edge] + 0.75 * 255
    picture = np.clip(np.rint(out), 0, 255).astype(np.uint8)
    if not labels:
        return picture
    return _write_names(picture, id_map, [legible(classes[c].name, classes[c].dataset_id) for c in ids])


def find_confused(
    prediction: Prediction, target: Target, classes: ClassTable, threshold: float = 0.25
) -> list[Confused]:
    """Predicted thing segments that cover more than ``threshold`` of two or more true ones (IBS paper, Fig. 5).

    Crowd segments are no instances and never count as swallowed. Swallowed instances are listed by share, largest
    first, and numbered from 1 through the image; one that two predictions share keeps its number.

    Raises:
        ValueError: if the sizes of the two id maps differ.
    """
    true, predicted = target.id_map.cpu(), prediction.id_map.cpu()
    if predicted.shape != true.shape:
        raise ValueError(f"Prediction {tuple(predicted.shape)} and ground truth {tuple(true.shape)} differ in size.")
    joint = joint_histogram(true, predicted, len(target), len(prediction)).numpy()
    areas = joint.sum(1)
    instance = np.concatenate([[False], (target.is_thing & ~target.is_crowd).cpu().numpy()])
    covered = (joint > threshold * areas[:, None]) & instance[:, None]
    confused: list[Confused] = []
    number_of: dict[int, int] = {}
    for k in range(1, len(prediction) + 1):
        info = classes[int(prediction.class_ids[k - 1])]
        rows = np.nonzero(covered[:, k])[0]
        if not info.is_thing or len(rows) < 2:
            continue
        share = joint[rows, k] / areas[rows]
        swallowed = []
        for i in np.argsort(-share, kind="stable"):
            r = int(rows[i])
            name = classes[int(target.class_ids[r - 1])].name
            number = number_of.setdefault(r, len(number_of) + 1)
            swallowed.append(Swallowed(number, r - 1, name, float(share[i]), int(areas[r])))
        confused.append(Confused(k - 1, info.name, float(prediction.scores[k - 1]), tuple(swallowed)))
    return confused


def draw_confused(
    image: Picture, predicted: IdMap, true: IdMap, rows: Sequence[Confused], thick: int | None = None
) -> Picture:
    """Draw what :func:`find_confused` found; the maps may be scaled-down copies (nearest) of those it read.

    Args:
        image: (H, W, 3) uint8, RGB.
        predicted: (H, W) integer id map of the prediction.
        true: (H, W) integer id map of the ground truth.
        rows: the confused segments.
        thick: of the outlines, in pixels; by default a 400th of the shorter side.

    Returns:
        (H, W, 3) uint8: a confused prediction in full light under a tint, its outline white, every swallowed true
        instance outlined in its own colour with its number; all else dimmed and grey.
    """
    _check_sizes(image, predicted)
    _check_sizes(image, true)
    lit = np.zeros(int(predicted.max(initial=0)) + 1, bool)
    lit[[r.row + 1 for r in rows if r.row + 1 < len(lit)]] = True
    inside = lit[predicted]
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    out = np.repeat((24 + 0.38 * grey)[..., None], 3, axis=2)
    out[inside] = image[inside]

    thick = thick or max(1, min(image.shape[:2]) // 400)
    color_of = np.zeros((int(true.max(initial=0)) + 1, 3), np.float32)
    marked = np.zeros(len(color_of), bool)
    swallowed = [s for r in rows for s in r.swallowed if s.row + 1 < len(color_of)]
    for s in swallowed:
        color_of[s.row + 1] = OUTLINES[(s.number - 1) % len(OUTLINES)]
        marked[s.row + 1] = True
    instance = marked[true]
    out[instance] = 0.72 * out[instance] + 0.28 * color_of[true][instance]
    # Inner side of the true instance only: neighbours keep a line each.
    inner = _widen(boundaries(true), thick) & instance
    out[inner] = color_of[true][inner]
    outer = _widen(boundaries(np.where(inside, predicted, 0)), thick) & ~inner
    out[outer & (_widen(inside, thick))] = _PREDICTION_OUTLINE
    picture = np.clip(np.rint(out), 0, 255).astype(np.uint8)
    return _write_numbers(picture, true, swallowed)


def _check_sizes(image: Picture, id_map: IdMap) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[:2] != id_map.shape:
        raise ValueError(f"Image {image.shape} and id map {id_map.shape} do not fit; expected (H, W, 3) and (H, W).")


def _widen(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Grow by ``pixels`` - 1 in the four directions."""
    for _ in range(pixels - 1):
        grown = mask.copy()
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        mask = grown
    return mask


def _anchors(id_map: IdMap) -> dict[int, tuple[int, int, int]]:
    """Of every id that occurs: (x, y, area) with the segment's own pixel that is nearest to its centre of mass."""
    flat = id_map.ravel()
    order = np.argsort(flat, kind="stable")
    ids, start = np.unique(flat[order], return_index=True)
    anchors = {}
    for k, pixels in zip(ids.tolist(), np.split(order, start[1:]), strict=True):
        if k:
            ys, xs = np.divmod(pixels, id_map.shape[1])
            near = int(np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2))
            anchors[k] = (int(xs[near]), int(ys[near]), len(pixels))
    return anchors


def _write_names(picture: Picture, id_map: IdMap, names: Sequence[str]) -> Picture:
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    size = max(10, min(picture.shape[:2]) // 36)
    for k, (x, y, area) in _anchors(id_map).items():
        if area > 12 * size * size:
            font = font_for(names[k - 1], size)
            draw.text((x, y), names[k - 1], "white", font, "mm", stroke_width=max(1, size // 8), stroke_fill="black")
    return np.asarray(canvas)


def _write_numbers(picture: Picture, true: IdMap, swallowed: Sequence[Swallowed]) -> Picture:
    if not swallowed:
        return picture
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    largest = max(11, min(picture.shape[:2]) // 28)
    anchors = _anchors(true)
    # Small instances have small numbers, written last, so that those in a crowd stay legible.
    for s in sorted(swallowed, key=lambda s: -s.area):
        if s.row + 1 in anchors:
            x, y, area = anchors[s.row + 1]
            size = min(largest, max(10, int(area**0.5 / 2.5)))
            font = ImageFont.load_default(size)
            color = OUTLINES[(s.number - 1) % len(OUTLINES)]
            left, top, right, bottom = draw.textbbox((x, y), str(s.number), font, "mm")
            pad = max(1, size // 6)
            draw.rounded_rectangle((left - pad, top - pad, right + pad, bottom + pad), pad, (16, 18, 24), color)
            draw.text((x, y), str(s.number), color, font, "mm")
    return np.asarray(canvas)
