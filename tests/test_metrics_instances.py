"""Average precision against pycocotools on masks, id maps as run lengths, and two processes."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers import class_table, target_from_map
from panoptic_ibs.functional.rle import encode_id_map, encode_masks
from panoptic_ibs.metrics import BoundaryQuality, PanopticMetrics
from panoptic_ibs.metrics.instances import AP_KEYS, InstanceAP, instances_from_panoptic
from panoptic_ibs.segments import Instances, Prediction
from panoptic_ibs.structures import Target

CLASSES = class_table(things=3, stuff=2)  # contiguous ids: stuff 0, 1; things 2, 3, 4


def random_image(
    rng: np.random.Generator, index: int, crowded: float = 0.15, longest: int = 130
) -> tuple[Prediction, Target]:
    """Boxes over boxes; predictions are disturbed copies with tied scores, some of them of other classes."""
    h, w = (int(v) for v in rng.integers(8, longest, 2))
    n = int(rng.integers(0, 7))
    truth = np.zeros((h, w), np.int64)
    for k in range(1, n + 1):
        y, x = rng.integers(0, h), rng.integers(0, w)
        truth[y : y + rng.integers(1, h + 1), x : x + rng.integers(1, w + 1)] = k
    truth_classes = rng.choice(len(CLASSES), n)
    crowd = tuple(np.flatnonzero(rng.random(n) < crowded).tolist())
    target = target_from_map(torch.from_numpy(truth), truth_classes.tolist(), CLASSES, crowd, index)

    masks, classes, scores = [], [], []
    for _ in range(int(rng.integers(0, 9))):
        mask = np.zeros((h, w), bool)
        y, x = rng.integers(0, h), rng.integers(0, w)
        mask[y : y + rng.integers(1, h + 1), x : x + rng.integers(1, w + 1)] = True
        label = rng.choice(CLASSES.thing_ids)
        if n and rng.random() < 0.8:
            k = int(rng.integers(1, n + 1))
            mask = (truth == k) & (rng.random((h, w)) < rng.choice([0.6, 0.8, 0.95, 1.0]))
            if CLASSES[int(truth_classes[k - 1])].is_thing:
                label = truth_classes[k - 1]
        masks.append(mask)
        classes.append(int(label))
        scores.append(float(rng.integers(1, 8)) / 8)
    rles = encode_masks(torch.from_numpy(np.array(masks).reshape(len(masks), h, w)))
    instances = Instances(rles, torch.tensor(classes, dtype=torch.long), torch.tensor(scores))

    guess, order = np.zeros((h, w), np.int32), np.argsort(scores)
    for i in order:
        guess[masks[i]] = i + 1
    panoptic = Prediction(torch.from_numpy(guess), instances.class_ids, instances.scores, target.image_id, instances)
    return panoptic, target


def pycocotools(images: list[tuple[Instances, Target]]) -> dict[str, Any]:
    """The reference: masks of the things, COCO's loadRes, evaluate, accumulate and summarize."""
    truth, results, sizes = [], [], []
    for number, (instances, target) in enumerate(images):
        sizes.append({"id": number, "height": target.id_map.shape[0], "width": target.id_map.shape[1]})
        for k in range(len(target)):
            mask = np.asfortranarray((target.id_map.numpy() == k + 1).astype(np.uint8))
            c = int(target.class_ids[k])
            if not CLASSES[c].is_thing or not mask.any():
                continue
            rle, crowd = coco_mask.encode(mask), int(target.is_crowd[k])
            truth.append({"id": len(truth) + 1, "image_id": number, "category_id": c, "segmentation": rle,
                          "area": int(mask.sum()), "bbox": [0, 0, 1, 1], "iscrowd": crowd})  # fmt: skip
        for rle, c, score in zip(instances.rles, instances.class_ids, instances.scores, strict=True):
            results.append(
                {"image_id": number, "category_id": int(c), "segmentation": dict(rle), "score": float(score)}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        container = COCO()
        container.dataset = {
            "info": {},
            "images": sizes,
            "categories": [{"id": c} for c in CLASSES.thing_ids],
            "annotations": truth,
        }  # fmt: skip
        container.createIndex()
        evaluation = COCOeval(container, container.loadRes(results) if results else COCO(), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = dict(zip(AP_KEYS, (None if v == -1 else float(v) for v in evaluation.stats[:6]), strict=True))
    per_class = {}
    for i, c in enumerate(CLASSES.thing_ids):
        values = evaluation.eval["precision"][:, :, i, 0, 2]
        per_class[CLASSES[c].name] = float(values[values > -1].mean()) if (values > -1).any() else None
    return expected | {"ap_per_class": per_class}


def assert_same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(ours) == list(expected)
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(ours[key], value)
        else:
            assert ours[key] == (None if value is None else pytest.approx(value, abs=1e-12)), key


def result(images: list[tuple[Prediction, Target]], panoptic: bool = False) -> dict[str, Any]:
    metric = InstanceAP(CLASSES, panoptic)
    metric.update([p for p, _ in images], [t for _, t in images])
    return metric.compute()


@pytest.mark.parametrize("seed", range(60))
def test_equals_pycocotools(seed: int) -> None:
    """Hundreds of images in sixty sets: ties, crowds, wrong classes, empty sides."""
    rng = np.random.default_rng(seed)
    images = [random_image(rng, i, longest=130 + 2 * seed) for i in range(int(rng.integers(1, 12)))]
    if not any((t.is_thing & (t.areas > 0)).any() for _, t in images):
        assert result(images)["ap"] is None
        return
    judged = [(p.instances, t) for p, t in images if p.instances is not None]
    if any(len(i) for i, _ in judged):
        assert_same(result(images), pycocotools(judged))
    from_panoptic = [(instances_from_panoptic(p, CLASSES), t) for p, t in images]
    if any(len(i) for i, _ in from_panoptic):
        expected = pycocotools(from_panoptic)
        assert_same(result(images, panoptic=True), expected)
        for (prediction, _), (instances, _) in zip(images, from_panoptic, strict=True):
            prediction.instances = instances
        assert_same(result(images), expected)


def test_the_random_images_cover_all_outcomes() -> None:
    rng = np.random.default_rng(0)
    values = result([random_image(rng, i, longest=240) for i in range(150)])
    assert all(0.01 < values[key] < 0.99 for key in AP_KEYS), values


def test_more_than_a_hundred_of_a_class() -> None:
    """Only the best hundred of a class in an image are judged."""
    truth = torch.arange(1, 126).reshape(5, 25).repeat_interleave(3, 0).repeat_interleave(3, 1)
    target = target_from_map(truth, [2] * 125, CLASSES)
    scores = torch.linspace(0.1, 0.9, 125)
    instances = Instances(encode_id_map(truth.numpy(), 125), torch.full((125,), 2), scores)
    image = Prediction(truth.int(), instances.class_ids, scores, "", instances), target
    expected = pycocotools([(instances, target)])
    assert expected["ap"] == pytest.approx(81 / 101)  # recall 0.8: 81 of the 101 recall points
    assert_same(result([image]), expected)
    assert_same(result([image], panoptic=True), expected)


def test_no_truth_and_no_prediction() -> None:
    nothing = Instances([], torch.zeros(0, dtype=torch.long), torch.zeros(0))
    empty = Prediction(torch.zeros(4, 4, dtype=torch.int32), nothing.class_ids, nothing.scores, "", nothing)
    bare = target_from_map(torch.zeros(4, 4), [], CLASSES)
    assert result([(empty, bare)])["ap"] is None
    assert result([])["ap_per_class"] == {"thing0": None, "thing1": None, "thing2": None}
    one = target_from_map(torch.ones(4, 4), [3], CLASSES)
    values = result([(empty, one)])
    assert (values["ap"], values["ap_small"], values["ap_large"]) == (0.0, 0.0, None)
    assert values["ap_per_class"] == {"thing0": None, "thing1": 0.0, "thing2": None}
    assert json.loads(json.dumps(values)) == values


def test_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    result([random_image(rng, i) for i in range(5)])
    assert capsys.readouterr() == ("", "")


def test_bad_input_raises() -> None:
    target = target_from_map(torch.ones(4, 4), [3], CLASSES)
    plain = Prediction(torch.ones(4, 4, dtype=torch.int32), torch.tensor([3]), torch.ones(1))
    mask = torch.ones(1, 4, 4, dtype=torch.bool)

    def update(instances: Instances | None) -> None:
        InstanceAP(CLASSES).update([Prediction(plain.id_map, plain.class_ids, plain.scores, "", instances)], [target])

    with pytest.raises(ValueError, match="image0: the prediction has no instances"):
        update(None)
    for c in (0, 5, -1):
        with pytest.raises(ValueError, match=r"must be of things \(contiguous ids \[2, 3, 4\]\)"):
            update(Instances(encode_masks(mask), torch.tensor([c]), torch.ones(1)))
    with pytest.raises(ValueError, match=r"an instance has size \[4, 3\], the ground truth \[4, 4\]"):
        update(Instances(encode_masks(mask[:, :, :3]), torch.tensor([3]), torch.ones(1)))
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        InstanceAP(CLASSES).update([plain], [target, target])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 6), (40, 23)])
def test_id_maps_become_the_run_lengths_of_their_masks(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    for dtype in (np.uint8, np.int32, np.int64):
        ids = rng.integers(0, 5, shape).astype(dtype)
        masks = torch.from_numpy(np.stack([ids == k for k in range(1, 7)]))  # ids 5 and 6 do not occur
        assert encode_id_map(ids, 6) == encode_masks(masks)
    assert encode_id_map(np.zeros(shape, np.int32), 0) == []
    with pytest.raises(ValueError, match="holds ids from 7 to 7; expected 0 to 6"):
        encode_id_map(np.full(shape, 7), 6)


def _results(images: list[tuple[Prediction, Target]], process: Callable[[int], bool]) -> list[dict[str, Any]]:
    """Every metric on the images of one process."""
    results = []
    for metric in (InstanceAP(CLASSES), PanopticMetrics(CLASSES), BoundaryQuality(CLASSES, 0.1)):
        for i, (p, t) in enumerate(images):
            if process(i):
                metric.update([p], [t])
        results.append(metric.compute())
        metric.reset()
        results.append(metric.compute())  # what was gathered from the others is let go of
    return results


def _images() -> list[tuple[Prediction, Target]]:
    rng = np.random.default_rng(5)
    return [random_image(rng, i) for i in range(10)]


SHARDS = (range(0, 10, 2), range(7), range(10))  # interleaved; uneven; nothing at all on rank 1


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = [_results(_images(), lambda i, shard=shard: (i in shard) == (rank == 0)) for shard in SHARDS]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_processes_with_uneven_shards_and_an_empty_rank() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (folder,), nprocs=2)
        results = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    expected = _results(_images(), lambda i: True)
    assert expected[0]["ap"] > 0
    assert expected[1]["ap"] is None
    assert expected[2]["pq_by_size"]["small"]["pq"] > 0
    assert expected[4]["boundary_pq"] > 0
    for result in (*results[0], *results[1]):
        for ours, wanted in zip(result, expected, strict=True):
            assert_same(ours, wanted)
