"""Datasets: crops with their targets for training, whole images for evaluation, and the collate function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import find_objects
from torch import Tensor
from torch.utils.data import Dataset

from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.functional.resizing import Size
from panoptic_ibs.structures import Batch, CropRequest, ImageSize, Target

from .geometry import ShortestSide
from .readers import ImageMemory, PanopticReader
from .windows import plan, resize_id_map, resize_image

Transform = Callable[[np.ndarray, int], np.ndarray]
"""(image (H, W, 3) uint8, seed) -> image of the same shape; labels are not touched."""


@dataclass
class Sample:
    """One image or crop: ``image`` (3, h, w) uint8 RGB, its target, and what the batch needs to know.

    ``canvas`` is the (height, width) that was asked for; the image fills its top left, :func:`collate` pads the rest.
    """

    image: Tensor
    target: Target
    size: ImageSize
    canvas: Size
    pair: int = -1
    file_name: str = ""


@dataclass
class Unread:
    """What takes the place of an image that cannot be read, in evaluation: ``reason`` names the file."""

    reason: str


class PanopticDataset(Dataset[list[Sample]]):
    """Fulfils crop requests: reads the source window, resizes only that, flips, and makes the target.

    The result has the pixels of resizing the whole image and cropping then. All that is random comes from the request:
    two calls with one request give the same sample.

    Args:
        reader: the split.
        transforms: photometric augmentation, called with ``CropRequest.seed``; none when None.
        keep_removed_segments: keep segments that the crop removed as empty rows (what the reference once did, see
            the crop fix of de Geus and Dubbelman, 2023). Otherwise they are no targets, and their last pixels become
            void.
        min_pixels: a segment with fewer pixels in the crop counts as removed.
        memory_mb: see :class:`ImageMemory`.
    """

    def __init__(
        self,
        reader: PanopticReader,
        transforms: Transform | None = None,
        keep_removed_segments: bool = False,
        min_pixels: int = 2,
        memory_mb: float = 0,
    ) -> None:
        self.reader = reader
        self.memory = ImageMemory(reader, memory_mb)
        self.transforms = transforms
        self.keep_removed_segments = keep_removed_segments
        self.min_pixels = min_pixels

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, requests: Sequence[CropRequest]) -> list[Sample]:
        """One sample per request.

        Raises:
            DataError: if a file is missing, truncated, of another size, or holds an unlisted id.
        """
        return [self._fulfil(request) for request in requests]

    def _fulfil(self, request: CropRequest) -> Sample:
        i = request.image_index
        height, width = self.reader.table.sizes[i]
        stored = (int(height), int(width))
        part = plan(stored, request.resized, request.window)
        source, source_ids = self.memory.read(i, part.source)
        image = resize_image(source, part)
        id_map = resize_id_map(source_ids, stored, request.resized, part)
        if request.flip:
            image, id_map = image[:, ::-1].copy(), id_map[:, ::-1].copy()
        if self.transforms is not None:
            image = self.transforms(image, request.seed)
        valid = (image.shape[0], image.shape[1])
        return Sample(
            image=_channels_first(image),
            target=make_target(id_map, self.reader, i, 0 if self.keep_removed_segments else self.min_pixels),
            size=ImageSize(valid=valid, original=valid),
            canvas=(request.window[2], request.window[3]),
            pair=-1 if request.pair is None else request.pair,
            file_name=str(self.reader.image_path(i)),
        )


class EvaluationDataset(Dataset[list[Sample | Unread]]):
    """Whole images, resized by the policy's largest size; targets stay at the size on disk, with every listed segment.

    A broken file does not end an evaluation: it gives an :class:`Unread`, and a batch that tells it.

    Args:
        reader: the split.
        resize: policy, or None to keep the size on disk.
        limit: number of images, taken evenly over the split; all when None.

    Raises:
        ConfigError: if ``limit`` is below 1.
    """

    def __init__(self, reader: PanopticReader, resize: ShortestSide | None = None, limit: int | None = None) -> None:
        self.reader = reader
        self.resize = resize
        if limit is not None and limit < 1:
            raise ConfigError(f"data.val_limit={limit} must be at least 1, or null for all images.")
        count = len(reader) if limit is None else min(limit, len(reader))
        self.indices = [int(i) for i in np.linspace(0, len(reader) - 1, count).round()]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int | None) -> list[Sample | Unread]:
        """The image at ``position`` as a list of one sample; no sample for None."""
        if position is None:
            return []
        i = self.indices[position]
        try:
            image, id_map = self.reader.read(i)
        except DataError as error:
            return [Unread(str(error))]
        original = (image.shape[0], image.shape[1])
        size = self.resize.fixed(*original) if self.resize is not None else original
        if size != original:
            image = resize_image(image, plan(original, size, (0, 0, *size)))
        return [
            Sample(
                image=_channels_first(image),
                target=make_target(id_map, self.reader, i, min_pixels=0),
                size=ImageSize(valid=size, original=original),
                canvas=size,
                file_name=str(self.reader.image_path(i)),
            )
        ]


def make_target(id_map: np.ndarray, reader: PanopticReader, image_index: int, min_pixels: int = 2) -> Target:
    """Make the target of a crop: count pixels, drop what the crop removed, find tight boxes in one pass.

    Args:
        id_map: (H, W) integer, row + 1 of the image's segment table, 0 void.
        reader: the split.
        image_index: position of the image.
        min_pixels: segments with fewer pixels leave the table and become void; 0 keeps all rows, even empty ones.
    """
    record = reader.records[image_index]
    segments = record.segments
    counts = np.bincount(id_map.ravel(), minlength=len(segments) + 1)
    keep = np.flatnonzero(counts[1:] >= min_pixels)
    if len(keep) < len(segments):
        lookup = np.zeros(len(segments) + 1, id_map.dtype)
        lookup[keep + 1] = np.arange(1, len(keep) + 1)
        id_map = lookup[id_map]
    boxes = np.zeros((len(keep), 4), np.float32)
    for row, found in enumerate(find_objects(id_map, max_label=len(keep))):
        if found is not None:
            boxes[row] = (found[1].start, found[0].start, found[1].stop, found[0].stop)
    class_ids = segments.class_ids[keep]
    return Target(
        id_map=torch.from_numpy(np.ascontiguousarray(id_map)),
        class_ids=torch.from_numpy(class_ids),
        is_thing=torch.from_numpy(np.array(reader.classes.is_thing, dtype=bool)[class_ids]),
        is_crowd=torch.from_numpy(segments.iscrowd[keep]),
        boxes=torch.from_numpy(boxes),
        areas=torch.from_numpy(counts[1:][keep].astype(np.int64)),
        segment_ids=torch.from_numpy(segments.ids[keep]),
        image_index=image_index,
        image_id=record.image_id,
    )


def _channels_first(image: np.ndarray) -> Tensor:
    """(3, H, W) tensor of (H, W, 3); a copy, since the memory of Pillow's images cannot be written to."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def collate(
    items: Sequence[Sequence[Sample | Unread]],
    size_divisor: int = 32,
    pad_targets: bool = True,
) -> Batch:
    """Join dataset items to a batch, padded at the bottom and right; the two crops of a pair stay neighbours.

    What a padding pixel is does not matter: :meth:`panoptic_ibs.model.PanopticModel.normalize` makes it zero.

    Args:
        items: lists of samples; none gives a batch without images. What could not be read goes to ``faults``.
        size_divisor: height and width of the batch are multiples of it.
        pad_targets: pad the id maps with void to the batch's size (training); else leave them (evaluation).
    """
    samples = [sample for item in items for sample in item if isinstance(sample, Sample)]
    faults = [sample.reason for item in items for sample in item if isinstance(sample, Unread)]
    if not samples:
        nothing = torch.empty((0, 3, 0, 0), dtype=torch.uint8)
        return Batch(nothing, [], [], torch.empty(0, dtype=torch.int64), faults=faults)
    height, width = (_round_up(max(s.canvas[k] for s in samples), size_divisor) for k in (0, 1))
    images = torch.empty((len(samples), 3, height, width), dtype=torch.uint8)
    for canvas, sample in zip(images, samples, strict=True):
        _place(sample.image, canvas)
        if pad_targets and sample.target.id_map.shape != (height, width):
            ids = sample.target.id_map
            sample.target.id_map = _place(ids, torch.empty((height, width), dtype=ids.dtype))
    return Batch(
        images=images,
        targets=[s.target for s in samples],
        sizes=[s.size for s in samples],
        pairs=torch.tensor([s.pair for s in samples], dtype=torch.int64),
        file_names=[s.file_name for s in samples],
        faults=faults,
    )


def _place(part: Tensor, canvas: Tensor) -> Tensor:
    """Copy ``part`` to the top left of the canvas and make the rest zero, which is void in an id map."""
    height, width = part.shape[-2:]
    canvas[..., :height, :width] = part
    canvas[..., height:, :] = 0
    canvas[..., :height, width:] = 0
    return canvas


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


__all__ = ["EvaluationDataset", "PanopticDataset", "Sample", "Size", "collate", "make_target"]
