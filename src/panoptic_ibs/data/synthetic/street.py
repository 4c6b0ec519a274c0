"""The street itself: ground, lamps, clutter, shadows and the bonnet of the camera's own car."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

from .camera import Color, Point3
from .canvas import Canvas
from .figures import Stance
from .plots import draw_tree
from .scene import Scene, pick
from .textures import cast_shadows, grain_ground
from .vehicles import Placed

Rng = np.random.Generator
Prop = tuple[float, Callable[[], None]]
"""Distance, and what draws it."""

ASPHALT: tuple[Color, ...] = ((96, 96, 100), (84, 86, 92), (110, 106, 104))
PAVING: tuple[Color, ...] = ((168, 162, 152), (150, 150, 152), (178, 164, 150))
GRASS: tuple[Color, ...] = ((112, 138, 68), (132, 140, 78), (98, 128, 66))
FAR = 240.0


def _strip(x0: float, x1: float, z0: float, z1: float, y: float = 0.0) -> list[Point3]:
    return [(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)]


def draw_ground(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Road with markings, sidewalks, verges; then their grain and every shadow that falls on them."""
    s, cam = scene.street, canvas.camera
    road, paving, grass = pick(rng, ASPHALT), pick(rng, PAVING), pick(rng, GRASS)
    flat = canvas.light.lambert((0, 1, 0))
    for x0, x1, side in ((-200.0, s.walk_left, 0), (s.walk_right, 200.0, 1)):
        park = s.sides[side] == "park"
        canvas.begin("terrain" if park else "sidewalk", shared=True)
        canvas.face(_strip(x0, x1, cam.near, FAR), grass if park else paving, flat * 0.95)
    canvas.begin("sidewalk", shared=True)
    canvas.face(_strip(s.walk_left, s.left, cam.near, FAR), paving, flat)
    canvas.face(_strip(s.right, s.walk_right, cam.near, FAR), paving, flat)
    walk = canvas.current
    canvas.begin("road", shared=True)
    canvas.face(_strip(s.left, s.right, cam.near, FAR), road, flat)
    for x in (s.left, s.right):  # kerb stones
        canvas.face(_strip(x - 0.12, x + 0.12, cam.near, 90), (196, 194, 188), flat, solid=False)
        canvas.face(
            _strip(x + (0.12 if x < 0 else -0.3), x + (0.3 if x < 0 else -0.12), cam.near, 60),
            road,
            0.55,
            solid=False,
        )
    _markings(canvas, scene, rng)
    grain_ground(canvas.image, rng, cam, canvas.ids == walk, float(rng.choice((0.5, 0.8, 1.2))))
    _shadows(canvas, scene)


