"""From a plan to a picture with its id map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .camera import Camera
from .canvas import Canvas
from .figures import Stance, draw_bicycle, draw_motorcycle, draw_person, draw_rider
from .picture import CLASSES, SyntheticImage, check_request, compact
from .plots import draw_sides, draw_skyline
from .scene import Item, Scene, plan
from .street import draw_bonnet, draw_ground, props
from .textures import finish, paint_sky
from .vehicles import Placed, draw_vehicle

THINGS_PER_IMAGE = (20, 60)


def render(seed: int, index: int, size: tuple[int, int]) -> SyntheticImage:
    """Render picture ``index`` of the set ``seed`` at ``size`` (height, width), each at least 32 pixels.

    The same arguments give the same bytes in every process. A plan of which too few things stay visible is
    replaced by the next one for the same index.

    Raises:
        ValueError: if the size is too small, or the seed or index negative.
    """
    check_request(seed, index, size)
    best: SyntheticImage | None = None
    for attempt in range(4):
        picture = _draw(plan(seed, index, attempt), size)
        if best is None or picture.num_things > best.num_things:
            best = picture
        if best.num_things >= THINGS_PER_IMAGE[0]:
            break
    assert best is not None
    return best


def _draw(scene: Scene, size: tuple[int, int]) -> SyntheticImage:
    h, w = size
    rng = np.random.default_rng((*scene.seed, 3))
    focal = 1.27 * scene.zoom * (h * w) ** 0.5
    canvas = Canvas(size, Camera(focal, scene.cx * w, scene.horizon * h, scene.camera_height), scene.light)
    canvas.begin("sky", shared=True)
    canvas.ids[:] = canvas.current
    paint_sky(canvas.image, rng, canvas.camera, scene.light)
    draw_skyline(canvas, scene, rng)
    draw_ground(canvas, scene, rng)
    draw_sides(canvas, scene, rng)
    todo: list[tuple[float, int, Callable[[], None]]] = [
        (item.near, i, partial(draw_item, canvas, item)) for i, item in enumerate(scene.items)
    ]
    todo += [(z, len(todo) + i, draw) for i, (z, draw) in enumerate(props(canvas, scene, rng))]
    for near, _, draw in sorted(todo, key=lambda t: (-t[0], t[1])):
        if near > canvas.camera.near:
            draw()
    draw_bonnet(canvas, scene, rng)
    ids, rows = compact(canvas.ids, canvas.rows)
    names = ["", *CLASSES.names]
    class_of = np.array([0] + [names.index(name) for name, _ in rows], np.uint8)
    image = finish(canvas.image, rng, class_of[ids], names, scene.light)
    edge = max(1, round(h / 256))  # a thin frame without labels, as rectified camera images have
    for frame in (ids[:edge], ids[-edge:], ids[:, :edge], ids[:, -edge:]):
        frame[...] = 0
    return SyntheticImage(image, *compact(ids, rows))


def draw_item(canvas: Canvas, item: Item) -> None:
    """Draw one thing into its own segment (crowds share one)."""
    canvas.begin(item.class_name, shared=item.crowd, crowd=item.crowd)
    body = item.body
    if isinstance(body, Placed):
        draw_vehicle(canvas, body)
    else:
        _draw_standing(canvas, item, body)


def _draw_standing(canvas: Canvas, item: Item, at: Stance) -> None:
    if item.class_name == "bicycle":
        draw_bicycle(canvas, at, item.color)
    elif item.class_name == "motorcycle":
        draw_motorcycle(canvas, at, item.color)
    elif item.outfit is not None and item.class_name == "rider":
        draw_rider(canvas, at, item.outfit, item.motor)
    elif item.outfit is not None:
        draw_person(canvas, at, item.outfit)
