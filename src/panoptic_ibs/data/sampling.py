"""Samplers: which crop of which image comes next. They read no pixels.

A sampler yields one list of :class:`CropRequest` per dataset item: two for a pair, one otherwise. Request ``index`` of
an epoch follows from (seed, epoch, index) alone, so it is the same on any number of ranks and workers and after a
resume. Rank r of W takes the indices r, r + W, r + 2 W, ...; an epoch is rounded up to whole batches on every rank, and
what is added comes from the next shuffle.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from torch.utils.data import DistributedSampler

from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.functional.resizing import Size, resized_size
from panoptic_ibs.ranges import AtLeastOne, Bounds, Items, Positive, Share
from panoptic_ibs.structures import CropRequest

from .geometry import Resize, offset_around, random_offset

if TYPE_CHECKING:
    from .readers import PanopticReader, Record

_SHUFFLE = 1  # a fourth number in the seed keeps shuffles apart from requests


class RequestSampler(DistributedSampler[list[CropRequest]], ABC):
    """What all samplers share: sharding, epochs and resuming. Subclasses implement :meth:`requests`.

    It is a ``DistributedSampler``, so that Lightning neither replaces it nor forgets ``set_epoch``.

    Args:
        reader: the split that requests are made for.
        seed: root of all randomness.
        rank: this process, from 0.
        world_size: number of processes.
        resize: policy for the resized size of the whole image.
        epoch_length: items in an epoch over all ranks (a pair is one item); all images once when None.
        flip_probability: share of crops to mirror.
    """

    crops_per_item = 1

    def __init__(
        self,
        reader: PanopticReader,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        resize: Resize,
        epoch_length: AtLeastOne | None = None,
        flip_probability: Share = 0.5,
    ) -> None:
        super().__init__(reader, num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        if epoch_length is not None and epoch_length < 1:
            raise ConfigError(f"sampling.epoch_length={epoch_length} must be at least 1, or null for all images.")
        self.reader = reader
        self.resize = resize
        self.epoch_length = epoch_length or -(-len(reader) // self.crops_per_item)
        self.flip_probability = flip_probability
        self.items_per_batch = 1
        self.start_index = 0
        self._start_epoch = 0
        self._orders: dict[tuple[int, int, int], np.ndarray] = {}

    @abstractmethod
    def requests(self, epoch: int, index: int) -> list[CropRequest]:
        """Item ``index`` of ``epoch``: a function of (seed, epoch, index) alone."""

    def __len__(self) -> int:
        """Items of one whole epoch on this rank; the same on every rank."""
        step = self.num_replicas * self.items_per_batch
        return -(-self.epoch_length // step) * self.items_per_batch

    def __iter__(self) -> Iterator[list[CropRequest]]:
        start = self.start_index if self.epoch == self._start_epoch else 0
        for item in range(start // self.num_replicas, len(self)):
            yield self.requests(self.epoch, item * self.num_replicas + self.rank)

    def resume(self, epoch: int, start_index: int) -> None:
        """Start ``epoch`` at item ``start_index``, counted over all ranks; other epochs start at 0."""
        self.epoch, self._start_epoch, self.start_index = epoch, epoch, start_index

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration walks over."""
        if epoch != self._start_epoch:
            self.start_index = 0
        super().set_epoch(epoch)

    def _rng(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, index])

    def _shuffled(self, epoch: int, index: int, count: int) -> int:
        """Element ``index`` of an endless row of shuffles of ``range(count)``."""
        key = (epoch, index // count, count)
        if key not in self._orders:
            self._orders = {key: np.random.default_rng([self.seed, *key[:2], _SHUFFLE]).permutation(count)}
        return int(self._orders[key][index % count])

    def _request(
        self,
        rng: np.random.Generator,
        image_index: int,
        resized: Size,
        window: tuple[int, int, int, int],
        segment_id: int | None = None,
        pair: int | None = None,
    ) -> CropRequest:
        flip = bool(rng.random() < self.flip_probability)
        return CropRequest(image_index, resized, window, flip, int(rng.integers(2**62)), segment_id, pair)


class FullImageSampler(RequestSampler):
    """Whole images, each once an epoch in random order, resized by the policy."""

    def requests(self, epoch: int, index: int) -> list[CropRequest]:
        """See :class:`RequestSampler`."""
        rng = self._rng(epoch, index)
        image_index = self._shuffled(epoch, index, len(self.reader))
        resized = self.resize.draw(rng, *_size(self.reader, image_index))
        return [self._request(rng, image_index, resized, (0, 0, *resized))]


class CropSampler(RequestSampler):
    """Base of the samplers that cut crops of one size.

    Args:
        crop_size: (height, width) in pixels. A smaller image is padded with void at the bottom and right.
        reader, seed, rank, world_size, options: see :class:`RequestSampler`.
    """

    def __init__(
        self,
        reader: PanopticReader,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        crop_size: Annotated[Sequence[AtLeastOne], Items(2)],
        resize: Resize,
        epoch_length: AtLeastOne | None = None,
        flip_probability: Share = 0.5,
    ) -> None:
        super().__init__(
            reader,
            seed,
            rank,
            world_size,
            resize=resize,
            epoch_length=epoch_length,
            flip_probability=flip_probability,
        )
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ConfigError(f"sampling.crop_size={list(crop_size)} must be [height, width] in pixels.")
        self.crop_size: Size = (int(crop_size[0]), int(crop_size[1]))

    def _random_window(self, rng: np.random.Generator, resized: Size) -> tuple[int, int, int, int]:
        top, left = (random_offset(rng, full, part) for full, part in zip(resized, self.crop_size, strict=True))
        return (top, left, *self.crop_size)

    def _window_around(
        self, rng: np.random.Generator, record: Record, resized: Size, row: int
    ) -> tuple[int, int, int, int]:
        """A random window that holds the centre of the box of segment ``row``."""
        x, y, w, h = (float(v) for v in record.segments.boxes[row])
        top = offset_around(rng, resized[0], self.crop_size[0], (y + h / 2) * resized[0] / record.height)
        left = offset_around(rng, resized[1], self.crop_size[1], (x + w / 2) * resized[1] / record.width)
        return (top, left, *self.crop_size)


class RandomCropSampler(CropSampler):
    """Random resize, then a crop anywhere (Mask2Former's crop)."""

    def requests(self, epoch: int, index: int) -> list[CropRequest]:
        """See :class:`RequestSampler`."""
        rng = self._rng(epoch, index)
        image_index = self._shuffled(epoch, index, len(self.reader))
        resized = self.resize.draw(rng, *_size(self.reader, image_index))
        return [self._request(rng, image_index, resized, self._random_window(rng, resized))]


class InstanceCropSampler(CropSampler):
    """Random resize, then a crop that holds the box centre of a random non-crowd thing (Panoptic FCN's crop).

    An image without things is cropped anywhere.
    """

    def requests(self, epoch: int, index: int) -> list[CropRequest]:
        """See :class:`RequestSampler`."""
        rng = self._rng(epoch, index)
        image_index = self._shuffled(epoch, index, len(self.reader))
        record = self.reader.records[image_index]
        resized = self.resize.draw(rng, record.height, record.width)
        segments = record.segments
        is_thing = np.array(self.reader.classes.is_thing)[segments.class_ids]
        rows = np.flatnonzero(is_thing & ~segments.iscrowd)
        if not len(rows):
            return [self._request(rng, image_index, resized, self._random_window(rng, resized))]
        row = int(rng.choice(rows))
        window = self._window_around(rng, record, resized, row)
        return [self._request(rng, image_index, resized, window, int(segments.ids[row]))]


class PairedCropSampler(CropSampler):
    """Two crops that show the same class at the same size, so that look-alikes meet in one batch.

    The unit is a class: an epoch walks over shuffles of the classes that occur, stuff included. For a class, one target
    size s is drawn for the pair; each crop draws an image with a usable segment of the class, then such a segment. A
    thing is scaled by s / sqrt(w h) of its box, within ``shortest`` and ``longest``; stuff gets the ordinary random
    resize. The crop holds the centre of the segment's box. The two segments differ whenever the class has more than
    one. Default clamps are those for Cityscapes; for Vistas they are (1024, 6192) and 9288.

    Args:
        target_sizes: sizes s in pixels.
        scale_segments: False gives things the ordinary random resize too.
        shortest: (low, high) clamp of the resized image's shorter side, in pixels.
        longest: cap of the longer side, in pixels.
        same_image: whether both crops may come from one image; if not, the second image differs where the class
            occurs in more than one.
        crop_size, resize, epoch_length, flip_probability: see the base classes. An epoch is as many crops as there
            are images when ``epoch_length`` is None.

    Raises:
        DataError: if no class has a usable segment (not a crowd, with a box and an area).
    """

    crops_per_item = 2

    def __init__(
        self,
        reader: PanopticReader,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        crop_size: Annotated[Sequence[AtLeastOne], Items(2)],
        resize: Resize,
        target_sizes: Annotated[Sequence[Positive], Items(least=1)] = (32, 64, 128, 256, 512),
        scale_segments: bool = True,
        shortest: Annotated[Sequence[Annotated[float, Bounds(least=1)]], Items(2)] = (512, 3096),
        longest: Annotated[float, Bounds(least=1)] = 6192,
        same_image: bool = True,
        epoch_length: AtLeastOne | None = None,
        flip_probability: Share = 0.5,
    ) -> None:
        super().__init__(
            reader,
            seed,
            rank,
            world_size,
            crop_size=crop_size,
            resize=resize,
            epoch_length=epoch_length,
            flip_probability=flip_probability,
        )
        if len(shortest) != 2 or not 1 <= shortest[0] <= shortest[1]:
            raise ConfigError(f"sampling.shortest={list(shortest)} is not (low, high) with 1 <= low <= high.")
        if not len(target_sizes) or min(target_sizes) <= 0:
            raise ConfigError(f"sampling.target_sizes={list(target_sizes)} must be one or more positive sizes.")
        self.target_sizes = tuple(float(s) for s in target_sizes)
        self.scale_segments = scale_segments
        self.shortest = (float(shortest[0]), float(shortest[1]))
        self.longest = float(longest)
        self.same_image = same_image
        self.class_ids = self._usable_classes(rank)

    def _usable_classes(self, rank: int) -> tuple[int, ...]:
        occurring = self.reader.index.occurring
        if not occurring:
            raise DataError(
                f"{self.reader.json_path}: no class has a usable segment (iscrowd 0, bbox and area not empty), so "
                "sampling=paired_crop has nothing to draw. Choose sampling=random_crop or correct the annotations."
            )
        without = [c.name for i, c in enumerate(self.reader.classes.classes) if i not in set(occurring)]
        if without and rank == 0:
            names = ", ".join(without[:8]) + (", ..." if len(without) > 8 else "")
            text = f"{self.reader.json_path}: {len(without)} classes have no usable segment and are skipped: {names}."
            warnings.warn(text, stacklevel=3)
        return occurring

    def requests(self, epoch: int, index: int) -> list[CropRequest]:
        """See :class:`RequestSampler`."""
        rng = self._rng(epoch, index)
        class_id = self.class_ids[self._shuffled(epoch, index, len(self.class_ids))]
        size = self.target_sizes[int(rng.integers(len(self.target_sizes)))]
        first = self._draw(rng, class_id, None)
        return [self._crop(rng, *drawn, size, index) for drawn in (first, self._draw(rng, class_id, first))]

    def _draw(self, rng: np.random.Generator, class_id: int, other: tuple[int, int] | None) -> tuple[int, int]:
        """An image, then a segment of the class in it; not ``other`` if there is a choice."""
        index = self.reader.index
        images = index.images(class_id)
        if other is not None and len(images) > 1:
            lonely = len(index.segments(class_id, other[0])) == 1
            if lonely or not self.same_image:
                images = images[images != other[0]]
        image_index = int(rng.choice(images))
        rows = index.segments(class_id, image_index)
        if other is not None and image_index == other[0] and len(rows) > 1:
            rows = rows[rows != other[1]]
        return image_index, int(rng.choice(rows))

    def _crop(self, rng: np.random.Generator, image_index: int, row: int, size: float, pair: int) -> CropRequest:
        record = self.reader.records[image_index]
        segments = record.segments
        if self.scale_segments and self.reader.classes.is_thing[int(segments.class_ids[row])]:
            extent = float(np.sqrt(np.prod(segments.boxes[row, 2:].astype(np.float64))))
            side = min(record.height, record.width) * size / extent
            side = min(max(side, self.shortest[0]), self.shortest[1])
            resized = resized_size((record.height, record.width), side, self.longest)
        else:
            resized = self.resize.draw(rng, record.height, record.width)
        window = self._window_around(rng, record, resized, row)
        return self._request(rng, image_index, resized, window, int(segments.ids[row]), pair)


class EvaluationSampler(DistributedSampler[int | None]):
    """Positions in order, each exactly once over all ranks: rank r of W takes r, r + W, ...

    Ranks may hold one position more or less than others. That is right for evaluation, where ranks meet only when the
    metrics' sums are added at the end; padding with repeated images, as the usual sampler does, would count them twice.
    A rank without a position gives one None, a batch without images: no rank may miss that meeting.
    """

    def __init__(self, count: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(count), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._positions: Sequence[int | None] = range(rank, count, world_size) or [None]

    def __iter__(self) -> Iterator[int | None]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


def _size(reader: PanopticReader, image_index: int) -> Size:
    height, width = reader.table.sizes[image_index]
    return int(height), int(width)
