"""Feature pyramids: FPN with one or two extra levels, and the semantic FPN that joins levels at stride 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.structures import FeatureLevel

from .convolution import ConvBlock


class FeaturePyramid(nn.Module):
    """FPN (Lin et al. 2017) on strides 4 to 32, with coarser levels.

    Args:
        levels: the backbone's levels; those with strides 4, 8, 16 and 32 are used.
        channels: channels of every output.
        top: ``"convolutions"``: P6 and P7 by stride-2 convolutions from P5 (RetinaNet); ``"subsampled"``: P6 alone,
            every second pixel of P5 (detectors with region proposals).
        norm: group normalisation behind every lateral and output convolution.

    Raises:
        ConfigError: if the backbone lacks one of the strides.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        levels: Sequence[FeatureLevel],
        channels: int = 256,
        top: Literal["convolutions", "subsampled"] = "convolutions",
        norm: bool = False,
    ) -> None:
        super().__init__()
        by_stride = {level.stride: i for i, level in enumerate(levels)}
        missing = [s for s in self.strides if s not in by_stride]
        if missing:
            raise ConfigError(
                f"The feature pyramid needs backbone outputs at strides 4, 8, 16 and 32; this backbone has "
                f"{sorted(by_stride)}. Choose a backbone with a stride-4 stage, e.g. backbone=resnet50."
            )
        self.inputs = [by_stride[s] for s in self.strides]
        self.lateral = nn.ModuleList(_conv(levels[i].channels, channels, 1, norm) for i in self.inputs)
        self.output = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in self.inputs)
        self.subsampled = top == "subsampled"
        if not self.subsampled:
            self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """P2 to P7 (or P6), strides 4 to 128 (64), from the backbone's features (finest first)."""
        merged = [conv(features[i]) for i, conv in zip(self.inputs, self.lateral, strict=True)]
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.output, merged, strict=True)]
        if self.subsampled:
            return [*outputs, outputs[-1][..., ::2, ::2]]
        p6 = self.p6(outputs[-1])
        return [*outputs, p6, self.p7(F.relu(p6))]


def _conv(in_channels: int, channels: int, size: int, norm: bool) -> nn.Module:
    conv = nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=not norm)
    return nn.Sequential(conv, nn.GroupNorm(min(32, channels), channels)) if norm else conv


class SemanticPyramid(nn.Module):
    """Semantic FPN (Kirillov et al. 2019): P2 to P5 brought to stride 4 by convolution and upsampling, and summed."""

    def __init__(
        self, in_channels: int = 256, channels: int = 256, num_levels: int = 4, groups: int | None = None
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for level in range(num_levels):
            steps: list[nn.Module] = []
            for k in range(max(1, level)):
                block = ConvBlock(in_channels if k == 0 else channels, channels, groups=groups)
                nn.init.kaiming_normal_(block.conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
                steps.append(block)
                if level:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.branches.append(nn.Sequential(*steps))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, C, H / 4, W / 4) from P2 to P5."""
        result: Tensor = self.branches[0](features[0])
        for branch, feature in zip(list(self.branches)[1:], features[1:], strict=True):
            result = result + branch(feature)
        return result
