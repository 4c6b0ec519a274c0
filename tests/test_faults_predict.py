"""What predict writes belongs together whatever happens, and one broken image does not end it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import compose, run
from helpers import class_table
from panoptic_ibs import instantiation, signals, staging
from panoptic_ibs.coco_writer import PanopticWriter
from panoptic_ibs.construction import build_model
from panoptic_ibs.image_files import file_stem, find_images, image_names
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.segments import Prediction

CLASSES = class_table()


@pytest.fixture(scope="module")
def model() -> PanopticModel:
    torch.manual_seed(0)
    config = compose("backbone=tiny", "head.channels=16", "head.feature_channels=16", "head.depth=1")
    return build_model(instantiation.model_config(config), CLASSES).eval()


@pytest.fixture
def predict(model: PanopticModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Predicts ``tmp_path/in`` to ``tmp_path/out`` with a small network."""
    monkeypatch.setattr("panoptic_ibs.construction.load", lambda *_, **__: model)
    return lambda *arguments: run("predict", "ckpt_path=x", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}",
                                  "device=cpu", *arguments)  # fmt: skip


def draw(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def files(out: Path) -> dict[str, list[str]]:
    """What the JSON lists, and the names in the two folders; nothing hidden is left."""
    assert not list(out.glob(".*")), list(out.glob(".*"))
    content = json.loads((out / "panoptic.json").read_text())
    found = {kind: sorted(p.name for p in (out / kind).iterdir()) for kind in ("panoptic", "overlay")}
    return {"json": sorted(a["file_name"] for a in content["annotations"]), **found}


def consistent(out: Path, *names: str) -> None:
    assert files(out) == dict.fromkeys(("json", "panoptic", "overlay"), sorted(names))


def test_broken_images_are_listed_and_the_others_predicted(predict: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    draw(folder / "a.png")
    draw(folder / "z.jpg")
    (folder / "broken.png").write_bytes(draw(folder / "b.png").read_bytes()[:-500])
    (folder / "text.jpg").write_text("hello")
    Image.fromarray(np.zeros((20, 30), np.float32)).save(folder / "float.tif")
    os.mkfifo(folder / "pipe.png")
    (folder / "._a.png").write_bytes(b"macOS")
    (folder / ".DS_Store").write_bytes(b"macOS")
    result = predict()
    assert result.code == 2
    consistent(tmp_path / "out", "a.png", "b.png", "z.png")
    lines = result.err.strip().splitlines()
    assert lines[0] == "error: 4 of 7 images could not be predicted; the others were:"
    for name, words in (("broken.png", "cannot be decoded"), ("text.jpg", "no image format that is known"),
                        ("float.tif", "floating-point pixels"), ("pipe.png", "must be a regular file")):  # fmt: skip
        assert sum(f"{name}: " in line and words in line for line in lines[1:]) == 1, (name, lines)
    for name in ("a.png", "b.png", "z.jpg"):
        (folder / name).unlink()
    result = predict()  # what was there stays
    assert (result.code, "No image could be predicted" in result.err) == (2, True)
    consistent(tmp_path / "out", "a.png", "b.png", "z.png")


def test_pictures_are_read_as_in_training_and_upright(
    predict: Any, model: PanopticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bits of grey by their high byte; EXIF orientation is heeded, and told."""
    grey = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint16)
    (tmp_path / "in").mkdir()
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "in/8.png")
    Image.fromarray(grey * 256 + 99).save(tmp_path / "in/16.png")
    exif = Image.Exif()
    exif[0x112] = 6
    draw(tmp_path / "in/turned.jpg", exif=exif)
    seen = []
    plain = model.predict
    monkeypatch.setattr(model, "predict", lambda image: (seen.append(image), plain(image))[1])
    result = predict()
    assert result.code == 0, result.err
    np.testing.assert_array_equal(seen[0], seen[1])
    assert [image.shape for image in seen] == [(48, 64, 3), (48, 64, 3), (64, 48, 3)]
    assert "1 image(s) were turned upright" in result.out
    assert Image.open(tmp_path / "out/panoptic/turned.png").size == (48, 64)


def test_too_little_memory_for_one_image(
    predict: Any, model: PanopticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "in/a.png")
    large = draw(tmp_path / "in/large.png", (96, 80))
    plain = model.predict

    def limited(image: Any) -> Any:
        if image.shape[0] > 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(image)

    monkeypatch.setattr(model, "predict", limited)
    result = predict()
    assert (result.code, f"{large}: memory does not suffice" in result.err) == (2, True)
    consistent(tmp_path / "out", "a.png")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("input=", 'input is ""; expected: text that is not empty'),
        ("output=", 'output is ""; expected: text that is not empty'),
        ("labels=maybe", 'labels is "maybe"; expected: true or false'),
        ("input=/dev/null", "/dev/null: this is a pipe, socket or device"),
        ("input=/dev/null/x", "no such image or folder (Not a directory; input=)"),
        (f"input={'x' * 300}", "no such image or folder (File name too long; input=)"),
    ],
)
def test_what_is_no_input(predict: Any, tmp_path: Path, argument: str, words: str) -> None:
    draw(tmp_path / "in/a.png")
    result = predict(argument)
    assert result.code == 2
    assert words in result.message
    assert not (tmp_path / "out").exists()


def test_names_differ_even_where_capitals_do_not_count() -> None:
    names = ("a.jpg", "a.png", "a.jpg.png", "A.jpg", "ä.png", "ö.png", "b c.png", "b_c.png", "q.png", "Q.PNG", "x.tif")
    paths = [Path("in", name) for name in names]
    found = image_names(paths)
    assert len({file_stem(name).casefold() for name in found}) == len(names)
    assert found == image_names(paths)
    assert found[-1] == "x"
    assert file_stem("") != ""


def test_a_new_prediction_leaves_nothing_of_the_former_but_what_is_not_ours(predict: Any, tmp_path: Path) -> None:
    draw(tmp_path / "in/a.png")
    draw(tmp_path / "in/b.png")
    assert predict().code == 0
    consistent(tmp_path / "out", "a.png", "b.png")
    (tmp_path / "in/b.png").unlink()
    draw(tmp_path / "in/c.png")
    notes = [tmp_path / "out" / name for name in ("panoptic/mine.png", "overlay/notes.txt", "readme.md")]
    for note in notes:
        note.write_text("mine")
    assert predict().code == 0
    assert all(note.read_text() == "mine" for note in notes)
    for note in notes:
        note.unlink()
    consistent(tmp_path / "out", "a.png", "c.png")
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    del content["info"]  # another program's: nothing that it lists is deleted
    (tmp_path / "out/panoptic.json").write_text(json.dumps(content))
    (tmp_path / "in/c.png").unlink()
    assert predict().code == 0
    assert files(tmp_path / "out")["panoptic"] == ["a.png", "c.png"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_predicted_before_a_stop_is_a_complete_set(
    predict: Any, model: PanopticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for name in "abc":
        draw(tmp_path / f"in/{name}.png")
    plain, calls = model.predict, []

    def stop(image: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt if number == signal.SIGINT else signals.Stopped(number)
        return plain(image)

    monkeypatch.setattr(model, "predict", stop)
    result = predict()
    assert result.code == 128 + number
    assert "2 of 3 image(s) were predicted" in result.out
    consistent(tmp_path / "out", "a.png", "b.png")
    calls[:] = [1, 1]
    predict()  # stopped before the first image: the former set stays
    consistent(tmp_path / "out", "a.png", "b.png")


def test_a_full_disk_leaves_the_former_set(predict: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "in/a.png")
    assert predict().code == 0
    former = (tmp_path / "out/panoptic/a.png").read_bytes()
    draw(tmp_path / "in/a.png", seed=1)
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert predict().code != 0
    consistent(tmp_path / "out", "a.png")
    assert (tmp_path / "out/panoptic/a.png").read_bytes() == former


def prediction(name: str, rows: int) -> Prediction:
    ids = torch.full((8, 8), rows, dtype=torch.int32)
    return Prediction(ids, torch.zeros(rows, dtype=torch.int64), torch.ones(rows), name)


def write(folder: Path, names: str, rows: int) -> None:
    """A set of which each PNG holds the id ``rows``."""
    writer = PanopticWriter(folder, CLASSES)
    for name in names:
        writer.add(prediction(name, rows))
        Image.new("RGB", (8, 8)).save(writer.staging / f"overlay/{name}.png")
    writer.close()


@pytest.mark.parametrize("moment", range(9))
def test_killed_while_it_writes(tmp_path: Path, moment: int) -> None:
    """Whenever SIGKILL comes, a JSON has exactly its PNGs; and the next set is whole, with nothing left behind."""
    write(tmp_path, "ab", 1)
    child = os.fork()
    if child == 0:
        moves = [0]

        def replace(*paths: Any) -> None:
            if moves[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            moves[0] += 1
            plain(*paths)

        plain, os.replace = os.replace, replace
        write(tmp_path, "bc", 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (moment < 7)  # three for the JSON, four PNGs and pictures, and the last
    if (tmp_path / "panoptic.json").exists():
        content = json.loads((tmp_path / "panoptic.json").read_text())
        names = {a["file_name"]: a["segments_info"][0]["id"] for a in content["annotations"]}
        assert set(names) in ({"a.png", "b.png"}, {"b.png", "c.png"})
        for name, row in names.items():
            assert np.array(Image.open(tmp_path / "panoptic" / name)).max() == row
    write(tmp_path, "d", 3)
    consistent(tmp_path, "d.png")


def test_signals_wait_while_files_are_moved() -> None:
    seen: list[str] = []
    with signals.handled(lambda *_: seen.append("late")):
        with staging.undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append("moved")
        assert seen == ["moved", "late"]


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    with pytest.raises(Exception, match="this is a pipe, socket or device"):
        find_images(tmp_path / "p")
