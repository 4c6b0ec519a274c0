"""The examples run, each in seconds, and their numbers are right."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import compose, run
from helpers import class_table, random_target
from panoptic_files import CATEGORIES, write_coco
from panoptic_ibs import instantiation
from panoptic_ibs.classes import ClassTable
from panoptic_ibs.coco_writer import PanopticWriter
from panoptic_ibs.construction import build_model
from panoptic_ibs.segments import Prediction

FOLDER = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the examples are not in this installation")


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ibs_in_a_loop_of_ones_own() -> None:
    history = np.array(example("ibs_in_your_loop").main(steps=60))
    assert np.isfinite(history).all()
    assert (history[:3] > 0).all()
    assert (history[-10:].mean(0) < 0.5 * history[:3].mean(0)).all()  # both losses are learnt


def test_scoring_a_folder_of_predictions(tmp_path: Path) -> None:
    write_coco(tmp_path, "val", count=2)
    predictions = tmp_path / "predictions"
    shutil.copytree(tmp_path / "annotations" / "panoptic_val", predictions / "panoptic")
    content = json.loads((tmp_path / "annotations" / "panoptic_val.json").read_text())
    for annotation in content["annotations"]:
        annotation["segments_info"] = [s for s in annotation["segments_info"] if not s["iscrowd"]]
    (predictions / "panoptic.json").write_text(json.dumps({"annotations": content["annotations"]}))
    metrics = example("score_predictions").main(str(predictions), str(tmp_path), "val")
    assert metrics["pq"] == pytest.approx(1.0)  # the truth itself
    assert metrics["num_images"] == 2


def test_own_masks_become_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "classes.csv").write_text("id,name,thing\n1,road,0\n2,car,1\n7,tree,0\n")
    ids = np.zeros((2, 40, 60), np.uint16)
    ids[0, 5:20] = 1000
    ids[0, 8:12, 4:20], ids[0, 8:12, 30:40] = 2001, 2002
    ids[1] = 7000  # nothing is void here
    for number, mask in enumerate(ids):
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "images" / f"{number}.jpg")
    path = example("own_masks").main(
        *(str(tmp_path / name) for name in ("images", "masks", "classes.csv", "out")), "train"
    )
    content = json.loads(path.read_text())
    assert [(c["id"], c["name"], c["isthing"]) for c in content["categories"]] == [
        (1, "road", 0), (2, "car", 1), (7, "tree", 0),
    ]  # fmt: skip
    first, second = content["annotations"]
    assert [(s["category_id"], s["area"]) for s in first["segments_info"]] == [(1, 15 * 60 - 64 - 40), (2, 64), (2, 40)]
    assert [(s["category_id"], s["area"]) for s in second["segments_info"]] == [(7, 2400)]
    root = f"data.root={tmp_path / 'out'}"
    splits = ("data.train=train", "data.val=train")
    done = run("prepare", "check", "data=coco_panoptic", root, *splits, f"run_dir={tmp_path}")
    assert done.code == 0, done.out


def test_reading_predictions_with_numpy(tmp_path: Path) -> None:
    classes = class_table()
    writer, expected = PanopticWriter(tmp_path, classes), {}
    for number in range(2):
        target = random_target(classes, (64, 96), segments=300, seed=number)
        writer.add(Prediction(target.id_map, target.class_ids, torch.ones(len(target)), f"image{number}"))
        counts: dict[str, int] = {}
        for row, class_id in enumerate(target.class_ids.tolist()):
            if area := int((target.id_map == row + 1).sum()):
                counts[classes[class_id].name] = counts.get(classes[class_id].name, 0) + area
        expected[f"image{number}"] = counts
    writer.close()
    assert example("read_prediction").main(str(tmp_path)) == expected


def test_comparing_two_checkpoints(tmp_path: Path) -> None:
    write_coco(tmp_path, "val", count=2, size=(64, 96))
    classes = ClassTable.from_coco(CATEGORIES)
    config = compose("recipe=none", "backbone=tiny", "head.channels=8", "head.feature_channels=8", "head.depth=1",
                     "head.inference.stuff_area=1")  # fmt: skip
    description = instantiation.model_config(config)
    for name in "ab":
        torch.manual_seed(ord(name))
        model = build_model(description, classes)
        entry = {"version": "0", "model": description, "classes": classes.to_list()}
        weights = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({"state_dict": weights, "global_step": 1, "panoptic_ibs": entry}, tmp_path / f"{name}.ckpt")
    words = [str(tmp_path / name) for name in ("a.ckpt", "b.ckpt")]
    compared = example("compare_checkpoints").main(*words, str(tmp_path), "val", str(tmp_path / "out"))
    assert set(compared["pq"]) >= {"value", "low", "high"}
    assert (tmp_path / "out/A/panoptic.json").is_file()
    assert (tmp_path / "out/comparison/report/index.html").is_file()


def test_objects_for_fiftyone_have_their_masks_and_their_confusion(tmp_path: Path) -> None:
    from pycocotools import mask as coco

    import panoptic_ibs
    from prediction_files import write_split

    write_split(tmp_path)
    out = tmp_path / "objects.json"
    example("to_fiftyone").main(str(tmp_path / "mine.json"), str(tmp_path), "val2017", str(out))
    content = json.loads(out.read_text())
    truth = json.loads((tmp_path / "annotations/panoptic_val2017.json").read_text())
    theirs = {a["image_id"]: a for a in json.loads((tmp_path / "mine.json").read_text())["annotations"]}
    things = {c["id"] for c in CATEGORIES if c["isthing"]}

    def ids(path: Path) -> np.ndarray:
        return np.array(Image.open(path)).astype(np.int64) @ [1, 256, 65536]

    confused = total = 0
    for number, annotation in enumerate(truth["annotations"], 1):
        own = theirs[annotation["image_id"]]
        mine, true = (ids(f / own["file_name"]) for f in (tmp_path / "mine", tmp_path / "annotations/panoptic_val2017"))
        objects = [o for o in content["annotations"] if o["image_id"] == number]
        listed = {s["id"]: s for s in own["segments_info"] if (mine == s["id"]).any()}
        assert len(objects) == len(listed)
        for found in objects:
            mask = coco.decode(found["segmentation"]).astype(bool)
            (segment,) = {int(i) for i in np.unique(mine[mask])}
            assert (mask == (mine == segment)).all()
            assert found["category_id"] == listed[segment]["category_id"]
            shares = sorted(
                ((mask & (true == s["id"])).sum() / (true == s["id"]).sum() for s in annotation["segments_info"]
                 if s["category_id"] in things and not s["iscrowd"]),
                reverse=True,
            )  # fmt: skip
            is_thing = found["category_id"] in things
            assert found["thing"] == is_thing
            assert found["confusion"] == pytest.approx(shares[1] if is_thing and len(shares) > 1 else 0.0, abs=1e-4)
            total, confused = total + is_thing, confused + (is_thing and found["confusion"] > 0.5)
    scored = panoptic_ibs.score_files(tmp_path / "mine.json", root=tmp_path, val="val2017", bootstrap=0)
    assert total > 20
    assert 0 < confused < total
    assert confused / total == pytest.approx(scored["confusion"]["50"])
