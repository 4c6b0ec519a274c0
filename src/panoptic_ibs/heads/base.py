"""What a head is: its loss weights, four methods, and more that have defaults.

A new head is one file beside this one and one yaml in ``conf/head``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.segments import EmbeddingView, Prediction, SoftSegments
from panoptic_ibs.structures import FeatureLevel, HeadLosses, ImageSize, Target


class Head(nn.Module, ABC):
    """Makes segments from a feature pyramid.

    Args:
        classes: the class table; the only source of class counts.
        levels: strides and channels of the backbone's outputs, finest first.

    Attributes:
        makes_instances: whether predictions hold ``instances``; average precision is then reported as well.
        embeds: whether :meth:`losses` hands out segment embeddings; without them there is nothing that intra-batch
            supervision could look at, and a run that asks for it does not start.
        weights: of every loss term, by name; :mod:`panoptic_ibs.weighing` multiplies.
    """

    makes_instances: bool = False
    embeds: bool = True
    weights: Mapping[str, float] = {}  # replaced, never changed

    def __init__(self, classes: ClassTable, levels: Sequence[FeatureLevel]) -> None:
        super().__init__()
        self.classes = classes
        self.levels = tuple(levels)

    def run(self, backbone: nn.Module, images: Tensor) -> Any:
        """Raw outputs from normalised images (B, 3, H, W): the only way in. Heads inside of a backbone override it."""
        return self(backbone(images))

    def progress(self, share: float) -> None:
        """Told before every step: the share of the training's steps that are done, from 0 to 1."""

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> Any:
        """Raw outputs from the backbone's features, each (B, C_l, H_l, W_l), finest first."""

    @abstractmethod
    def losses(self, output: Any, targets: Sequence[Target]) -> HeadLosses:
        """Loss terms by name (each a scalar with a gradient path, *not* weighted) and the segment embeddings."""

    @abstractmethod
    def segments(
        self, output: Any, sizes: Sequence[ImageSize], targets: Sequence[Target] | None = None
    ) -> Iterable[SoftSegments]:
        """The segments of each image before they compete for pixels.

        Args:
            output: of :meth:`run`.
            sizes: of its images.
            targets: their ground truth where there is one; only oracle modes look at it.
        """

    @abstractmethod
    def fuse(self, soft: SoftSegments) -> Prediction:
        """The head's own rule from soft segments to an id map, at ``soft.size.original``."""

    @torch.no_grad()
    def predict(
        self,
        output: Any,
        sizes: Sequence[ImageSize],
        targets: Sequence[Target] | None = None,
        refine: Callable[[int, SoftSegments], SoftSegments] | None = None,
    ) -> list[Prediction]:
        """One panoptic prediction an image, at ``sizes[i].original``: segments, refined, fused.

        Args:
            output: of :meth:`run`.
            sizes: of its images.
            targets: as for :meth:`segments`.
            refine: changes the soft segments of image i.
        """
        found = enumerate(self.segments(output, sizes, targets))
        return [self.fuse(soft if refine is None else refine(i, soft)) for i, soft in found]

    def exported(self, output: Any) -> Any:
        """What an exported network gives: the raw output, and what weights that :meth:`segments` uses make of it.

        Args:
            output: of :meth:`run`.

        Returns:
            A dataclass or mapping of tensors and lists of tensors.
        """
        return output

    def embedding_view(
        self, output: Any, image: int, size: ImageSize, target: Target | None = None
    ) -> EmbeddingView | None:
        """Pixel embeddings and queries of one image of the batch, as :meth:`segments` used them, for the report.

        Args:
            output: of :meth:`forward`.
            image: which of its images.
            size: its sizes.
            target: its ground truth where there is one; only oracle modes look at it.

        Returns:
            None from heads that have nothing of the kind.
        """
        return None
