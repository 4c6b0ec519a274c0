"""Samplers: geometry against brute force, determinism, sharding, resuming, and what cannot be drawn."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panoptic_files import edit, write_coco
from panoptic_ibs.data.geometry import ScaleJitter, ShortestSide, offset_around, random_offset
from panoptic_ibs.data.readers import PanopticReader, coco_panoptic
from panoptic_ibs.data.sampling import (
    EvaluationSampler,
    FullImageSampler,
    InstanceCropSampler,
    PairedCropSampler,
    RandomCropSampler,
    RequestSampler,
)
from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.functional.resizing import resized_size

RESIZE = ShortestSide(range=(30, 90), longest=120)
CROP = (24, 32)
PAIR = {"crop_size": CROP, "target_sizes": (4, 8, 16, 32), "shortest": (30, 150), "longest": 240, "resize": RESIZE}
SAMPLERS: dict[str, tuple[type[RequestSampler], dict[str, Any]]] = {
    "full": (FullImageSampler, {"resize": RESIZE}),
    "random": (RandomCropSampler, {"resize": RESIZE, "crop_size": CROP}),
    "instance": (InstanceCropSampler, {"resize": RESIZE, "crop_size": CROP}),
    "paired": (PairedCropSampler, PAIR),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PanopticReader:
    root = tmp_path_factory.mktemp("set")
    write_coco(root, count=7, things=7, seed=3)
    return coco_panoptic(root, "train2017", cache_dir=root.parent / "cache")


def make(name: str, reader: PanopticReader, **options: Any) -> RequestSampler:
    kind, settings = SAMPLERS[name]
    return kind(reader=reader, **{**settings, **options})


@pytest.mark.parametrize(
    ("image", "shortest", "longest", "expected"),
    [  # by hand, with detectron2's ResizeShortestEdge in mind: scale, cap, then int(x + 0.5)
        ((1024, 2048), 512, 4096, (512, 1024)),
        ((1024, 2048), 3096, 6192, (3096, 6192)),
        ((480, 640), 800, 1333, (800, 1067)),  # 1066.67 rounds up
        ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
        ((400, 1000), 800, 1333, (533, 1333)),  # 2000 capped by 0.6665: 533.2
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 300), 7, 100, (7, 7)),
        ((1, 1000), 1, 10, (1, 10)),  # never below one pixel
    ],
)
def test_resized_size(image: tuple[int, int], shortest: int, longest: int, expected: tuple[int, int]) -> None:
    assert resized_size(image, shortest, longest) == expected


def test_shortest_side_draws_all_values_and_no_other() -> None:
    rng = np.random.default_rng(0)
    drawn = {ShortestSide(range=(5, 8)).draw(rng, 10, 20)[0] for _ in range(200)}
    assert drawn == {5, 6, 7, 8}
    assert {ShortestSide(choices=[5, 9]).draw(rng, 10, 20) for _ in range(100)} == {(5, 10), (9, 18)}
    assert ShortestSide(choices=[5, 9]).fixed(10, 20) == (9, 18)
    assert ShortestSide(range=(5, 9), longest=10).fixed(10, 20) == (5, 10)
    for wrong in ({}, {"range": (1, 2), "choices": [1]}, {"range": (3, 2)}, {"choices": []}, {"choices": [0]}):
        with pytest.raises(ConfigError, match="ShortestSide"):
            ShortestSide(**wrong)


def test_offsets_are_exactly_the_allowed_ones() -> None:
    rng = np.random.default_rng(0)
    for full, part in ((10, 4), (5, 5), (3, 8), (9, 1)):
        drawn = {random_offset(rng, full, part) for _ in range(300)}
        assert drawn == set(range(max(full - part, 0) + 1))
        for center in (0.0, 0.5, 2.5, full / 2, full - 0.5):
            drawn = {offset_around(rng, full, part, center) for _ in range(300)}
            fits = [o for o in range(full) if o <= center < o + part and (o + part <= full or o == 0)]
            assert drawn == set(fits)


@pytest.mark.parametrize("name", SAMPLERS)
def test_requests_follow_from_seed_epoch_and_index(name: str, reader: PanopticReader) -> None:
    one, two = make(name, reader, seed=5), make(name, reader, seed=5, rank=1, world_size=4)
    wanted = [(e, i) for e in range(3) for i in range(9)]
    forward = {k: one.requests(*k) for k in wanted}
    backward = {k: two.requests(*k) for k in reversed(wanted)}
    assert forward == backward
    assert forward != {k: make(name, reader, seed=6).requests(*k) for k in wanted}
    seeds = [r.seed for items in forward.values() for r in items]
    assert len(set(seeds)) == len(seeds)
    assert forward[0, 0] != forward[1, 0]
    flips = [r.flip for i in range(100) for r in one.requests(0, i)]
    assert 0.3 < np.mean(flips) < 0.7
    assert not any(r.flip for i in range(20) for r in make(name, reader, flip_probability=0.0).requests(0, i))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("world_size", "items_per_batch"), [(1, 1), (2, 2), (3, 4)])
def test_ranks_share_an_epoch(name: str, world_size: int, items_per_batch: int, reader: PanopticReader) -> None:
    ranks = [make(name, reader, rank=r, world_size=world_size) for r in range(world_size)]
    for sampler in ranks:
        sampler.items_per_batch = items_per_batch
        sampler.set_epoch(2)
    shards = [list(sampler) for sampler in ranks]
    assert {len(s) for s in shards} == {len(ranks[0])}
    assert len(ranks[0]) % items_per_batch == 0
    joined = [item for step in zip(*shards, strict=True) for item in step]
    assert joined == [ranks[0].requests(2, i) for i in range(len(joined))]
    assert 0 <= len(joined) - ranks[0].epoch_length < world_size * items_per_batch


def test_resuming_continues_the_epoch_also_on_other_ranks(reader: PanopticReader) -> None:
    whole = make("paired", reader, epoch_length=12)
    whole.set_epoch(3)
    expected = list(whole)
    resumed = [make("paired", reader, epoch_length=12, rank=r, world_size=2) for r in range(2)]
    for sampler in resumed:
        sampler.resume(3, 4)
    shards = [list(sampler) for sampler in resumed]
    assert [item for step in zip(*shards, strict=True) for item in step] == expected[4:]
    for sampler in resumed:
        sampler.set_epoch(3)  # Lightning says it again
        assert len(list(sampler)) == 4
        sampler.set_epoch(4)
        assert len(list(sampler)) == len(sampler) == 6


@pytest.mark.parametrize("name", ["full", "random", "instance"])
def test_an_epoch_takes_each_image_once_and_cycles(name: str, reader: PanopticReader) -> None:
    sampler = make(name, reader, epoch_length=20)
    images = [item[0].image_index for item in sampler]
    assert sorted(images[:7]) == sorted(images[7:14]) == list(range(7))
    assert images[:7] != images[7:14]
    sampler.set_epoch(1)
    assert images != [item[0].image_index for item in sampler]


def test_full_images_are_whole(reader: PanopticReader) -> None:
    for item in make("full", reader):
        (request,) = item
        assert request.window == (0, 0, *request.resized)
        assert request.pair is None
        record = reader.records[request.image_index]
        allowed = {resized_size((record.height, record.width), s, 120) for s in range(30, 91)}
        assert request.resized in allowed


def holds_center(reader: PanopticReader, request: Any) -> bool:
    record = reader.records[request.image_index]
    row = record.segments.ids.tolist().index(request.segment_id)
    x, y, w, h = record.segments.boxes[row]
    cy, cx = (y + h / 2) * request.resized[0] / record.height, (x + w / 2) * request.resized[1] / record.width
    top, left, height, width = request.window
    return bool(top <= cy < top + height and left <= cx < left + width)


def on_image(request: Any) -> bool:
    """Padding only where the image is smaller than the crop."""
    return all(
        start >= 0 and (start + part <= full or start == 0)
        for start, part, full in zip(request.window[:2], request.window[2:], request.resized, strict=True)
    )


def test_random_crops_lie_on_the_image(reader: PanopticReader) -> None:
    requests = [r for i in range(200) for r in make("random", reader).requests(0, i)]
    assert all(on_image(r) and r.window[2:] == CROP for r in requests)
    assert len({r.window for r in requests}) > 100


def test_instance_crops_hold_the_centre_of_a_thing(reader: PanopticReader) -> None:
    sampler = make("instance", reader)
    seen = set()
    for i in range(300):
        (request,) = sampler.requests(0, i)
        record = reader.records[request.image_index]
        row = record.segments.ids.tolist().index(request.segment_id)
        assert reader.classes.is_thing[record.segments.class_ids[row]]
        assert not record.segments.iscrowd[row]
        assert holds_center(reader, request)
        assert on_image(request)
        seen.add((request.image_index, request.segment_id))
    things = np.array(reader.classes.is_thing)
    allowed = sum(int((things[r.segments.class_ids] & ~r.segments.iscrowd).sum()) for r in reader.records)
    assert len(seen) == allowed, "every thing must come up"


def test_instance_crop_of_an_image_without_things(tmp_path: Path) -> None:
    write_coco(tmp_path, things=0, count=2)
    reader = coco_panoptic(tmp_path, "train2017", cache_dir=tmp_path / "cache")
    (request,) = make("instance", reader).requests(0, 0)
    assert request.segment_id is None
    assert on_image(request)


@pytest.mark.parametrize("same_image", [True, False])
@pytest.mark.parametrize("scale_segments", [True, False])
def test_pairs_follow_the_recipe(reader: PanopticReader, same_image: bool, scale_segments: bool) -> None:
    sampler = make("paired", reader, same_image=same_image, scale_segments=scale_segments)
    assert isinstance(sampler, PairedCropSampler)
    sizes = Counter()
    for index in range(400):
        pair = sampler.requests(1, index)
        assert len(pair) == 2
        assert {r.pair for r in pair} == {index}
        options, classes = [], set()
        for r in pair:
            record = reader.records[r.image_index]
            row = record.segments.ids.tolist().index(r.segment_id)
            assert not record.segments.iscrowd[row]
            assert holds_center(reader, r)
            assert on_image(r)
            assert r.window[2:] == CROP
            class_id = int(record.segments.class_ids[row])
            classes.add(class_id)
            short = min(record.height, record.width)
            if scale_segments and reader.classes.is_thing[class_id]:
                w, h = map(float, record.segments.boxes[row, 2:])
                sides = {s: min(max(short * s / np.sqrt(w * h), 30), 150) for s in (4, 8, 16, 32)}
                fits = {s for s, side in sides.items() if shape(record, side, 240) == r.resized}
                assert fits
                options.append(fits)
            else:
                assert r.resized in {shape(record, s, 120) for s in range(30, 91)}
        assert len(classes) == 1, "both crops show one class"
        if options:
            common = options[0] & options[1]
            assert common, "one target size for the pair"
            sizes.update(common if len(common) == 1 else ())
        (class_id,) = classes
        if reader.index.count(class_id) > 1:
            assert (pair[0].image_index, pair[0].segment_id) != (pair[1].image_index, pair[1].segment_id)
        if not same_image and len(reader.index.images(class_id)) > 1:
            assert pair[0].image_index != pair[1].image_index
    assert not scale_segments or set(sizes) == {4, 8, 16, 32}


def shape(record: Any, side: float, longest: float) -> tuple[int, int]:
    """A naive resized_size."""
    scale = min(side / min(record.height, record.width), longest / max(record.height, record.width))
    return int(record.height * scale + 0.5 + 1e-9), int(record.width * scale + 0.5 + 1e-9)


def test_an_epoch_of_pairs_walks_over_the_classes(reader: PanopticReader) -> None:
    sampler = make("paired", reader, epoch_length=12)
    assert sampler.epoch_length == 12
    assert make("paired", reader).epoch_length == 4, "as many crops as images"

    def class_of(request: Any) -> int:
        s = reader.records[request.image_index].segments
        return int(s.class_ids[s.ids.tolist().index(request.segment_id)])

    classes = [class_of(item[0]) for item in sampler]
    for cycle in range(3):
        assert sorted(classes[4 * cycle : 4 * cycle + 4]) == [0, 1, 2, 3]
    assert len({tuple(class_of(sampler.requests(e, i)[0]) for i in range(4)) for e in range(20)}) > 5


def spoiled(tmp_path: Path, change: Any) -> PanopticReader:
    edit(write_coco(tmp_path, seed=3), change)
    return coco_panoptic(tmp_path, "train2017", cache_dir=tmp_path / "cache")


def crowds_only(*categories: int) -> Any:
    def change(content: dict[str, Any]) -> None:
        for a in content["annotations"]:
            for s in a["segments_info"]:
                if s["category_id"] in categories:
                    s["iscrowd"] = 1

    return change


def test_a_class_without_usable_segment_is_skipped_with_one_warning(tmp_path: Path) -> None:
    reader = spoiled(tmp_path, crowds_only(26))
    with pytest.warns(UserWarning, match=r"1 classes have no usable segment and are skipped: car\.") as caught:
        sampler = make("paired", reader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(sampler)
    assert len(caught) == 1
    assert isinstance(sampler, PairedCropSampler)
    assert sampler.class_ids == (0, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("paired", reader, rank=1, world_size=2)


def test_no_usable_segment_at_all_is_an_error(tmp_path: Path) -> None:
    reader = spoiled(tmp_path, crowds_only(7, 23, 24, 26))
    with pytest.raises(
        DataError, match=r"panoptic_train2017.json: no class has a usable segment.*sampling=random_crop"
    ):
        make("paired", reader)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("random", {"crop_size": (0, 4)}, "sampling.crop_size"),
        ("random", {"crop_size": (4,)}, "sampling.crop_size"),
        ("full", {"epoch_length": 0}, "sampling.epoch_length"),
        ("paired", {"shortest": (9, 3)}, "sampling.shortest"),
        ("paired", {"target_sizes": []}, "sampling.target_sizes"),
    ],
)
def test_wrong_settings_are_named(name: str, options: dict[str, Any], word: str, reader: PanopticReader) -> None:
    with pytest.raises(ConfigError, match=word):
        make(name, reader, **options)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_takes_every_position_once(world_size: int) -> None:
    ranks = [EvaluationSampler(7, rank, world_size) for rank in range(world_size)]
    taken = [p for sampler in ranks for p in sampler if p is not None]
    assert sorted(taken) == list(range(7))
    assert all(len(sampler) for sampler in ranks)  # a rank without an image has a batch that is empty
    assert [len(list(s)) for s in ranks] == [len(s) for s in ranks]


def test_scale_jitter_fits_a_square_of_random_size() -> None:
    rng = np.random.default_rng(0)
    sizes = [ScaleJitter(100, (0.5, 2.0)).draw(rng, 48, 64) for _ in range(300)]
    longest = np.array([max(s) for s in sizes])
    assert 50 <= longest.min() < 60
    assert 190 < longest.max() <= 200
    assert all(abs(h / w - 0.75) < 0.02 for h, w in sizes)
    with pytest.raises(ConfigError, match="ScaleJitter"):
        ScaleJitter(100, (2.0, 1.0))
