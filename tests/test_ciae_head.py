"""CIAE's inference against loops over pixels, and the head as a whole."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import class_table, random_batch, random_target, target_from_map
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.heads.ciae import CIAE
from panoptic_ibs.heads.ciae.inference import Queries, first_of_duplicates, fuse, oracle_queries
from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.segments import SoftSegments
from panoptic_ibs.structures import FeatureLevel, ImageSize
from test_ciae_detection import RANGES, make_output, plant, planted

LEVELS = [FeatureLevel(4, 8), FeatureLevel(8, 8), FeatureLevel(16, 16), FeatureLevel(32, 16)]


def make_head(**options) -> CIAE:
    torch.manual_seed(0)
    values = {"dimension": 6, "channels": 16, "embedding_channels": 16, "depth": 1, "level_ranges": RANGES, **options}
    return CIAE(class_table(), LEVELS, **values)


def make_features(size: tuple[int, int] = (64, 96), count: int = 2, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, c, size[0] // s, size[1] // s, generator=g) for s, c in LEVELS]


# --- inference ---------------------------------------------------------------------------------------------------


def naive_fuse(
    maps: Tensor, things: Queries, memory: Tensor, stuff: list[int], size: ImageSize, area: int
) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Eq. 1, 16 and Section IV-C pixel by pixel: pixels of each (class, number of the instance or -1)."""
    full = F.interpolate(maps[None], scale_factor=4, mode="bilinear")[..., : size.valid[0], : size.valid[1]]
    if size.original != size.valid:
        full = F.interpolate(full, size=size.original, mode="bilinear")
    full = F.normalize(full[0], dim=0)
    segments: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for y in range(size.original[0]):
        for x in range(size.original[1]):
            scores = []
            for n, (query, box) in enumerate(zip(things.embeddings, things.boxes.tolist(), strict=True)):
                if box[0] <= x + 0.5 <= box[2] and box[1] <= y + 0.5 <= box[3]:
                    scores.append((float(query @ full[:, y, x]), (int(things.class_ids[n]), n)))
            scores += [(float(q @ full[:, y, x]), (c, -1)) for q, c in zip(memory, stuff, strict=True)]
            segments.setdefault(max(scores)[1], set()).add((y, x))
    return {k: v for k, v in segments.items() if k[1] >= 0 or len(v) >= area}


@pytest.mark.parametrize("size", [ImageSize((16, 24), (16, 24)), ImageSize((14, 21), (20, 30))])
def test_fusing_against_pixel_loops(size: ImageSize) -> None:
    g = torch.Generator().manual_seed(3)
    maps = torch.randn(5, 4, 6, generator=g, dtype=torch.float64)
    embeddings = F.normalize(torch.randn(9, 5, generator=g, dtype=torch.float64), dim=1)
    corner = torch.rand(9, 2, generator=g) * 10
    boxes = torch.cat([corner, corner + 3 + torch.rand(9, 2, generator=g) * 12], dim=1)
    things = Queries(embeddings, boxes, torch.arange(9) % 3 + 2, torch.rand(9, generator=g))
    memory = F.normalize(torch.randn(2, 5, generator=g, dtype=torch.float64), dim=1)
    whole = naive_fuse(maps, things, memory, [0, 1], size, 1)
    area = min(len(v) for k, v in whole.items() if k[1] < 0) + 1  # drops one of the two stuff segments
    expected = {k: v for k, v in whole.items() if k[1] >= 0 or len(v) >= area}
    assert len(expected) == len(whole) - 1
    soft = SoftSegments(
        masks=(torch.cat([embeddings, memory]) @ maps.flatten(1)).unflatten(1, maps.shape[-2:]),
        class_ids=torch.cat([things.class_ids, torch.tensor([0, 1])]),
        is_thing=torch.arange(11) < 9,
        scores=torch.cat([things.scores, torch.ones(2)]),
        size=size,
        kind="similarity",
        boxes=boxes,
    )
    id_map, classes, scores = fuse(soft, area)
    found = {}
    for k, c in enumerate(classes.tolist(), start=1):
        pixels = {tuple(p) for p in (id_map == k).nonzero().tolist()}
        numbers = [n for (cls, n), v in expected.items() if v == pixels and cls == c]
        assert len(numbers) == 1
        found[(c, numbers[0])] = pixels
        assert scores[k - 1] == (1.0 if numbers[0] < 0 else things.scores[numbers[0]])
    assert found == expected
    assert id_map.dtype == torch.int32


