"""Crops, recipes, losses and heads at their edges: the right value, or one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from cli_helpers import compose
from helpers import class_table, random_batch, target_from_map
from panoptic_ibs.data.class_tables import published_classes
from panoptic_ibs.data.windows import plan, resize_id_map, resize_image
from panoptic_ibs.heads.panoptic_fcn import PanopticFCN
from panoptic_ibs.heads.panoptic_fcn.inference import merge_regions
from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.structures import FeatureLevel, SegmentEmbeddings

LEVELS = tuple(FeatureLevel(4 * 2**i, 8) for i in range(4))


@st.composite
def crops(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]:
    """Stored and resized size and a window, each side by itself: resized or not, whole, cut or passing the border."""
    sides = []
    for _ in range(2):
        stored = draw(st.integers(1, 40))
        resized = draw(st.one_of(st.just(stored), st.integers(1, 60)))
        start = draw(st.one_of(st.just(0), st.integers(0, resized - 1)))
        length = draw(st.one_of(st.just(resized - start), st.integers(1, 70)))
        sides.append((stored, resized, start, length))
    (a, b, top, height), (c, d, left, width) = sides
    return (a, c), (b, d), (top, left, height, width)


@settings(max_examples=300, deadline=None)
@given(crops())
def test_a_crop_is_the_same_part_of_the_whole_resized_map(case: tuple) -> None:
    stored, resized, window = case
    ids = np.arange(stored[0] * stored[1], dtype=np.int32).reshape(stored)
    pixels = np.repeat((ids % 251).astype(np.uint8)[..., None], 3, axis=2)
    whole = np.asarray(Image.fromarray(ids).resize(resized[::-1], Image.Resampling.NEAREST))
    part = plan(stored, resized, window)
    t, x, h, w = part.source
    top, left, height, width = part.window
    got = resize_id_map(ids[t : t + h, x : x + w], stored, resized, part)
    np.testing.assert_array_equal(got, whole[top : top + height, left : left + width])
    image = resize_image(pixels[t : t + h, x : x + w], part)
    assert image.shape == (*got.shape, 3)
    if stored == resized:
        np.testing.assert_array_equal(image, pixels[top : top + height, left : left + width])


def test_coco_colours_are_the_official_ones() -> None:
    table = published_classes("coco_panoptic")
    assert table is not None
    colours = {c.name: c.color for c in table.classes}
    assert len(colours) == len(set(colours.values())) == 133
    known = {
        "person": (220, 20, 60),
        "bicycle": (119, 11, 32),
        "car": (0, 0, 142),
        "motorcycle": (0, 0, 230),
        "traffic light": (250, 170, 30),
        "banner": (255, 255, 128),
        "sky-other-merged": (70, 130, 180),
        "tree-merged": (107, 142, 35),
        "rug-merged": (250, 141, 255),
    }
    assert {name: colours[name] for name in known} == known


@pytest.mark.parametrize(
    "recipe", ["vistas_panoptic_fcn_crop_ibs", "vistas_panoptic_fcn_full", "coco_panoptic_fcn_full"]
)
def test_recipes_of_panoptic_fcn_are_deformable_in_the_position_head(recipe: str) -> None:
    """Published: modulated deformable convolutions there, none in the kernel head and in the feature encoder."""
    head = compose(f"experiment={recipe}", "data.root=none").head
    assert (head.deform, head.deform_features) == (True, False)


def naive_ibs(out: SegmentEmbeddings, positions: int) -> Tensor:
    """Two crops; every instance's k embeddings against the other crop, divided by the number of instances."""
    total = torch.zeros(())
    assert out.weight is not None
    for row, image in enumerate(out.image_index.tolist()):
        logits = [
            (out.embeddings[row] * out.features[1 - image, :, y, x]).sum()
            for y in range(out.features.shape[2])
            for x in range(out.features.shape[3])
        ]
        loss = sigmoid_focal_loss(torch.stack(logits), torch.zeros(len(logits)), 0.25, 2.0).mean()
        total = total + out.weight[row].item() * loss
    return total / (len(out.image_index) // positions)


def test_panoptic_fcn_divides_ibs_by_the_number_of_instances() -> None:
    """An instance that has no position on its level counts all the same, as published."""
    torch.manual_seed(0)
    head = PanopticFCN(class_table(), LEVELS, channels=8, feature_channels=8, depth=1, num_positions=3)
    batch = random_batch(head.classes, (64, 64), count=2, segments=3)
    id_map = batch.targets[0].id_map.clone()
    id_map[0, 0:3] = len(batch.targets[0]) + 1  # misses the four central pixels of its cell
    ids = [*batch.targets[0].class_ids.tolist(), head.classes.thing_ids[0]]
    targets = [target_from_map(id_map, ids, head.classes), batch.targets[1]]
    features = [torch.randn(2, 8, 64 // s, 64 // s) for s, _ in LEVELS]
    _, (segments,) = head.losses(head(features), targets)
    assert segments.weight is not None
    sums = segments.weight.view(-1, 3).sum(1)
    assert (sums == 0).sum() == 1
    assert len(sums) > 3
    ibs = IntraBatchSupervision(weight=1.0)(segments)
    torch.testing.assert_close(ibs, naive_ibs(segments, 3), rtol=1e-5, atol=1e-8)
    segments.count = None  # what other heads have: divided by the summed weights
    former = IntraBatchSupervision(weight=1.0)(segments)
    torch.testing.assert_close(former * (len(sums) - 1), ibs * len(sums), rtol=1e-5, atol=1e-8)


def test_no_region_above_the_threshold() -> None:
    kernel, channel, score = torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    assert [t.shape for t in merge_regions(kernel, channel, score)] == [(0, 8), (0,), (0,)]
