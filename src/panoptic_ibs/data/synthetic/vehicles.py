"""Cars, buses, trucks and trams: side profiles extruded over the vehicle's width, seen from any angle."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .camera import Color, Point2, Point3
from .canvas import Canvas

MATERIALS: dict[str, Color] = {
    "glass": (52, 62, 74),
    "shine": (112, 128, 142),
    "dark": (36, 37, 40),
    "tyre": (26, 26, 28),
    "rim": (150, 152, 156),
    "red": (196, 26, 24),
    "lamp": (250, 244, 214),
    "plate": (232, 232, 226),
    "sign": (250, 190, 60),
}

Decal = tuple[float, float, float, float, str]
"""u0, u1 across (-1 is the left edge, 1 the right one), v0, v1 along the edge (0 is its start), material."""


@dataclass(frozen=True)
class Part:
    """One extruded profile. Lengths in metres; fore runs from the rear (negative) to the front.

    Attributes:
        profile: points (fore, y) from the rear's bottom over the roof to the front's bottom.
        width: of the vehicle.
        skins: material of each edge between neighbours in ``profile`` ("body", "accent" or a key of MATERIALS).
        decals: edge number -> rectangles on it.
        side: polygons (fore, y) on both flanks, with a material.
        wheels: (fore, radius).
        belt: height above which the flanks lean inwards by ``lean`` metres a metre.
        skirt: material of the flanks.
    """

    profile: tuple[Point2, ...]
    width: float
    skins: tuple[str, ...]
    decals: dict[int, tuple[Decal, ...]]
    side: tuple[tuple[tuple[Point2, ...], str], ...]
    wheels: tuple[tuple[float, float], ...] = ()
    belt: float = 99.0
    lean: float = 0.0
    skirt: str = "body"

    @property
    def middle(self) -> float:
        """Centre along the length."""
        return 0.5 * (self.profile[0][0] + self.profile[-1][0])


@dataclass(frozen=True)
class Model:
    """A vehicle: its class, parts and outer length and height."""

    class_name: str
    parts: tuple[Part, ...]
    length: float
    height: float
    width: float


def _box(l0: float, l1: float, y0: float, y1: float) -> tuple[Point2, ...]:
    return (l0, y0), (l0, y1), (l1, y1), (l1, y0)


def _car(length: float, width: float, height: float, bonnet: float, boot: float, rake: tuple[float, float]) -> Model:
    r, f, belt = -length / 2, length / 2, 0.6 * height + 0.06
    roof_r, roof_f = r + boot + rake[0], f - bonnet - rake[1]
    profile = (
        (r + 0.06, 0.24), (r, 0.52), (r + 0.05, belt), (r + boot, belt + 0.04), (roof_r, height),
        (roof_f, height), (f - bonnet, belt + 0.04), (f - 0.14, belt - 0.18), (f, 0.5), (f - 0.05, 0.22),
    )  # fmt: skip
    skins = ("dark", "body", "body", "body", "body", "body", "body", "body", "dark")
    pane: Decal = (-0.88, 0.88, 0.08, 0.92, "glass")
    glint: Decal = (-0.5, 0.1, 0.45, 0.8, "shine")
    decals: dict[int, tuple[Decal, ...]] = {
        1: ((-1, -0.66, 0.5, 0.95, "red"), (0.66, 1, 0.5, 0.95, "red"), (-0.28, 0.28, 0.2, 0.55, "plate")),
        3: (pane,),
        5: (pane, glint),
        7: (
            (-0.97, -0.6, 0.1, 0.75, "lamp"), (0.6, 0.97, 0.1, 0.75, "lamp"), (-0.5, 0.5, 0.25, 0.85, "dark"),
            (-0.25, 0.25, 0.9, 1.1, "plate"),
        ),
    }  # fmt: skip
    low, high, mid = belt + 0.07, height - 0.09, 0.5 * (roof_r + roof_f) - 0.05
    rear_pane = (
        (r + boot + 0.14 + 0.12 * rake[0], low),
        (roof_r + 0.08, high),
        (mid - 0.05, high),
        (mid - 0.05, low),
    )
    front_pane = ((mid + 0.05, low), (mid + 0.05, high), (roof_f - 0.06, high), (f - bonnet - 0.14, low))
    sill = ((r + 0.8, 0.24), (r + 0.8, 0.34), (f - 0.8, 0.34), (f - 0.8, 0.24))
    handle = _box(mid - 0.35, mid - 0.18, belt - 0.14, belt - 0.1)
    side = ((rear_pane, "glass"), (front_pane, "glass"), (sill, "dark"), (handle, "dark"))
    radius = 0.2 + 0.085 * height
    wheels = ((r + 0.2 * length, radius), (f - 0.19 * length, radius))
    part = Part(profile, width, skins, decals, side, wheels, belt, 0.32)
    return Model("car", (part,), length, height, width)


def _bus() -> Model:
    r, f, top = -5.6, 5.6, 3.05
    profile = ((r, 0.32), (r, 2.95), (r + 0.1, top), (f - 0.25, top), (f - 0.06, 2.62), (f, 0.32))
    skins = ("body", "body", "body", "body", "body")
    decals: dict[int, tuple[Decal, ...]] = {
        0: (
            (-0.82, 0.82, 0.6, 0.86, "glass"), (-0.6, 0.6, 0.14, 0.36, "dark"), (-0.97, -0.78, 0.16, 0.46, "red"),
            (0.78, 0.97, 0.16, 0.46, "red"), (-0.22, 0.22, 0.04, 0.1, "plate"),
        ),
        3: ((-0.75, 0.75, 0.15, 0.85, "dark"), (-0.6, 0.45, 0.3, 0.7, "sign")),
        4: (
            (-0.93, 0.93, 0.03, 0.56, "glass"), (-0.6, -0.1, 0.1, 0.42, "shine"), (-0.95, -0.62, 0.76, 0.86, "lamp"),
            (0.62, 0.95, 0.76, 0.86, "lamp"), (-1, 1, 0.92, 1, "dark"), (-0.2, 0.2, 0.84, 0.9, "plate"),
        ),
    }  # fmt: skip
    side: list[tuple[tuple[Point2, ...], str]] = [
        (_box(r, f, 0.95, 1.28), "accent"),
        (_box(r, f, 0.32, 0.42), "dark"),
    ]
    side += [(_box(r + 0.5 + 1.32 * i, r + 1.7 + 1.32 * i, 1.5, 2.55), "glass") for i in range(8)]
    side += [(_box(a, a + 1.15, 0.45, 2.6), "glass") for a in (-1.2, 4.1)]
    part = Part(profile, 2.5, skins, decals, tuple(side), ((-3.3, 0.48), (3.1, 0.48)))
    return Model("bus", (part,), 11.2, top, 2.5)


def _truck(cargo: float, top: float) -> Model:
    length = cargo + 2.3
    r, f = -length / 2, length / 2
    back = r + cargo
    frame: tuple[tuple[tuple[Point2, ...], str], ...] = ((_box(r, back, 0.62, 1.0), "dark"),)
    box = Part(
        ((r, 0.62), (r, 1.0), (r, top), (back, top), (back, 0.62)), 2.5, ("dark", "accent", "accent", "accent"),
        {
            0: ((-0.95, -0.7, 0.1, 0.75, "red"), (0.7, 0.95, 0.1, 0.75, "red"), (-0.2, 0.2, 0.1, 0.6, "plate")),
            1: (
                (-0.02, 0.02, 0, 1, "dark"), (-0.3, -0.25, 0.05, 0.95, "rim"), (0.25, 0.3, 0.05, 0.95, "rim"),
                (-1, 1, 0.96, 1, "rim"),
            ),
        },
        (*frame, (_box(r + 0.9, back - 0.9, 1.5, 2.1), "body"), (_box(r, back, top - 0.12, top), "rim")),
        ((r + 0.9, 0.5), (r + 2.0, 0.5)), skirt="accent",
    )  # fmt: skip
    cab = Part(
        ((back + 0.2, 0.4), (back + 0.2, 2.5), (back + 0.8, 2.85), (f - 0.3, 2.75), (f - 0.05, 1.65), (f, 0.4)), 2.4,
        ("body", "body", "body", "body", "body"),
        {
            3: ((-0.9, 0.9, 0.1, 0.95, "glass"), (-0.5, 0, 0.2, 0.6, "shine")),
            4: (
                (-0.6, 0.6, 0.12, 0.5, "dark"), (-0.95, -0.62, 0.62, 0.78, "lamp"), (0.62, 0.95, 0.62, 0.78, "lamp"),
                (-1, 1, 0.86, 1, "dark"),
            ),
        },
        (
            (((f - 1.25, 1.65), (f - 1.25, 2.45), (f - 0.4, 2.45), (f - 0.2, 1.65)), "glass"),
            (_box(back + 0.2, f, 0.4, 0.62), "dark"),
        ),
        ((f - 0.85, 0.5),),
    )  # fmt: skip
    return Model("truck", (box, cab), length, top, 2.5)


def _tram() -> Model:
    r, f = -7.5, 7.5
    profile = (
        (r, 0.2), (r - 0.05, 1.25), (r + 0.55, 2.75), (r + 0.9, 3.2), (f - 0.9, 3.2), (f - 0.55, 2.75),
        (f + 0.05, 1.25), (f, 0.2),
    )  # fmt: skip
    front: tuple[Decal, ...] = (
        (-0.95, -0.6, 0.35, 0.55, "lamp"), (0.6, 0.95, 0.35, 0.55, "lamp"), (-1, 1, 0.84, 1, "dark"),
        (-0.16, 0.16, 0.28, 0.5, "lamp"),
    )  # fmt: skip
    rear: tuple[Decal, ...] = tuple((a, b, 1 - d, 1 - c, "red" if m == "lamp" else m) for a, b, c, d, m in front)
    pane: Decal = (-0.9, 0.9, 0.05, 0.95, "glass")
    board: Decal = (-0.6, 0.6, 0.25, 0.75, "sign")
    decals = {
        0: rear,
        1: (pane,),
        2: (board,),
        4: (board,),
        5: (pane, (-0.6, -0.1, 0.2, 0.6, "shine")),
        6: front,
    }
    side: list[tuple[tuple[Point2, ...], str]] = [
        (_box(r, f, 0.2, 0.46), "dark"), (_box(r + 0.5, f - 0.5, 2.72, 2.92), "accent"),
        (_box(r + 0.1, f - 0.1, 0.85, 1.05), "accent"),
    ]  # fmt: skip
    side += [(_box(r + 0.75 + 1.55 * i, r + 2.15 + 1.55 * i, 1.3, 2.6), "glass") for i in range(9)]
    side += [(_box(a, a + 1.0, 0.5, 2.62), "accent") for a in (-4.6, 3.4)]
    side += [(_box(a + b, a + b + 0.38, 0.7, 2.5), "glass") for a in (-4.6, 3.4) for b in (0.08, 0.54)]
    side += [(_box(-0.35, 0.35, 0.3, 3.15), "dark")]
    body = Part(profile, 2.4, ("body",) * 7, decals, tuple(side))
    gear = [
        Part(
            tuple((fore + a, y) for fore, y in _box(-1.3, 1.3, 3.2, 3.55)),
            1.8,
            ("rim", "rim", "rim"),
            {},
            (),
            skirt="rim",
        )
        for a in (-3.6, 3.2)
    ]
    return Model("train", (body, *gear), 15.1, 3.6, 2.4)


MODELS: dict[str, tuple[Model, ...]] = {
    "car": (
        _car(4.55, 1.82, 1.45, 1.15, 0.75, (0.55, 0.75)),  # saloon
        _car(3.95, 1.74, 1.5, 0.95, 0.1, (0.4, 0.7)),  # hatchback
        _car(4.6, 1.82, 1.5, 1.1, 0.08, (0.35, 0.75)),  # estate
        _car(4.5, 1.88, 1.74, 1.05, 0.1, (0.3, 0.6)),  # off-roader
        _car(4.9, 1.95, 2.02, 0.7, 0.05, (0.12, 0.65)),  # van
    ),
    "bus": (_bus(),),
    "truck": (_truck(5.6, 3.5), _truck(4.2, 3.1)),
    "train": (_tram(),),
}


@dataclass(frozen=True)
class Placed:
    """A vehicle on the street: heading ``yaw`` 0 drives away from the camera, pi towards it."""

    model: Model
    x: float
    z: float
    yaw: float
    body: Color
    accent: Color

    def world(self, fore: float, y: float, s: float) -> Point3:
        """World point of vehicle coordinates: forward, up, right."""
        sin, cos = math.sin(self.yaw), math.cos(self.yaw)
        return self.x + fore * sin + s * cos, y, self.z + fore * cos - s * sin

    @property
    def near(self) -> float:
        """Distance of the nearest corner."""
        half, w = self.model.length / 2, self.model.width / 2
        return self.z - half * abs(math.cos(self.yaw)) - w * abs(math.sin(self.yaw))

    def footprint(self) -> list[Point3]:
        """The four corners on the ground."""
        a, b = self.model.length / 2, self.model.width / 2
        return [self.world(fore, 0.0, s) for fore, s in ((-a, -b), (-a, b), (a, b), (a, -b))]


def draw_vehicle(canvas: Canvas, v: Placed) -> None:
    """Draw one vehicle into the current segment; its parts from far to near."""
    for part in sorted(v.model.parts, key=lambda p: (p.profile[0][1] > 3, -v.world(p.middle, 0, 0)[2])):
        _draw_part(canvas, v, part)
    if v.model.class_name == "train" and canvas.scale(v.z) > 4:
        for a, b in (((-0.8, 3.5), (0.3, 4.2)), ((0.3, 4.2), (-0.5, 4.9))):
            canvas.limb(v.world(a[0], a[1], 0), v.world(b[0], b[1], 0), 0.09, 0.09, MATERIALS["dark"])
        canvas.limb(v.world(-0.5, 4.9, -0.7), v.world(-0.5, 4.9, 0.7), 0.08, 0.08, MATERIALS["dark"])


def _draw_part(canvas: Canvas, v: Placed, part: Part) -> None:
    half = part.width / 2
    sin, cos = math.sin(v.yaw), math.cos(v.yaw)
    across = v.x * cos - v.z * sin  # how far the axis passes the camera on the right
    flank = -1.0 if across > half else 1.0 if across < -half else 0.0
    detail = canvas.scale(v.z) * v.model.height > 9

    def wide(y: float) -> float:
        return half - max(0.0, y - part.belt) * part.lean

    def tone(material: str) -> Color:
        return v.body if material == "body" else v.accent if material == "accent" else MATERIALS[material]

    for s in (-half + 0.12, half - 0.12):
        for fore, radius in part.wheels:
            canvas.face(_circle(v, fore, radius, s - 0.1), MATERIALS["tyre"], 0.8)
            canvas.face(_circle(v, fore, radius, s + 0.1), MATERIALS["tyre"], 0.8)
            a, b = v.world(fore, radius, s - 0.1), v.world(fore, radius, s + 0.1)
            canvas.limb((a[0], 0.3, a[2]), (b[0], 0.3, b[2]), 0.6, 0.6, MATERIALS["tyre"], 0.7)
    strips = []
    for i, ((l0, y0), (l1, y1)) in enumerate(zip(part.profile, part.profile[1:], strict=False)):
        dl, dy = l1 - l0, y1 - y0
        size = math.hypot(dl, dy)
        normal = (-dy / size * sin, dl / size, -dy / size * cos)
        mid = v.world((l0 + l1) / 2, (y0 + y1) / 2, 0)
        towards = -mid[0] * normal[0] + (canvas.camera.height - mid[1]) * normal[1] - mid[2] * normal[2]
        if towards > 0:
            strips.append((-mid[2], i, (l0, y0), (l1, y1), canvas.light.lambert(normal)))
    for _, i, (l0, y0), (l1, y1), light in sorted(strips):

        def on(u: float, t: float, a: Point2 = (l0, y0), b: Point2 = (l1, y1)) -> Point3:
            y = a[1] + t * (b[1] - a[1])
            return v.world(a[0] + t * (b[0] - a[0]), y, u * wide(y))

        canvas.face([on(-1, 0), on(1, 0), on(1, 1), on(-1, 1)], tone(part.skins[i]), light)
        for u0, u1, v0, v1, material in part.decals.get(i, ()) if detail else ():
            slant = 0.22 if material == "shine" else 0.0
            glow = 1.1 if material in ("lamp", "red", "sign") else max(light, 0.7)
            canvas.face(
                [on(u0, v0), on(u1, v0), on(u1 + slant, v1), on(u0 + slant, v1)], tone(material), glow, solid=False
            )
    if flank == 0.0:
        return
    light = canvas.light.lambert((flank * cos, 0.0, -flank * sin))

    def at(fore: float, y: float) -> Point3:
        return v.world(fore, y, flank * wide(y))

    canvas.face([at(fore, y) for fore, y in part.profile], tone(part.skirt), light)
    for polygon, material in part.side if detail else ():
        canvas.face([at(fore, y) for fore, y in polygon], tone(material), max(light, 0.6), solid=False)
    for fore, radius in part.wheels:
        canvas.face(_circle(v, fore, radius * 1.12, flank * half), MATERIALS["dark"], 0.6)
        canvas.face(_circle(v, fore, radius, flank * (half + 0.01)), MATERIALS["tyre"], light)
        if detail:
            canvas.face(_circle(v, fore, 0.58 * radius, flank * (half + 0.01)), MATERIALS["rim"], light, solid=False)
            canvas.face(_circle(v, fore, 0.2 * radius, flank * (half + 0.01)), MATERIALS["dark"], light, solid=False)


def _circle(v: Placed, fore: float, radius: float, s: float) -> list[Point3]:
    turn = [2 * math.pi * i / 14 for i in range(14)]
    return [v.world(fore + radius * math.cos(t), max(0.0, min(radius, 0.5) + radius * math.sin(t)), s) for t in turn]