def test_no_proposals_leave_stuff_alone() -> None:
    head = make_head(inference={"stuff_area": 1, "score_threshold": 0.99}).eval()
    size = ImageSize((64, 96), (64, 96))
    predictions = head.predict(head(make_features()), [size, size])
    for p in predictions:
        assert set(p.class_ids.tolist()) <= {0, 1}
        assert (p.id_map > 0).all()
    none = make_head(inference={"stuff_area": 10**6, "score_threshold": 0.99}).eval()
    assert len(none.predict(none(make_features()), [size, size])[0]) == 0


def test_queries_are_the_pixels_that_proposals_come_from() -> None:
    head = make_head().eval()
    output = planted()
    plant(output, 0, 2, 3, 1, 4.0, [10, 8, 12, 9])
    size = ImageSize((64, 96), (128, 192))
    queries = head.queries(output.embeddings[0], head.proposals(output, 0, size), size)
    full = F.interpolate(output.embeddings[:1], scale_factor=4, mode="bilinear")[0]
    torch.testing.assert_close(queries.embeddings, F.normalize(full[:, 20, 28], dim=0)[None])
    assert queries.boxes.tolist() == [[36.0, 24.0, 80.0, 58.0]]  # in pixels of the original
    assert queries.class_ids.tolist() == [3]  # channel 1 is the second thing class


def test_duplicates_by_hand() -> None:
    """The second repeats the first; the third is as similar but outside its box; the fourth is inside but another."""
    embeddings = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 4, 30, 30], [50, 50, 60, 60], [0, 0, 9, 9]])
    points = torch.tensor([[5, 5], [6, 6], [55, 55], [4, 4]])
    assert first_of_duplicates(embeddings, boxes, points, 0.9).tolist() == [0, 2, 3]
    assert first_of_duplicates(embeddings, boxes, points, 0.999).tolist() == [0, 1, 2, 3]
    assert first_of_duplicates(embeddings[:0], boxes[:0], points[:0], 0.9).tolist() == []
    output = planted()
    plant(output, 0, 2, 3, 1, 4.0, [10, 8, 12, 9])
    plant(output, 0, 2, 4, 1, 3.0, [2, 2, 30, 30])  # inside the first one's box, little overlap
    output.embeddings[0] = torch.ones(6, 16, 24)
    size = ImageSize((64, 96), (64, 96))
    for limit, left in ((None, 2), (0.95, 1)):
        head = make_head(inference={"duplicates": limit}).eval()
        assert len(head.queries(output.embeddings[0], head.proposals(output, 0, size), size).scores) == left


def test_category_from_the_embedding() -> None:
    """Table IV, 'E': the thing memory most similar to the query; the detector may know one class only."""
    head = make_head(thing_categories="separate", detector_classes="merged", category_source="embedding").eval()
    output = planted()
    plant(output, 0, 2, 3, 0, 4.0, [10, 8, 12, 9])
    for c in range(3):
        output.embeddings[0] = head.memory.directions[c][:, None, None] * 2
        size = ImageSize((64, 96), (64, 96))
        queries = head.queries(output.embeddings[0], head.proposals(output, 0, size), size)
        assert queries.class_ids.tolist() == [2 + c]


def test_oracle_mode() -> None:
    """Embeddings that follow the truth give it back, at another size than the input's too."""
    head = make_head(inference={"oracle": True, "stuff_area": 1}).eval()
    id_map = torch.ones(64, 96, dtype=torch.int32)
    id_map[32:] = 2
    id_map[8:24, 8:24], id_map[40:56, 48:80] = 3, 4
    target = target_from_map(id_map, [0, 1, 4, 2], class_table())
    code = F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(5)), dim=1)
    code[:2] = head.memory.directions[1:]
    output = make_output()
    output.embeddings[0] = code[id_map[::4, ::4].long() - 1].permute(2, 0, 1)
    (prediction,) = head.predict(output, [ImageSize((64, 96), (64, 96))], [target])
    assert prediction.class_ids.tolist() == [4, 2, 0, 1]
    truth = torch.tensor([0, 3, 4, 1, 2])[id_map.long()]
    assert ((prediction.id_map == truth).float().mean()) > 0.9
    bigger = target_from_map(id_map.repeat_interleave(2, 0).repeat_interleave(2, 1), [0, 1, 4, 2], class_table())
    (large,) = head.predict(output, [ImageSize((64, 96), (128, 192))], [bigger])
    assert large.id_map.shape == (128, 192)
    assert large.class_ids.tolist() == [4, 2, 0, 1]
    with pytest.raises(ConfigError, match="ground truth"):
        head.predict(output, [ImageSize((64, 96), (64, 96))])


