"""ResNets and ResNeXts with deformable convolutions in their last stages (Dai et al., ICCV 2017)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.ranges import Bounds

from . import TimmBackbone


class DeformableConv(nn.Module):
    """A 3 x 3 convolution that becomes deformable: its weights are kept, and offsets start at zero.

    Before the first step it is therefore the very convolution that it replaces. Sampling is in float32 under autocast.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        shape: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        self.offset = nn.Conv2d(conv.in_channels, 18, 3, **shape)
        self.conv = DeformConv2d(
            conv.in_channels, conv.out_channels, 3, groups=conv.groups, bias=conv.bias is not None, **shape
        )
        self.conv.load_state_dict(conv.state_dict())
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            result: Tensor = self.conv(x, self.offset(x))
        return result


class DeformableBackbone(TimmBackbone):
    """A timm ResNet or ResNeXt of bottleneck blocks, deformable in the 3 x 3 convolutions of its last stages.

    Args:
        name: timm's model name.
        deform_stages: how many of the four stages, from the last.
        options: arguments of :class:`TimmBackbone`.

    Raises:
        ConfigError: a model without such stages; a number of stages outside 0 to 4.
    """

    def __init__(self, name: str, deform_stages: Annotated[int, Bounds(least=0, most=4)] = 3, **options: Any) -> None:
        super().__init__(name, **options)
        if not 0 <= deform_stages <= 4:
            raise ConfigError(f"backbone.deform_stages is {deform_stages}; a ResNet has 4 stages.")
        stages = [child for key, child in self.model.named_children() if key.startswith("layer")]
        for stage in stages[len(stages) - deform_stages :]:
            for block in stage.modules():
                if isinstance(block, Bottleneck):
                    trained = block.conv2.weight.requires_grad
                    block.conv2 = DeformableConv(block.conv2).requires_grad_(trained)  # type: ignore[assignment]
        if deform_stages and not any(isinstance(m, DeformableConv) for m in self.model.modules()):
            raise ConfigError(f"backbone.deform_stages: {name!r} has no ResNet bottleneck blocks; set it to 0.")
