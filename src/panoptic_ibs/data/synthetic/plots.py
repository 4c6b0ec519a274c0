"""What lines the street: houses, walls, fences, parks, trees and the skyline at its end."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .camera import Color
from .canvas import Canvas
from .scene import Scene, pick

Rng = np.random.Generator

PLASTER: tuple[Color, ...] = (
    (214, 196, 164), (188, 132, 104), (170, 92, 76), (206, 204, 196), (222, 206, 130), (164, 170, 176), (150, 118, 96),
    (196, 164, 150), (138, 150, 160), (226, 214, 198),
)  # fmt: skip
LEAVES: tuple[Color, ...] = ((62, 98, 44), (78, 110, 48), (54, 88, 54), (104, 118, 50), (150, 110, 44))


def draw_skyline(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Close the street at its end: hazy blocks of houses and tree tops across the whole horizon."""
    end = scene.street.end
    canvas.begin("vegetation", shared=True)
    x = -0.9 * end
    while x < 0.9 * end:
        wide, high = rng.uniform(5, 12), rng.uniform(3.5, 7.5)
        canvas.ball((x, high * 0.25, end + 25), max(wide, high) * 0.75, pick(rng, LEAVES), 0.75, 0.7)
        x += wide * 0.7
    x = -0.9 * end
    while x < 0.9 * end:
        wide, high = rng.uniform(8, 22), rng.uniform(7, 19)
        if rng.random() < 0.62:
            canvas.begin("building", shared=True)
            _front(canvas, rng, x, x + wide, high, end + rng.uniform(5, 20), pick(rng, PLASTER))
        x += wide * rng.uniform(0.9, 1.3)


def _front(canvas: Canvas, rng: Rng, x0: float, x1: float, high: float, z: float, color: Color) -> None:
    """A house front that faces the camera."""
    canvas.face([(x0, 0, z), (x0, high, z), (x1, high, z), (x1, 0, z)], color, canvas.light.lambert((0, 0, -1)))
    if canvas.scale(z) < 1.2:
        return
    grid_x = np.arange(x0 + 1.2, x1 - 1.4, 2.6)
    grid_y = np.arange(1.6, high - 1.8, 3.1)
    _panes(canvas, rng, grid_x, grid_y, lambda u, y: np.stack((u, y, np.full_like(u, z)), -1), (1.2, 1.5), z)


def _panes(
    canvas: Canvas,
    rng: Rng,
    grid_u: np.ndarray,
    grid_y: np.ndarray,
    place: Callable[[np.ndarray, np.ndarray], np.ndarray],
    pane: tuple[float, float],
    z: float,
) -> None:
    """Draw a grid of windows on the plane ``place(u, y)``: dark ones, bright ones, and frames where near."""
    u, y = (a.ravel() for a in np.meshgrid(grid_u, grid_y))
    if not len(u):
        return
    lit = rng.random(len(u)) < {"day": 0.12, "overcast": 0.2, "dusk": 0.5}[canvas.light.kind]
    glow: Color = (168, 186, 200) if canvas.light.kind == "day" else (250, 214, 140)

    def quads(grow: float, keep: np.ndarray) -> np.ndarray:
        du = np.array([-grow, -grow, pane[0] + grow, pane[0] + grow])
        dy = np.array([-grow, pane[1] + grow, pane[1] + grow, -grow])
        return canvas.camera.pixels(place(u[keep, None] + du, y[keep, None] + dy))

    light = canvas.light
    if canvas.scale(z) > 9:
        canvas.fill_many(quads(0.13, lit | True), light.paint((226, 222, 212), 0.85, z))
    canvas.fill_many(quads(0.0, ~lit), light.paint((58, 68, 82), 0.95, z))
    canvas.fill_many(quads(0.0, lit), light.paint(glow, 1.05, z))
    if canvas.scale(z) > 16:  # glazing bars
        du, dy = np.array([0.47, 0.47, 0.53, 0.53]) * pane[0], np.array([0, 1, 1, 0]) * pane[1]
        canvas.fill_many(
            canvas.camera.pixels(place(u[:, None] + du, y[:, None] + dy)),
            light.paint((226, 222, 212), 0.8, z),
        )


