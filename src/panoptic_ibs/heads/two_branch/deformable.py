"""The deformable semantic branch of UPSNet (Xiong et al., CVPR 2019); pyramids with deformable output convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from panoptic_ibs.functional.distributed import normalizer
from panoptic_ibs.layers.convolution import DeformableConv
from panoptic_ibs.layers.pyramid import FeaturePyramid
from panoptic_ibs.ranges import AtLeastOne

from .class_map import IGNORE

ROI = 28  # side of the regions of the RoI semantic loss


@dataclass(frozen=True)
class DeformableOptions:
    """The deformable semantic branch.

    Attributes:
        depth: deformable convolutions that every level goes through; UPSNet has 3 on COCO and 2 on Cityscapes.
        width: channels of the last two of them; those before keep the pyramid's.
        norm: group normalisation behind each; UPSNet's released networks have none, and were trained with one large
            image a GPU.
        deformable: else they are plain: on a CPU deformable ones take several times as long to train.
    """

    depth: AtLeastOne = 3
    width: AtLeastOne = 128
    norm: bool = True
    deformable: bool = True


class DeformableBranch(nn.Module):
    """Semantic logits (B, K, H / 4, W / 4) from P2 to P5.

    All levels go through the same deformable convolutions, are brought to stride 4, concatenated, and classified by one
    1 x 1 convolution. Here each level is classified by its share of that convolution before it is upsampled, which is
    the same, both being linear, and needs no map of four times the channels.

    Args:
        channels: of the pyramid.
        classes: K.
        options: see there.
        levels: number of levels.
    """

    def __init__(self, channels: int, classes: int, options: DeformableOptions, levels: int = 4) -> None:
        super().__init__()
        widths = [channels] * max(options.depth - 1, 1) + [options.width] * min(options.depth, 2)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            conv = nn.Conv2d(a, b, 3, padding=1, bias=not options.norm)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            norm = [nn.GroupNorm(max(min(32, b // 8), 1), b)] if options.norm else []
            layers += [DeformableConv(conv) if options.deformable else conv, *norm, nn.ReLU(inplace=True)]
        self.shared = nn.Sequential(*layers)
        self.predict = nn.Conv2d(levels * options.width, classes, 1)
        nn.init.normal_(self.predict.weight, std=0.01)
        nn.init.zeros_(self.predict.bias)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits at stride 4 from the levels, each half the size of the one before."""
        parts = self.predict.weight.chunk(len(levels), dim=1)
        result = F.conv2d(self.shared(levels[0]), parts[0], self.predict.bias)
        for i, (x, weight) in enumerate(zip(levels[1:], parts[1:], strict=True), start=1):
            part = F.conv2d(self.shared(x), weight)
            result = result + F.interpolate(part, scale_factor=2**i, mode="bilinear", align_corners=False)
        return result


def region_semantic_loss(logits: Tensor, labels: Tensor, boxes: Tensor, valid: Tensor, stride: int = 4) -> Tensor:
    """Semantic cross-entropy inside the boxes of the things, each at 28 x 28 whatever its size (UPSNet's RoI loss).

    UPSNet reads the branch's features by RoIAlign and classifies them; RoIAlign and the classifying convolution are
    both linear, so the logits are read here. Labels are those of the pixels at the centres of the cells.

    Args:
        logits: (B, K, H / stride, W / stride).
        labels: (B, H, W) uint8, :data:`IGNORE` where nothing is said.
        boxes: (B, G, 4) of the things, whole pixels.
        valid: (B, G) bool; others only fill up.
        stride: of the logits.

    Returns:
        A scalar, the mean over the labelled cells of all boxes and ranks; 0 with a gradient path where there is none.
    """
    b, g = valid.shape
    height, width = labels.shape[-2:]
    image = torch.arange(b, device=boxes.device).repeat_interleave(g)
    flat = boxes.float().flatten(0, 1)
    with torch.autocast(logits.device.type, enabled=False):
        regions = torch.cat([image[:, None].float(), flat], 1)
        found = roi_align(logits.float(), regions, ROI, 1 / stride, sampling_ratio=2, aligned=True)
        centre = (torch.arange(ROI, device=boxes.device) + 0.5) / ROI
        x = (flat[:, :1] + (flat[:, 2:3] - flat[:, :1]) * centre).long().clamp(0, width - 1)
        y = (flat[:, 1:2] + (flat[:, 3:] - flat[:, 1:2]) * centre).long().clamp(0, height - 1)
        wanted = labels[image[:, None, None], y[:, :, None], x[:, None]].long()
        wanted = wanted.masked_fill(~valid.flatten()[:, None, None], IGNORE)
        total = F.cross_entropy(found, wanted, ignore_index=IGNORE, reduction="sum")
        return total / normalizer((wanted != IGNORE).sum(), total)


def deform_outputs(neck: FeaturePyramid, levels: Sequence[int]) -> None:
    """Make the 3 x 3 output convolutions of some levels of a pyramid (2 for P2 to 5 for P5) deformable."""
    for level in levels:
        old = neck.output[level - 2]
        if isinstance(old, nn.Sequential):  # with a normalisation
            old[0] = DeformableConv(old[0])  # type: ignore[arg-type]
        else:
            neck.output[level - 2] = DeformableConv(old)  # type: ignore[arg-type]


class WithContext(nn.Module):
    """A lateral convolution of a pyramid that adds a linear function of the map's mean (UPSNet on COCO)."""

    def __init__(self, lateral: nn.Module, in_channels: int, channels: int) -> None:
        super().__init__()
        self.lateral, self.context = lateral, nn.Linear(in_channels, channels)
        nn.init.kaiming_uniform_(self.context.weight, a=1)
        nn.init.zeros_(self.context.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        result: Tensor = self.lateral(x) + self.context(x.mean((2, 3)))[..., None, None]
        return result