def _markings(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    s, white = scene.street, (226, 226, 220)
    flat = canvas.light.lambert((0, 1, 0))
    begin = (s.crossing or 2.0) + 2.2
    if s.rails is None:
        for i in range(16):
            z = begin + 4.5 * i
            canvas.face(_strip(s.center - 0.07, s.center + 0.07, z, z + 2.4), white, flat, solid=False)
    else:
        for x in (s.rails - 1.15, s.rails - 0.95, s.rails + 0.95, s.rails + 1.15):
            canvas.face(_strip(x - 0.04, x + 0.04, canvas.camera.near, 110), (58, 56, 58), 1.0, solid=False)
        canvas.face(_strip(s.rails - 1.75, s.rails - 1.67, begin, 90), white, flat, solid=False)
        canvas.face(_strip(s.rails + 1.67, s.rails + 1.75, begin, 90), white, flat, solid=False)
    for x, way in ((s.right - 2.15, 1), (s.left + 2.15, -1)):
        canvas.face(_strip(x - 0.05, x + 0.05, begin, 60), white, flat * 0.9, solid=False)
        for i in range(9):
            z = begin + 5.6 * i
            canvas.face(_strip(x, x + way * 1.9, z, z + 0.1), white, flat * 0.85, solid=False)
    if s.crossing is not None:
        x = s.left + 0.5
        while x < s.right - 0.8:
            canvas.face(_strip(x, x + 0.5, s.crossing - 1.5, s.crossing + 1.5), white, flat, solid=False)
            x += 1.05
        canvas.face(_strip(s.center, s.right - 0.3, s.crossing - 2.6, s.crossing - 2.3), white, flat, solid=False)


def _shadows(canvas: Canvas, scene: Scene) -> None:
    """Shadows on the ground: of houses, of things, and the dark under every vehicle."""
    mask = np.zeros(canvas.ids.shape, np.uint8)
    sun, cam = canvas.light.sun, canvas.camera
    deep = int(255 * canvas.light.shadow)

    def shade(points: list[Point3], value: int) -> None:
        flat = np.asarray(cam.polygon(points), np.float32)
        if len(flat) >= 3:
            cv2.fillConvexPoly(mask, canvas.fixed(cv2.convexHull(flat)[:, 0]), value, cv2.LINE_AA, 4)

    run = min(1.6, 1.0 / max(0.2, sun[1]))
    dx, dz = -sun[0] * run, -sun[2] * run
    s = scene.street
    if canvas.light.kind != "overcast":
        for x, side in ((s.walk_left, 0), (s.walk_right, 1)):
            reach = x + dx * 9
            if s.sides[side] == "houses" and (reach - x) * (-x) > 0:
                shade(_strip(min(x, reach), max(x, reach), cam.near, 110), deep)
    for item in scene.items:
        body = item.body
        if isinstance(body, Stance):
            h, r = (1.6 if item.outfit else 1.0), 0.22
            feet = [(body.x + a, 0.0, body.z + b) for a, b in ((-r, -r), (r, -r), (r, r), (-r, r))]
        else:
            feet, h = body.footprint(), body.model.height
        if min(p[2] for p in feet) < cam.near:
            continue
        if canvas.light.kind != "overcast":
            shade(feet + [(x + dx * h, 0.0, z + dz * h) for x, _, z in feet], deep)
    for item in scene.items:
        if isinstance(item.body, Placed) and item.near > cam.near:
            grown = [
                (x + 0.06 * (x - item.body.x), 0.0, z + 0.03 * (z - item.body.z)) for x, _, z in item.body.footprint()
            ]
            shade(grown, 175)
        elif item.near > cam.near:
            shade(
                [(item.body.x + a, 0.0, item.body.z + b) for a, b in ((-0.3, 0), (0, -0.2), (0.3, 0), (0, 0.2))],
                110,
            )
    cast_shadows(canvas.image, mask)


def props(canvas: Canvas, scene: Scene, rng: Rng) -> list[Prop]:
    """Street trees, lamps, and things without a label (bins, sign boards: void), to be sorted among the things."""
    out: list[Prop] = []
    s = scene.street

    def tree(x: float, z: float, high: float) -> Prop:
        return z, lambda: draw_tree(canvas, rng, x, z, high)

    def lamp(x: float, z: float, arm: float) -> Prop:
        return z, lambda: _lamp(canvas, x, z, arm)

    def bin_(x: float, z: float, kind: int) -> Prop:
        return z, lambda: _unlabelled(canvas, x, z, kind)

    for x, sign in ((s.left - 0.55, 1), (s.right + 0.55, -1)):
        first, gap = rng.uniform(10, 20), rng.uniform(16, 26)
        out += [lamp(x, first + gap * i, sign * 1.6) for i in range(4)]
        if rng.random() < 0.6:
            start, step = rng.uniform(16, 26), rng.uniform(8, 15)
            out += [tree(x - 0.25 * sign, start + step * i, rng.uniform(5.5, 7.5)) for i in range(5)]
        out += [
            bin_(x - sign * rng.uniform(0, 0.4), rng.uniform(9, 30), int(rng.integers(3)))
            for _ in range(int(rng.integers(1, 4)))
        ]
    return out


def _lamp(canvas: Canvas, x: float, z: float, arm: float) -> None:
    canvas.begin("pole", shared=True)
    paint = (104, 108, 112)
    canvas.limb((x, 0, z), (x, 6.4, z), 0.2, 0.12, paint, 0.9)
    canvas.limb((x, 6.4, z), (x + arm, 6.75, z), 0.11, 0.09, paint, 0.9)
    glow = (255, 232, 170) if canvas.light.kind == "dusk" else (206, 208, 206)
    canvas.limb((x + arm, 6.72, z), (x + arm * 1.35, 6.74, z), 0.2, 0.16, glow, 1.2)


def _unlabelled(canvas: Canvas, x: float, z: float, kind: int) -> None:
    """A bin, a sign or a box: things of no class, void in the id map."""
    if kind == 1:
        canvas.begin("pole", shared=True)
        canvas.limb((x, 0, z), (x, 2.3, z), 0.09, 0.09, (130, 132, 134), 0.9)
        canvas.begin(None)
        canvas.ball((x, 2.45, z), 0.36, (206, 40, 38))
        canvas.ball((x, 2.45, z - 0.01), 0.26, (240, 238, 232))
        return
    canvas.begin(None)
    w, h, paint = (0.3, 1.05, (64, 84, 70)) if kind == 0 else (0.42, 1.35, (176, 164, 60))
    canvas.face([(x - w, 0, z), (x - w, h, z), (x + w, h, z), (x + w, 0, z)], paint, 0.85)
    canvas.face([(x - w, h, z), (x - w, h + 0.08, z), (x + w, h + 0.08, z), (x + w, h, z)], (50, 54, 54), 0.9)
    canvas.face(
        [
            (x - 0.6 * w, 0.6 * h, z),
            (x - 0.6 * w, 0.8 * h, z),
            (x + 0.6 * w, 0.8 * h, z),
            (x + 0.6 * w, 0.6 * h, z),
        ],
        (206, 206, 200),
        0.8,
    )


def draw_bonnet(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """The camera's own car at the bottom edge: void, as in the real data."""
    if not scene.bonnet:
        return
    h, w = canvas.ids.shape
    rise = float(rng.uniform(0.045, 0.085)) * h
    color = pick(rng, ((40, 44, 52), (128, 132, 138), (74, 28, 32), (34, 52, 84)))
    canvas.begin(None)
    for drop, tone in ((0.0, 0.75), (0.1, 1.0), (0.3, 1.18), (0.42, 1.0)):
        t = np.linspace(0, math.pi, 25)
        x = w * (0.5 - (0.47 - 0.05 * drop) * np.cos(t))
        y = h + 2 - (rise + 2) * (1 - drop) * np.sin(t) ** 0.55
        canvas.fill(np.stack((x, y), -1), canvas.light.paint(color, tone, 0))
