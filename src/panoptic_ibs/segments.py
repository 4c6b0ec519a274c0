"""Segments that a head found in an image, before and after they compete for pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import Tensor

from .structures import ImageSize


@dataclass
class Instances:
    """Instance segmentation of one image: N masks that may overlap.

    Attributes:
        rles: N masks as compressed COCO run lengths: ``{"size": [H, W], "counts": bytes}``.
        class_ids: (N,) int64 on the CPU, contiguous class ids of things.
        scores: (N,) float32 on the CPU.
    """

    rles: list[dict[str, Any]]
    class_ids: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.rles)


@dataclass
class EmbeddingView:
    """What a head can show of one image beside its segments: pixel embeddings, and the queries held against them.

    Attributes:
        embeddings: (D, h, w) at stride 4 of the padded network input.
        size: sizes of the image, for bringing the map there (:func:`panoptic_ibs.functional.fusion.upsample`).
        queries: (N, D) of things, best first.
        class_ids: (N,) contiguous class ids.
        scores: (N,).
        cosine: whether similarity is the cosine, else the inner product.
        points: (N, 2) x and y, in pixels of the original image, of the centre of the pixel that each query was read
            from; None if queries are not read from the map.
        boxes: (N, 4) x1 y1 x2 y2 in pixels of the original image; None without a detector.
    """

    embeddings: Tensor
    size: ImageSize
    queries: Tensor
    class_ids: Tensor
    scores: Tensor
    cosine: bool = True
    points: Tensor | None = None
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return self.queries.shape[0]


@dataclass
class SoftSegments:
    """Segments of one image before they compete for pixels: what refinement, several views and networks exchange.

    Attributes:
        masks: (N, h, w) float32 at ``stride`` of the padded network input; the higher, the likelier.
        class_ids: (N,) contiguous class ids; -1 for a mask that competes for pixels and is no segment.
        is_thing: (N,) bool, best kept on the CPU.
        scores: (N,) float32.
        size: sizes of the image.
        kind: ``"logits"``, whose sigmoid is the probability of being inside; ``"similarity"``, which can only be
            compared with the other masks of the same pixel; ``"panoptic"``, logits that compete with all others of the
            pixel, those in boxes after adding the semantic logits of their class (UPSNet).
        boxes: (T, 4) x1 y1 x2 y2 in pixels of the original image, outside of which the T things, the first rows, end;
            None where nothing limits them.
        in_boxes: the masks, all of them things', are (N, m, m) logits over their ``boxes`` alone, to be pasted late
            (:mod:`panoptic_ibs.functional.box_masks`); else they are of the whole image.
        semantic: (K, h, w) logits at ``stride`` that decide on stuff in place of masks, or None.
        semantic_classes: (K,) contiguous class ids of ``semantic``; -1 for what is no stuff.
        channels: (N,) int64 channel of ``semantic`` that each mask in a box is added to, of kind ``"panoptic"``, whose
            stuff channels come first; else None.
        instances: the instance segmentation, from heads that were asked for it.
        stride: of masks and semantic logits, in pixels of the network's input.
    """

    masks: Tensor
    class_ids: Tensor
    is_thing: Tensor
    scores: Tensor
    size: ImageSize
    kind: Literal["logits", "similarity", "panoptic"] = "logits"
    boxes: Tensor | None = None
    in_boxes: bool = False
    semantic: Tensor | None = None
    semantic_classes: Tensor | None = None
    channels: Tensor | None = None
    instances: Instances | None = None
    stride: int = 4

    def __len__(self) -> int:
        return self.class_ids.shape[0]

    @property
    def things(self) -> int:
        """Number of things."""
        return int(self.is_thing.sum())


@dataclass
class Prediction:
    """Panoptic prediction of one image.

    Attributes:
        id_map: (H, W) integer, :func:`id_map_dtype` where this package makes it; 0 is void, k >= 1 is row k - 1 of the
            table. To index with it: ``table[id_map.long()]``.
        class_ids: (N,) int64, contiguous class ids.
        scores: (N,) float32 in [0, 1].
        image_id: the data set's name of the image.
        instances: the instance segmentation, from heads that were asked for it.
        view: makes the view of the embeddings, None from heads that have none. It holds the head's raw output, so it
            is there only where it was asked for.
    """

    id_map: Tensor
    class_ids: Tensor
    scores: Tensor
    image_id: str = ""
    instances: Instances | None = None
    view: Callable[[], EmbeddingView | None] | None = None

    def __len__(self) -> int:
        return self.class_ids.shape[0]

    def cpu(self) -> Self:
        """Copy to the CPU."""
        return replace(self, id_map=self.id_map.cpu(), class_ids=self.class_ids.cpu(), scores=self.scores.cpu())
