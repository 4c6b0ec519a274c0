"""One broken file does not throw an evaluation away: what is sound is evaluated and kept, the rest is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from cli_helpers import compose
from cli_helpers import run as command
from panoptic_files import edit, write_coco
from panoptic_ibs import instantiation
from panoptic_ibs.baselines import StuffOnly, score
from panoptic_ibs.construction import build_model
from panoptic_ibs.data.datamodule import PanopticDataModule
from panoptic_ibs.errors import DataError, out_of_memory
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.prediction_files.sets import ScoringOptions
from panoptic_ibs.task import PanopticTask
from panoptic_ibs.whole_images import complete, evaluate, incomplete

COUNT = 4


def data_of(root: Path) -> PanopticDataModule:
    data = PanopticDataModule("coco_panoptic", root, val="val", cache_dir=root / "cache", num_workers=0)
    data.setup("validate")
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_coco(root, "val", COUNT, (64, 64))
    return root


@pytest.fixture(scope="module")
def model(whole: Path) -> PanopticModel:
    torch.manual_seed(0)
    config = compose("backbone=tiny", "head.channels=16", "head.feature_channels=16", "head.depth=1")
    return build_model(instantiation.model_config(config), data_of(whole).classes).eval()


def run(model: PanopticModel, root: Path, out: Path) -> dict[str, Any]:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=out, **quiet)
    data = data_of(root)
    results = evaluate(trainer, PanopticTask(model), data, out)
    return complete(results, data, out, ScoringOptions(bootstrap=20, gallery=0))


def test_the_sound_images_are_evaluated_as_if_they_were_alone(
    model: PanopticModel, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, alone = tmp_path / "broken", tmp_path / "alone"
    for folder in (root, alone):
        shutil.copytree(whole, folder)
    (root / "val" / "0001.png").write_bytes(b"no picture")
    png = root / "annotations/panoptic_val/0002.png"
    png.write_bytes(png.read_bytes()[:-20])

    def keep(content: dict[str, Any]) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (11, 12)]
        content["images"] = [a for a in content["images"] if a["id"] not in (11, 12)]

    edit(alone / "annotations/panoptic_val.json", keep)
    results, wanted = run(model, root, tmp_path / "a"), run(model, alone, tmp_path / "b")
    assert results.pop("complete") is False
    faults = results.pop("faults")
    assert [str(root / "val" / "0001.png") in faults[1], str(png) in faults[0]] == [True, True]
    assert results == wanted
    assert results["num_images"] == 2
    written = json.loads((tmp_path / "a/predictions/panoptic.json").read_text())
    assert [a["image_id"] for a in written["annotations"]] == [10, 13]
    assert capsys.readouterr().err == ""  # the command says it, and the confidence intervals do not
    told = incomplete({**results, "faults": faults})
    assert told.startswith("2 of 4 images could not be evaluated; the others were:\n")
    assert str(png) in told
    assert incomplete(wanted) == ""

    for file in (root / "val").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="No image could be evaluated:\n"):
        run(model, root, tmp_path / "c")


def test_the_baselines_are_scored_on_what_is_sound(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(whole, root)
    (root / "annotations/panoptic_val/0000.png").unlink()
    data = data_of(root)
    metrics = score(StuffOnly(data.reader("val")), data, None, "stuff only")
    assert metrics["num_images"] == COUNT - 1


def test_too_little_memory_for_one_image_is_told_like_a_broken_file(
    model: PanopticModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PanopticModel.predict_batch
    errors = iter((torch.OutOfMemoryError("CUDA out of memory"), MemoryError()))

    def predict(self: PanopticModel, batch: Any, views: bool = False) -> Any:
        error = next(errors, None)
        if error is not None:
            raise error
        return plain(self, batch, views)

    monkeypatch.setattr(PanopticModel, "predict_batch", predict)
    results = run(model, whole, tmp_path)
    assert (results["num_images"], results["complete"]) == (2, False)
    assert results["faults"][0] == f"{whole / 'val/0000.png'}: memory does not suffice for this image."
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(RuntimeError("shapes differ"))


def test_training_keeps_its_evaluation(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(whole, root)
    write_coco(root, "train", 2, (64, 64))
    broken = root / "val" / "0003.png"
    broken.write_bytes(b"no picture")
    data = ("data=coco_panoptic", f"data.root={root}", "data.train=train", "data.val=val")
    presets = ("data.presets.crop_size=[64,64]", "data.presets.resize.range=[64,64]", "data.presets.stuff_area=16",
               "data.eval_resize=null")  # fmt: skip
    result = command("train", "debug=fast", "backbone=tiny", *data, *presets, "head.channels=16",
                     "head.feature_channels=16", "head.depth=1", "trainer.max_steps=1",
                     "callbacks.progress=null", "evaluation.baselines=true",
                     f"paths.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}")  # fmt: skip
    assert result.code == 2
    assert "error: 1 of 2 images could not be evaluated; the others were:\n" in result.err
    assert result.err.strip().splitlines()[-1].startswith(f"{broken}: the image cannot be decoded", 2)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["num_images"], metrics["complete"], len(metrics["faults"])) == (1, False, 1)
    assert "Not every image could be judged" in (tmp_path / "run/report/index.html").read_text()
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
