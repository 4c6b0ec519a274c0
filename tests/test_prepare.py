"""The data set check lists every defect at once; the command's exit status, files and messages; the configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from panoptic_files import edit, write_coco
from panoptic_ibs.data.check import check
from panoptic_ibs.data.datamodule import PanopticDataModule
from panoptic_ibs.data.readers import DEFAULT_SPLITS, coco_panoptic
from panoptic_ibs.prepare import main

CONF = Path(__file__).resolve().parents[1] / "conf"


def spoil_pixels(path: Path, change: Any) -> None:
    pixels = np.array(Image.open(path))
    change(pixels)
    Image.fromarray(pixels).save(path)


def wipe(segment_id: int) -> Any:
    def change(pixels: np.ndarray) -> None:
        ids = pixels.astype(int) @ (1, 256, 65536)
        pixels[ids == segment_id] = 0

    return change


def spoil(root: Path) -> dict[str, str]:
    """Every kind of defect in one data set of ten images; kind -> a word of its message."""
    json_path = write_coco(root, count=10, seed=4)
    photos, pngs = root / "train2017", root / "annotations/panoptic_train2017"
    (photos / "0000.png").unlink()
    (photos / "0001.png").write_bytes((photos / "0001.png").read_bytes()[:300])
    Image.new("RGB", (9, 9)).save(photos / "0002.png")
    (pngs / "0003.png").unlink()
    spoil_pixels(pngs / "0004.png", lambda p: p.__setitem__((0, 0), (1, 2, 3)))
    last = json.loads(json_path.read_text())["annotations"][5]["segments_info"][-1]["id"]
    spoil_pixels(pngs / "0005.png", wipe(last))

    def change(content: dict[str, Any]) -> None:
        annotations = content["annotations"]
        annotations[6]["segments_info"][0]["area"] += 7
        annotations[7]["segments_info"][0]["bbox"][2] -= 5
        annotations[8]["segments_info"][0]["category_id"] = 99
        annotations[9]["segments_info"][1]["id"] = annotations[9]["segments_info"][0]["id"]
        content["images"].append({"id": 99, "file_name": "x.png", "height": 4, "width": 4})

    edit(json_path, change)
    return {
        "image": "0000.png",
        "id PNG": "0003.png",
        "unlisted id": str(1 + 2 * 256 + 3 * 65536),
        "absent segment": str(last),
        "area": "area is",
        "bbox": "bbox is",
        "unknown category": "category_id 99",
        "duplicate id": "annotations[9]",
        "no annotation": "1 images",
    }


def test_every_kind_of_defect_is_listed_at_once(tmp_path: Path) -> None:
    words = spoil(tmp_path)
    steps: list[int] = []
    defects = check(coco_panoptic(tmp_path, "train2017", strict=False), workers=2, progress=lambda: steps.append(1))
    assert len(steps) == 10
    for kind, word in words.items():
        assert any(d.kind == kind and word in d.message for d in defects), kind
    assert {d.kind for d in defects} == set(words)
    assert sum(d.kind == "image" for d in defects) == 3
    quick = check(coco_panoptic(tmp_path, "train2017", strict=False), images=False)
    assert [d.file for d in quick if d.kind == "image"] == [str(tmp_path / "train2017/0000.png")]


def test_a_sound_set_has_no_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, "val2017", seed=1)
    monkeypatch.chdir(tmp_path)
    assert main(["check", "data=coco_panoptic", f"data.root={tmp_path}"]) == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["defects"] == 0
    segments = json.loads((tmp_path / "annotations/panoptic_val2017.json").read_text())["annotations"]
    count = sum(len(a["segments_info"]) for a in segments)
    assert report["splits"]["val2017"] == {"images": 4, "segments": count, "defects": []}


def test_defects_end_with_status_one_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = spoil(tmp_path / "set")
    out = tmp_path / "run"
    words_of_command = ["check", "data=coco_panoptic", f"data.root={tmp_path / 'set'}", f"run_dir={out}"]
    assert main(words_of_command) == 1  # val2017 is missing altogether: one more defect
    report = json.loads((out / "check.json").read_text())
    assert report["defects"] == sum(len(s["defects"]) for s in report["splits"].values())
    assert set(words) < {d["kind"] for d in report["splits"]["train2017"]["defects"]} | {"unreadable"}
    assert "panoptic_val2017.json" in report["splits"]["val2017"]["defects"][-1]["message"]
    assert "duplicate id" in capsys.readouterr().out
    assert main([*words_of_command, "data.train=null", "data.val=null"]) == 2
    assert "There is no split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["scan"], "'scan' is unknown"),
        (["check", "data=voc"], "data=voc is unknown"),
        (["check", "data=coco_panoptic"], "data.root is not set"),
        (["check", "data=coco_panoptic", "data.root=/no/such/place"], "/no/such/place"),
        (["check", "colour=red"], "'colour=red' is not understood"),
        (["check", "data=vistas", "images=perhaps"], "images=perhaps"),
        (["synthetic"], "root is not set"),
        (["synthetic", "root=x", "num_train=many"], "num_train=many"),
    ],
)
def test_wrong_commands_are_explained(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from panoptic_ibs.prepare import main; main(['--help']);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'hydra', 'numpy')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "data.root=DIR" in result.stdout


def test_synthetic_is_written_and_sound(tmp_path: Path) -> None:
    root = tmp_path / "synthetic"
    assert main(["synthetic", f"root={root}", "num_train=2", "num_val=1", "height=64", "width=128"]) == 0
    assert main(["check", "data=synthetic", f"data.root={root}", f"run_dir={tmp_path}"]) == 0


# ------------------------------------------------------------------------------------------------ conf


def compose(data: str, sampling: str, **values: Any) -> Any:
    """The two groups in a root as conf/config.yaml has it."""
    root = {
        "seed": 3,
        "paths": {"cache": str(values.pop("cache"))},
        "data": OmegaConf.load(CONF / f"data/{data}.yaml"),
        "sampling": OmegaConf.load(CONF / f"sampling/{sampling}.yaml"),
    }
    config = OmegaConf.create(root)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return config


def test_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    for data in DEFAULT_SPLITS:
        config = compose(data, "paired_crop", cache=tmp_path)
        assert (config.data.train, config.data.val) == DEFAULT_SPLITS[data]
    cityscapes, vistas = (compose(d, "paired_crop", cache=tmp_path).sampling for d in ("cityscapes", "vistas"))
    assert (cityscapes.shortest, cityscapes.longest) == ([512, 3096], 6192)
    assert (vistas.shortest, vistas.longest) == ([1024, 6192], 9288)
    assert cityscapes.target_sizes == vistas.target_sizes == [32, 64, 128, 256, 512]
    assert (cityscapes.resize.range, cityscapes.resize.longest) == ([512, 2048], 4096)
    assert (vistas.resize.choices, vistas.resize.longest) == (list(range(1024, 2049, 128)), 4096)
    assert (cityscapes.crop_size, vistas.crop_size) == ([512, 1024], [1024, 1024])


@pytest.mark.parametrize("sampling", ["full_image", "random_crop", "instance_crop", "paired_crop"])
@pytest.mark.parametrize("data", ["coco_panoptic", "synthetic"])
def test_every_combination_gives_batches(tmp_path: Path, data: str, sampling: str) -> None:
    values: dict[str, Any] = {"data.num_workers": 0, "sampling.batch_size": 2, "cache": tmp_path / "cache"}
    if data == "coco_panoptic":
        write_coco(tmp_path / "set")
        write_coco(tmp_path / "set", "val2017")
        values |= {"data.root": str(tmp_path / "set")}
    else:
        values |= {"data.synthetic": {"num_train": 2, "num_val": 1, "size": [64, 128], "seed": 0}}
    if sampling != "full_image":
        values |= {"sampling.crop_size": [32, 64]}
    module = hydra.utils.instantiate(compose(data, sampling, **values).data)
    assert isinstance(module, PanopticDataModule)
    module.prepare_data()
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert len(batch) == 2
    if sampling == "paired_crop":
        assert batch.pairs[0] == batch.pairs[1] >= 0
    if sampling != "full_image":
        assert batch.images.shape[2:] == (32, 64)
    assert len(next(iter(module.val_dataloader()))) == 1
