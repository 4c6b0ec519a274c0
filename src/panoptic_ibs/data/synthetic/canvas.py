"""The canvas: every stroke goes to the picture (anti-aliased) and to the id map (not) at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from .camera import Camera, Color, Light, Point2, Point3

_SHIFT = 4  # cv2 takes fixed-point coordinates: 1/16 of a pixel
_LIMIT = 30_000.0  # far outside any picture; keeps the fixed-point numbers in range


class Canvas:
    """A picture and its id map under one camera and one light.

    Strokes are drawn from far to near (painter's algorithm). ``begin`` names the segment that the strokes which follow
    belong to; widths and radii are in metres, colours are RGB paint that ``light`` turns into pixels.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        ids: (H, W) int32; 0 is void, k is row k - 1 of ``rows``.
        rows: (class name, iscrowd) per segment.
    """

    def __init__(self, size: tuple[int, int], camera: Camera, light: Light) -> None:
        self.image = np.zeros((*size, 3), np.uint8)
        self.ids = np.zeros(size, np.int32)
        self.rows: list[tuple[str, bool]] = []
        self.camera, self.light = camera, light
        self._shared: dict[tuple[str, bool], int] = {}
        self.current = 0

    def begin(self, class_name: str | None, shared: bool = False, crowd: bool = False) -> None:
        """Start a segment. ``shared``: all strokes of this class are one segment (stuff, crowd). None is void."""
        if class_name is None:
            self.current = 0
            return
        key = (class_name, crowd)
        if shared and key in self._shared:
            self.current = self._shared[key]
            return
        self.rows.append(key)
        self.current = len(self.rows)
        if shared:
            self._shared[key] = self.current

    def fill(self, points: Sequence[Point2] | np.ndarray, rgb: Color, solid: bool = True, paint: bool = True) -> None:
        """Fill a polygon in pixels with a final colour; ``solid`` marks the id map, ``paint`` the picture."""
        if len(points) < 3:
            return
        fixed = self.fixed(points)
        if paint:
            cv2.fillPoly(self.image, [fixed], rgb, cv2.LINE_AA, _SHIFT)
        if solid:
            cv2.fillPoly(self.ids, [fixed], self.current, cv2.LINE_8, _SHIFT)

    def fill_many(self, polygons: np.ndarray, rgb: Color) -> None:
        """Fill polygons (N, K, 2) that do not overlap, in the picture only."""
        if len(polygons):
            cv2.fillPoly(self.image, list(self.fixed(polygons)), rgb, cv2.LINE_AA, _SHIFT)

    def face(self, points: list[Point3], color: Color, brightness: float = 1.0, solid: bool = True) -> None:
        """Fill a polygon in the world."""
        z = sum(p[2] for p in points) / len(points)
        self.fill(self.camera.polygon(points), self.light.paint(color, brightness, max(z, 0.0)), solid)

    def hull(self, points: list[Point3], color: Color, brightness: float = 1.0) -> None:
        """Fill the convex hull of world points as seen by the camera."""
        flat = np.asarray(self.camera.polygon(points), np.float32)
        if len(flat) >= 3:
            self.fill(cv2.convexHull(flat)[:, 0], self.light.paint(color, brightness, points[0][2]))

    def limb(self, a: Point3, b: Point3, wide_a: float, wide_b: float, color: Color, brightness: float = 1.0) -> None:
        """Fill a tapered bar with round ends between two world points; widths are diameters."""
        if min(a[2], b[2]) < self.camera.near:
            return
        (ax, ay), (bx, by) = self.camera.pixel(a), self.camera.pixel(b)
        ra, rb = 0.5 * wide_a * self.camera.focal / a[2], 0.5 * wide_b * self.camera.focal / b[2]
        ra, rb = max(ra, 0.35), max(rb, 0.35)
        angle = math.atan2(by - ay, bx - ax)
        steps = (90, 150, 210, 270) if ra > 2 else (90, 270)
        points = [
            (ax + ra * math.cos(angle + math.radians(d)), ay + ra * math.sin(angle + math.radians(d))) for d in steps
        ]
        points += [
            (bx - rb * math.cos(angle + math.radians(d)), by - rb * math.sin(angle + math.radians(d))) for d in steps
        ]
        self.fill(points, self.light.paint(color, brightness, a[2]))

    def ball(self, center: Point3, radius: float, color: Color, brightness: float = 1.0, squash: float = 1.0) -> None:
        """Fill a disc around a world point; ``squash`` is its height over its width."""
        if center[2] < self.camera.near:
            return
        x, y = self.camera.pixel(center)
        r = radius * self.camera.focal / center[2]
        rgb = self.light.paint(color, brightness, center[2])
        if squash == 1.0 and r >= 2:  # the same disc, several times as fast
            if -r < x < self.ids.shape[1] + r and -r < y < self.ids.shape[0] + r and r < _LIMIT:
                at = round((x - 0.5) * 16), round((y - 0.5) * 16)
                cv2.circle(self.image, at, round(r * 16), rgb, -1, cv2.LINE_AA, _SHIFT)
                cv2.circle(self.ids, at, round(r * 16), self.current, -1, cv2.LINE_8, _SHIFT)
            return
        n = 6 if r < 2 else 10 if r < 8 else 18
        turn = [2 * math.pi * i / n for i in range(n)]
        points = [(x + r * math.cos(t), y + r * squash * math.sin(t)) for t in turn]
        self.fill(points, rgb)

    def outline(self, points: list[Point3], width: float, color: Color, brightness: float = 1.0) -> None:
        """Stroke a closed curve of world points; the id map gets its inside too."""
        if min(p[2] for p in points) < self.camera.near:
            return
        flat = self.camera.polygon(points)
        thick = max(1, round(width * self.camera.focal / points[0][2]))
        rgb, fixed = self.light.paint(color, brightness, points[0][2]), self.fixed(flat)
        cv2.polylines(self.image, [fixed], True, rgb, thick, cv2.LINE_AA, _SHIFT)
        cv2.fillPoly(self.ids, [fixed], self.current, cv2.LINE_8, _SHIFT)
        cv2.polylines(self.ids, [fixed], True, self.current, thick, cv2.LINE_8, _SHIFT)

    def scale(self, z: float) -> float:
        """Pixels per metre at distance ``z``."""
        return self.camera.focal / z

    @staticmethod
    def fixed(points: Sequence[Point2] | np.ndarray) -> np.ndarray:
        """Fixed-point coordinates; the world's (0, 0) is a pixel's corner, cv2's its centre."""
        flat = np.minimum(np.maximum(np.asarray(points, np.float64), -_LIMIT), _LIMIT) - 0.5
        return np.rint(flat * (1 << _SHIFT)).astype(np.int32)
