"""What goes through training and evaluation: crops, targets, batches, segment embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

# So many segments, and one id more, fit in the type.
_ID_MAP_DTYPES = ((2**8 - 2, torch.uint8), (2**15 - 2, torch.int16), (2**31 - 2, torch.int32))


def id_map_dtype(segments: int) -> torch.dtype:
    """Type of the id maps that readers and heads make for ``segments`` segments: the smallest of uint8, int16, int32.

    Bytes are the memory traffic of batches and metrics. Two things to mind: ``id_map - 1`` is 255 on the void of bytes,
    and torch takes an index of bytes for a mask, so cast first. Maps that users bring may have any integer type.
    """
    return next(dtype for most, dtype in _ID_MAP_DTYPES if segments <= most)


class ImageSize(NamedTuple):
    """Sizes of one image, each (height, width) in pixels.

    ``valid`` is the part of the network input that holds the image (the rest is padding at the bottom and right);
    ``original`` is the size in which predictions are asked for.
    """

    valid: tuple[int, int]
    original: tuple[int, int]


class FeatureLevel(NamedTuple):
    """One output of a backbone: its stride in pixels and its number of channels."""

    stride: int
    channels: int


@dataclass(frozen=True)
class CropRequest:
    """What a sampler asks of a dataset. It reads no pixels and holds plain numbers only.

    Attributes:
        image_index: position of the image in the reader.
        resized: (height, width) that the *whole* image would be resized to.
        window: (top, left, height, width) of the crop, in pixels of the resized image. It may pass the resized
            image's bottom or right border: that part is padding, labelled void.
        flip: mirror the crop horizontally.
        seed: seeds all else that is random in this sample (colour jitter), derived from (seed, epoch, index).
        segment_id: dataset id of the segment that the crop was drawn for, or None.
        pair: number of the pair in the epoch, or None; the two crops of a pair are neighbours in the batch.
    """

    image_index: int
    resized: tuple[int, int]
    window: tuple[int, int, int, int]
    flip: bool = False
    seed: int = 0
    segment_id: int | None = None
    pair: int | None = None


@dataclass
class Target:
    """Ground truth of one image or crop: an id map and a table of N segments.

    Attributes:
        id_map: (H, W) integer, :func:`id_map_dtype` where this package makes it; 0 is void, k >= 1 is row k - 1 of the
            table. To index with it: ``table[id_map.long()]``.
        class_ids: (N,) int64, contiguous class ids.
        is_thing: (N,) bool.
        is_crowd: (N,) bool; crowd segments are neither targets nor misses.
        boxes: (N, 4) float32, tight x1 y1 x2 y2 in pixels of the id map (x2, y2 exclusive); zeros where the segment
            has no pixel left.
        areas: (N,) int64, pixels of the segment in the id map.
        segment_ids: (N,) int64, ids in the data set.
        image_index: position of the image in the reader; with ``segment_ids`` it names a segment everywhere.
        image_id: the data set's name of the image, for messages.
    """

    id_map: Tensor
    class_ids: Tensor
    is_thing: Tensor
    is_crowd: Tensor
    boxes: Tensor
    areas: Tensor
    segment_ids: Tensor
    image_index: int = -1
    image_id: str = ""

    def __len__(self) -> int:
        return self.class_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move the id map to ``device``. The small per-segment table stays on the CPU: grouping by it costs no sync."""
        return replace(self, id_map=self.id_map.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Pin the id map."""
        return replace(self, id_map=self.id_map.pin_memory())


@dataclass
class Batch:
    """B images or crops and their targets.

    Attributes:
        images: (B, 3, H, W) uint8, RGB; padded at the bottom and right.
        targets: B targets. In training their id maps have the size (H, W); in evaluation ``sizes[i].original``.
        sizes: B sizes.
        pairs: (B,) int64 on the CPU, number of the pair that a crop belongs to, -1 for none.
        file_names: B image paths, for messages.
        faults: in evaluation, what is wrong with images that could not be read and so are not in the batch.
    """

    images: Tensor
    targets: list[Target]
    sizes: list[ImageSize]
    pairs: Tensor
    file_names: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move images and id maps to ``device``."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            targets=[t.to(device, non_blocking) for t in self.targets],
        )

    def pin_memory(self) -> Self:
        """Pin images and id maps (called by the DataLoader)."""
        return replace(self, images=self.images.pin_memory(), targets=[t.pin_memory() for t in self.targets])


def dot_product(embeddings: Tensor, features: Tensor) -> Tensor:
    """Logits (S, P) of embeddings (S, C) and features (C, P): the plain product (Panoptic FCN, Mask2Former)."""
    return embeddings @ features


@dataclass
class SegmentEmbeddings:
    """Segment embeddings and pixel features of one supervised output of a head; all that IBS ever sees.

    Attributes:
        embeddings: (S, C), in the graph.
        features: (B, C, H, W), in the graph; usually at stride 4.
        image_index: (S,) int64, the crop (0 to B - 1) that each embedding comes from. Best kept on the CPU: grouping
            embeddings by crop then needs no host-device sync.
        is_thing: (S,) bool, whether the embedding is matched to a *thing* ground-truth segment. Best kept on the CPU.
        weight: (S,) share of each embedding in the loss, or None for one each. Panoptic FCN's k positions of an
            instance have weights that sum to one, or to zero if none of its positions can be used.
        segment_index: (S,) int64, row of the segment in its crop's target, or None if unknown. Lets the caller tell
            which crops hold the very same segment.
        logits: how (S, C) embeddings and (C, P) features become (S, P) logits.
        name: names the output in error messages, e.g. "layer 3".
        count: number of thing instances that the loss is divided by, or None for the summed weight of the things. They
            differ where an instance has no embedding of any weight.
    """

    embeddings: Tensor
    features: Tensor
    image_index: Tensor
    is_thing: Tensor
    weight: Tensor | None = None
    segment_index: Tensor | None = None
    logits: Callable[[Tensor, Tensor], Tensor] = dot_product
    name: str = ""
    count: int | None = None

    def __post_init__(self) -> None:
        s = self.embeddings.shape[0]
        for f in fields(self):
            value: Any = getattr(self, f.name)
            per_segment = f.name in ("image_index", "is_thing", "weight", "segment_index") and value is not None
            if per_segment and value.shape != (s,):
                raise ValueError(f"SegmentEmbeddings.{f.name}: shape {tuple(value.shape)}, expected ({s},).")
        if self.features.ndim != 4 or self.features.shape[1] != self.embeddings.shape[-1]:
            raise ValueError(
                f"SegmentEmbeddings: features {tuple(self.features.shape)} do not fit embeddings "
                f"{tuple(self.embeddings.shape)}; expected (B, C, H, W) and (S, C)."
            )


HeadLosses = tuple[dict[str, Tensor], Sequence[SegmentEmbeddings]]
