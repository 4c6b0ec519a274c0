from __future__ import annotations

import pytest
import torch
from torch import nn

from panoptic_ibs.backbones import TimmBackbone
from panoptic_ibs.backbones.deformable import DeformableBackbone, DeformableConv
from panoptic_ibs.errors import ConfigError

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "zero_init_last": False}  # else blocks start as nothing


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "cardinality": 2, "base_width": 32}])
def test_starts_as_the_plain_network(options: dict) -> None:
    """Zero offsets: the same features until the offsets are learnt, then others; with grouped convolutions too."""
    torch.manual_seed(0)
    plain = TimmBackbone("resnet50", options=options).eval()
    deformable = DeformableBackbone("resnet50", deform_stages=3, options=options).eval()
    own = deformable.state_dict()
    own |= {k.replace("conv2.weight", "conv2.conv.weight"): v for k, v in plain.state_dict().items()
            if k.replace("conv2.weight", "conv2.conv.weight") in own}  # fmt: skip
    own |= {k: v for k, v in plain.state_dict().items() if k in own}
    deformable.load_state_dict(own)
    found = [m for m in deformable.modules() if isinstance(m, DeformableConv)]
    assert len(found) == 3
    x = torch.randn(1, 3, 64, 96)
    before = deformable(x)
    for a, b in zip(before, plain(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    nn.init.normal_(found[-1].offset.weight)
    assert not torch.allclose(deformable(x)[-1], before[-1], atol=1e-3)
    sum(f.sum() for f in deformable(x)).backward()
    assert all(m.offset.weight.grad is not None for m in found)


def test_frozen_stages_stay_frozen() -> None:
    backbone = DeformableBackbone("resnet50", deform_stages=4, frozen_stages=2, options=SMALL)
    assert not any(p.requires_grad for p in backbone.model.layer1.parameters())
    assert all(p.requires_grad for p in backbone.model.layer2.parameters())


def test_bad_stages() -> None:
    with pytest.raises(ConfigError, match="4 stages"):
        DeformableBackbone("resnet50", deform_stages=5, options=SMALL)
    with pytest.raises(ConfigError, match="no ResNet bottleneck"):
        DeformableBackbone("resnet18", options=SMALL)
