"""Car parks from above: rows of look-alikes on plain ground, easier than street scenes.

A street scene shows that things differ in kind, size and distance. Here they hardly do: whoever tells two neighbours in
a row apart has only the place to go by, which is what a network that draws masks from embeddings gets wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from panoptic_ibs.classes import ClassTable

from .camera import Color
from .picture import CLASSES, SyntheticImage, check_request, compact
from .scene import BRIGHT, CAR_PAINT, pick
from .textures import value_noise

Rng = np.random.Generator
Points = NDArray[np.float64]

LOT_CLASSES = ClassTable(c for c in CLASSES.classes if c.name in ("road", "sidewalk", "terrain", "car", "truck", "bus"))
"""The classes of the street scenes that a car park has."""

FINE = 3
"""Pictures are drawn at so many times their size: OpenCV's own anti-aliasing knows no labels."""

GROUND: dict[str, tuple[Color, ...]] = {
    "road": ((92, 92, 96), (78, 80, 86), (108, 104, 102)),
    "sidewalk": ((172, 166, 156), (156, 156, 158), (184, 170, 156)),
    "terrain": ((104, 136, 62), (124, 138, 76), (90, 124, 62)),
}
GRAIN = {"road": 7.0, "sidewalk": 9.0, "terrain": 20.0}


@dataclass(frozen=True)
class Kind:
    """A thing seen from above; lengths as shares of the picture's shorter side, patches as (x0, x1, y0, y1, color) in
    half widths and half lengths.
    """

    width: float
    length: float
    nose: float
    patches: tuple[tuple[float, float, float, float, Color], ...]


GLASS, LIGHT, HATCH = (44, 54, 66), (236, 236, 228), (206, 208, 210)
KINDS = {
    "car": Kind(
        0.1, 0.2, 0.72,
        ((-0.76, 0.76, -0.78, -0.56, GLASS), (-0.7, 0.7, 0.18, 0.5, GLASS), (-0.78, -0.4, 0.9, 0.98, LIGHT),
         (0.4, 0.78, 0.9, 0.98, LIGHT)),
    ),
    "truck": Kind(
        0.125, 0.37, 0.9,
        ((-0.98, 0.98, 0.44, 0.52, (30, 30, 32)), (-0.8, 0.8, 0.72, 0.86, GLASS), (-0.9, 0.9, -0.96, -0.93, LIGHT),
         (-0.9, 0.9, -0.5, -0.47, (150, 150, 150)), (-0.9, 0.9, 0.0, 0.03, (150, 150, 150))),
    ),
    "bus": Kind(
        0.12, 0.45, 0.96,
        ((-0.9, 0.9, 0.88, 0.96, GLASS), (-0.5, 0.5, 0.4, 0.6, HATCH), (-0.5, 0.5, -0.6, -0.4, HATCH),
         (-0.96, -0.84, -0.9, 0.8, GLASS), (0.84, 0.96, -0.9, 0.8, GLASS)),
    ),
}  # fmt: skip


def render_lot(seed: int, index: int, size: tuple[int, int]) -> SyntheticImage:
    """Render picture ``index`` of the car parks ``seed`` at ``size`` (height, width), each at least 32 pixels.

    The same arguments give the same bytes in every process. In each run of three pictures every kind of vehicle has the
    middle row once.

    Raises:
        ValueError: if the size is too small, or the seed or index negative.
    """
    check_request(seed, index, size)
    rng = np.random.default_rng((seed, index, 4))
    lot = _Lot(rng, size)
    lot.pave()
    for row in lot.rows(tuple(KINDS)[index % len(KINDS)]):
        lot.park(*row)
    return lot.finish()


