"""Small makers shared by the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from panoptic_ibs.classes import ClassInfo, ClassTable
from panoptic_ibs.structures import Batch, ImageSize, Target, id_map_dtype


def class_table(things: int = 3, stuff: int = 2) -> ClassTable:
    """Stuff first, as on Cityscapes, with dataset ids that differ from the contiguous ones."""
    rows = [ClassInfo(f"stuff{i}", 7 + i, False, (10 * i, 90, 200)) for i in range(stuff)]
    rows += [ClassInfo(f"thing{i}", 50 + i, True, (200, 20 * i, 60)) for i in range(things)]
    return ClassTable(rows)


def target_from_map(
    id_map: Tensor,
    class_ids: list[int],
    classes: ClassTable,
    crowd: tuple[int, ...] = (),
    image_index: int = 0,
) -> Target:
    """A target with boxes and areas by naive loops."""
    boxes, areas = [], []
    for k in range(1, len(class_ids) + 1):
        ys, xs = (id_map == k).nonzero(as_tuple=True)
        areas.append(len(ys))
        empty = [0.0, 0.0, 0.0, 0.0]
        boxes.append([float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)] if len(ys) else empty)
    ids = torch.tensor(class_ids, dtype=torch.long)
    return Target(
        id_map=id_map.int(),
        class_ids=ids,
        is_thing=torch.tensor([classes[c].is_thing for c in class_ids], dtype=torch.bool),
        is_crowd=torch.tensor([k in crowd for k in range(len(class_ids))], dtype=torch.bool),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        areas=torch.tensor(areas, dtype=torch.long),
        segment_ids=torch.arange(1000, 1000 + len(class_ids)),
        image_index=image_index,
        image_id=f"image{image_index}",
    )


def random_target(
    classes: ClassTable,
    size: tuple[int, int] = (64, 128),
    segments: int = 8,
    seed: int = 0,
    image_index: int = 0,
) -> Target:
    """Stuff stripes under random boxes of things; the first rows are the stuff classes."""
    g = torch.Generator().manual_seed(seed)
    h, w = size
    stuff = list(classes.stuff_ids)
    id_map = torch.zeros(size, dtype=id_map_dtype(segments))
    ids = []
    for i, c in enumerate(stuff):
        id_map[i * h // len(stuff) : (i + 1) * h // len(stuff)] = i + 1
        ids.append(c)
    for _ in range(segments):
        bh = int(torch.randint(4, h // 2, (), generator=g))
        bw = int(torch.randint(4, w // 2, (), generator=g))
        y, x = int(torch.randint(0, h - bh, (), generator=g)), int(torch.randint(0, w - bw, (), generator=g))
        ids.append(classes.thing_ids[int(torch.randint(0, len(classes.thing_ids), (), generator=g))])
        id_map[y : y + bh, x : x + bw] = len(ids)
    id_map[: h // 16] = 0  # void
    return target_from_map(id_map, ids, classes, image_index=image_index)


def random_batch(
    classes: ClassTable, size: tuple[int, int] = (64, 128), count: int = 2, segments: int = 8, seed: int = 0
) -> Batch:
    """Noise images with targets; neighbours are pairs."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, *size), generator=g, dtype=torch.uint8)
    targets = [random_target(classes, size, segments, seed * 100 + i, i) for i in range(count)]
    return Batch(images, targets, [ImageSize(size, size)] * count, torch.arange(count) // 2)
