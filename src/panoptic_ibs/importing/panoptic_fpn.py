"""Names and shapes of Panoptic FPN and Mask R-CNN: detectron2 (single stage and cascade) and torchvision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from panoptic_ibs.errors import CheckpointError

from .renaming import Rule, numbered

_HEAD, _PREDICT = r"roi_heads\.box_head\.", r"roi_heads\.box_predictor\."


def _stage(there: str, here: str) -> list[Rule]:
    """Rules of one stage's box head of detectron2; ``there`` stands between the module and its layers."""
    return [
        *numbered((rf"{_HEAD}{there}conv{{n}}\.norm\.(.*)", rf"box_heads.{here}.convs.{{m}}.norm.\1"), range(1, 9), -1),
        *numbered((rf"{_HEAD}{there}conv{{n}}\.(.*)", rf"box_heads.{here}.convs.{{m}}.conv.\1"), range(1, 9), -1),
        *numbered((rf"{_HEAD}{there}fc{{n}}\.(.*)", rf"box_heads.{here}.layers.{{m}}.\1"), range(1, 5), -1),
        (rf"{_PREDICT}{there}cls_score\.(.*)", rf"box_heads.{here}.classify.\1"),
        (rf"{_PREDICT}{there}bbox_pred\.(.*)", rf"box_heads.{here}.move.\1"),
    ]


def _instances(rules: list[Rule]) -> list[Rule]:
    return [(pattern, f"instances.{new}") for pattern, new in rules]


DETECTRON2: list[Rule] = [
    *(
        rule
        for kind in ("lateral", "output")
        for rule in numbered((rf"backbone\.fpn_{kind}{{n}}\.norm\.(.*)", rf"neck.{kind}.{{m}}.1.\1"), range(2, 6), -2)
    ),
    *(
        rule
        for kind in ("lateral", "output")
        for rule in numbered((rf"backbone\.fpn_{kind}{{n}}\.(weight|bias)", rf"neck.{kind}.{{m}}.\1"), range(2, 6), -2)
    ),
    *_instances(
        [
            (r"proposal_generator\.rpn_head\.conv\.(.*)", r"proposals.conv.\1"),
            (r"proposal_generator\.rpn_head\.objectness_logits\.(.*)", r"proposals.objectness.\1"),
            (r"proposal_generator\.rpn_head\.anchor_deltas\.(.*)", r"proposals.deltas.\1"),
            *_stage("", "0"),
            *(rule for k in range(3) for rule in _stage(rf"{k}\.", str(k))),
            *numbered(
                (r"roi_heads\.mask_head\.mask_fcn{n}\.norm\.(.*)", r"mask_head.convs.{m}.norm.\1"), range(1, 9), -1
            ),
            *numbered((r"roi_heads\.mask_head\.mask_fcn{n}\.(.*)", r"mask_head.convs.{m}.conv.\1"), range(1, 9), -1),
            (r"roi_heads\.mask_head\.deconv\.(.*)", r"mask_head.grow.\1"),
            (r"roi_heads\.mask_head\.predictor\.(.*)", r"mask_head.predict.\1"),
        ]
    ),
    *numbered((r"sem_seg_head\.p{n}\.(\d+)\.(norm\..*)", r"semantic.pyramid.branches.{m}.\1.\2"), range(2, 6), -2),
    *numbered(
        (r"sem_seg_head\.p{n}\.(\d+)\.(weight|bias)", r"semantic.pyramid.branches.{m}.\1.conv.\2"), range(2, 6), -2
    ),
    (r"sem_seg_head\.predictor\.(.*)", r"semantic.predict.\1"),
]

