"""Operations that a training step dispatches in the form for GPUs, counted on the CPU: 8 crops, 2 crops, the peer.

Deformable attention is one kernel a direction on a GPU. On the CPU something of the same inputs and outputs stands in
for it, so that it counts as one operation and its allocations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

SIZE, SEGMENTS, POINTS = 64, 10, 64  # the number of operations does not depend on sizes
TARGETS = {"mask2former": "<= 5000 at 2 crops, <= 1.1x at 8", "ciae": "losses <= 1000, <= 1.1x"}


def counted(work: Callable[[], Any]) -> int:
    """Number of operations that ``work`` dispatches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        work()
    return count.number


@contextmanager
def form_for_gpus() -> Iterator[None]:
    """Within it the code takes the form for GPUs, with a stand-in for the kernel of deformable attention."""
    import torch

    from panoptic_ibs.functional import forms

    class StandIn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Any, reference: Any, offsets: Any, weights: Any) -> Any:
            ctx.save_for_backward(values, offsets, weights)
            return values.new_zeros(values.shape[0], reference.shape[0], *values.shape[2:])

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            values, offsets, weights = (torch.zeros_like(t) for t in ctx.saved_tensors)
            return values, None, offsets, weights

    def sample(values: Any, _: Any, reference: Any, offsets: Any, weights: Any) -> Any:
        return StandIn.apply(values, reference, offsets, weights)

    with forms.forced(True), mock.patch("panoptic_ibs.layers.sampling.sample_grid", sample):
        yield


def step_and_losses(head: str, classes: Any) -> dict[str, list[int]]:
    """Operations of a step and of the losses alone, with 2 and with 8 crops."""
    import torch

    model = _model(head, classes)
    numbers: dict[str, list[int]] = {"step": [], "losses": []}
    for crops in (2, 8):
        batch = _batch(classes, crops)
        with form_for_gpus():
            output = model(batch)  # what is made once a size is made
            numbers["losses"].append(counted(lambda o=output, b=batch: model.head.losses(o, b.targets)))
            numbers["step"].append(
                counted(lambda b=batch: torch.stack(list(model.losses(b)[0].values())).sum().backward())
            )
    return numbers


def class_table() -> Any:
    """Two classes of stuff and three of things."""
    from panoptic_ibs.classes import ClassTable

    return ClassTable.from_coco([{"id": k + 1, "name": f"class {k}", "isthing": int(k > 1)} for k in range(5)])


def _model(head: str, classes: Any) -> Any:
    from panoptic_ibs.backbones import TimmBackbone
    from panoptic_ibs.heads.ciae import CIAE
    from panoptic_ibs.heads.mask2former import Mask2Former
    from panoptic_ibs.heads.panoptic_fcn import PanopticFCN
    from panoptic_ibs.heads.two_branch import PanopticFPN
    from panoptic_ibs.model import PanopticModel

    backbone = TimmBackbone("resnet50")
    options = {"loss": {"points": POINTS}} if head == "mask2former" else {}
    makers: dict[str, Any] = {"panoptic_fcn": PanopticFCN, "mask2former": Mask2Former, "ciae": CIAE,
                              "panoptic_fpn": PanopticFPN}  # fmt: skip
    return PanopticModel(backbone, makers[head](classes, backbone.levels, **options), classes).train()


def _batch(classes: Any, crops: int) -> Any:
    """Noise, and targets of columns of stuff and things."""
    import torch

    from panoptic_ibs.structures import Batch, ImageSize, Target

    columns = torch.arange(SIZE) * SEGMENTS // SIZE + 1
    id_map = columns.expand(SIZE, SIZE).to(torch.uint8)
    class_ids = torch.arange(SEGMENTS) % len(classes)
    left = torch.stack([(columns == k + 1).nonzero().min() for k in range(SEGMENTS)]).float()
    right = torch.stack([(columns == k + 1).nonzero().max() for k in range(SEGMENTS)]).float() + 1
    boxes = torch.stack([left, torch.zeros(SEGMENTS), right, torch.full((SEGMENTS,), float(SIZE))], 1)
    targets = [
        Target(
            id_map, class_ids, torch.tensor(classes.is_thing)[class_ids], class_ids < 0, boxes,
            torch.bincount(id_map.long().ravel(), minlength=SEGMENTS + 1)[1:], torch.arange(1, SEGMENTS + 1), i, str(i),
        )
        for i in range(crops)
    ]  # fmt: skip
    images = torch.randint(0, 256, (crops, 3, SIZE, SIZE), dtype=torch.uint8)
    return Batch(images, targets, [ImageSize((SIZE, SIZE), (SIZE, SIZE))] * crops, torch.arange(crops) // 2)


def _peer(crops: int) -> int:
    """A step of ``transformers``' Mask2Former with the same backbone, targets and points."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=ResNetConfig(out_features=features),
        num_labels=5,
        train_num_points=POINTS,
        use_timm_backbone=False,
    )
    model = Mask2FormerForUniversalSegmentation(config).train()
    images = torch.randn(crops, 3, SIZE, SIZE)
    columns = torch.arange(SIZE) * SEGMENTS // SIZE
    masks = torch.stack([(columns == k).float().expand(SIZE, SIZE) for k in range(SEGMENTS)])
    labels = torch.arange(SEGMENTS) % 5
    return counted(
        lambda: model(images, mask_labels=[masks] * crops, class_labels=[labels] * crops).loss.sum().backward()
    )


def run() -> list[dict[str, Any]]:
    """Rows: whole steps of each head with 2 and 8 crops; the losses alone; the peer's step."""
    classes = class_table()
    found = []
    for head in ("panoptic_fcn", "mask2former", "ciae", "panoptic_fpn"):
        numbers = step_and_losses(head, classes)
        for what, (few, many) in numbers.items():
            found.append(
                {"what": f"{head}, operations of {'a step' if what == 'step' else 'the losses alone'}: 8 crops over 2",
                 "ours": many, "peer": few, "unit": "operations", "ratio": many / few, "target": TARGETS.get(head, "")}
            )  # fmt: skip
        if head == "mask2former":
            for crops, ours in zip((2, 8), numbers["step"], strict=True):
                theirs = _peer(crops)
                found.append(
                    {"what": f"mask2former, a step of {crops} crops over transformers'", "ours": ours, "peer": theirs,
                     "unit": "operations", "ratio": ours / theirs}
                )  # fmt: skip
    return found
