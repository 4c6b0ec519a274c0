"""People, bicycles and motorcycles: jointed figures in the world, drawn limb by limb."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .camera import Color, Point3
from .canvas import Canvas

RUBBER: Color = (30, 30, 32)
STEEL: Color = (165, 168, 172)


@dataclass(frozen=True)
class Outfit:
    """How a person looks: heights in metres, colours in RGB."""

    height: float
    skin: Color
    hair: Color
    top: Color
    legs: Color
    shoes: Color
    coat: bool = False
    cap: Color | None = None
    bag: Color | None = None


@dataclass(frozen=True)
class Stance:
    """Where a figure or two-wheeler stands; ``yaw`` as for vehicles, ``stride`` swings the legs (0 stands)."""

    x: float
    z: float
    yaw: float
    stride: float = 0.0

    def world(self, fore: float, y: float, s: float) -> Point3:
        """World point of body coordinates: forward, up, right."""
        sin, cos = math.sin(self.yaw), math.cos(self.yaw)
        return self.x + fore * sin + s * cos, y, self.z + fore * cos - s * sin

    def near_side(self) -> float:
        """+1 when the right-hand side is nearer to the camera, else -1."""
        return -1.0 if self.x * math.cos(self.yaw) - self.z * math.sin(self.yaw) > 0 else 1.0


def draw_person(canvas: Canvas, at: Stance, o: Outfit) -> None:
    """Draw a standing or walking person into the current segment."""
    h, a, side = o.height, at.stride, at.near_side()
    shade = canvas.light.lambert((0.0, 0.0, -1.0))
    lit = canvas.light.lambert((math.copysign(0.7, canvas.light.sun[0]), 0.0, -0.7))
    for s, swing, tone in ((-side, -a, 0.82), (side, a, 1.0)):
        hip = at.world(0.0, 0.5 * h, 0.09 * s)
        knee = at.world(0.3 * swing + 0.03, 0.27 * h, 0.1 * s)
        foot = at.world(swing, 0.045 * h, 0.1 * s)
        canvas.limb(hip, knee, 0.17, 0.14, o.legs, shade * tone)
        canvas.limb(knee, foot, 0.14, 0.1, o.legs, shade * tone)
        toe = at.world(swing + 0.14, 0.03, 0.1 * s)
        canvas.limb(at.world(swing - 0.05, 0.05, 0.1 * s), toe, 0.1, 0.09, o.shoes, shade)
    hem = 0.33 * h if o.coat else 0.47 * h
    _arm(canvas, at, o, -side, 0.8 * a, shade * 0.8)
    flare = 0.2 if o.coat else 0.16
    trunk = [at.world(fore, hem, flare * s) for fore in (-0.1, 0.1) for s in (-1, 1)]
    trunk += [at.world(fore, 0.8 * h, 0.22 * s) for fore in (-0.08, 0.06) for s in (-1, 1)]
    trunk += [at.world(0.0, 0.84 * h, 0.12 * s) for s in (-1, 1)]
    canvas.hull(trunk, o.top, shade)
    if canvas.scale(at.z) > 12:  # the flank that the sun touches
        left = math.copysign(1.0, canvas.light.sun[0]) * (1 if math.cos(at.yaw) > 0 else -1)
        strip = [at.world(0.0, hem + 0.02, f * flare * left) for f in (0.35, 0.95)]
        strip += [at.world(0.0, 0.8 * h, f * 0.21 * left) for f in (0.35, 0.95)]
        canvas.hull(strip, o.top, lit * 1.08)
    if o.bag is not None and math.cos(at.yaw) > -0.3:
        canvas.hull(
            [at.world(fore, y * h, 0.14 * s) for fore in (-0.1, -0.26) for y in (0.56, 0.8) for s in (-1, 1)],
            o.bag,
            shade,
        )
    _arm(canvas, at, o, side, -0.8 * a, shade * 0.94)
    _head(canvas, at, o, 0.02, h, shade)


def _arm(canvas: Canvas, at: Stance, o: Outfit, s: float, swing: float, shade: float) -> None:
    h = o.height
    elbow, hand = at.world(0.4 * swing, 0.62 * h, 0.27 * s), at.world(swing + 0.06, 0.47 * h, 0.26 * s)
    canvas.limb(at.world(0.0, 0.8 * h, 0.2 * s), elbow, 0.12, 0.1, o.top, shade)
    canvas.limb(elbow, hand, 0.1, 0.085, o.top, shade)
    canvas.ball(hand, 0.05, o.skin, shade)


def _head(canvas: Canvas, at: Stance, o: Outfit, fore: float, top: float, shade: float) -> None:
    """Head whose crown is at ``top``: face, hair (most of it seen from behind), cap or helmet."""
    toward = -math.cos(at.yaw)  # 1 faces the camera
    canvas.limb(at.world(fore - 0.02, top - 0.3, 0), at.world(fore, top - 0.18, 0), 0.11, 0.11, o.skin, shade * 0.85)
    center = at.world(fore, top - 0.125, 0)
    canvas.ball(center, 0.105, o.hair if toward < -0.4 else o.skin, shade, 1.2)
    if toward >= -0.4:
        canvas.ball(at.world(fore - 0.035, top - 0.07, 0), 0.1, o.hair, shade, 0.75)
        if canvas.scale(at.z) > 60 and toward > 0.5:  # near enough for eyes
            for s in (-0.04, 0.04):
                canvas.ball(at.world(fore + 0.09, top - 0.14, s), 0.013, (40, 32, 30))
    if o.cap is not None:
        canvas.ball(at.world(fore, top - 0.045, 0), 0.115, o.cap, shade * 1.05, 0.62)


def draw_bicycle(canvas: Canvas, at: Stance, paint: Color) -> None:
    """Draw a bicycle: two wheels with spokes, a diamond frame, saddle and handlebar."""
    shade = canvas.light.lambert((0.0, 0.3, -0.95))
    fine = canvas.scale(at.z) > 22
    for fore in (-0.52, 0.52):
        rim = [at.world(fore + 0.33 * math.cos(t), 0.345 + 0.33 * math.sin(t), 0) for t in _turn(16 if fine else 10)]
        canvas.outline(rim, 0.045, RUBBER, shade)
        if fine:
            for i in range(8):
                canvas.limb(rim[i], rim[i + 8], 0.008, 0.008, STEEL, shade)
        canvas.ball(at.world(fore, 0.345, 0), 0.045, STEEL, shade)
    crank, seat, head = (-0.08, 0.3), (-0.2, 0.8), (0.36, 0.78)
    bars = ((crank, seat), (crank, head), (seat, head), ((-0.52, 0.345), crank), ((-0.52, 0.345), seat))
    frame = [at.world(fore, y, 0) for fore, y in (crank, seat, head)]
    canvas.fill(canvas.camera.polygon(frame), paint, solid=True, paint=False)
    for a, b in (*bars, (head, (0.52, 0.345)), (head, (0.33, 0.98))):
        canvas.limb(at.world(*a, 0), at.world(*b, 0), 0.05, 0.05, paint, shade)
    canvas.limb(at.world(-0.2, 0.8, 0), at.world(-0.23, 0.93, 0), 0.035, 0.035, STEEL, shade)
    canvas.limb(at.world(-0.34, 0.95, 0), at.world(-0.1, 0.94, 0), 0.1, 0.06, RUBBER, shade)
    canvas.limb(at.world(0.33, 1.0, -0.28), at.world(0.33, 1.0, 0.28), 0.045, 0.045, RUBBER, shade)
    canvas.ball(at.world(-0.08, 0.3, 0), 0.09, RUBBER, shade)


def draw_motorcycle(canvas: Canvas, at: Stance, paint: Color) -> None:
    """Draw a motorcycle: fat wheels, engine, tank, seat, fork, lamp and exhaust."""
    shade = canvas.light.lambert((0.0, 0.3, -0.95))
    for fore in (-0.68, 0.7):
        for s in (-0.06, 0.06):
            wheel = [at.world(fore + 0.33 * math.cos(t), 0.33 + 0.33 * math.sin(t), s) for t in _turn(14)]
            canvas.face(wheel, RUBBER, shade)
        near = 0.065 * at.near_side()
        hub = [at.world(fore + 0.2 * math.cos(t), 0.33 + 0.2 * math.sin(t), near) for t in _turn(12)]
        canvas.face(hub, STEEL, shade * 0.8, solid=False)
        disc = [at.world(fore + 0.1 * math.cos(t), 0.33 + 0.1 * math.sin(t), near) for t in _turn(10)]
        canvas.face(disc, RUBBER, shade, solid=False)

    def block(points: tuple[tuple[float, float], ...], half: float, color: Color, light: float) -> None:
        canvas.hull([at.world(fore, y, s) for fore, y in points for s in (-half, half)], color, light)

    canvas.limb(at.world(0.7, 0.33, 0.07), at.world(0.42, 0.98, 0.07), 0.07, 0.07, STEEL, shade)
    canvas.limb(at.world(0.7, 0.33, -0.07), at.world(0.42, 0.98, -0.07), 0.07, 0.07, STEEL, shade)
    block(((-0.3, 0.28), (0.32, 0.28), (0.36, 0.6), (-0.3, 0.62)), 0.16, (72, 74, 78), shade)
    block(((-0.75, 0.74), (-0.1, 0.66), (-0.05, 0.84), (-0.8, 0.9)), 0.13, RUBBER, shade * 1.2)
    block(((-0.95, 0.62), (-0.6, 0.6), (-0.5, 0.74), (-0.95, 0.78)), 0.1, paint, shade * 0.9)
    block(((-0.12, 0.66), (0.4, 0.7), (0.42, 0.95), (0.02, 0.98)), 0.17, paint, shade)
    block(((0.38, 0.62), (0.62, 0.82), (0.52, 1.12), (0.36, 1.0)), 0.15, paint, shade * 1.08)
    block(((0.42, 0.6), (0.9, 0.62), (1.0, 0.68), (0.6, 0.72)), 0.07, paint, shade * 0.95)
    canvas.limb(at.world(0.36, 1.04, -0.36), at.world(0.36, 1.04, 0.36), 0.06, 0.06, RUBBER, shade)
    if math.cos(at.yaw) < 0.5:
        canvas.ball(at.world(0.62, 0.9, 0), 0.1, (250, 246, 220), 1.05)
    if math.cos(at.yaw) > 0.2:
        canvas.ball(at.world(-0.96, 0.72, 0), 0.06, (200, 30, 28), 1.1)
    pipe = 0.2 * at.near_side()
    canvas.limb(at.world(-0.85, 0.4, pipe), at.world(0.0, 0.28, pipe), 0.11, 0.07, STEEL, shade * 1.05)


def draw_rider(canvas: Canvas, at: Stance, o: Outfit, motor: bool) -> None:
    """Draw the rider of a bicycle or motorcycle at the same stance, into the current segment."""
    shade, side = canvas.light.lambert((0.0, 0.2, -0.97)), at.near_side()
    hip, shoulder = ((-0.3, 0.92), (0.02, 1.42)) if motor else ((-0.22, 1.0), (0.1, 1.5))
    grip, spread = ((0.34, 1.07), 0.32) if motor else ((0.33, 1.03), 0.25)
    knee = (0.16, 0.72) if motor else (0.14, 0.72)
    for s, turn in ((-side, 1.0), (side, -1.0)):
        kick = 0.0 if motor else 0.13 * turn
        foot = (-0.02, 0.3) if motor else (-0.02, 0.28 + kick)
        k = at.world(knee[0], knee[1] + kick * 0.7, (0.22 if motor else 0.13) * s)
        f = at.world(*foot, 0.2 * s if motor else 0.13 * s)
        canvas.limb(at.world(*hip, 0.1 * s), k, 0.2, 0.15, o.legs, shade * (0.8 + 0.1 * (s == side)))
        canvas.limb(k, f, 0.15, 0.11, o.legs, shade * (0.8 + 0.1 * (s == side)))
        canvas.limb(f, at.world(foot[0] + 0.14, foot[1] - 0.02, 0.13 * s), 0.1, 0.09, o.shoes, shade)
    trunk = [at.world(hip[0] + fore, hip[1] - 0.06, 0.17 * s) for fore in (-0.1, 0.08) for s in (-1, 1)]
    trunk += [at.world(shoulder[0] + fore, shoulder[1], 0.21 * s) for fore in (-0.1, 0.05) for s in (-1, 1)]
    canvas.hull(trunk, o.top, shade)
    if o.bag is not None:
        back = [
            at.world(hip[0] + 0.02 + fore, hip[1] + y, 0.14 * s)
            for fore in (0.0, -0.2)
            for y in (0.1, 0.42)
            for s in (-1, 1)
        ]
        canvas.hull(back, o.bag, shade)
    for s in (-side, side):
        elbow = at.world(shoulder[0] + 0.14, 1.2, 0.3 * s)
        canvas.limb(at.world(*shoulder, 0.19 * s), elbow, 0.13, 0.11, o.top, shade * 0.92)
        canvas.limb(elbow, at.world(*grip, spread * s), 0.1, 0.08, o.top, shade * 0.92)
        canvas.ball(at.world(*grip, spread * s), 0.05, RUBBER if motor else o.skin, shade)
    _head(canvas, at, o, shoulder[0] + 0.08, shoulder[1] + 0.36, shade)
    if o.cap is not None:
        lid = at.world(shoulder[0] + 0.07, shoulder[1] + (0.24 if motor else 0.3), 0)
        canvas.ball(lid, 0.14 if motor else 0.125, o.cap, shade * 1.1, 1.05 if motor else 0.7)


def _turn(n: int) -> list[float]:
    return [2 * math.pi * i / n for i in range(n)]
