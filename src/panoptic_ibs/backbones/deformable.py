"""ResNets and ResNeXts with deformable convolutions in their last stages (Dai et al., ICCV 2017)."""

from __future__ import annotations

from typing import Annotated, Any

from timm.models.resnet import Bottleneck

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.layers.convolution import DeformableConv
from panoptic_ibs.ranges import Bounds

from . import TimmBackbone
from .folding import unfold


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
                    unfold(block.conv2)
                    trained = block.conv2.weight.requires_grad
                    block.conv2 = DeformableConv(block.conv2).requires_grad_(trained)  # type: ignore[assignment]
        if deform_stages and not any(isinstance(m, DeformableConv) for m in self.model.modules()):
            raise ConfigError(f"backbone.deform_stages: {name!r} has no ResNet bottleneck blocks; set it to 0.")
