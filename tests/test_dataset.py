"""Window-first against resize-then-crop by Pillow, targets against naive loops, collating, jitter, DataModule."""

from __future__ import annotations

import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from panoptic_files import edit, write_coco
from panoptic_ibs.data.datamodule import PanopticDataModule
from panoptic_ibs.data.dataset import EvaluationDataset, PanopticDataset, collate, make_target
from panoptic_ibs.data.geometry import ShortestSide
from panoptic_ibs.data.readers import PanopticReader, coco_panoptic
from panoptic_ibs.data.sampling import PairedCropSampler, RandomCropSampler
from panoptic_ibs.data.transforms import ColorJitter
from panoptic_ibs.data.windows import plan, resize_id_map, resize_image
from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.structures import Batch, CropRequest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    write_coco(root, count=6, size=(60, 90), things=8, seed=1)
    write_coco(root, "val2017", count=3, size=(50, 40), things=4, seed=2)
    return root


@pytest.fixture(scope="module")
def reader(root: Path) -> PanopticReader:
    return coco_panoptic(root, "train2017", cache_dir=root.parent / "cache")


def resized_whole(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """By Pillow, along rows and then along columns, as all versions up to 12 do (later ones choose the order)."""
    wide = Image.fromarray(image).resize((size[0], image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(wide.resize(size, Image.Resampling.BILINEAR))


def resize_then_crop(
    image: np.ndarray, id_map: np.ndarray, request: CropRequest, fill: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The reference: all of the image, by Pillow; the padding stays at the bottom and right."""
    size = request.resized[::-1]
    whole = resized_whole(image, size)
    np.testing.assert_allclose(
        whole.astype(int), np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)), atol=1
    )
    ids = np.asarray(Image.fromarray(id_map).resize(size, Image.Resampling.NEAREST))
    top, left, height, width = request.window
    whole, ids = whole[top : top + height, left : left + width], ids[top : top + height, left : left + width]
    if request.flip:
        whole, ids = whole[:, ::-1], ids[:, ::-1]
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = fill
    labels = np.zeros((height, width), np.int32)
    canvas[: whole.shape[0], : whole.shape[1]] = whole
    labels[: ids.shape[0], : ids.shape[1]] = ids
    return canvas, labels


def random_request(rng: np.random.Generator, reader: PanopticReader) -> CropRequest:
    i = int(rng.integers(len(reader)))
    h, w = (int(v) for v in reader.table.sizes[i])
    scale = float(np.exp(rng.uniform(np.log(0.2), np.log(8))))
    resized = (max(round(h * scale), 1), max(round(w * scale), 1))
    size = (int(rng.integers(1, 80)), int(rng.integers(1, 80)))
    start = [int(rng.integers(0, max(f - p, 0) + 1)) for f, p in zip(resized, size, strict=True)]
    if rng.random() < 0.2:  # past the border
        start = [min(s + 5, f - 1) for s, f in zip(start, resized, strict=True)]
    return CropRequest(i, resized, (*start, *size), flip=bool(rng.random() < 0.5))


def test_window_first_equals_resize_then_crop(reader: PanopticReader) -> None:
    rng = np.random.default_rng(0)
    dataset = PanopticDataset(reader, min_pixels=0)
    differing = pixels = 0
    for _ in range(300):
        request = random_request(rng, reader)
        (sample,) = dataset[[request]]
        batch = collate([[sample]], size_divisor=1)
        image, labels = resize_then_crop(*reader.read(request.image_index), request, (0, 0, 0))
        got = batch.images[0].permute(1, 2, 0).numpy()
        assert got.shape == image.shape
        difference = np.abs(got.astype(int) - image)
        assert difference.max() <= 1, f"{request} differs by {difference.max()} grey levels"
        differing += int((difference > 0).sum())
        pixels += difference.size
        np.testing.assert_array_equal(batch.targets[0].id_map.numpy(), labels, err_msg=str(request))
        top, left, h, w = request.window
        assert sample.size.valid == (min(h, request.resized[0] - top), min(w, request.resized[1] - left))
    assert differing <= 3e-3 * pixels, f"{differing} of {pixels} values differ by one grey level"


@pytest.mark.parametrize("stored", [(37, 53), (512, 1024), (100, 3)])
@pytest.mark.parametrize("scale", [0.25, 1 / 3, 0.5, 1.0, 1.5, 2.0, 3.0, 7 / 3])
def test_ties_of_nearest_fall_as_in_pillow(stored: tuple[int, int], scale: float) -> None:
    resized = (max(round(stored[0] * scale), 1), max(round(stored[1] * scale), 1))
    ids = np.arange(stored[0] * stored[1], dtype=np.int32).reshape(stored)
    whole = np.asarray(Image.fromarray(ids).resize(resized[::-1], Image.Resampling.NEAREST))
    for window in ((0, 0, *resized), (resized[0] // 2, resized[1] // 3, 9, 9)):
        part = plan(stored, resized, window)
        t, x, h, w = part.source
        got = resize_id_map(ids[t : t + h, x : x + w], stored, resized, part)
        top, left, height, width = part.window
        np.testing.assert_array_equal(got, whole[top : top + height, left : left + width])


def test_only_the_window_is_read() -> None:
    part = plan((1024, 2048), (3096, 6192), (1000, 2000, 512, 1024))
    assert part.source[2] * part.source[3] < 1.3 * (512 * 1024) / 3.02**2
    image = np.random.default_rng(0).integers(0, 256, (*part.source[2:], 3), dtype=np.uint8)
    assert resize_image(image, part).shape == (512, 1024, 3)
    with pytest.raises(ValueError, match="does not lie on"):
        plan((10, 10), (20, 20), (20, 0, 5, 5))


def test_image_smaller_than_the_crop_is_padded_with_void(reader: PanopticReader) -> None:
    dataset = PanopticDataset(reader)
    for flip in (False, True):
        (sample,) = dataset[[CropRequest(0, (20, 30), (0, 0, 64, 64), flip=flip)]]
        batch = collate([[sample]], size_divisor=32)
        (target,) = batch.targets
        assert batch.images.shape == (1, 3, 64, 64)
        assert (target.id_map[20:] == 0).all()
        assert (target.id_map[:, 30:] == 0).all()
        assert (target.id_map[:18, :28] > 0).any()
        assert sample.size.valid == (20, 30)
        assert not batch.images[0, :, 20:].any()
        assert not batch.images[0, :, :, 30:].any()


def check_target(sample: Any, reader: PanopticReader) -> None:
    """Every row of the table against a loop over pixels."""
    target = sample.target
    record = reader.records[target.image_index]
    assert target.image_id == record.image_id
    listed = record.segments.ids.tolist()
    for row in range(len(target)):
        ys, xs = (target.id_map == row + 1).nonzero(as_tuple=True)
        assert target.areas[row] == len(ys)
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(ys) else [0, 0, 0, 0]
        assert target.boxes[row].tolist() == [float(v) for v in box]
        k = listed.index(int(target.segment_ids[row]))
        assert target.class_ids[row] == record.segments.class_ids[k]
        assert target.is_crowd[row] == bool(record.segments.iscrowd[k])
        assert target.is_thing[row] == reader.classes.is_thing[int(target.class_ids[row])]
    assert int(target.id_map.max()) <= len(target)


def test_targets_of_crops(reader: PanopticReader) -> None:
    rng = np.random.default_rng(3)
    dropped = 0
    for _ in range(60):
        request = random_request(rng, reader)
        (sample,) = PanopticDataset(reader)[[request]]
        (kept,) = PanopticDataset(reader, keep_removed_segments=True)[[request]]
        (strict,) = PanopticDataset(reader, min_pixels=40)[[request]]
        for s in (sample, kept, strict):
            check_target(s, reader)
        assert (sample.target.areas >= 2).all()
        assert (strict.target.areas >= 40).all()
        assert len(kept.target) == len(reader.records[request.image_index].segments)
        rows = (kept.target.areas >= 2).nonzero().flatten()
        assert kept.target.segment_ids[rows].tolist() == sample.target.segment_ids.tolist()
        wanted = torch.where(torch.isin(kept.target.id_map, rows.int() + 1), kept.target.id_map, 0)
        assert ((wanted > 0) == (sample.target.id_map > 0)).all()
        dropped += len(kept.target) - len(sample.target)
    assert dropped > 20


def test_the_last_pixel_of_a_removed_segment_becomes_void(reader: PanopticReader) -> None:
    _, id_map = reader.read(0)
    crop = np.full((8, 8), 1, np.int32)
    crop[3, 4] = 2
    target = make_target(crop, reader, 0)
    assert target.id_map[3, 4] == 0
    assert target.segment_ids.tolist() == [int(reader.records[0].segments.ids[0])]
    assert make_target(np.zeros((4, 4), np.int32), reader, 0).boxes.shape == (0, 4)
    assert len(make_target(id_map, reader, 0, min_pixels=0)) == len(reader.records[0].segments)


def test_evaluation_keeps_the_target_at_its_size(root: Path, reader: PanopticReader) -> None:
    dataset = EvaluationDataset(reader, ShortestSide(choices=[32]), limit=4)
    assert dataset.indices == [0, 2, 3, 5]
    (sample,) = dataset[1]
    image, id_map = reader.read(2)
    height, width = image.shape[:2]
    size = (32, int(width * 32 / height + 0.5))
    whole = resized_whole(image, size[::-1])
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0), whole)
    np.testing.assert_array_equal(sample.target.id_map, id_map)
    assert (sample.size.valid, sample.size.original) == (size, (height, width))
    check_target(sample, reader)
    batch = collate([dataset[1]], pad_targets=False)
    assert batch.images.shape[2:] == (32, -(-size[1] // 32) * 32)
    assert batch.targets[0].id_map.shape == (height, width)
    (plain,) = EvaluationDataset(reader)[0]
    np.testing.assert_array_equal(plain.image.permute(1, 2, 0), reader.read(0)[0])


def test_collate_keeps_pairs_together_and_pads(reader: PanopticReader) -> None:
    dataset = PanopticDataset(reader)
    items = [
        [CropRequest(0, (60, 90), (0, 0, 40, 50), pair=7), CropRequest(1, (64, 96), (0, 0, 30, 70), pair=7)],
        [CropRequest(2, (60, 90), (0, 0, 10, 10))],
    ]
    batch = collate([dataset[i] for i in items], size_divisor=16)
    assert batch.images.shape == (3, 3, 48, 80)
    assert batch.images.dtype == torch.uint8
    assert batch.pairs.tolist() == [7, 7, -1]
    assert [t.image_index for t in batch.targets] == [0, 1, 2]
    for k, request in enumerate(r for item in items for r in item):
        (sample,) = dataset[[request]]
        h, w = request.window[2:]
        assert batch.targets[k].id_map.shape == (48, 80)
        assert torch.equal(batch.images[k, :, :h, :w], sample.image)
        assert torch.equal(batch.targets[k].id_map[:h, :w], sample.target.id_map)
        assert int(batch.targets[k].id_map.sum()) == int(sample.target.id_map.sum())
        assert not batch.images[k, :, h:].any()
        assert not batch.images[k, :, :, w:].any()
        assert batch.file_names[k].endswith(f"{request.image_index:04d}.png")


# ------------------------------------------------------------------------------------------------ colour jitter


def test_jitter_follows_the_seed() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    jitter = ColorJitter()
    one = jitter(image.copy(), 2**61 + 5)
    many = [jitter(image.copy(), seed) for seed in range(30)]
    np.testing.assert_array_equal(one, pickle.loads(pickle.dumps(jitter))(image.copy(), 2**61 + 5))
    assert one.dtype == np.uint8
    assert one.shape == image.shape
    same = sum(np.array_equal(m, image) for m in many)
    assert 0 < same < 15, "each of four with probability one half: about 2 of 30 stay as they are"
    assert len({m.tobytes() for m in many}) > 15


def test_jitter_of_brightness_against_the_formula() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    neutral = {"contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    got = ColorJitter(brightness=(1.2, 1.2), probability=1.0, **neutral)(image, 0)
    np.testing.assert_allclose(got, np.clip(image * 1.2, 0, 255), atol=1)


def test_jitter_leaves_labels_and_is_drawn_from_the_request(reader: PanopticReader) -> None:
    request = CropRequest(0, (60, 90), (0, 0, 40, 50), seed=11)
    (plain,) = PanopticDataset(reader)[[request]]
    (one,) = PanopticDataset(reader, ColorJitter(probability=1.0))[[request]]
    (two,) = PanopticDataset(reader, ColorJitter(probability=1.0))[[request]]
    assert torch.equal(one.image, two.image)
    assert not torch.equal(one.image, plain.image)
    assert torch.equal(one.target.id_map, plain.target.id_map)


# ------------------------------------------------------------------------------------------------ DataModule

RESIZE = ShortestSide(range=(40, 90))
PAIRED = partial(PairedCropSampler, crop_size=(32, 32), resize=RESIZE, target_sizes=(8, 16), shortest=(40, 200))


def module(root: Path, **options: Any) -> PanopticDataModule:
    settings = {
        "name": "coco_panoptic",
        "root": root,
        "train": "train2017",
        "val": "val2017",
        "sampling": PAIRED,
        "batch_size": 4,
        "num_workers": 0,
        "cache_dir": root.parent / "cache",
    }
    return PanopticDataModule(**{**settings, **options})


def test_datamodule_gives_pairs_and_whole_images(root: Path) -> None:
    data = module(root, num_workers=1, val_limit=2)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 2  # six images: three pairs, rounded up to whole batches
    for batch in batches:
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.pairs[0] == batch.pairs[1] != batch.pairs[2] == batch.pairs[3]
    whole = list(data.val_dataloader())
    assert [b.targets[0].image_id for b in whole] == ["10", "12"]
    assert whole[0].sizes[0].original == tuple(whole[0].targets[0].id_map.shape)
    assert data.classes.names == ("road", "sky", "person", "car")
    assert data.crops_per_device == 4


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_an_odd_batch_of_pairs_is_refused_at_start(root: Path, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"sampling.batch_size={batch_size} is odd.*Set sampling.batch_size="):
        module(root, batch_size=batch_size)
    hidden = module(root, batch_size=batch_size, sampling=lambda **k: PAIRED(**k))
    with pytest.raises(ConfigError, match="is odd"):
        hidden.train_dataloader()
    module(root, batch_size=batch_size, sampling=partial(RandomCropSampler, crop_size=(8, 8), resize=RESIZE))


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val is not set"):
        module(root, val=None).setup("validate")
    with pytest.raises(ConfigError, match=r"data\.root is not set"):
        PanopticDataModule("vistas", train="training", val="validation").setup()
    with pytest.raises(ConfigError, match="sampling=full_image"):
        module(root, sampling=None).train_dataloader()
    with pytest.raises(ConfigError, match=r"sampling\.batch_size=0"):
        module(root, batch_size=0)
    with pytest.raises(ConfigError, match=r"data\.val_limit=0"):
        module(root, val_limit=0).val_dataloader()
    shutil.copytree(root, tmp_path / "other")
    edit(tmp_path / "other/annotations/panoptic_val2017.json", lambda c: c["categories"].reverse())
    with pytest.raises(DataError, match="different 'categories'"):
        module(tmp_path / "other").setup("fit")


def test_validation_needs_no_training_split(root: Path) -> None:
    data = module(root, train=None, sampling=None)
    data.setup("validate")
    assert len(data.val_dataloader()) == 3
    assert len(data.classes) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_one_sentence(root: Path, tmp_path: Path, workers: int) -> None:
    """It ends training, but takes a single image out of an evaluation."""
    shutil.copytree(root, tmp_path / "set")
    (tmp_path / "set/val2017/0001.png").unlink()
    data = module(tmp_path / "set", num_workers=workers)
    batches = list(data.val_dataloader())
    assert [len(batch) for batch in batches] == [1, 0, 1]
    (fault,) = batches[1].faults
    assert fault.startswith(str(tmp_path / "set/val2017/0001.png"))
    for file in (tmp_path / "set/train2017").iterdir():
        file.unlink()
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    assert str(caught.value).startswith(str(tmp_path / "set/train2017"))
    assert "\n" not in str(caught.value)


class Recorder(lightning.LightningModule):
    """Notes which crops each step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        digest = f"{[t.segment_ids.tolist() for t in batch.targets]}{int(batch.images.long().sum())}"
        self.seen.append((self.current_epoch, self.global_step, digest))
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(root: Path, folder: Path, steps: int, workers: int, resume: Path | None = None) -> Recorder:
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        limit_val_batches=0,
    )
    model = Recorder()
    trainer.fit(model, datamodule=module(root, num_workers=workers), ckpt_path=resume)
    return model


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_sees_the_same_crops(root: Path, tmp_path: Path) -> None:
    """Two steps an epoch: the stops are mid-epoch, at the end of one, and mid-epoch of the third."""
    expected = fit(root, tmp_path / "whole", 7, 0).seen
    assert len({digest for *_, digest in expected}) == 7
    for stop, workers in ((1, 0), (2, 0), (5, 0), (4, 1), (3, 1)):
        path = next((tmp_path / "whole").glob(f"*step={stop}.ckpt"))
        resumed = fit(root, tmp_path / f"resumed{stop}", 7, workers, path).seen
        assert [s[1:] for s in resumed] == [s[1:] for s in expected[stop:]], f"stopped after step {stop}"
