"""The plan of a street scene: which look-alikes stand where. No pixels here, and nothing depends on the image size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .camera import Color, Light, make_light
from .figures import Outfit, Stance
from .vehicles import MODELS, Placed

Rng = np.random.Generator

# In each run of six images every feature comes up once, so that small sets hold all thing classes.
FEATURES = ("buses", "trams", "motorcycles", "bicycles", "trucks", "riders")

CAR_PAINT: tuple[Color, ...] = (
    (196, 200, 204), (40, 42, 48), (232, 232, 228), (124, 128, 134), (150, 30, 34), (36, 62, 124), (58, 98, 152),
    (196, 172, 120), (52, 92, 70), (208, 120, 42), (104, 44, 56), (222, 196, 60),
)  # fmt: skip
BRIGHT: tuple[Color, ...] = (
    (196, 44, 40), (236, 186, 40), (40, 104, 176), (44, 132, 84), (232, 232, 226), (226, 122, 38), (122, 66, 140),
    (44, 156, 160),
)  # fmt: skip
CLOTH: tuple[Color, ...] = (
    (44, 48, 62), (120, 44, 48), (54, 78, 112), (150, 150, 146), (196, 176, 134), (68, 88, 62), (216, 208, 196),
    (98, 72, 56), (196, 84, 60), (226, 178, 62), (60, 120, 132), (142, 96, 140), (34, 34, 38),
)  # fmt: skip
SKIN: tuple[Color, ...] = ((238, 200, 172), (222, 176, 142), (186, 134, 98), (136, 92, 66), (94, 64, 48))
HAIR: tuple[Color, ...] = ((40, 30, 26), (86, 58, 38), (170, 128, 76), (24, 22, 24), (150, 146, 142))


@dataclass(frozen=True)
class Item:
    """One thing: its class, what to draw it from, and the distance by which it is sorted (far to near)."""

    class_name: str
    body: Placed | Stance
    near: float
    color: Color = (0, 0, 0)
    outfit: Outfit | None = None
    motor: bool = False
    crowd: bool = False


@dataclass(frozen=True)
class Street:
    """The street's cross-section: x of the kerbs and of the plots' edges, and what lines either side."""

    left: float
    right: float
    walk_left: float
    walk_right: float
    sides: tuple[str, str]
    center: float
    crossing: float | None
    rails: float | None
    end: float


@dataclass
class Scene:
    """Everything that a picture shows, in metres. ``cx``, ``horizon`` are shares of the width and height."""

    seed: tuple[int, ...]
    light: Light
    street: Street
    camera_height: float
    cx: float
    horizon: float
    zoom: float
    bonnet: bool
    items: list[Item] = field(default_factory=list)


def plan(seed: int, index: int, attempt: int = 0) -> Scene:
    """Plan image ``index`` of the set ``seed``; ``attempt`` draws another plan for the same image."""
    rng = np.random.default_rng((seed, index, attempt, 1))
    order = np.random.default_rng((seed, index // len(FEATURES), 2)).permutation(len(FEATURES))
    feature = FEATURES[int(order[index % len(FEATURES)])]
    street = _street(rng, feature)
    scene = Scene(
        (seed, index, attempt), make_light(rng), street, rng.uniform(1.8, 2.5), rng.uniform(0.4, 0.6),
        rng.uniform(0.36, 0.44), rng.uniform(0.92, 1.1), bool(rng.random() < 0.75),
    )  # fmt: skip
    limit = int(rng.integers(50, 61))
    first = _feature(rng, street, feature)
    taken = max((item.near for item in first), default=0.0) if feature == "motorcycles" else 0.0
    groups = [first, _parked(rng, street, 1, taken), _on_walk(rng, street, 1, rack=feature != "bicycles")]
    groups += [_crossing(rng, street, feature), _own_lane(rng, street, feature)]
    groups += [_parked(rng, street, -1), _on_walk(rng, street, -1), _oncoming(rng, street, feature)]
    while sum(map(len, groups)) < limit - 4:
        groups.append(_strollers(rng, street, int(rng.choice((-1, 1))), int(rng.integers(4, 10))))
    for group in groups:
        scene.items += group[: max(0, limit - len(scene.items))]
    if rng.random() < 0.75:
        scene.items += _crowd(rng, street)
    scene.items.sort(key=lambda item: -item.near)
    return scene


def _street(rng: Rng, feature: str) -> Street:
    width = rng.uniform(10.5, 13.0) + (2.5 if feature == "trams" else 0.0)
    right = rng.uniform(3.4, 4.3)
    left = right - width
    sides = [str(s) for s in rng.choice(("houses", "park"), 2, p=(0.68, 0.32))]
    crossing = float(rng.uniform(7.2, 10.0)) if rng.random() < 0.65 else None
    rails = left + 0.42 * width if feature == "trams" else None
    return Street(
        left, right, left - rng.uniform(3.0, 5.0), right + rng.uniform(3.0, 5.0), (sides[0], sides[1]),
        (left + right) / 2 + 0.4, crossing, rails, rng.uniform(90, 130),
    )  # fmt: skip


def pick(rng: Rng, colors: tuple[Color, ...]) -> Color:
    """One of the colours."""
    return colors[int(rng.integers(len(colors)))]


def _vary(rng: Rng, color: Color, by: float) -> Color:
    r, g, b = (float(np.clip(c + d, 4, 250)) for c, d in zip(color, rng.normal(0, by, 3), strict=True))
    return r, g, b


def _vehicle(model_class: str, number: int, x: float, z: float, yaw: float, body: Color, accent: Color) -> Item:
    placed = Placed(MODELS[model_class][number], x, z, yaw, body, accent)
    return Item(model_class, placed, placed.near, body)


def _queue(
    rng: Rng,
    kind: str,
    x: float,
    start: float,
    n: int,
    yaw: float,
    gap: tuple[float, float],
    spread: float = 0.12,
) -> list[Item]:
    """``n`` vehicles of one model in one colour, one behind the other from ``start`` (the nearest one's near end)."""
    number = int(rng.integers(len(MODELS[kind])))
    body = pick(rng, CAR_PAINT) if kind == "car" else pick(rng, BRIGHT)
    accent = pick(rng, ((236, 236, 232), (210, 214, 218), (60, 66, 76), *BRIGHT))
    if kind == "truck":
        accent = pick(rng, ((226, 226, 222), (206, 202, 190), (176, 182, 188), (70, 96, 140), (186, 62, 50)))
    odd = rng.random() < 0.4 and kind == "car"  # one stranger in the row
    items, z = [], start
    for i in range(n):
        stranger = odd and i == n // 2
        paint = pick(rng, CAR_PAINT) if stranger else body
        model = int(rng.integers(len(MODELS[kind]))) if stranger else number
        length = MODELS[kind][model].length
        turn = yaw + float(rng.normal(0, 0.015))
        at = x + float(rng.normal(0, spread))
        items.append(_vehicle(kind, model, at, z + length / 2, turn, _vary(rng, paint, 2), accent))
        z += length + rng.uniform(*gap)
    return items


def outfit(rng: Rng, like: Outfit | None = None, strict: bool = True) -> Outfit:
    """Clothes, drawn anew or like those of a group: the same coat, other heads and heights."""
    height = float(np.clip(rng.normal(1.72, 0.06), 1.5, 1.95))
    skin, hair = pick(rng, SKIN), pick(rng, HAIR)
    if like is not None and strict:
        top, legs = _vary(rng, like.top, 4), _vary(rng, like.legs, 4)
        return Outfit(like.height + height - 1.72, skin, hair, top, legs, like.shoes, like.coat, like.cap, like.bag)
    top, legs = (
        pick(rng, CLOTH),
        pick(rng, ((44, 48, 62), (34, 34, 38), (64, 84, 120), (120, 112, 100), (70, 62, 56))),
    )
    cap = pick(rng, BRIGHT) if rng.random() < 0.3 else None
    bag = pick(rng, CLOTH) if rng.random() < 0.3 else None
    child = rng.random() < 0.12
    return Outfit(
        1.25 if child else height, skin, hair, top, legs, pick(rng, ((30, 30, 34), (90, 60, 44), (220, 220, 216))),
        bool(rng.random() < 0.35), cap, bag,
    )  # fmt: skip


def _people(
    rng: Rng, spots: list[tuple[float, float]], yaw: float | None, walking: bool, crowd: bool = False
) -> list[Item]:
    """People in similar clothes on the given spots (x, z)."""
    like, loose = outfit(rng), rng.random() < 0.25
    items = []
    for x, z in spots:
        turn = float(rng.normal(yaw, 0.25)) if yaw is not None else float(rng.uniform(0, 2 * math.pi))
        stride = float(rng.choice((-1, 1)) * rng.uniform(0.14, 0.3)) if walking else float(rng.normal(0, 0.03))
        dress = outfit(rng, like, strict=not (loose and rng.random() < 0.5))
        items.append(Item("person", Stance(x, z, turn, stride), z, outfit=dress, crowd=crowd))
    return items


def _spots(
    rng: Rng, n: int, x: tuple[float, float], z: tuple[float, float], apart: float = 0.55
) -> list[tuple[float, float]]:
    """Up to ``n`` places, none nearer to another than ``apart``."""
    out: list[tuple[float, float]] = []
    for _ in range(8 * n):
        spot = (float(rng.uniform(*x)), float(rng.uniform(*z)))
        if all(math.hypot(spot[0] - a, spot[1] - b) > apart for a, b in out):
            out.append(spot)
        if len(out) == n:
            break
    return out


def _walk(street: Street, side: int) -> tuple[float, float]:
    """Where people walk on the sidewalk of a side (+1 right)."""
    return (street.right + 0.7, street.walk_right - 0.4) if side > 0 else (street.walk_left + 0.4, street.left - 0.7)


def _strollers(rng: Rng, street: Street, side: int, n: int) -> list[Item]:
    z = float(rng.uniform(8.5, 20)) if side > 0 else float(rng.uniform(12, 24))
    deep = rng.uniform(3.0, 9.0)
    yaw = float(rng.choice((0.0, math.pi))) + float(rng.normal(0, 0.2))
    return _people(rng, _spots(rng, n, _walk(street, side), (z, z + deep)), yaw, walking=True)


def _on_walk(rng: Rng, street: Street, side: int, rack: bool = True) -> list[Item]:
    if rng.random() < 0.35 and rack:
        return _rack(rng, street, side) + _strollers(rng, street, side, int(rng.integers(2, 6)))
    return _strollers(rng, street, side, int(rng.integers(6, 12)))


def _rack(rng: Rng, street: Street, side: int) -> list[Item]:
    """A rack of bicycles of one make, seen from the side, one behind the other."""
    n, step = int(rng.integers(5, 11)), rng.uniform(0.55, 0.95)
    x = (street.right + 1.1) if side > 0 else (street.left - 1.1)
    z = float(rng.uniform(9.5, 15)) if side > 0 else float(rng.uniform(15, 22))
    paint, yaw = pick(rng, BRIGHT + CLOTH), side * rng.uniform(1.15, 1.5)
    items = []
    for i in range(n):
        at = Stance(x + float(rng.normal(0, 0.08)), z + step * i, yaw + float(rng.normal(0, 0.05)))
        items.append(Item("bicycle", at, at.z, _vary(rng, paint, 5)))
    return items


def _motor_row(rng: Rng, street: Street, side: int) -> list[Item]:
    n, step = int(rng.integers(4, 9)), rng.uniform(0.95, 1.5)
    x = street.right - 1.0 if side > 0 else street.left + 1.1
    z = float(rng.uniform(7.5, 12)) if side > 0 else float(rng.uniform(13, 18))
    paint, yaw = pick(rng, BRIGHT + CAR_PAINT[:2]), side * rng.uniform(-1.45, -0.9)
    items = []
    for i in range(n):
        at = Stance(x + float(rng.normal(0, 0.06)), z + step * i, yaw + float(rng.normal(0, 0.06)))
        items.append(Item("motorcycle", at, at.z - 0.3, _vary(rng, paint, 4)))
    return items


def _parked(rng: Rng, street: Street, side: int, taken: float = 0.0) -> list[Item]:
    """What stands along the kerb beyond ``taken`` metres: cars, a few trucks, or motorcycles and then cars."""
    x = street.right - 1.05 if side > 0 else street.left + 1.1
    yaw = 0.0 if side > 0 else math.pi
    start = float(rng.uniform(6.2, 12.0)) if side > 0 else float(rng.uniform(11, 18))
    dice = rng.random()
    if taken > 0:
        return _queue(rng, "car", x, taken + 2.5, int(rng.integers(4, 9)), yaw, (0.6, 1.3))
    if dice < 0.2:
        near = _motor_row(rng, street, side)
        return near + _queue(rng, "car", x, near[-1].near + 4.0, int(rng.integers(3, 6)), yaw, (0.7, 1.6))
    if dice < 0.3:
        return _queue(rng, "truck", x - 0.3 * side, start + 3, int(rng.integers(2, 4)), yaw, (0.8, 2.0))
    return _queue(rng, "car", x, start, int(rng.integers(6, 11)), yaw, (0.6, 1.3))


def _riders(rng: Rng, x: tuple[float, float], z: tuple[float, float], n: int, yaw: float, motor: bool) -> list[Item]:
    """A pack of riders in similar clothes on look-alike machines; two segments each."""
    like, paint = outfit(rng), pick(rng, BRIGHT + CAR_PAINT)
    cap = like.cap or pick(rng, BRIGHT)
    items: list[Item] = []
    for sx, sz in _spots(rng, n, x, z, 1.1):
        at = Stance(sx, sz, yaw + float(rng.normal(0, 0.16)))
        o = outfit(rng, like)
        dress = Outfit(1.75, o.skin, o.hair, o.top, o.legs, o.shoes, False, cap, o.bag)
        items.append(Item("motorcycle" if motor else "bicycle", at, sz, _vary(rng, paint, 5), motor=motor))
        items.append(Item("rider", at, sz - 0.01, outfit=dress, motor=motor))
    return items


def _feature(rng: Rng, street: Street, feature: str) -> list[Item]:
    lane = 0.5 * (street.left + street.center) + 0.5
    free = 0.0 if street.crossing is None else street.crossing + 2.2  # vehicles wait behind the crossing
    if feature == "buses":
        return _queue(
            rng,
            "bus",
            lane,
            max(free, float(rng.uniform(7.5, 12))),
            int(rng.integers(2, 5)),
            math.pi,
            (1.0, 4.0),
            0.3,
        )
    if feature == "trams" and street.rails is not None:
        return _queue(
            rng,
            "train",
            street.rails,
            max(free, float(rng.uniform(7.5, 12))),
            int(rng.integers(1, 4)),
            math.pi,
            (0.6, 3.0),
            0.02,
        )
    if feature == "trucks":
        return _queue(
            rng,
            "truck",
            lane,
            max(free, float(rng.uniform(7.5, 11))),
            int(rng.integers(2, 5)),
            math.pi,
            (1.0, 4.0),
            0.3,
        )
    if feature == "motorcycles":
        return _motor_row(rng, street, 1)
    if feature == "bicycles":
        return _rack(rng, street, 1)
    motor = bool(rng.random() < 0.35)
    yaw = float(rng.choice((0.35, -0.3, math.pi - 0.4)))
    return _riders(rng, (-3.0, 1.6), (6.5, 14.0), int(rng.integers(3, 6)), yaw, motor)


def _crossing(rng: Rng, street: Street, feature: str) -> list[Item]:
    if street.crossing is None or feature == "riders":
        return []
    spots = _spots(
        rng,
        int(rng.integers(3, 9)),
        (street.left + 2.4, street.right - 2.2),
        (street.crossing - 1.2, street.crossing + 1.3),
    )
    return _people(rng, spots, float(rng.choice((-1, 1))) * math.pi / 2, walking=True)


def _own_lane(rng: Rng, street: Street, feature: str) -> list[Item]:
    x = float(rng.uniform(-0.6, 0.4))
    start = (street.crossing or 6.0) + float(rng.uniform(2.0, 6.0))
    if feature == "riders":
        start = 16.0
    dice = rng.random()
    if dice < 0.5:
        return _queue(rng, "car", x, start, int(rng.integers(1, 4)), 0.0, (2.0, 6.0), 0.3)
    if dice < 0.65:
        kind = str(rng.choice(("bus", "truck")))
        return _queue(rng, kind, x, start + 1, 1, 0.0, (3.0, 6.0), 0.2)
    if dice < 0.85 or feature in ("buses", "trams", "trucks"):
        return _riders(
            rng,
            (x - 1.0, x + 1.2),
            (start, start + 8),
            int(rng.integers(2, 4)),
            0.0,
            bool(rng.random() < 0.5),
        )
    return _queue(rng, "car", x - 4.0, start + 12, 2, math.pi / 2, (0.5, 1.0))  # cross traffic


def _oncoming(rng: Rng, street: Street, feature: str) -> list[Item]:
    x = 0.5 * (street.left + street.center) + 0.6
    if feature in ("buses", "trucks", "trams"):
        return []
    kind = str(rng.choice(("car", "bus", "truck", "rider"), p=(0.5, 0.2, 0.15, 0.15)))
    start = float(rng.uniform(9, 18)) + (0.0 if street.crossing is None else 4.0)
    if kind == "rider":
        return _riders(rng, (x - 1, x + 1), (start, start + 10), 3, math.pi, bool(rng.random() < 0.5))
    return _queue(rng, kind, x, start, int(rng.integers(1, 4)), math.pi, (2.5, 7.0), 0.3)


def _crowd(rng: Rng, street: Street) -> list[Item]:
    """A far group that the labels do not tell apart: people on the sidewalk, or bicycles beside it."""
    side = int(rng.choice((-1, 1)))
    z = float(rng.uniform(24, 36))
    if rng.random() < 0.7:
        spots = _spots(rng, int(rng.integers(9, 18)), _walk(street, side), (z, z + 7), 0.4)
        return _people(rng, spots, None, walking=False, crowd=True)
    x, yaw, paint = (street.right + 1.1 if side > 0 else street.left - 1.1), 1.3, pick(rng, BRIGHT)
    stances = [Stance(x, z - 8 + 0.5 * i, yaw) for i in range(14)]
    return [Item("bicycle", s, s.z, _vary(rng, paint, 6), crowd=True) for s in stances]
