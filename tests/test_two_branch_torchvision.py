"""Panoptic FPN's instance branch beside torchvision's Mask R-CNN with the same weights: outputs and loss terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn

from helpers import class_table, random_batch
from panoptic_ibs.construction import build_model
from panoptic_ibs.functional import forms
from panoptic_ibs.heads.two_branch import PanopticFPN
from panoptic_ibs.importing import compare, import_checkpoint
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.structures import Batch

SIZE = (64, 128)
ALL = 10**6  # nothing is drawn: all anchors and proposals train


def wider(network: MaskRCNN) -> None:
    """Random weights whose outputs differ from box to box."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if name.endswith(("bn3.weight", "downsample.1.weight")):
                value.fill_(0.3)
            elif name.endswith(("running_mean", "bn1.bias", "bn2.bias")):
                value.add_(0.05 * torch.randn(value.shape, generator=g))
            elif name.endswith("running_var"):
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=g))
        heads = network.roi_heads
        network.rpn.head.cls_logits.weight.normal_(std=0.05, generator=g)
        network.rpn.head.bbox_pred.weight.normal_(std=0.01, generator=g)
        heads.box_predictor.cls_score.weight.normal_(std=0.3, generator=g)
        heads.box_predictor.bbox_pred.weight.normal_(std=0.1, generator=g)
        heads.mask_predictor.mask_fcn_logits.weight.normal_(std=0.5, generator=g)


@pytest.fixture(scope="module")
def pair() -> tuple[MaskRCNN, PanopticModel]:
    """torchvision's network and ours with its weights."""
    torch.manual_seed(5)
    options = {"rpn_batch_size_per_image": ALL, "rpn_positive_fraction": 1.0, "box_batch_size_per_image": ALL}
    network = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=SIZE[0], max_size=512,
        rpn_post_nms_top_n_train=60, rpn_post_nms_top_n_test=60, box_positive_fraction=1.0, **options,
    )  # fmt: skip
    wider(network)
    imported = import_checkpoint(network.state_dict(), "panoptic_fpn", 5, 2)
    everything = {
        "proposals": {
            **imported.head["proposals"],
            "sampled": ALL,
            "positive_share": 1.0,
            "kept": 60,
            "kept_at_test": 60,
        },
        "regions": {"sampled": ALL, "positive_share": 1.0},
    }
    description = {
        "backbone": {"_target_": "panoptic_ibs.backbones.TimmBackbone", **imported.backbone},
        "head": {"_target_": "panoptic_ibs.heads.two_branch.PanopticFPN", **imported.head, **everything},
        **imported.model,
    }
    model = build_model(description, class_table())
    found = compare(imported, model.state_dict())
    assert found.complete
    assert found.fresh
    assert all(name.startswith("head.semantic.") for name in found.fresh)
    model.load_state_dict(imported.weights, strict=False)
    return network.eval(), model.eval()


def theirs(network: MaskRCNN, batch: Batch) -> list[Tensor]:
    """Images as torchvision takes them; the batch's are of the size that it resizes to."""
    return list(batch.images.float() / 255)


@pytest.mark.parametrize("form", [False, True], ids=["cpu", "batched"])
def test_boxes_scores_and_masks_are_torchvisions(pair: tuple[MaskRCNN, PanopticModel], form: bool) -> None:
    network, model = pair
    batch = random_batch(model.classes, SIZE, count=2)
    head = model.head
    assert isinstance(head, PanopticFPN)
    with torch.inference_mode(), forms.forced(form):
        wanted = network(theirs(network, batch))
        output = model(batch)
        found = head.detected(output, batch.sizes, head.inference)
        for i, (ours, other) in enumerate(zip(found, wanted, strict=True)):
            assert len(other["scores"]) > 20
            assert ours.labels.tolist() == other["labels"].tolist()
            torch.testing.assert_close(ours.scores, other["scores"], atol=1e-4, rtol=0)
            torch.testing.assert_close(ours.boxes, other["boxes"], atol=1e-3, rtol=1e-4)
            assert head.instances is not None
            masks = head.instances.masks(output.pyramid, ours.boxes, torch.full_like(ours.labels, i), ours.labels)
            features = network.backbone(network.transform(theirs(network, batch))[0].tensors)
            heads: Any = network.roi_heads
            pooled = heads.mask_roi_pool(features, [f.boxes if k == i else f.boxes[:0] for k, f in enumerate(found)],
                                         [SIZE] * 2)  # fmt: skip
            logits = heads.mask_predictor(heads.mask_head(pooled))
            logits = logits[torch.arange(len(ours)), ours.labels]
            assert logits.sigmoid().std() > 0.05
            torch.testing.assert_close(masks.sigmoid(), logits.sigmoid(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", [False, True], ids=["cpu", "batched"])
def test_loss_terms_are_torchvisions(pair: tuple[MaskRCNN, PanopticModel], form: bool) -> None:
    """All of them, from images to losses, with nothing drawn at random."""
    network, model = pair
    batch = random_batch(model.classes, SIZE, count=2, segments=5, seed=1)
    targets = []
    for t in batch.targets:
        rows = (t.is_thing & (t.areas > 0)).nonzero().squeeze(1)
        masks = (t.id_map == rows[:, None, None] + 1).to(torch.uint8)
        targets.append({"boxes": t.boxes[rows], "labels": t.class_ids[rows] - 1, "masks": masks})
    network.train()
    model.train()
    try:
        with torch.no_grad(), forms.forced(form):
            wanted = network(theirs(network, batch), targets)
            found, _ = model.losses(batch)
    finally:
        network.eval()
        model.eval()
    names = {"rpn_class": "loss_objectness", "rpn_box": "loss_rpn_box_reg", "box_class": "loss_classifier",
             "box_move": "loss_box_reg", "mask": "loss_mask"}  # fmt: skip
    for ours, other in names.items():
        assert wanted[other] > 1e-3
        torch.testing.assert_close(found[ours], wanted[other], rtol=1e-4, atol=1e-5, msg=lambda m, n=ours: f"{n}: {m}")
