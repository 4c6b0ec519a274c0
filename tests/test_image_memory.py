"""Crops from images kept in memory against crops from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from panoptic_files import write_coco
from panoptic_ibs.data.dataset import PanopticDataset, Sample
from panoptic_ibs.data.readers import ImageMemory, PanopticReader, coco_panoptic
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.structures import CropRequest


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PanopticReader:
    root: Path = tmp_path_factory.mktemp("set")
    write_coco(root, count=6, size=(60, 90), things=8, seed=1)
    return coco_panoptic(root, "train2017", cache_dir=root.parent / "cache")


def samples_equal(one: Sample, two: Sample) -> bool:
    same = torch.equal(one.image, two.image) and one.size == two.size
    return same and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one.target).values(), vars(two.target).values(), strict=True)
    )


@pytest.mark.parametrize("megabytes", [0, 0.05, 100])
def test_crops_from_memory_are_those_from_disk(reader: PanopticReader, megabytes: float) -> None:
    plain, kept = PanopticDataset(reader), PanopticDataset(reader, memory_mb=megabytes)
    rng = np.random.default_rng(0)
    for _ in range(60):
        i = int(rng.integers(len(reader)))
        height, width = (round(side * rng.uniform(0.5, 2)) for side in reader.table.sizes[i])
        top, left = int(rng.integers(height // 2)), int(rng.integers(width // 2))
        request = CropRequest(i, (height, width), (top, left, 40, 50), flip=bool(rng.integers(2)))
        (expected,), (found,) = plain[[request]], kept[[request]]
        assert samples_equal(found, expected)
        found.image.zero_()  # nobody else's pixels
        found.target.id_map.zero_()


def test_a_kept_image_is_decoded_once(reader: PanopticReader, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = reader.read, []
    monkeypatch.setattr(reader, "read", lambda *key: calls.append(key) or read(*key))
    size = read(0)[0].nbytes + read(0)[1].nbytes
    memory = ImageMemory(reader, 1.1 * size / 1e6)  # room for one image
    for _ in range(3):
        memory.read(0, (0, 0, 8, 8))
        memory.read(1, (4, 4, 8, 8))
    assert calls == [(0,), *[(1, (4, 4, 8, 8))] * 3]
    with pytest.raises(ConfigError, match=r"data\.memory_mb=-1"):
        ImageMemory(reader, -1)
