"""The convolutional parts of CIAE (Gao et al., 2020, Section IV-A): FCOS's proposal head and the embedding branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs.layers.convolution import ConvBlock, ConvStack, add_coordinates
from panoptic_ibs.layers.pyramid import SemanticPyramid

STRIDES = (8, 16, 32, 64, 128)
LARGEST_EXPONENT = 8.0  # of box sides in strides: 3000 strides


@dataclass
class CIAEOutput:
    """Raw outputs; the lists run over the levels P3 to P7.

    Attributes:
        classes: (B, thing channels, h, w) logits.
        centerness: (B, 1, h, w) logits.
        boxes: (B, 4, h, w) distances to the left, top, right and bottom side in pixels, positive.
        embeddings: (B, D, H / 4, W / 4) pixel embeddings P' + P'', before upsampling and normalisation.
        semantic: (B, stuff classes + 1, H / 4, W / 4) logits, channel 0 for all things; None unless stuff is
            modelled apart (Table III).
    """

    classes: list[Tensor]
    centerness: list[Tensor]
    boxes: list[Tensor]
    embeddings: Tensor
    semantic: Tensor | None = None


class ProposalHead(nn.Module):
    """FCOS's two towers, shared by the levels, with a box embedding on the regression tower.

    Args:
        channels: width of pyramid and towers.
        num_classes: thing channels.
        dimension: of the box embedding; 0 for none.
        depth: convolutions of each tower.
        init_std: of the output convolutions' weights.
    """

    def __init__(self, channels: int, num_classes: int, dimension: int, depth: int = 4, init_std: float = 0.01) -> None:
        super().__init__()
        self.class_tower = ConvStack(channels, channels, depth)
        self.box_tower = ConvStack(channels, channels, depth)
        self.out_class = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.out_box = nn.Conv2d(channels, 5 + dimension, 3, padding=1)  # sides, centre-ness, embedding
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        for conv in (self.out_class, self.out_box):
            nn.init.normal_(conv.weight, std=init_std)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.out_class.bias, -math.log(99))  # type: ignore[arg-type]  # RetinaNet's prior of 0.01

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Class logits, centre-ness logits, sides in pixels and box embeddings of P3 to P7."""
        classes, centerness, boxes, embeddings = [], [], [], []
        for x, stride, scale in zip(levels, STRIDES, self.scales, strict=True):
            classes.append(self.out_class(self.class_tower(x)))
            out = self.out_box(self.box_tower(x))
            boxes.append((scale * out[:, :4].float()).clamp(max=LARGEST_EXPONENT).exp() * stride)
            centerness.append(out[:, 4:5])
            embeddings.append(out[:, 5:])
        return classes, centerness, boxes, embeddings


class PyramidBlock(ConvBlock):
    """A :class:`ConvBlock` with the semantic FPN's first weights, optionally behind a CoordConv."""

    def __init__(self, in_channels: int, out_channels: int, coord: bool = False) -> None:
        super().__init__(in_channels + 2 * coord, out_channels)
        self.coord = coord
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        return super().forward(add_coordinates(x) if self.coord else x)


class CoordPyramid(SemanticPyramid):
    """Semantic FPN with coordinates in every convolution on P5, which sees most of the image."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(in_channels, channels)
        last: nn.Sequential = self.branches[-1]  # type: ignore[assignment]
        for i, step in enumerate(last):
            if isinstance(step, ConvBlock):
                last[i] = PyramidBlock(in_channels if i == 0 else channels, channels, coord=True)


class EmbeddingBranch(nn.Module):
    """Pixel embeddings at stride 4 from P2 to P5 and from the box embeddings.

    Args:
        in_channels: of the pyramid.
        channels: width of the branch (128, as in Panoptic FPN).
        dimension: of the embedding.
        coord_conv: coordinates in the convolutions on P5.
        box_embedding: fuse the box embeddings.
        semantic: channels of a semantic branch beside P'; 0 for none.
        finest: channels of P2, if not ``in_channels``.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        dimension: int,
        coord_conv: bool = True,
        box_embedding: bool = True,
        semantic: int = 0,
        finest: int | None = None,
    ) -> None:
        super().__init__()
        self.pyramid = (CoordPyramid if coord_conv else SemanticPyramid)(in_channels, channels)
        if finest is not None and finest != in_channels:
            branch: nn.Sequential = self.pyramid.branches[0]  # type: ignore[assignment]
            branch[0] = PyramidBlock(finest, channels)
        self.out = nn.Conv2d(channels, dimension, 1)
        self.fuse = nn.Conv2d(dimension, dimension, 3, padding=1) if box_embedding else None
        self.semantic = nn.Conv2d(channels, semantic, 1) if semantic else None
        for conv in filter(None, (self.out, self.fuse, self.semantic)):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Embeddings and semantic logits.

        Args:
            levels: P2 to P5; boxes: box embeddings of P3 to P7.
        """
        x = self.pyramid(levels)
        embeddings: Tensor = self.out(x)
        if self.fuse is not None:
            height, width = x.shape[-2:]
            total = embeddings.new_zeros(())
            for stride, box in zip(STRIDES, boxes, strict=True):
                # By the very factor, then cut: the coarse levels may reach over the border of the image.
                full = F.interpolate(box, scale_factor=stride // 4, mode="bilinear", align_corners=False)
                total = total + full[..., :height, :width]
            embeddings = embeddings + self.fuse(total)
        return embeddings, None if self.semantic is None else self.semantic(x)
