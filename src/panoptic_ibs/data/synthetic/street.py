"""The street itself: ground, houses, parks, trees, poles, skyline, shadows and the bonnet of the camera's own car."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

from .camera import Color, Point3
from .canvas import Canvas
from .figures import Stance
from .scene import Scene, pick
from .textures import cast_shadows, grain_ground
from .vehicles import Placed

Rng = np.random.Generator
Prop = tuple[float, Callable[[], None]]
"""Distance, and what draws it."""

ASPHALT: tuple[Color, ...] = ((96, 96, 100), (84, 86, 92), (110, 106, 104))
PAVING: tuple[Color, ...] = ((168, 162, 152), (150, 150, 152), (178, 164, 150))
GRASS: tuple[Color, ...] = ((112, 138, 68), (132, 140, 78), (98, 128, 66))
PLASTER: tuple[Color, ...] = (
    (214, 196, 164), (188, 132, 104), (170, 92, 76), (206, 204, 196), (222, 206, 130), (164, 170, 176), (150, 118, 96),
    (196, 164, 150), (138, 150, 160), (226, 214, 198),
)  # fmt: skip
LEAVES: tuple[Color, ...] = ((62, 98, 44), (78, 110, 48), (54, 88, 54), (104, 118, 50), (150, 110, 44))
FAR = 240.0


def _strip(x0: float, x1: float, z0: float, z1: float, y: float = 0.0) -> list[Point3]:
    return [(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)]


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
    cast_shadows(canvas.image, mask, canvas.light)


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
            [(x, 0, z0), (x, high, z0), (far, high, z0), (far, 0, z0)],
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