def test_oracle_queries_are_means_and_leave_out_what_has_no_pixel() -> None:
    maps = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0))
    id_map = torch.zeros(32, 32, dtype=torch.int32)
    id_map[:16, :16], id_map[16:, 16:] = 1, 2
    id_map[30, 0] = 3  # lost when the map is brought to 16 x 16
    target = target_from_map(id_map, [2, 3, 4], class_table())
    found = oracle_queries(maps, target, ImageSize((16, 16), (32, 32)))
    full = F.interpolate(maps[None], scale_factor=4, mode="bilinear")[0]
    means = torch.stack([full[:, :8, :8].flatten(1).sum(1), full[:, 8:, 8:].flatten(1).sum(1)])
    torch.testing.assert_close(found.embeddings, F.normalize(means, dim=1))
    assert found.class_ids.tolist() == [2, 3]
    torch.testing.assert_close(found.boxes, target.boxes[:2])


# --- the head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coord_conv": False, "box_embedding": False, "finest_channels": 8},
        {"thing_categories": "separate", "loss": {"box_filter": None, "other_crops": True}},
        {"consistent_stuff": False},
    ],
)
@pytest.mark.parametrize("things", [6, 0])
def test_training_reaches_every_parameter(options: dict, things: int) -> None:
    """Also without any instance: DDP must find a gradient for everything."""
    head = make_head(**options).train()
    batch = random_batch(class_table(), (64, 96), segments=things)
    losses, segments = head.losses(head(make_features()), batch.targets)
    expected = {"class", "centerness", "box", "embedding"} | ({"semantic"} if head.embedding_branch.semantic else set())
    assert set(losses) == expected
    total = torch.stack(list(losses.values())).sum() + IntraBatchSupervision()(segments, targets=batch.targets)
    total.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    if things:
        assert losses["box"] > 0
        assert head.embedding_branch.out.weight.grad.abs().sum() > 0
    assert len(segments[0].embeddings) == things * 2


def test_memory_moves_in_training_only_and_after_its_use() -> None:
    head = make_head(memory={"momentum": 0.5})
    batch = random_batch(class_table(), (64, 96))
    before = head.memory.directions.clone()
    output = head(make_features())
    evaluated, _ = head.eval().losses(output, batch.targets)
    assert torch.equal(head.memory.directions, before)
    trained, _ = head.train().losses(output, batch.targets)
    torch.testing.assert_close(trained["embedding"], evaluated["embedding"])
    assert not torch.equal(head.memory.directions, before)
    assert head.memory.iteration == 1
    twin = make_head()
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin.memory.directions, head.memory.directions)


def test_losses_are_in_float32_under_autocast() -> None:
    """The same outputs give the same losses and the same memory, whatever the precision around them."""
    batch = random_batch(class_table(), (64, 96))
    output = make_output()
    plain, mixed = make_head(memory={"momentum": 0.5}).train(), make_head(memory={"momentum": 0.5}).train()
    expected, segments = plain.losses(output, batch.targets)
    ibs = IntraBatchSupervision(partners="paired")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, other = mixed.losses(output, batch.targets)
        found["ibs"] = ibs(other, batch.pairs)
    expected["ibs"] = ibs(segments, batch.pairs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain.memory.directions, mixed.memory.directions)


def test_intra_batch_supervision_lowers_the_confusion() -> None:
    """Gradient steps on the intra-batch loss alone part the instances of a crop from the pixels of the other."""
    batch = random_batch(class_table(), (32, 32), segments=3)
    g = torch.Generator().manual_seed(0)
    maps = (torch.randn(2, 6, 8, 8, generator=g) * 0.3 + 1).requires_grad_()  # all alike: confused
    head = make_head()
    ibs = IntraBatchSupervision(partners="paired")
    optimizer = torch.optim.SGD([maps], 1.0)
    values = []
    for _ in range(20):
        output = make_output((32, 32))
        output.embeddings = maps
        _, segments = head.losses(output, batch.targets)
        loss = ibs(segments, batch.pairs)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]