class _Lot:
    """A picture under way: its own coordinates run along (x) and across (y) the rows, from the picture's centre."""

    def __init__(self, rng: Rng, size: tuple[int, int]) -> None:
        self.rng, self.size = rng, size
        h, w = (s * FINE for s in size)
        self.image = np.zeros((h, w, 3), np.uint8)
        self.ids = np.zeros((h, w), np.int32)
        self.names: list[str] = []
        self.unit = min(h, w) * rng.uniform(1.2, 1.9)
        self.reach = 0.5 * math.hypot(h, w) / self.unit
        angle = rng.uniform(-0.5, 0.5) + (math.pi / 2 if rng.random() < 0.25 else 0.0)
        self.turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        self.shadow = rng.uniform(-0.03, 0.03, 2)
        self.dark = rng.uniform(0.45, 0.75)
        self.colors = {name: pick(rng, colors) for name, colors in GROUND.items()}

    def fill(self, points: Points, color: Color | None, segment: int | None = None) -> None:
        """Fill a polygon in the lot's coordinates, in the picture, the id map or both."""
        pixels = self.pixels(points)
        if color is not None:
            cv2.fillPoly(self.image, [pixels], color)
        if segment is not None:
            cv2.fillPoly(self.ids, [pixels], segment)

    def pixels(self, points: Points) -> NDArray[np.int32]:
        """Points in the lot's coordinates as pixels (x, y) of the fine picture."""
        h, w = self.ids.shape
        return np.rint(points @ self.turn * self.unit + (w / 2, h / 2)).astype(np.int32)

    def strip(self, name: str, low: float, high: float) -> None:
        """Ground of a class from one side of the picture to the other; a class's ground is one segment."""
        if name not in self.names:
            self.names.append(name)
        self.fill(_box(-self.reach, self.reach, low, high), self.colors[name], self.names.index(name) + 1)

    def pave(self) -> None:
        """Asphalt everywhere; the grain comes last."""
        self.strip("road", -self.reach, self.reach)

    def rows(self, middle: str) -> list[tuple[str, float]]:
        """Lay strips of ground outwards from the middle row; returns the kind and the place (y) of each row."""
        rng = self.rng
        found = [(middle, 0.0)]
        for way in (-1, 1):
            y, kind = 0.5 * KINDS[middle].length + 0.02, middle
            while y < self.reach:
                gap = rng.uniform(0.04, 0.22)
                ground = str(rng.choice(("road", "sidewalk", "terrain"), p=(0.4, 0.25, 0.35)))
                if ground != "road":
                    self.strip(ground, *sorted((way * y, way * (y + gap))))
                kind = str(rng.choice(tuple(KINDS), p=(0.6, 0.2, 0.2))) if rng.random() < 0.6 else kind
                half = 0.5 * KINDS[kind].length + 0.02
                found.append((kind, way * (y + gap + half)))
                y += gap + 2 * half
        return found

    def park(self, kind: str, y: float) -> None:
        """One row: neighbours look alike, until another look takes over or a place is free."""
        rng, shape = self.rng, KINDS[kind]
        x = -self.reach + rng.uniform(0, shape.width)
        paint, ahead = self._look(kind), rng.choice((-1.0, 1.0))
        while x < self.reach:
            if rng.random() < 0.12:
                paint, ahead = self._look(kind), rng.choice((-1.0, 1.0))
            if rng.random() < 0.8:
                yaw = float(rng.normal(0, 0.03)) + (math.pi if ahead < 0 else 0.0)
                self._thing(kind, (x, y + float(rng.normal(0, 0.008))), yaw, paint)
            x += shape.width * rng.uniform(1.25, 1.5)

    def _look(self, kind: str) -> Color:
        return pick(self.rng, CAR_PAINT if kind == "car" else BRIGHT)

    def _thing(self, kind: str, at: tuple[float, float], yaw: float, paint: Color) -> None:
        shape = KINDS[kind]
        turn = np.array([[math.cos(yaw), math.sin(yaw)], [-math.sin(yaw), math.cos(yaw)]])
        half = 0.5 * np.array([shape.width, shape.length])
        n = shape.nose
        body = np.array(
            [(-0.9, -1), (0.9, -1), (1, -0.9), (1, 0.8), (n, 1), (-n, 1), (-1, 0.8), (-1, -0.9)]
        )  # from above, the front at y = 1
        self.names.append(kind)
        place = body * half @ turn + at
        ground = self._ground_under(place + self.shadow)
        self.image[ground] = (self.image[ground] * self.dark).astype(np.uint8)
        shade = tuple(float(np.clip(c + d, 4, 250)) for c, d in zip(paint, self.rng.normal(0, 3, 3), strict=True))
        self.fill(place, (shade[0], shade[1], shade[2]), len(self.names))
        for x0, x1, y0, y1, color in shape.patches:
            self.fill(_box(x0, x1, y0, y1) * half @ turn + at, color)

    def _ground_under(self, points: Points) -> NDArray[np.bool_]:
        """Where a polygon lies on ground that nothing stands on yet."""
        mask = np.zeros(self.ids.shape, np.uint8)
        cv2.fillPoly(mask, [self.pixels(points)], 1)
        stuff = np.array([False] + [name in GROUND for name in self.names[:-1]])
        return (mask > 0) & stuff[self.ids]

    def finish(self) -> SyntheticImage:
        """At the picture's own size, with grain, light and noise; segments of too few pixels become void."""
        rng, (h, w) = self.rng, self.size
        ids = self.ids[FINE // 2 :: FINE, FINE // 2 :: FINE]
        image = cv2.resize(self.image, (w, h), interpolation=cv2.INTER_AREA).astype(np.float32)
        grain = np.array([0.0] + [GRAIN.get(name, 4.0) for name in self.names], np.float32)[ids]
        noise = 0.6 * value_noise(rng, self.size, 2.5 * h / 128) + 0.4 * value_noise(rng, self.size, 9.0 * h / 128)
        image += (grain * noise)[..., None]
        image *= rng.uniform(0.75, 1.1) * rng.uniform(0.95, 1.05, 3)
        image += rng.normal(0, 3, image.shape)
        rows = [(name, False) for name in self.names]
        return SyntheticImage(np.clip(image, 0, 255).astype(np.uint8), *compact(ids, rows))


def _box(x0: float, x1: float, y0: float, y1: float) -> Points:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
