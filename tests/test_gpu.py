"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from helpers import class_table, random_batch
from panoptic_ibs.construction import build_model
from panoptic_ibs.ibs import IntraBatchSupervision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

CONFIG = {
    "backbone": {"_target_": "panoptic_ibs.backbones.TimmBackbone", "name": "resnet18"},
    "head": {"_target_": "panoptic_ibs.heads.panoptic_fcn.PanopticFCN", "channels": 64, "feature_channels": 32},
}


def test_no_sync_in_the_training_step() -> None:
    model = build_model(CONFIG, class_table()).cuda()
    batch = random_batch(model.classes, (128, 256)).to("cuda")
    ibs = IntraBatchSupervision(partners="paired")

    def step() -> torch.Tensor:
        losses, segments = model.losses(batch)
        total = sum(losses.values()) + ibs(segments, batch.pairs, batch.targets)
        total.backward()
        return total

    step()  # cuDNN chooses its algorithms and may sync while it does
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(total)


def test_losses_agree_with_the_cpu() -> None:
    torch.manual_seed(0)
    model = build_model(CONFIG, class_table())
    batch = random_batch(model.classes, (128, 256))
    ibs = IntraBatchSupervision(partners="paired")
    losses, segments = model.losses(batch)
    expected = {**losses, "ibs": ibs(segments, batch.pairs, batch.targets)}
    model.cuda()
    on_gpu = batch.to("cuda")
    losses, segments = model.losses(on_gpu)
    for name, value in {**losses, "ibs": ibs(segments, on_gpu.pairs, on_gpu.targets)}.items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-3, atol=1e-4)
