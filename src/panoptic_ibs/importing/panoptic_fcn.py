"""Names and shapes of the reference Panoptic FCN (detectron2), with and without IBS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from panoptic_ibs.errors import CheckpointError

from .renaming import Rule, numbered


def _stack(theirs: str, ours: str) -> list[Rule]:
    """A row of convolutions, plain or deformable, whose number starts at 1 there and at 0 here."""
    parts = [
        (r"dcnv2\.norm\.(.*)", r"norm.\1"),
        (r"dcnv2\.(weight|bias)", r"conv.conv.\1"),
        (r"offset_mask_conv\.(.*)", r"conv.offset_mask.\1"),
        (r"norm\.(.*)", r"norm.\1"),
        (r"(weight|bias)", r"conv.\1"),
    ]
    return [
        rule
        for pattern, new in parts
        for rule in numbered((rf"{theirs}{{n}}\.{pattern}", f"{ours}.blocks.{{m}}.{new}"), range(1, 10), -1)
    ]


RULES: list[Rule] = [
    *numbered((r"backbone\.fpn_lateral{n}\.(.*)", r"fpn.lateral.{m}.\1"), range(2, 6), -2),
    *numbered((r"backbone\.fpn_output{n}\.(.*)", r"fpn.output.{m}.\1"), range(2, 6), -2),
    (r"backbone\.top_block\.(p[67]\..*)", r"fpn.\1"),
    *numbered((r"semantic_fpn\.p{n}\.(\d+)\.(norm\..*)", r"semantic_fpn.branches.{m}.\1.\2"), range(2, 6), -2),
    *numbered((r"semantic_fpn\.p{n}\.(\d+)\.(weight|bias)", r"semantic_fpn.branches.{m}.\1.conv.\2"), range(2, 6), -2),
    *_stack(r"position_head\.position_head\.position_head_head_", "position_head.stack"),
    *_stack(r"kernel_head\.kernel_head\.kernel_head_head_", "kernel_head.stack"),
    *_stack(r"feature_encoder\.encode_head\.encode_head_head_", "feature_encoder"),
    (r"position_head\.out_inst\.(.*)", r"position_head.out_thing.\1"),
    (r"position_head\.out_sem\.(.*)", r"position_head.out_stuff.\1"),
    (r"kernel_head\.out_conv\.(.*)", r"kernel_head.out.\1"),
    (r"(thing|stuff)_generator\.embed_extractor\.(.*)", r"\1_generator.embed.\2"),
]


def options(weights: Mapping[str, Tensor], num_classes: int, num_stuff: int) -> dict[str, Any]:
    """Options of :class:`panoptic_ibs.heads.panoptic_fcn.PanopticFCN` from the head's tensors.

    Raises:
        CheckpointError: another number of thing or stuff channels than the data set gives.
    """
    things, stuff = (int(weights[f"position_head.out_{kind}.weight"].shape[0]) for kind in ("thing", "stuff"))
    conventions = {num_classes: "all", num_stuff + 1: "merged"}
    if things != num_classes - num_stuff or stuff not in conventions:
        raise CheckpointError(
            f"The file's network has {things} thing and {stuff} stuff channels; the data set has "
            f"{num_classes - num_stuff} thing classes and needs {num_stuff + 1} stuff channels (things merged into "
            f"one) or {num_classes} (all classes)."
        )
    blocks = [int(m[1]) for m in (re.match(r"position_head\.stack\.blocks\.(\d+)\.", n) for n in weights) if m]
    return {
        "stuff": conventions[stuff],
        "channels": int(weights["fpn.lateral.0.weight"].shape[0]),
        "feature_channels": int(weights["thing_generator.embed.weight"].shape[0]),
        "depth": 1 + max(blocks),
        "deform": "position_head.stack.blocks.0.conv.offset_mask.weight" in weights,
        "deform_features": "feature_encoder.blocks.0.conv.offset_mask.weight" in weights,
        "norm_groups": 32,
    }


def rows(options: Mapping[str, Any], classes: list[int], things: list[int], stuff: list[int]) -> dict[str, list[int]]:
    """Tensors whose rows are classes, and from which row of the file each is taken; see ``Program.rows``."""
    regions = classes if options["stuff"] == "all" else [0, *(1 + row for row in stuff)]
    kinds = ("weight", "bias")
    return {
        **{f"position_head.out_thing.{kind}": things for kind in kinds},
        **{f"position_head.out_stuff.{kind}": regions for kind in kinds},
    }
