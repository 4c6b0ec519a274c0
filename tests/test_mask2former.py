from __future__ import annotations

from typing import Any

import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import class_table, random_target, target_from_map
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.functional.masks import sample_masks
from panoptic_ibs.functional.matching import hungarian, pairwise_bce, pairwise_dice
from panoptic_ibs.functional.points import sample_points, sample_rows
from panoptic_ibs.heads.mask2former import Mask2Former, Mask2FormerOutput, inference
from panoptic_ibs.heads.mask2former.inference import confident, instances, panoptic, semantic
from panoptic_ibs.heads.mask2former.network import attention_mask
from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.importing.mask2former import TRANSFORMERS
from panoptic_ibs.importing.renaming import rename
from panoptic_ibs.structures import FeatureLevel, ImageSize
from panoptic_ibs.weighing import Fixed

LEVELS = [FeatureLevel(4, 256), FeatureLevel(8, 512), FeatureLevel(16, 1024), FeatureLevel(32, 2048)]
SMALL = [FeatureLevel(4, 8), FeatureLevel(8, 8), FeatureLevel(16, 16), FeatureLevel(32, 16)]


def small_head(**options) -> Mask2Former:
    torch.manual_seed(0)
    narrow = {"queries": 12, "channels": 64, "encoder_hidden": 32, "encoder_depth": 1, "decoder_hidden": 32}
    return Mask2Former(class_table(), SMALL, **{**narrow, "decoder_depth": 3, "loss": {"points": 64}, **options})


def small_features(batch: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, lv.channels, 64 // lv.stride, 128 // lv.stride) for lv in SMALL]


# --- transformers as oracle ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install panoptic-ibs[dev]")
    torch.manual_seed(0)
    classes = class_table()
    backbone = transformers.ResNetConfig(
        embedding_size=32, out_features=["stage1", "stage2", "stage3", "stage4"], depths=[1, 1, 1, 1]
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_queries=20, num_labels=len(classes), train_num_points=200,
        use_auxiliary_loss=True, output_auxiliary_logits=True, encoder_layers=2, decoder_layers=10,
    )  # fmt: skip
    theirs = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    for name, p in theirs.named_parameters():  # zero-initialised parts would hide differences
        if "backbone" not in name and "encoder.encoder" not in name:
            torch.nn.init.normal_(p, std=0.1) if p.ndim > 1 else torch.nn.init.normal_(p, std=0.05)
    ours = Mask2Former(classes, LEVELS, queries=20, encoder_depth=2, loss={"points": 200}).eval()
    ours.load_state_dict(rename(theirs.state_dict(), TRANSFORMERS)[0])
    return theirs, ours, classes


def test_network_equals_transformers(oracle) -> None:
    theirs, ours, _ = oracle
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True)
        features = theirs.model.pixel_level_module.encoder(images).feature_maps
        output = ours(list(features))
    assert len(output.logits) == 10
    layers = [*expected.auxiliary_logits, {"class_queries_logits": expected.class_queries_logits,
                                           "masks_queries_logits": expected.masks_queries_logits}]  # fmt: skip
    for i, layer in enumerate(layers):
        masks = torch.einsum("bqc,bchw->bqhw", output.embeddings[i], output.features)
        for mine, reference in (
            (output.logits[i], layer["class_queries_logits"]),
            (masks, layer["masks_queries_logits"]),
        ):
            error = (mine - reference).norm() / reference.norm()
            assert error < 1e-4, f"prediction {i}: relative error {error:.2e}"


