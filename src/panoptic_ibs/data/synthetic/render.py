"""From a plan to a picture with its id map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from panoptic_ibs.classes import ClassInfo, ClassTable

from .camera import Camera
from .canvas import Canvas
from .figures import Stance, draw_bicycle, draw_motorcycle, draw_person, draw_rider
from .plots import draw_sides, draw_skyline
from .scene import Item, Scene, plan
from .street import draw_bonnet, draw_ground, props
from .textures import finish, paint_sky
from .vehicles import Placed, draw_vehicle

MIN_PIXELS = 12
"""Segments with fewer visible pixels are void: nobody could tell what they are."""

THINGS_PER_IMAGE = (20, 60)

CLASSES = ClassTable(
    ClassInfo(name, dataset_id, thing, color)
    for name, dataset_id, thing, color in (
        ("road", 7, False, (128, 64, 128)),
        ("sidewalk", 8, False, (244, 35, 232)),
        ("building", 11, False, (70, 70, 70)),
        ("wall", 12, False, (102, 102, 156)),
        ("fence", 13, False, (190, 153, 153)),
        ("pole", 17, False, (153, 153, 153)),
        ("vegetation", 21, False, (107, 142, 35)),
        ("terrain", 22, False, (152, 251, 152)),
        ("sky", 23, False, (70, 130, 180)),
        ("person", 24, True, (220, 20, 60)),
        ("rider", 25, True, (255, 0, 0)),
        ("car", 26, True, (0, 0, 142)),
        ("truck", 27, True, (0, 0, 70)),
        ("bus", 28, True, (0, 60, 100)),
        ("train", 31, True, (0, 80, 100)),
        ("motorcycle", 32, True, (0, 0, 230)),
        ("bicycle", 33, True, (119, 11, 32)),
    )
)
"""Names, label ids and colours as in Cityscapes, of the classes that the scenes hold."""


@dataclass
class SyntheticImage:
    """One picture and its panoptic labels.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        id_map: (H, W) int32; 0 is void, k >= 1 is row k - 1 of ``segments``.
        segments: (class name, iscrowd) rows. Every row has at least ``MIN_PIXELS`` pixels; a stuff class and a class's
            crowd are one row each.
    """

    image: NDArray[np.uint8]
    id_map: NDArray[np.int32]
    segments: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def num_things(self) -> int:
        """Number of thing instances, crowd not counted."""
        thing = dict(zip(CLASSES.names, CLASSES.is_thing, strict=True))
        return sum(thing[name] and not crowd for name, crowd in self.segments)


def render(seed: int, index: int, size: tuple[int, int]) -> SyntheticImage:
    """Render picture ``index`` of the set ``seed`` at ``size`` (height, width), each at least 32 pixels.

    The same arguments give the same bytes in every process. A plan of which too few things stay visible is
    replaced by the next one for the same index.

    Raises:
        ValueError: if the size is too small, or the seed or index negative.
    """
    if min(size) < 32 or seed < 0 or index < 0:
        raise ValueError(f"render(seed={seed}, index={index}, size={size}): need seed, index >= 0 and size >= 32 x 32.")
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
    ids, rows = _compact(canvas)
    names = ["", *CLASSES.names]
    class_of = np.array([0] + [names.index(name) for name, _ in rows], np.uint8)
    image = finish(canvas.image, rng, class_of[ids], names, scene.light)
    edge = max(1, round(h / 256))  # a thin frame without labels, as rectified camera images have
    for frame in (ids[:edge], ids[-edge:], ids[:, :edge], ids[:, -edge:]):
        frame[...] = 0
    canvas.ids, canvas.rows = ids, rows
    ids, rows = _compact(canvas)
    return SyntheticImage(image, ids, rows)


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


def _compact(canvas: Canvas) -> tuple[NDArray[np.int32], list[tuple[str, bool]]]:
    """Drop segments with too few visible pixels (void from now on) and number the others without gaps."""
    area = np.bincount(canvas.ids.ravel(), minlength=len(canvas.rows) + 1)
    keep = area >= MIN_PIXELS
    keep[0] = False
    new = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return new[canvas.ids], [row for row, kept in zip(canvas.rows, keep[1:], strict=True) if kept]