def test_overfits_a_crop() -> None:
    """The embedding, trained alone on one crop, gives back its segments in oracle mode."""
    torch.manual_seed(0)
    target = random_target(class_table(), (48, 64), 4, seed=2)
    head = make_head(memory={"momentum": 0.99}, inference={"oracle": True, "stuff_area": 1})
    maps = torch.randn(1, 6, 12, 16).requires_grad_()
    optimizer = torch.optim.Adam([maps], 0.1)
    for _ in range(60):
        output = make_output((48, 64), count=1)
        output.embeddings = maps
        losses, _ = head.losses(output, [target])
        optimizer.zero_grad()
        losses["embedding"].backward()
        optimizer.step()
    (prediction,) = head.predict(output, [ImageSize((48, 64), (48, 64))], [target])
    predicted = torch.cat([torch.tensor([-1]), prediction.class_ids])[prediction.id_map.long()]
    truth = torch.cat([torch.tensor([-1]), target.class_ids])[target.id_map.long()]
    valid = truth >= 0
    assert (predicted == truth)[valid].float().mean() > 0.85


def test_classes_never_seen_are_named_once() -> None:
    head = make_head().eval()
    size = ImageSize((64, 96), (64, 96))
    output = head(make_features())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.predict(output, [size])  # untrained: nothing to say
    head = make_head().eval()
    head.memory.seen[:2] = True
    with pytest.warns(UserWarning, match="never saw stuff1 in training"):
        head.predict(output, [size])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.predict(output, [size])


def test_separate_stuff_is_the_semantic_branch() -> None:
    head = make_head(consistent_stuff=False, inference={"stuff_area": 1, "score_threshold": 0.0}).eval()
    output = head(make_features())
    assert output.semantic.shape == (2, 3, 16, 24)
    output.semantic.zero_()
    output.semantic[:, 2] = 1.0
    (p,) = head.predict(output, [ImageSize((64, 96), (64, 96))])
    assert p.class_ids.tolist() == [1]
    output.semantic[:, 0] = 2.0
    (p,) = head.predict(output, [ImageSize((64, 96), (64, 96))])
    assert set(p.class_ids.tolist()) <= {2, 3, 4}
    batch = random_batch(class_table(), (64, 96))
    loss = head.losses(output, batch.targets)[0]["semantic"]
    log_probability = output.semantic[0, :, 0, 0].log_softmax(0)
    wrong = total = 0.0
    for t in batch.targets:
        channel = torch.cat([torch.tensor([-1]), torch.where(t.is_thing, 0, t.class_ids + 1)])[t.id_map.long()]
        views = torch.stack([channel[y::4, x::4] for y in (1, 2) for x in (1, 2)])
        wrong -= log_probability[views[views >= 0]].sum().item()
        total += (views >= 0).sum().item()
    assert loss.item() == pytest.approx(wrong / total, rel=1e-5)


def test_coordinates_reach_p5() -> None:
    """With CoordConv a constant image gives a map that differs from side to side."""
    features = [torch.ones(1, c, 64 // s * 4, 96 // s * 4) for s, c in LEVELS]
    for on in (True, False):
        head = make_head(coord_conv=on, box_embedding=False).eval()
        middle = head(features).embeddings[0, :, 32, 40:56]
        assert (middle.std(dim=1).sum() > 1e-3) == on


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"loss": {"margin": 2.5}}, "margin"),
        ({"loss": {"margin": -1}}, "margin"),
        ({"loss": {"marge": 1}}, "marge"),
        ({"memory": {"momentum": 1.5}}, "momentum"),
        ({"memory": {"step": 1}}, "step"),
        ({"inference": {"score": 1}}, "score"),
        ({"dimension": 0}, "dimension"),
        ({"level_ranges": [[0, 1]]}, "level_ranges"),
        ({"thing_categories": "both"}, "thing_categories"),
        ({"category_source": "embedding"}, "thing_categories=separate"),
        ({"detector_classes": "merged"}, "detector_classes=separate"),
    ],
)
def test_bad_options(options: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make_head(**options)


def test_needs_things() -> None:
    with pytest.raises(ConfigError, match="thing class"):
        CIAE(class_table(things=0), LEVELS)
