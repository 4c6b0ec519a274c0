"""Crops, recipes, losses and heads at their edges: the right value, or one sentence."""

from __future__ import annotations

import io
from typing import Any

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
from panoptic_ibs.classes import ClassTable
from panoptic_ibs.construction import build_model
from panoptic_ibs.data.class_tables import published_classes
from panoptic_ibs.data.windows import plan, resize_id_map, resize_image
from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.functional.pictures import upright_rgb
from panoptic_ibs.heads.panoptic_fcn import PanopticFCN
from panoptic_ibs.heads.panoptic_fcn.inference import merge_regions
from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.metrics import InstanceAP
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.structures import Batch, FeatureLevel, ImageSize, SegmentEmbeddings
from panoptic_ibs.task import PanopticTask, check_precision

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


# --- heads at their edges ------------------------------------------------------------------------------------

HEADS: dict[str, dict[str, Any]] = {
    "panoptic_fcn.PanopticFCN": {"channels": 8, "feature_channels": 8, "depth": 1, "num_positions": 3},
    "mask2former.Mask2Former": {
        "channels": 32,
        "queries": 6,
        "encoder_hidden": 8,
        "encoder_depth": 1,
        "decoder_hidden": 8,
        "decoder_depth": 2,
        "loss": {"points": 32},
    },
    "ciae.CIAE": {"channels": 8, "embedding_channels": 8, "depth": 1, "dimension": 8, "memory": {"steps": 10}},
}
BACKBONE = {
    "_target_": "panoptic_ibs.backbones.TimmBackbone",
    "name": "resnet18",
    "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
}


def network(head: str, classes: ClassTable, **options: Any) -> PanopticModel:
    torch.manual_seed(0)
    part = {"_target_": f"panoptic_ibs.heads.{head}", **HEADS[head], **options}
    return build_model({"backbone": BACKBONE, "head": part}, classes)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("things", "stuff"), [(2, 0), (1, 0), (0, 2), (0, 1), (1, 1)])
def test_classes_of_one_kind(head: str, things: int, stuff: int) -> None:
    """Train with IBS, validate and predict; heads that cannot do without things say so."""
    classes = class_table(things, stuff)
    if not things and head != "mask2former.Mask2Former":
        with pytest.raises(ConfigError, match="needs at least one thing class"):
            network(head, classes)
        return
    model = network(head, classes)
    maps = [torch.zeros(64, 64), torch.zeros(64, 64)]
    maps[0][8:40, 8:40], maps[1][20:60, 4:30] = 1, 1
    targets = [target_from_map(m, [len(classes) - 1], classes, image_index=i) for i, m in enumerate(maps)]
    void = target_from_map(torch.zeros(64, 64), [], classes)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for truth in (targets, [targets[0], void], [void, void]):
        batch = Batch(images, truth, [ImageSize((64, 64), (64, 64))] * 2, torch.tensor([0, 0]))
        terms, segments = model.train().losses(batch)
        for partners in ("random", "paired"):
            terms[partners] = IntraBatchSupervision(partners=partners)(segments, batch.pairs, truth)  # type: ignore[arg-type]
        loss = sum(terms.values())
        assert torch.isfinite(loss)
        model.zero_grad()
        loss.backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        for prediction in model.eval().predict_batch(batch, views=True):
            assert prediction.id_map.shape == (64, 64)
            assert prediction.view is not None
            prediction.view()
    images = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    assert model.predict(images)[0].id_map.shape == (40, 56)


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("panoptic_fcn.PanopticFCN", {"inference": {"region_threshold": 0.999}}),
        ("panoptic_fcn.PanopticFCN", {"inference": {"center_threshold": 0.999}}),
        ("panoptic_fcn.PanopticFCN", {"inference": {"center_threshold": 0.999, "region_threshold": 0.999}}),
        ("panoptic_fcn.PanopticFCN", {"inference": {"instance_threshold": 1.0}}),
        ("mask2former.Mask2Former", {"score_threshold": 0.999}),
        ("mask2former.Mask2Former", {"overlap_threshold": 1.0, "score_threshold": 0.0}),
        ("mask2former.Mask2Former", {"task": "instance", "score_threshold": 0.999}),
        ("ciae.CIAE", {"inference": {"score_threshold": 0.999}}),
        ("ciae.CIAE", {"inference": {"score_threshold": 0.999, "stuff_area": 10**6}}),
    ],
)
def test_nothing_passes_the_thresholds(head: str, options: dict[str, Any]) -> None:
    model = network(head, class_table(), **options).eval()
    batch = random_batch(model.classes, (64, 64), count=1)
    (prediction,) = model.predict_batch(batch, views=True)
    assert prediction.id_map.shape == (64, 64)
    assert int(prediction.id_map.max()) <= len(prediction)
    assert prediction.view is not None
    prediction.view()


@pytest.mark.parametrize("things", [0, 1])
def test_instances_where_stuff_takes_all_places(things: int) -> None:
    """Of the best (query, class) pairs none is a thing, or there are no things at all."""
    model = network("mask2former.Mask2Former", class_table(things, 2), instances=True, top_instances=1).eval()
    with torch.no_grad():
        model.head.query_decoder.classify.bias[:2] += 50  # type: ignore[union-attr,index,operator]
    batch = Batch(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        [target_from_map(torch.ones(64, 64), [0], model.classes)],
        [ImageSize((64, 64), (64, 64))],
        torch.tensor([-1]),
    )
    predictions = model.predict_batch(batch)
    assert predictions[0].instances is not None
    assert len(predictions[0].instances) == 0
    precision = InstanceAP(model.classes)
    precision.update(predictions, batch.targets)
    assert precision.compute()["ap"] is None


