"""The pinhole camera over a flat street, and the light: how metres become pixels and paint becomes colour."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Color = tuple[float, float, float]
Point2 = tuple[float, float]
Point3 = tuple[float, float, float]


@dataclass(frozen=True)
class Camera:
    """World axes in metres: x to the right, y up from the ground, z forward; the camera stands at (0, height, 0).

    Attributes:
        focal: focal length in pixels.
        cx, horizon: the vanishing point of the street, in pixels.
        height: of the camera above the ground.
    """

    focal: float
    cx: float
    horizon: float
    height: float
    near: float = 1.5

    def pixel(self, point: Point3) -> Point2:
        """Image point (x, y) of one world point in front of the near plane."""
        scale = self.focal / point[2]
        return self.cx + scale * point[0], self.horizon + scale * (self.height - point[1])

    def pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Image points (..., 2) of world points (..., 3), all in front of the camera."""
        scale = self.focal / points[..., 2]
        return np.stack(
            (self.cx + scale * points[..., 0], self.horizon + scale * (self.height - points[..., 1])), axis=-1
        )

    def polygon(self, points: list[Point3]) -> list[Point2]:
        """Project a polygon, clipped at the near plane; empty when it lies behind."""
        if min(p[2] for p in points) < self.near:
            points = self._clip(points)
        return [self.pixel(p) for p in points]

    def _clip(self, points: list[Point3]) -> list[Point3]:
        kept: list[Point3] = []
        for a, b in zip(points, points[1:] + points[:1], strict=True):
            if a[2] >= self.near:
                kept.append(a)
            if (a[2] >= self.near) != (b[2] >= self.near):
                t = (self.near - a[2]) / (b[2] - a[2])
                kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), self.near))
        return kept


@dataclass(frozen=True)
class Light:
    """Daylight of one picture: sun, sky, haze.

    Attributes:
        kind: "day", "overcast" or "dusk".
        sun: unit vector towards the sun.
        ambient, diffuse: shares of the sky's and of the sun's light.
        sky_top, sky_low: colours of the sky at the zenith and over the horizon.
        haze_distance: metres after which 63 % of a colour has become haze (the colour of the low sky).
        tint: colour of the light.
        shadow: darkness of cast shadows, 0 to 1.
    """

    kind: str
    sun: Point3
    ambient: float
    diffuse: float
    sky_top: Color
    sky_low: Color
    haze_distance: float
    tint: Color
    shadow: float

    def lambert(self, normal: Point3) -> float:
        """Brightness of a surface with the given unit normal."""
        facing = sum(n * s for n, s in zip(normal, self.sun, strict=True))
        return self.ambient + self.diffuse * max(0.0, facing) + 0.08 * normal[1]

    def paint(self, color: Color, brightness: float, z: float) -> Color:
        """Colour of a surface seen at distance ``z``: lit, tinted, hazed; RGB, 0 to 255."""
        clear = math.exp(-z / self.haze_distance)
        (r, g, b), (tr, tg, tb), (hr, hg, hb), haze = color, self.tint, self.sky_low, 1.0 - clear
        return (
            min(255.0, r * brightness * tr) * clear + hr * haze,
            min(255.0, g * brightness * tg) * clear + hg * haze,
            min(255.0, b * brightness * tb) * clear + hb * haze,
        )


def make_light(rng: np.random.Generator) -> Light:
    """Draw a light: half of the pictures sunny, the others overcast or at dusk."""
    kind = str(rng.choice(("day", "overcast", "dusk"), p=(0.5, 0.27, 0.23)))
    azimuth = rng.uniform(-0.9, 0.9) + (math.pi if rng.random() < 0.65 else 0.0)
    elevation = rng.uniform(0.16, 0.3) if kind == "dusk" else rng.uniform(0.55, 1.0)
    sun = (
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
        math.cos(elevation) * math.cos(azimuth),
    )
    jitter = rng.uniform(-8, 8, 3)

    def near(r: float, g: float, b: float) -> Color:
        return r + float(jitter[0]), g + float(jitter[1]), b + float(jitter[2])

    if kind == "day":
        top, low = near(84, 138, 205), near(198, 220, 236)
        return Light(kind, sun, 0.62, 0.5, top, low, rng.uniform(280, 600), (1.03, 1.0, 0.95), rng.uniform(0.38, 0.5))
    if kind == "overcast":
        top, low = near(158, 168, 178), near(216, 219, 221)
        return Light(kind, sun, 0.78, 0.14, top, low, rng.uniform(140, 300), (0.97, 1.0, 1.03), 0.14)
    top, low = near(74, 78, 128), near(246, 186, 132)
    return Light(kind, sun, 0.66, 0.42, top, low, rng.uniform(220, 420), (1.02, 0.93, 0.9), rng.uniform(0.2, 0.3))
