"""The LightningDataModule: readers, sampler, datasets and loaders put together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from panoptic_ibs import signals
from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.ranges import AtLeastOne, NonNegative, OptionsOf, Seed, Whole

from .dataset import EvaluationDataset, PanopticDataset, Transform, collate
from .geometry import ShortestSide
from .loading import Loader, Packing
from .readers import PanopticReader, different_classes, make_reader
from .sampling import EvaluationSampler, RequestSampler


class PanopticDataModule(LightningDataModule):
    """Crops for training by any sampler, whole images for evaluation.

    Evaluation takes every image once: rank r of W evaluates images r, r + W, ... without repeats, so ranks may differ
    by one image (metrics add up their sums at the end). Training is resumable within an epoch: the state holds
    the epoch and the items consumed, counted over all ranks, so that even the number of processes may change.

    Args:
        name: layout, one of ``coco_panoptic``, ``cityscapes``, ``vistas``, ``synthetic``.
        root: folder of the data set. With ``synthetic`` it is written there first if it is missing; one of other
            arguments than those of ``synthetic`` is refused.
        train: name of the training split, or None where there is none.
        val: name of the validation split.
        sampling: makes the training sampler from (reader, seed, rank, world_size); None where nothing is trained.
        batch_size: crops per device.
        num_workers: loader processes.
        memory_mb: decoded training images that each loader process keeps, see
            :class:`panoptic_ibs.data.readers.ImageMemory`.
        seed: root of all randomness of the data.
        val_limit: evaluate only so many images, taken evenly over the split.
        cache_dir: folder of the parsed annotations; the user's cache folder when None.
        allow_outside: take files that the annotations name outside the data set's folders.
        eval_resize: size policy in evaluation; None keeps the size on disk.
        transforms: photometric augmentation of the crops.
        keep_removed_segments: see :class:`PanopticDataset`.
        min_pixels: see :class:`PanopticDataset`.
        size_divisor: batches are padded to multiples of it.
        synthetic: ``num_train``, ``num_val``, ``size`` (height, width), ``seed`` and ``scenes`` of the embedded set.
        presets: the data set's own crop sizes and scales, for other configuration files to refer to; not used here.
        train_reader: makes the training reader, in place of ``name``, ``root`` and ``train``.
        val_reader: makes the validation reader.

    Raises:
        ConfigError: if ``batch_size`` does not fit the sampler (an odd one with pairs) or a key is missing.
        DataError: from the readers; and if the two splits have different categories.
    """

    def __init__(
        self,
        name: str = "",
        root: Path | str | None = None,
        train: str | None = None,
        val: str | None = None,
        *,
        sampling: Callable[..., RequestSampler] | None = None,
        batch_size: AtLeastOne = 2,
        num_workers: Whole = 2,
        memory_mb: NonNegative = 0,
        seed: Seed = 0,
        val_limit: AtLeastOne | None = None,
        cache_dir: Path | str | None = None,
        allow_outside: bool = False,
        eval_resize: ShortestSide | None = None,
        transforms: Transform | None = None,
        keep_removed_segments: bool = False,
        min_pixels: Whole = 2,
        size_divisor: AtLeastOne = 32,
        synthetic: Annotated[Mapping[str, Any], OptionsOf("panoptic_ibs.data.synthetic.write_dataset")] | None = None,
        presets: Mapping[str, Any] | None = None,
        train_reader: Callable[[], PanopticReader] | None = None,
        val_reader: Callable[[], PanopticReader] | None = None,
    ) -> None:
        super().__init__()
        self.layout = name
        self.root = root
        self.splits = {"train": train, "val": val}
        self.sampling = sampling
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.memory_mb = memory_mb
        self.seed = seed
        self.val_limit = val_limit
        self.cache_dir = cache_dir
        self.allow_outside = allow_outside
        self.eval_resize = eval_resize
        self.transforms = transforms
        self.keep_removed_segments = keep_removed_segments
        self.min_pixels = min_pixels
        self.size_divisor = size_divisor
        self.synthetic = dict(synthetic or {})
        self._makers = {"train": train_reader, "val": val_reader}
        self._readers: dict[str, PanopticReader] = {}
        self._sampler: RequestSampler | None = None
        self._resume: dict[str, int] | None = None
        self.photographs = True  # False: they need not be there, as predictions are scored without
        _check_batch_size(batch_size, getattr(getattr(sampling, "func", sampling), "crops_per_item", 1))

    @property
    def classes(self) -> ClassTable:
        """The class table, of the training split where there is one."""
        if self._readers:
            return next(iter(self._readers.values())).classes
        return self.reader("train" if self._has("train") else "val").classes

    @property
    def crops_per_device(self) -> int:
        """Crops in the batch of one device."""
        return self.batch_size

    def reader(self, split: str) -> PanopticReader:
        """The reader of ``"train"`` or ``"val"``, made at the first call."""
        if split not in self._readers:
            self._write_synthetic()
            maker = self._makers[split]
            if maker is None and not self.splits[split]:
                raise ConfigError(f"data.{split} is not set. Name the split: data.{split}=NAME.")
            reader = maker() if maker else self._make(str(self.splits[split]))
            for other in self._readers.values():
                different = different_classes(other, reader)
                if different:
                    raise DataError(different)
            self._readers[split] = reader
            for other in self._readers.values():  # colours may differ: the training split's are taken
                other.classes = self._readers.get("train", reader).classes
        return self._readers[split]

    def _make(self, split: str) -> PanopticReader:
        options = {name: getattr(self, name) for name in ("cache_dir", "allow_outside", "photographs")}
        return make_reader(self.layout, self.root, split, **options)

    def _has(self, split: str) -> bool:
        return bool(self._makers[split] or self.splits[split])

    def fingerprint(self) -> dict[str, Any]:
        """What tells the training images apart from another set's, wherever they lie: how many, a hash of their ids."""
        table = self.reader("train").table
        ids = hashlib.sha256("\n".join(map(str, table.image_ids)).encode()).hexdigest()
        return {"train_images": len(table.image_ids), "train_ids": ids[:16]}

    def prepare_data(self) -> None:
        """Write the embedded set if it is wanted and missing; processes wait for the one that writes."""
        self._write_synthetic()

    def _write_synthetic(self) -> None:
        if self.layout != "synthetic" or not self.root or any(self._makers.values()):
            return
        folder = Path(self.root).expanduser() / "gtFine"
        splits = [s for s in self.splits.values() if s]
        missing = any(not (folder / f"cityscapes_panoptic_{s}.json").exists() for s in splits)
        if missing or self.synthetic:  # one that is there must be the one that is asked for
            from .synthetic import write_dataset

            options = {**self.synthetic}
            if "size" in options:
                options["size"] = tuple(options["size"])
            write_dataset(Path(self.root).expanduser(), **options)

    def setup(self, stage: str | None = None) -> None:
        """Read the annotations that ``stage`` needs: both splits to fit, only ``val`` to validate, test or predict."""
        if stage in (None, "fit") and self._has("train"):
            self.reader("train")
        if stage != "fit" or self._has("val"):
            self.reader("val")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of ``batch_size`` crops."""
        if self.sampling is None:
            raise ConfigError("Training needs a sampler: sampling=full_image|random_crop|instance_crop|paired_crop.")
        reader = self.reader("train")
        rank, world_size = self._place()
        sampler = self.sampling(reader=reader, seed=self.seed, rank=rank, world_size=world_size)
        _check_batch_size(self.batch_size, sampler.crops_per_item)
        sampler.items_per_batch = self.batch_size // sampler.crops_per_item
        if self._resume is not None:
            sampler.resume(self._resume["epoch"], self._resume["items"])
        self._sampler = sampler
        dataset = PanopticDataset(reader, self.transforms, self.keep_removed_segments, self.min_pixels, self.memory_mb)
        return Loader(
            dataset,
            batch_size=sampler.items_per_batch,
            sampler=sampler,
            collate_fn=Packing(partial(collate, size_divisor=self.size_divisor)),
            **self._loader_options(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Whole images one by one, in order, each once over all ranks."""
        dataset = EvaluationDataset(self.reader("val"), self.eval_resize, self.val_limit)
        return Loader(
            dataset,
            batch_size=1,
            sampler=EvaluationSampler(len(dataset), *self._place()),
            collate_fn=Packing(partial(collate, size_divisor=self.size_divisor, pad_targets=False)),
            **self._loader_options(),
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "worker_init_fn": _serve,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the training sampler. Lightning does it by itself; own loops call it."""
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Epoch and items consumed in it, over all ranks. Lightning puts it in the checkpoint."""
        if self.trainer is None or self._sampler is None:
            return {}
        trainer = self.trainer
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        if batches >= trainer.num_training_batches:  # workers fetch ahead, before Lightning names the next epoch
            return {"epoch": trainer.current_epoch + 1, "items": 0}
        items = batches * self._sampler.items_per_batch * self._sampler.num_replicas
        return {"epoch": trainer.current_epoch, "items": items}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._resume = dict(state_dict) or None


def _serve(_: int) -> None:
    """What a loader process does first: see to it that it serves to the end when a whole group is told to stop."""
    signals.let_first_pass()


def _check_batch_size(batch_size: int, crops_per_item: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"sampling.batch_size={batch_size} must be at least 1 (crops per device).")
    if batch_size % crops_per_item:
        below = batch_size - batch_size % crops_per_item
        choice = " or ".join(str(b) for b in (below, below + crops_per_item) if b)
        raise ConfigError(
            f"sampling.batch_size={batch_size} is odd, but sampling=paired_crop draws crops in pairs. "
            f"Set sampling.batch_size={choice}."
        )
