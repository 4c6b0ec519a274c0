"""What a head is: four methods, and one more for pictures.

A new head is one file beside this one and one yaml in ``conf/head``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.structures import EmbeddingView, FeatureLevel, HeadLosses, ImageSize, Prediction, Target


class Head(nn.Module, ABC):
    """Makes segments from a feature pyramid.

    Args:
        classes: the class table; the only source of class counts.
        levels: strides and channels of the backbone's outputs, finest first.

    Attributes:
        makes_instances: whether predictions hold ``instances``; average precision is then reported as well.
    """

    makes_instances: bool = False

    def __init__(self, classes: ClassTable, levels: Sequence[FeatureLevel]) -> None:
        super().__init__()
        self.classes = classes
        self.levels = tuple(levels)

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> Any:
        """Raw outputs from the backbone's features, each (B, C_l, H_l, W_l), finest first."""

    @abstractmethod
    def losses(self, output: Any, targets: Sequence[Target]) -> HeadLosses:
        """Loss terms by name (each a scalar with a gradient path, weights applied) and the segment embeddings."""

    @abstractmethod
    def predict(self, output: Any, sizes: Sequence[ImageSize]) -> list[Prediction]:
        """One panoptic prediction an image, at ``sizes[i].original``."""

    def embedding_view(
        self, output: Any, image: int, size: ImageSize, target: Target | None = None
    ) -> EmbeddingView | None:
        """Pixel embeddings and queries of one image of the batch, as :meth:`predict` used them, for the report.

        Args:
            output: of :meth:`forward`.
            image: which of its images.
            size: its sizes.
            target: its ground truth where there is one; only oracle modes look at it.

        Returns:
            None from heads that have nothing of the kind.
        """
        return None