def test_losses_equal_transformers(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the points fixed. transformers samples labels bilinearly from full-size masks, as the published program."""
    theirs, ours, classes = oracle
    targets = [random_target(classes, (64, 96), segments=n, seed=n + 3) for n in (5, 2)]
    images = torch.randn(2, 3, 64, 96)
    fixed = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(5))
    import transformers.models.mask2former.modeling_mask2former as reference

    monkeypatch.setattr(reference.torch, "rand", lambda *shape, **_: fixed.expand(shape[0], -1, -1))
    monkeypatch.setattr(
        theirs.criterion, "sample_points_using_uncertainty", lambda maps, *_: fixed.expand(maps.shape[0], -1, -1)
    )
    import panoptic_ibs.heads.mask2former.losses as own

    monkeypatch.setattr(own, "MASKS", 8)  # several parts
    monkeypatch.setattr(own, "uncertain_points", lambda maps, *_: fixed.expand(len(maps), -1, -1))
    visible = [(t.areas > 1).nonzero().squeeze(1) for t in targets]
    masks = [torch.stack([(t.id_map == r + 1).float() for r in v]) for t, v in zip(targets, visible, strict=True)]
    labels = [t.class_ids[v] for t, v in zip(targets, visible, strict=True)]
    with torch.no_grad():
        expected = theirs(images, mask_labels=masks, class_labels=labels).loss
        features = theirs.model.pixel_level_module.encoder(images).feature_maps
        losses, segments = ours.losses(ours(list(features)), targets)
    assert len(segments) == 9
    weighted = Fixed()(losses, ours.weights)
    torch.testing.assert_close(sum(weighted.values()), expected.squeeze(), rtol=1e-4, atol=1e-4)


# --- parts ---------------------------------------------------------------------------------------------------------


def test_masks_at_points_equal_grid_sample() -> None:
    target = random_target(class_table(), (64, 96), segments=6, seed=2)
    rows, points = torch.tensor([0, 2, 5]), torch.rand(3, 300, 2) * 1.1 - 0.05
    full = torch.stack([(target.id_map == r + 1).float() for r in rows])
    torch.testing.assert_close(
        sample_masks(target.id_map, rows, points), sample_points(full, points), atol=1e-4, rtol=0
    )
    shared = sample_masks(target.id_map, rows, points[0])
    torch.testing.assert_close(shared, sample_points(full, points[:1].expand(3, -1, -1)), atol=1e-4, rtol=0)


def test_rows_at_points_equal_grid_sample() -> None:
    maps, points = torch.randn(5, 7, 11), torch.rand(200, 2) * 1.2 - 0.1
    sampled = sample_rows(maps.flatten(1).T.contiguous(), (7, 11), points)
    torch.testing.assert_close(sampled.T, sample_points(maps, points.expand(5, -1, -1)))


def test_pairwise_costs_against_loops() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(4, 30), (torch.rand(3, 30) > 0.6).float()
    for s in range(4):
        for n in range(3):
            bce = F.binary_cross_entropy_with_logits(logits[s], masks[n])
            p = logits[s].sigmoid()
            dice = 1 - (2 * (p * masks[n]).sum() + 1) / (p.sum() + masks[n].sum() + 1)
            torch.testing.assert_close(pairwise_bce(logits, masks)[s, n], bce)
            torch.testing.assert_close(pairwise_dice(logits, masks)[s, n], dice)


def test_matching() -> None:
    cost = torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])
    ((rows, columns),) = hungarian([cost])
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0), (2, 2)]
    more_segments = hungarian([torch.tensor([[3.0, 1.0, 2.0]]), torch.zeros(4, 0)])
    assert [p[1].tolist() for p in more_segments] == [[1], []]
    with pytest.raises(FloatingPointError, match="street_7"):
        hungarian([cost, torch.tensor([[float("nan")]])], ["street_6", "street_7"])


def test_attention_mask_resizes_features_instead_of_masks() -> None:
    torch.manual_seed(0)
    embeddings, features = torch.randn(2, 5, 8), torch.randn(2, 8, 16, 24)
    embeddings[1, 3] = 0
    features[0] = features[0].abs()
    embeddings[0, 2] = -1  # nothing inside: may look everywhere
    small = F.interpolate(features, size=(4, 6), mode="bilinear", align_corners=False)
    allowed = attention_mask(embeddings, small.flatten(2))[:, 0]
    masks = torch.einsum("bqc,bchw->bqhw", embeddings, features)
    blocked = F.interpolate(masks, size=(4, 6), mode="bilinear", align_corners=False).sigmoid().flatten(2) < 0.5
    blocked[blocked.all(-1)] = False
    assert torch.equal(allowed, ~blocked)
    assert allowed[0, 2].all()


def naive_panoptic(logits, masks, is_thing, size, score_threshold=0.8, overlap=0.8):
    """The published post-processing, one query after the other at full resolution."""
    full = F.interpolate(masks[None], scale_factor=4, mode="bilinear", align_corners=False)
    full = full[..., : size.valid[0], : size.valid[1]]
    if size.valid != size.original:
        full = F.interpolate(full, size=size.original, mode="bilinear", align_corners=False)
    scores, labels = logits.softmax(-1).max(-1)
    probabilities = full[0].sigmoid()
    keep = (labels != logits.shape[-1] - 1) & (scores > score_threshold)
    scores, labels, probabilities = scores[keep], labels[keep], probabilities[keep]
    id_map, segments, stuff = torch.zeros(size.original, dtype=torch.int32), [], {}
    if not len(scores):
        return id_map, segments
    winner = (scores[:, None, None] * probabilities).argmax(0)
    for k in range(len(scores)):
        c = int(labels[k])
        area, original = int((winner == k).sum()), int((probabilities[k] >= 0.5).sum())
        mask = (winner == k) & (probabilities[k] >= 0.5)
        if not area or not original or not mask.sum() or area / original < overlap:
            continue
        if not is_thing[c]:
            if c in stuff:
                id_map[mask] = stuff[c]
                continue
            stuff[c] = len(segments) + 1
        segments.append(c)
        id_map[mask] = len(segments)
    return id_map, segments


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("seed", range(6))
def test_post_processing_is_bit_equal_to_the_published_one(
    seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "STRIPE", 4 + 4 * seed)
    g = torch.Generator().manual_seed(seed)
    masks = F.interpolate(torch.randn(30, 1, 4, 5, generator=g) * 6, size=(16, 24), mode="bicubic")[:, 0]
    logits = torch.randn(30, 6, generator=g) * 4
    is_thing = torch.tensor([False, False, True, True, True])
    size = ImageSize((60, 90), (60, 90)) if seed % 2 else ImageSize((60, 90), (75, 113))
    for threshold, overlap in ((0.6, 0.8), (0.0, 0.02)):
        keep, label, score = confident(logits, threshold)
        id_map, classes, _ = panoptic(masks[keep], score, label, is_thing[label], size, overlap, chunk)
        expected, segments = naive_panoptic(logits, masks, is_thing, size, threshold, overlap)
        assert torch.equal(id_map, expected)
        assert classes.tolist() == segments
    assert len(segments) >= 3
    keep, label, score = confident(logits + 100 * F.one_hot(torch.tensor(5), 6), 0.0)
    assert not keep.any()
    assert panoptic(masks[keep], score, label, is_thing[label], size)[0].sum() == 0


def test_semantic_and_instances_by_hand() -> None:
    logits = torch.full((2, 4), -20.0)
    logits[0, 2], logits[1, 0] = 20.0, 20.0
    masks = torch.full((2, 4, 4), -20.0)
    masks[0, :2], masks[1, 2:] = 20.0, 20.0
    size = ImageSize((16, 16), (16, 16))
    scores = semantic(logits, masks, size)
    assert scores.shape == (3, 16, 16)
    assert scores[:, 1].argmax(0).unique().tolist() == [2]
    assert scores[:, 14].argmax(0).unique().tolist() == [0]
    found = instances(logits, masks, torch.tensor([False, True, True]), size, top=2)
    best = int(found.scores.argmax())
    assert found.class_ids[best] == 2
    assert found.scores[best] > 0.9
    assert coco_mask.area(found.rles[best]) == pytest.approx(128, abs=16)


# --- the whole head ------------------------------------------------------------------------------------------------


def test_head_end_to_end_with_ibs() -> None:
    head = small_head()
    targets = [random_target(head.classes, segments=n, seed=n, image_index=n) for n in (6, 2)]
    output = head(small_features())
    losses, segments = head.losses(output, targets)
    assert set(losses) == {"class", "mask", "dice"}
    assert [s.name for s in segments] == ["layer 1", "layer 2", "layer 3"]
    loss = sum(losses.values()) + IntraBatchSupervision(weight=50)(segments, targets=targets)
    loss.backward()
    assert [n for n, p in head.named_parameters() if p.grad is None] == []
    for prediction in head.eval().predict(output, [ImageSize((64, 128), (64, 128))] * 2):
        assert prediction.id_map.shape == (64, 128)


def test_first_class_may_be_a_thing() -> None:
    from panoptic_ibs.classes import ClassTable

    classes = ClassTable(class_table().classes[::-1])  # things first, as on COCO
    assert classes.is_thing[0]
    head = small_head()
    head.classes = classes
    id_map = torch.ones(64, 128)
    id_map[:, :64] = 2
    target = target_from_map(id_map, [4, 0], classes)
    _, segments = head.losses(head(small_features(1)), [target])
    for s in segments:
        assert s.is_thing.sum() == 1
        assert target.class_ids[s.segment_index[s.is_thing]].tolist() == [0]


def test_crop_fix() -> None:
    id_map = torch.ones(64, 128)
    id_map[3, 3] = 2  # one pixel left of row 1, nothing of row 2
    target = target_from_map(id_map, [0, 3, 3], class_table())
    for fix, expected in ((True, 1), (False, 3)):
        head = small_head(crop_fix=fix)
        _, segments = head.losses(head(small_features(1)), [target])
        assert len(segments[0].image_index) == expected


def test_no_targets_and_more_targets_than_queries() -> None:
    head = small_head(queries=4)
    void = target_from_map(torch.zeros(64, 128), [], head.classes)
    many = random_target(head.classes, segments=9, seed=1)
    for targets in ([void, void], [void, many]):
        losses, segments = head.losses(head(small_features()), targets)
        head.zero_grad()
        total = sum(losses.values()) + IntraBatchSupervision()(segments)
        total.backward()
        assert torch.isfinite(total)
        assert [n for n, p in head.named_parameters() if p.grad is None] == []
        assert all(len(s.image_index) <= 4 for s in segments)


def test_diverged_outputs_name_the_image() -> None:
    head = small_head()
    output = head(small_features())
    broken = Mask2FormerOutput(output.logits, [e * float("nan") for e in output.embeddings], output.features)
    targets = [random_target(head.classes, seed=i, image_index=i) for i in range(2)]
    with pytest.raises(FloatingPointError, match="image0, image1"):
        head.losses(broken, targets)


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="no option focal"):
        small_head(loss={"focal": 1})
    with pytest.raises(ConfigError, match="stride-4"):
        Mask2Former(class_table(), LEVELS[1:])


def naive_instances(logits: Tensor, masks: Tensor, is_thing: Tensor, size: ImageSize, top: int):
    """The published instance inference with all masks at full resolution: (score, class, mask), best first."""
    full = F.interpolate(masks[None], scale_factor=4, mode="bilinear", align_corners=False)
    full = full[..., : size.valid[0], : size.valid[1]]
    full = F.interpolate(full, size=size.original, mode="bilinear", align_corners=False)[0]
    pairs = sorted(
        ((float(p), q, c) for q, row in enumerate(logits.softmax(-1)[:, :-1]) for c, p in enumerate(row)), reverse=True
    )
    result = []
    for p, q, c in pairs[:top]:
        if is_thing[c]:
            mask = full[q] > 0
            quality = (full[q].sigmoid() * mask).sum() / (mask.sum() + 1e-6)
            result.append((p * float(quality), c, mask))
    return sorted(result, key=lambda r: -r[0])


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_instances_against_a_naive_copy(chunk: int) -> None:
    g = torch.Generator().manual_seed(chunk)
    masks = F.interpolate(torch.randn(9, 1, 4, 5, generator=g) * 6, size=(16, 24), mode="bicubic")[:, 0]
    logits, is_thing = torch.randn(9, 6, generator=g) * 3, torch.tensor([False, False, True, True, True])
    size = ImageSize((60, 90), (75, 113))
    found = instances(logits, masks, is_thing, size, top=20, chunk=chunk)
    expected = naive_instances(logits, masks, is_thing, size, top=20)
    assert len(found) == len(expected) > 5
    order = found.scores.argsort(descending=True).tolist()
    for k, (score, label, mask) in zip(order, expected, strict=True):
        assert found.scores[k] == pytest.approx(score, abs=1e-5)
        assert found.class_ids[k] == label
        assert torch.equal(torch.from_numpy(coco_mask.decode(found.rles[k])).bool(), mask)


def test_instance_task_knows_things_only() -> None:
    head = small_head(task="instance")
    things = torch.tensor(head.classes.thing_ids)
    assert head.query_decoder.classify.out_features == len(things) + 1
    targets = [random_target(head.classes, segments=n, seed=n, image_index=n) for n in (8, 3)]
    assert any((~t.is_thing).any() for t in targets)
    output = head(small_features())
    losses, segments = head.losses(output, targets)
    assert all(torch.isfinite(v) for v in losses.values())
    for s in segments:
        assert s.is_thing.all()
        for i, target in enumerate(targets):
            assert target.is_thing[s.segment_index[s.image_index == i]].all()
    for prediction in head.eval().predict(output, [ImageSize((64, 128), (60, 120))] * 2):
        assert prediction.instances is not None
        assert set(prediction.instances.class_ids.tolist()) <= set(things.tolist())
        assert set(prediction.class_ids.tolist()) <= set(things.tolist())
        assert all(r["size"] == [60, 120] for r in prediction.instances.rles)
    semantic_map = head.predict_semantic(output, [ImageSize((64, 128), (60, 120))] * 2)[0]
    assert semantic_map.shape == (60, 120)
    assert set(semantic_map.unique().tolist()) <= set(things.tolist())
    with pytest.raises(ConfigError, match="'panoptic' or 'instance'"):
        small_head(task="semantic")


@pytest.mark.parametrize("training", [True, False])
def test_the_network_compiles_as_one_graph(training: bool) -> None:
    """No graph break and no operator that torch.compile cannot trace; the eager backend needs no compiler."""
    head = small_head().train(training)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    features = small_features()
    with torch.set_grad_enabled(training):
        mine, plain = compiled(features), head(features)
    torch.testing.assert_close(mine.logits[-1], plain.logits[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.features, plain.features, atol=1e-4, rtol=1e-4)


def test_half_precision_stays_near() -> None:
    """Under autocast the pixel decoder is the same to the last bit, and losses are float32."""
    head = small_head().eval()
    features = small_features()
    plain = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(features)
        losses, _ = head.losses(mixed, [random_target(head.classes, segments=4, seed=s) for s in (1, 2)])
    assert torch.equal(mixed.features, plain.features)
    assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())
    torch.testing.assert_close(mixed.embeddings[0].float(), plain.embeddings[0], atol=0.05, rtol=0.05)


class Largest(TorchDispatchMode):
    """Remembers the most elements that a tensor of floating-point numbers had."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else (result,):
            if isinstance(found, Tensor) and found.is_floating_point():
                self.elements = max(self.elements, found.numel())
        return result


@pytest.mark.parametrize("size", [ImageSize((512, 64), (512, 64)), ImageSize((512, 64), (700, 90))])
def test_no_result_makes_a_tensor_of_queries_times_full_resolution(size: ImageSize) -> None:
    queries, classes = 40, 3
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(queries, 128, 16, generator=generator)
    logits = torch.randn(queries, classes + 1, generator=generator)
    height, width = size.original
    things = torch.tensor([True, True, False])
    keep, label, score = confident(torch.cat([logits[:, :3] + 9, logits[:, 3:]], 1), 0.0)
    assert keep.all()
    jobs = {
        "panoptic": lambda: panoptic(masks, score, label, things[label], size),
        "instances": lambda: instances(logits, masks, things, size, top=120),
        "semantic": lambda: semantic(logits, masks, size),
    }
    for name, job in jobs.items():
        with Largest() as largest:
            job()
        assert largest.elements <= 8 * height * width, name  # of 40
    probabilities = logits.softmax(-1)[:, :-1]
    whole = F.interpolate(masks[None], scale_factor=4, mode="bilinear", align_corners=False)[0].sigmoid()
    expected = torch.einsum("qc,qhw->chw", probabilities, whole)[None]
    if size.valid != size.original:
        expected = F.interpolate(expected, size=size.original, mode="bilinear", align_corners=False)
    torch.testing.assert_close(semantic(logits, masks, size), expected[0], rtol=0, atol=1e-5)