# Layers have a second number since torchvision 0.13.
TORCHVISION: list[Rule] = [
    *numbered((r"backbone\.fpn\.inner_blocks\.{n}\.(?:0\.)?(weight|bias)", r"neck.lateral.{m}.\1"), range(4), 0),
    *numbered((r"backbone\.fpn\.layer_blocks\.{n}\.(?:0\.)?(weight|bias)", r"neck.output.{m}.\1"), range(4), 0),
    *_instances(
        [
            (r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", r"proposals.conv.\1"),
            (r"rpn\.head\.cls_logits\.(.*)", r"proposals.objectness.\1"),
            (r"rpn\.head\.bbox_pred\.(.*)", r"proposals.deltas.\1"),
            *numbered((r"roi_heads\.box_head\.fc{n}\.(.*)", r"box_heads.0.layers.{m}.\1"), (6, 7), -6),
            (r"roi_heads\.box_predictor\.cls_score\.(.*)", r"box_heads.0.classify.\1"),
            (r"roi_heads\.box_predictor\.bbox_pred\.(.*)", r"box_heads.0.move.\1"),
            *numbered((r"roi_heads\.mask_head\.{n}\.0\.(.*)", r"mask_head.convs.{m}.conv.\1"), range(4), 0),
            *numbered((r"roi_heads\.mask_head\.mask_fcn{n}\.(.*)", r"mask_head.convs.{m}.conv.\1"), range(1, 5), -1),
            (r"roi_heads\.mask_predictor\.conv5_mask\.(.*)", r"mask_head.grow.\1"),
            (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.*)", r"mask_head.predict.\1"),
        ]
    ),
]

TORCHVISION_BODY: list[Rule] = [(r"((?:conv1|bn1|layer\d)\..*)", r"\1")]

FRESH = r"head\.semantic\..*"
"""What a checkpoint of Mask R-CNN does not have."""

_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # of COCO's 90, which torchvision's detectors have outputs for


def detectron2_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The background, last there, is first here."""
    pattern = r"head\.instances\.box_heads\.\d\.classify\.(weight|bias)"
    return {n: torch.cat([v[-1:], v[:-1]]) if re.fullmatch(pattern, n) else v for n, v in weights.items()}


def torchvision_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Boxes and masks of the background, which nobody uses, are left out, and so are COCO's ids without a class."""
    found = dict(weights)
    count = found["head.instances.box_heads.0.classify.weight"].shape[0] - 1
    gone = {0, *(_UNUSED_IDS if count == 90 else ())}
    things = [k for k in range(count + 1) if k not in gone]
    for kind in ("weight", "bias"):
        classify, move, mask = (
            f"head.instances.{part}.{kind}"
            for part in ("box_heads.0.classify", "box_heads.0.move", "mask_head.predict")
        )
        found[classify] = found[classify][[0, *things]]
        found[move] = found[move].unflatten(0, (-1, 4))[things].flatten(0, 1)
        if mask in found:
            found[mask] = found[mask][things]
    return found


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((int(m[1]) for m in (re.match(rf"{prefix}\.(\d+)\.", name) for name in weights) if m), default=-1)


def _options(weights: Mapping[str, Tensor], num_classes: int, num_stuff: int) -> dict[str, Any]:
    """What the tensors say; see :func:`detectron2`.

    Raises:
        CheckpointError: another number of classes.
    """
    things = num_classes - num_stuff
    found = weights["instances.box_heads.0.classify.weight"].shape[0] - 1
    semantic = weights.get("semantic.predict.weight")
    channels = {num_stuff + 1: "merged", num_classes: "all"}
    if found != things or (semantic is not None and semantic.shape[0] not in channels):
        said = "" if semantic is None else f" and {semantic.shape[0]} semantic channels"
        raise CheckpointError(
            f"The file's network tells {found} thing classes apart{said}; the data set has {things} thing classes and "
            f"needs {num_stuff + 1} semantic channels (things merged into one) or {num_classes} (all classes)."
        )
    first = weights.get("instances.box_heads.0.layers.0.weight")
    mask = weights.get("instances.mask_head.convs.0.conv.weight")
    stages = _count(weights, r"instances\.box_heads")
    return {
        "channels": int(weights["instances.proposals.conv.weight"].shape[0]),
        "neck_norm": "neck.lateral.0.1.weight" in weights,
        "cascade": stages > 1,
        "semantic_classes": "merged" if semantic is None else channels[semantic.shape[0]],
        "semantic": {"width": 128 if semantic is None else int(semantic.shape[1]), "groups": 32},
        "box_head": {
            "size": 7,
            "convs": _count(weights, r"instances\.box_heads\.0\.convs"),
            "layers": _count(weights, r"instances\.box_heads\.0\.layers"),
            "width": 1024 if first is None else int(first.shape[0]),
            "norm": "instances.box_heads.0.convs.0.norm.weight" in weights,
        },
        "mask_head": {
            "size": 14,
            "convs": _count(weights, r"instances\.mask_head\.convs"),
            "width": 256 if mask is None else int(mask.shape[0]),
            "norm": "instances.mask_head.convs.0.norm.weight" in weights,
        },
    }


def detectron2(weights: Mapping[str, Tensor], num_classes: int, num_stuff: int) -> dict[str, Any]:
    """Options of :class:`panoptic_ibs.heads.two_branch.PanopticFPN` from the head's tensors.

    Raises:
        CheckpointError: another number of classes.
    """
    found = _options(weights, num_classes, num_stuff)
    agnostic = weights["instances.box_heads.0.move.weight"].shape[0] == 4
    if agnostic and num_classes - num_stuff == 1:
        agnostic = found["cascade"]  # with one class there is no difference
    return found | {
        "proposals": {"beta": 0.0, "kept": 2000 if found["cascade"] else 1000},
        "stages": {"beta": 0.0, "sampling": 0, "aligned": True, "agnostic": agnostic},
    }


def torchvision(weights: Mapping[str, Tensor], num_classes: int, num_stuff: int) -> dict[str, Any]:
    """As :func:`detectron2`, for torchvision's Mask R-CNN.

    Raises:
        CheckpointError: another number of classes.
    """
    return _options(weights, num_classes, num_stuff) | {
        "proposals": {"rounded_anchors": True, "beta": 1 / 9, "kept": 2000, "least_side": 1e-3},
        "inference": {"least_side": 1e-2},
        "stages": {"beta": 1 / 9, "sampling": 2, "aligned": False, "agnostic": False},
    }


def rows(options: Mapping[str, Any], classes: list[int], things: list[int], stuff: list[int]) -> dict[str, list[int]]:
    """Tensors whose rows are classes, and from which row of the file each is taken; see ``Program.rows``.

    A file with all semantic classes has the stuff first, then the things, as networks with merged things have theirs.
    """
    merged = options["semantic_classes"] == "merged"
    regions = [0, *(1 + row for row in stuff)] if merged else [*stuff, *(len(stuff) + row for row in things)]
    labels = [0, *(1 + row for row in things)]
    boxes = [4 * row + k for row in things for k in range(4)]
    stages = 3 if options["cascade"] else 1
    agnostic = options["stages"]["agnostic"]
    found: dict[str, list[int]] = {}
    for kind in ("weight", "bias"):
        found |= {f"instances.box_heads.{k}.classify.{kind}": labels for k in range(stages)}
        if not agnostic:
            found |= {f"instances.box_heads.{k}.move.{kind}": boxes for k in range(stages)}
        found |= {f"instances.mask_head.predict.{kind}": things, f"semantic.predict.{kind}": regions}
    return found
