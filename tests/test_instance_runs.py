"""Instance segmentation from training to files: average precision is reported, and comes out again from the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cli_helpers import run
from panoptic_files import write_coco
from panoptic_ibs.coco_writer import PanopticWriter
from panoptic_ibs.data.readers import make_reader
from panoptic_ibs.functional.rle import encode_masks
from panoptic_ibs.metrics import InstanceAP
from panoptic_ibs.segments import Instances, Prediction
from panoptic_ibs.structures import Target


def shaken(target: Target, seed: int) -> Prediction:
    """The true things, each shifted a little, with random scores."""
    rng = np.random.default_rng(seed)
    rows = (target.is_thing & ~target.is_crowd & (target.areas > 0)).nonzero().squeeze(1)
    masks = torch.stack([torch.roll(target.id_map == r + 1, int(rng.integers(3)), 1) for r in rows])
    scores = torch.tensor(rng.random(len(rows)), dtype=torch.float32)
    instances = Instances(encode_masks(masks), target.class_ids[rows], scores)
    nothing = torch.zeros(0)
    return Prediction(torch.zeros_like(target.id_map), nothing.long(), nothing, target.image_id, instances)


def test_written_instances_score_the_same(tmp_path: Path) -> None:
    from panoptic_ibs.data.dataset import EvaluationDataset

    write_coco(tmp_path / "set", "val2017", count=3, size=(60, 80), things=8)
    reader = make_reader("coco_panoptic", tmp_path / "set", "val2017", cache_dir=tmp_path / "cache")
    dataset = EvaluationDataset(reader)
    metric, writer = InstanceAP(reader.classes), PanopticWriter(tmp_path / "p", reader.classes, integer_ids=True)
    for i in range(3):
        target = dataset[i][0].target
        prediction = shaken(target, i)
        metric.update([prediction], [target])
        writer.add(prediction)
    writer.close()
    expected = metric.compute()
    assert 0.05 < expected["ap"] < 0.95
    result = run(
        "evaluate", f"predictions={tmp_path / 'p' / 'instances.json'}", "data=coco_panoptic",
        f"data.root={tmp_path / 'set'}", f"paths.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'r'}",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "r" / "metrics.json").read_text())
    for key in ("ap", "ap50", "ap75", "ap_small"):
        assert found[key] == pytest.approx(expected[key], abs=2e-3), key  # scores are written with five digits


def test_an_instance_run_reports_average_precision(tmp_path: Path) -> None:
    result = run(
        "train", "experiment=demo", "head=mask2former", "head.task=instance", "ibs=random", "debug=fast",
        "data.synthetic.num_train=4", "data.synthetic.num_val=2", "data.synthetic.size=[96,192]",
        "data.presets.crop_size=[64,96]", "evaluation.baselines=false", "callbacks.progress=null",
        f"paths.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'r'}",
    )  # fmt: skip
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["pq_stuff"] == 0
    assert 0 <= metrics["ap"] <= 1
    header = (tmp_path / "r" / "metrics.csv").read_text().splitlines()[0]
    assert "val/ap" in header
    entries = json.loads((tmp_path / "r" / "predictions" / "instances.json").read_text())
    assert isinstance(entries, list)
