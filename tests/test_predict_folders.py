"""Prediction of folders: all folders in them, no two images of one name, and batches that change nothing."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import compose, run
from helpers import class_table
from panoptic_ibs import instantiation
from panoptic_ibs.coco_writer import PanopticWriter, _listed
from panoptic_ibs.construction import build_model
from panoptic_ibs.errors import DataError
from panoptic_ibs.image_files import find_images, image_names
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.segments import Prediction
from panoptic_ibs.threads import Pending, ahead

CLASSES = class_table()
HEADS = {
    "panoptic_fcn": ("head.channels=16", "head.feature_channels=16", "head.depth=1", "head.inference.stuff_area=1",
                     "head.inference.min_score=0.0"),
    "mask2former": ("head.channels=32", "head.queries=8", "head.score_threshold=0.0"),
    "ciae": ("head.channels=16", "head.embedding_channels=16", "head.inference.score_threshold=0.0",
             "head.inference.stuff_area=1"),
}  # fmt: skip


def network(head: str, *words: str) -> PanopticModel:
    torch.manual_seed(0)
    config = compose("recipe=none", "backbone=tiny", f"head={head}", *words)
    return build_model(instantiation.model_config(config), CLASSES).eval()


@pytest.fixture(scope="module")
def model() -> PanopticModel:
    return network("panoptic_fcn", *HEADS["panoptic_fcn"])


def draw(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def predict(model: PanopticModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("panoptic_ibs.construction.load", lambda *_, **__: model)
    return lambda given, out, *words: run(
        "predict", "ckpt_path=x", f"input={given}", f"output={out}", "device=cpu", *words
    )


def content(out: Path) -> dict[str, Any]:
    """Image id -> its PNG's pixels and segments; the overlays have the same names and nothing hidden is left."""
    assert not list(out.glob(".*"))
    found = json.loads((out / "panoptic.json").read_text())
    listed = {a["image_id"]: a for a in found["annotations"]}
    names = {a["file_name"] for a in listed.values()}
    for kind in ("panoptic", "overlay"):
        assert {p.relative_to(out / kind).as_posix() for p in (out / kind).rglob("*.png")} == names
    return {k: (np.array(Image.open(out / "panoptic" / a["file_name"])), a["segments_info"]) for k, a in listed.items()}


def test_folders_in_folders_are_kept(predict: Any, tmp_path: Path) -> None:
    root = tmp_path / "in"
    for seed, name in enumerate(
        ("a.png", "left/a.png", "left/a.jpg", "right/deep/a.png", "b c/ä.png", ".hidden/x.png")
    ):
        draw(root / name, seed=seed)
    (root / "empty").mkdir()
    (root / "left" / "notes.txt").write_text("none")
    done = predict(root, tmp_path / "out")
    assert done.code == 0, done.err
    ids = {"a", "left/a.png", "left/a.jpg", "right/deep/a", "b c/ä"}
    assert set(content(tmp_path / "out")) == ids
    assert (tmp_path / "out/panoptic/right/deep/a.png").is_file()
    done = predict(root / "right", tmp_path / "out")  # anew: folders that are empty now are gone
    assert done.code == 0, done.err
    assert set(content(tmp_path / "out")) == {"deep/a"}
    assert [p.name for p in (tmp_path / "out/panoptic").iterdir()] == ["deep"]


def test_results_in_the_images_own_folder_are_no_images(predict: Any, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    for out in (tmp_path / "out", tmp_path):
        for _ in range(2):
            assert predict(tmp_path, out).code == 0
            assert set(content(out)) == {"a"} | ({"out/overlay/a", "out/panoptic/a"} if out == tmp_path else set())


def test_names_of_folders_differ_even_where_capitals_do_not_count(tmp_path: Path) -> None:
    root = Path("in")
    paths = [root / name for name in ("A/x.png", "a/x.png", "a/x.jpg", "a/b/x.png", "a_b/x.png", "x.png", "a b/x.png")]
    names = image_names(paths, root)
    writer = PanopticWriter(tmp_path, CLASSES)
    files = [writer.name(name, folders=True) for name in names]
    assert len({file.casefold() for file in files}) == len(paths)
    assert [file.count("/") for file in files] == [len(path.parts) - 2 for path in paths]
    writer.discard()


def test_a_file_that_names_pngs_elsewhere_deletes_none(tmp_path: Path) -> None:
    names = ["a.png", "b/c.png", "../d.png", "/e.png", "b/../../f.png", "g\\..\\h.png", "i.txt"]
    listed = {"info": {"program": "panoptic_ibs"}, "annotations": [{"file_name": name} for name in names]}
    (tmp_path / "panoptic.json").write_text(json.dumps(listed))
    assert _listed(tmp_path / "panoptic.json") == {"a.png", "b/c.png"}


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "a.png")

    def refuse(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"the folder cannot be read \(Permission denied\)"):
        find_images(tmp_path)