def test_a_head_without_convolutions() -> None:
    with pytest.raises(ConfigError, match=r"head\.depth is 0"):
        network("panoptic_fcn.PanopticFCN", class_table(), depth=0)


class Plain(PanopticFCN):
    """A head that hands out no embeddings, and whether it says so."""

    def losses(self, output: Any, targets: Any) -> Any:
        """The loss terms alone."""
        return super().losses(output, targets)[0], []


def test_ibs_with_a_head_without_embeddings() -> None:
    model = network("panoptic_fcn.PanopticFCN", class_table())
    ibs = IntraBatchSupervision(partners="random")
    assert PanopticTask(model, ibs=ibs).ibs is ibs
    model.head = Plain(class_table(), model.backbone.levels, channels=8, feature_channels=8, depth=1)
    task = PanopticTask(model, ibs=ibs)  # it says that it has some
    with pytest.raises(ConfigError, match=r"ibs=random: the head gave no segment embeddings.*ibs=none"):
        task.training_step(random_batch(model.classes, (64, 64)), 0)
    model.head.embeds = False
    with pytest.raises(ConfigError, match=r"ibs=random: the head Plain has no segment embeddings.*ibs=none"):
        PanopticTask(model, ibs=ibs)
    assert PanopticTask(model).ibs is None


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_convert_the_weights(precision: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.precision={precision} .*bf16-mixed"):
        check_precision(precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_precisions_that_do_not(precision: str) -> None:
    check_precision(precision)


def test_batch_norms_with_one_value_a_channel() -> None:
    model = network("ciae.CIAE", class_table())
    batch = random_batch(model.classes, (32, 32), count=1)
    with pytest.raises(
        ConfigError, match=r"1 crop\(s\) of 32x32.*sampling\.batch_size.*crop_size.*backbone\.freeze_norm"
    ):
        model.train().losses(batch)
    assert len(model.eval().predict_batch(batch)) == 1
    groups = network("panoptic_fcn.PanopticFCN", class_table(), norm_groups=8).eval()
    with pytest.raises(ConfigError, match="a single value a group on an image of 32x32"):
        groups.predict_batch(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_order": "BGR"}, r"model\.channel_order is 'BGR'; choose 'rgb' or 'bgr'"),
        ({"test_size": [0, 0]}, r"model\.test_size is \[0, 0\]"),
        ({"test_size": [5]}, r"model\.test_size is \[5\]"),
        ({"pixel_std": [1.0, 0.0, 1.0]}, r"model\.pixel_std"),
        ({"pixel_mean": [1.0, float("nan"), 1.0]}, r"model\.pixel_mean"),
        ({"size_divisor": 0}, r"model\.size_divisor is 0"),
        ({"size_divisor": "a"}, "model: PanopticModel cannot be made with these options"),
        ({"classes": 5}, r"model\.classes is no option: the program itself gives it"),
        ({"colour": 5}, "unexpected keyword argument 'colour'"),
    ],
)
def test_constructors_refuse(options: dict[str, Any], message: str) -> None:
    part = {"_target_": "panoptic_ibs.heads.panoptic_fcn.PanopticFCN", **HEADS["panoptic_fcn.PanopticFCN"]}
    with pytest.raises(ConfigError, match=message):
        build_model({"backbone": BACKBONE, "head": part, **options}, class_table())


# --- pictures given to a model ---------------------------------------------------------------------------------


def test_pictures_of_any_mode_and_orientation() -> None:
    model = network("panoptic_fcn.PanopticFCN", class_table(), inference={"instance_threshold": 0, "min_score": 0,
                                                                          "stuff_area": 1})  # fmt: skip
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].images[0]))
    grey = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    high = Image.fromarray((grey >> 8).astype(np.uint8))
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(file, "PNG", exif=exif)
    turned = Image.open(file)
    for picture, expected in [
        (Image.fromarray(grey), high.convert("RGB")),
        (high, high.convert("RGB")),
        (turned, colour.transpose(Image.Transpose.ROTATE_270)),
        (upright_rgb(turned), colour.transpose(Image.Transpose.ROTATE_270)),
        (colour.convert("RGBA"), colour),
    ]:
        (prediction,) = model.predict(picture)
        assert prediction.id_map.shape == expected.size[::-1]
        assert torch.equal(seen[-1].permute(1, 2, 0), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (Image.fromarray(np.ones((8, 8), np.float32)), DataError, "floating-point"),
        (np.ones((8, 8, 3), np.uint16), ValueError, "uint8 RGB"),
        (np.ones((8, 8), np.uint8), ValueError, "uint8 RGB"),
        (np.ones((0, 8, 3), np.uint8), ValueError, "uint8 RGB"),
        (torch.ones(3, 8, 8), ValueError, "uint8 RGB"),
        (torch.ones(8, 8), ValueError, "uint8 RGB"),
        (torch.ones(8, 8, 3, dtype=torch.uint8), ValueError, "uint8 RGB"),
    ],
)
def test_pictures_that_are_refused(picture: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        network("panoptic_fcn.PanopticFCN", class_table()).predict(picture)