def draw_sides(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Houses or park on either side, from far to near."""
    for x, sign, kind in (
        (scene.street.walk_left, -1, scene.street.sides[0]),
        (scene.street.walk_right, 1, scene.street.sides[1]),
    ):
        if kind == "houses":
            _houses(canvas, scene, rng, x, sign)
        else:
            _park(canvas, scene, rng, x, sign)


def _houses(canvas: Canvas, scene: Scene, rng: Rng, x: float, sign: int) -> None:
    plots, z = [], float(rng.uniform(1.5, 6))
    while z < scene.street.end:
        plots.append((z, z + rng.uniform(8, 20), rng.uniform(8.5, 21), rng.random() < 0.9))
        z = plots[-1][1] + (rng.uniform(3, 7) if rng.random() < 0.2 else 0.0)
    for z0, z1, high, there in reversed(plots):
        if there:
            canvas.begin("building", shared=True)
            _house(canvas, rng, x, sign, z0, z1, high)
        else:
            canvas.begin("wall", shared=True)
            lit = canvas.light.lambert((-sign, 0, 0))
            canvas.face([(x, 0, z0), (x, 2.2, z0), (x, 2.2, z1), (x, 0, z1)], (150, 120, 100), lit)
            canvas.face([(x, 2.2, z0), (x, 2.35, z0), (x, 2.35, z1), (x, 2.2, z1)], (180, 172, 160), lit)


def _house(canvas: Canvas, rng: Rng, x: float, sign: int, z0: float, z1: float, high: float) -> None:
    color, trim = pick(rng, PLASTER), (222, 216, 204)
    light, far = canvas.light.lambert((-sign, 0, 0)), x + sign * 14
    mid = 0.5 * (max(z0, 6.0) + z1)
    if z0 > canvas.camera.near:
        canvas.face(
            [(x, 0, z0), (x, high, z0), (x + sign * 2.2, high + 2.4, z0), (far, high + 2.4, z0), (far, 0, z0)],
            color,
            0.85 * canvas.light.lambert((0, 0, -1)),
        )

    def wall(u0: float, u1: float, y0: float, y1: float, paint: Color, dim: float = 1.0) -> None:
        canvas.face([(x, y0, u0), (x, y1, u0), (x, y1, u1), (x, y0, u1)], paint, light * dim)

    wall(z0, z1, 0, high, color)
    roof = pick(rng, ((122, 62, 50), (82, 80, 84), (104, 84, 72)))
    canvas.face(
        [(x, high, z0), (x + sign * 2.2, high + 2.4, z0), (x + sign * 2.2, high + 2.4, z1), (x, high, z1)],
        roof,
        light,
    )
    wall(z0, z1, high - 0.5, high, trim)
    if canvas.scale(mid) < 5:
        return
    wall(z0, z1, 3.55, 3.75, trim, 0.9)
    near = max(z0, canvas.camera.near + 0.5)
    step = rng.uniform(2.2, 3.0)
    grid = np.arange(near + 0.8, z1 - 1.3, step)
    pane = (rng.uniform(0.9, 1.3), rng.uniform(1.4, 1.8))

    def place(u: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack((np.full_like(u, x), y, u), -1)

    _panes(canvas, rng, grid, np.arange(4.4, high - 2.2, 3.1), place, (float(pane[0]), float(pane[1])), mid)
    shop, u = rng.random() < 0.6, near + 0.6
    while u < z1 - 2.4:
        if shop:
            wall(u, u + 2.1, 0.5, 2.7, (66, 78, 90))
            wall(u + 0.25, u + 0.9, 0.9, 2.3, (126, 142, 152))
        else:
            wall(u, u + 1.0, 0.15, 2.3, (92, 66, 50))
            wall(u + 1.5, u + 2.3, 1.1, 2.4, (62, 72, 84))
        u += 2.8
    if shop:
        wall(
            near + 0.4,
            z1 - 0.4,
            2.85,
            3.4,
            pick(rng, ((150, 44, 40), (40, 84, 70), (46, 60, 104), (206, 160, 60), (70, 60, 56))),
        )


def _park(canvas: Canvas, scene: Scene, rng: Rng, x: float, sign: int) -> None:
    end, light = scene.street.end, canvas.light.lambert((-sign, 0, 0))
    canvas.begin("vegetation", shared=True)
    z = end
    while z > 14:
        draw_tree(canvas, rng, x + sign * rng.uniform(5, 18), z, rng.uniform(6, 10))
        z -= rng.uniform(2.0, 6.0) * (0.5 + z / end)
    dice, z0 = rng.random(), canvas.camera.near
    if dice < 0.4:
        canvas.begin("fence", shared=True)
        high, paint = 1.25, pick(rng, ((74, 80, 74), (120, 96, 72), (176, 176, 170)))
        flat = canvas.camera.polygon([(x, 0, z0), (x, high, z0), (x, high, 90), (x, 0, 90)])
        canvas.fill(flat, (0, 0, 0), paint=False)
        for y in (0.15, 0.65, 1.15):
            canvas.face([(x, y, z0), (x, y + 0.08, z0), (x, y + 0.08, 90), (x, y, 90)], paint, light)
        u = 90.0
        while u > 4:
            canvas.face([(x, 0, u), (x, high, u), (x, high, u + 0.09), (x, 0, u + 0.09)], paint, light)
            u -= 0.3 if u < 26 else 1.2
    elif dice < 0.72:
        canvas.begin("wall", shared=True)
        paint, high = pick(rng, ((158, 122, 100), (164, 160, 150), (140, 134, 126))), rng.uniform(0.9, 1.9)
        canvas.face([(x, 0, z0), (x, high, z0), (x, high, 90), (x, 0, 90)], paint, light)
        for y in np.arange(0.3, high, 0.3):
            canvas.face(
                [(x, y, z0), (x, y + 0.03, z0), (x, y + 0.03, 25), (x, y, 25)],
                paint,
                light * 0.7,
                solid=False,
            )
        canvas.face(
            [(x, high - 0.02, z0), (x, high + 0.12, z0), (x, high + 0.12, 90), (x, high - 0.02, 90)],
            (190, 186, 176),
            light,
        )
    else:
        canvas.begin("vegetation", shared=True)
        z = 40.0
        while z > 6:
            canvas.ball(
                (x + sign * 0.6, 0.5, z),
                rng.uniform(0.6, 0.9),
                pick(rng, LEAVES[:3]),
                rng.uniform(0.7, 1.0),
                0.9,
            )
            z -= 0.5


def draw_tree(canvas: Canvas, rng: Rng, x: float, z: float, high: float) -> None:
    """A trunk and a crown of leaf clusters, dark below and bright towards the sun."""
    canvas.begin("vegetation", shared=True)
    leaf, wide = pick(rng, LEAVES), 0.26 * high
    canvas.limb((x, 0, z), (x + 0.05, 0.5 * high, z), 0.38, 0.24, (84, 68, 54), 0.85)
    middle = 0.68 * high
    n = int(np.clip(canvas.scale(z) * wide * 0.9, 8, 34))
    lean = 0.35 * wide * math.copysign(1.0, canvas.light.sun[0])
    for tone, shift, share in ((0.58, -0.16, 1.0), (0.82, 0.0, 0.9), (1.08, 0.2, 0.55)):
        angle, out = rng.uniform(0, 2 * math.pi, n), np.sqrt(rng.random(n)) * share
        size, glow = rng.uniform(0.2, 0.4, n) * (1.1 if tone < 0.9 else 0.6), rng.uniform(0.9, 1.1, n)
        for a, r, c, g in zip(angle, out, size, glow, strict=True):
            px = x + wide * r * math.cos(a) + lean * shift
            py = middle + 0.95 * wide * r * math.sin(a) + shift * wide
            canvas.ball((px, py, z), wide * c, leaf, tone * g)