@pytest.mark.parametrize("batch_size", [2, 3, 50])
def test_batches_change_nothing(predict: Any, tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(64, 48), (96, 64), (64, 48), (64, 48), (96, 64), (40, 40), (64, 48)]
    for number, size in enumerate(sizes):
        draw(tmp_path / f"in/{number}.png", size, seed=number)
    (tmp_path / "in/broken.png").write_text("no picture")
    assert predict(tmp_path / "in", tmp_path / "one").code == 2
    seen: list[int] = []
    plain = PanopticModel.predict_batch
    monkeypatch.setattr(
        PanopticModel, "predict_batch", lambda self, batch: seen.append(len(batch)) or plain(self, batch)
    )  # type: ignore[func-returns-value]
    done = predict(tmp_path / "in", tmp_path / "many", f"batch_size={batch_size}")
    assert (done.code, "1 of 8 images could not be predicted" in done.err) == (2, True)
    assert sorted(seen) == {2: [1, 2, 2, 2], 3: [1, 1, 2, 3], 50: [1, 2, 4]}[batch_size]
    one, many = content(tmp_path / "one"), content(tmp_path / "many")
    assert one.keys() == many.keys()
    assert sum(len(segments) for _, segments in one.values()) >= 3
    for name, (pixels, segments) in one.items():
        np.testing.assert_array_equal(pixels, many[name][0])
        assert [s["category_id"] for s in segments] == [s["category_id"] for s in many[name][1]]


@pytest.mark.parametrize("head", list(HEADS))
def test_heads_predict_images_of_one_size_together_as_alone(head: str) -> None:
    model = network(head, *HEADS[head])
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 96, 3), np.uint8) for _ in range(3)]
    images.insert(2, rng.integers(0, 255, (48, 64, 3), np.uint8))
    calls: list[int] = []
    plain = model.predict_batch
    model.predict_batch = lambda batch: calls.append(len(batch)) or plain(batch)  # type: ignore
    together = model.predict(images, batch_size=8)
    assert calls == [2, 1, 1]
    assert sum(map(len, together)) >= 3
    for image, found in zip(images, together, strict=True):
        (alone,) = model.predict(image)
        assert found.id_map.shape == alone.id_map.shape == image.shape[:2]
        assert (found.id_map == alone.id_map).float().mean() > 0.995
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-3, atol=1e-4)


def test_a_batch_that_does_not_fit_into_memory_is_done_one_by_one(
    predict: Any, model: PanopticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        draw(tmp_path / f"in/{number}.png", seed=number)
    plain = PanopticModel.predict_batch

    def limited(self: PanopticModel, batch: Any) -> list[Prediction]:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, batch)

    monkeypatch.setattr(PanopticModel, "predict_batch", limited)
    done = predict(tmp_path / "in", tmp_path / "out", "batch_size=3")
    assert done.code == 0, done.err
    assert set(content(tmp_path / "out")) == {"0", "1", "2"}


def test_reading_ahead_keeps_order_and_bounds() -> None:
    busy, most, lock = [0], [0], threading.Lock()

    def read(number: int) -> int:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.001 * (5 - number % 5))
        with lock:
            busy[0] -= 1
        return number

    taken = []

    def numbers() -> Any:
        for number in range(20):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        for expected, job in enumerate(ahead(pool, read, numbers(), 4)):
            assert job.result() == expected
            assert len(taken) <= expected + 4
    assert 1 < most[0] <= 3


def test_what_a_thread_raises_is_raised() -> None:
    def write(number: int) -> None:
        if number == 3:
            raise OSError(28, "No space left")

    def write_all(pending: Pending) -> None:
        for number in range(50):
            pending.add(write, number)
        pending.wait()

    with ThreadPoolExecutor(2) as pool, pytest.raises(OSError, match="No space left"):
        write_all(Pending(pool, 2))
