"""A checkpoint of another program as weights and options of a network of this package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from panoptic_ibs.errors import CheckpointError, ConfigError

from . import backbones, mask2former, panoptic_fcn, panoptic_fpn
from .programs import program_of
from .renaming import Rule, rename, under

# How a Caffe-style network of detectron2 sees images: BGR, and the published configurations give the channels' means in
# RGB order, so that blue loses red's mean. Here in RGB order, as ``PanopticModel`` takes them.
CAFFE = {"pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [1.0, 1.0, 1.0], "channel_order": "bgr"}
# As detectron2's own networks are: the means belong to their channels.
MSRA = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [1.0, 1.0, 1.0], "channel_order": "bgr"}
TORCHVISION = {
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "channel_order": "rgb",
}


@dataclass(frozen=True)
class Program:
    """One program that writes checkpoints of one head.

    Attributes:
        name: for people.
        sign: a name in its checkpoints that tells it from the others (a pattern for a whole name).
        rules: old names to names in our model.
        options: options of the head from its tensors and the numbers of classes and of stuff classes.
        rows: the head's tensors whose rows are classes, by name, and from which row of the file each is taken; from the
            head's options and the file's positions of all classes, of things and of stuff.
        backbone: options of the backbone that no tensor tells.
        model: how it normalises images.
        labelled: whether ``config.json`` in the checkpoint's folder names the classes.
        layout: brings renamed tensors that are laid out in another way into ours.
        fresh: names here (a pattern for a whole name) that start untrained if the file has none of them.
    """

    name: str
    sign: str
    rules: tuple[Rule, ...]
    options: Callable[[Mapping[str, Tensor], int, int], dict[str, Any]]
    rows: Callable[[Mapping[str, Any], list[int], list[int], list[int]], dict[str, list[int]]]
    backbone: Mapping[str, Any]
    model: Mapping[str, Any]
    labelled: bool = False
    layout: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    fresh: str | None = None


def _backbone(prefix: str, rules: list[Rule], norms: list[Rule]) -> list[Rule]:
    return under(prefix, rules, "backbone.model.") + under(prefix, norms, "backbone.output_norms.")


_HF = r"model\.pixel_level_module\.encoder\.(?:model\.|swin\.)?"

PROGRAMS: dict[str, list[Program]] = {
    "mask2former": [
        Program(
            "Mask2Former (detectron2)",
            r"sem_seg_head\.predictor\.class_embed\.weight",
            (
                *under("", mask2former.DETECTRON2, "head."),
                *_backbone(r"backbone\.", backbones.DETECTRON2_SWIN, backbones.DETECTRON2_OUTPUT_NORMS),
                *_backbone(r"backbone\.", backbones.DETECTRON2_RESNET, []),
            ),
            mask2former.options,
            mask2former.rows,
            {},
            TORCHVISION,
        ),
        Program(
            "Mask2Former (transformers)",
            r"class_predictor\.weight",
            (
                *under("", mask2former.TRANSFORMERS, "head."),
                *_backbone(_HF, backbones.TRANSFORMERS_SWIN, backbones.TRANSFORMERS_OUTPUT_NORMS),
                *_backbone(_HF, backbones.TRANSFORMERS_RESNET, []),
            ),
            mask2former.options,
            mask2former.rows,
            {},
            TORCHVISION,
            labelled=True,
        ),
    ],
    "panoptic_fcn": [
        Program(
            "Panoptic FCN (detectron2)",
            r"position_head\.out_inst\.weight",
            (
                *under("", panoptic_fcn.RULES, "head."),
                *_backbone(r"backbone\.bottom_up\.", backbones.DETECTRON2_RESNET, []),
            ),
            panoptic_fcn.options,
            panoptic_fcn.rows,
            {"stride_in_1x1": True},  # its backbones start from the MSRA weights
            CAFFE,
        )
    ],
    "panoptic_fpn": [
        Program(
            "Panoptic FPN or Mask R-CNN (detectron2)",
            r"proposal_generator\.rpn_head\.objectness_logits\.weight",
            (
                *under("", panoptic_fpn.DETECTRON2, "head."),
                *_backbone(r"backbone\.bottom_up\.", backbones.DETECTRON2_RESNET, []),
            ),
            panoptic_fpn.detectron2,
            panoptic_fpn.rows,
            {"stride_in_1x1": True},
            MSRA,
            layout=panoptic_fpn.detectron2_layout,
            fresh=panoptic_fpn.FRESH,
        ),
        Program(
            "Mask R-CNN (torchvision)",
            r"rpn\.head\.cls_logits\.weight",
            (
                *under("", panoptic_fpn.TORCHVISION, "head."),
                *_backbone(r"backbone\.body\.", panoptic_fpn.TORCHVISION_BODY, []),
            ),
            panoptic_fpn.torchvision,
            panoptic_fpn.rows,
            {},
            TORCHVISION,
            layout=panoptic_fpn.torchvision_layout,
            fresh=panoptic_fpn.FRESH,
        ),
    ],
}


@dataclass
class Imported:
    """A converted checkpoint.

    Attributes:
        program: what wrote it.
        weights: tensors by the names of :class:`panoptic_ibs.model.PanopticModel`.
        source: the old name of each new one.
        unused: old names that no rule knows.
        not_needed: old names of tensors that the network here makes itself.
        backbone, head, model: options that describe the network.
    """

    program: Program
    weights: dict[str, Tensor]
    source: dict[str, str]
    unused: list[str]
    not_needed: list[str]
    backbone: dict[str, Any]
    head: dict[str, Any]
    model: dict[str, Any]


def import_checkpoint(state: Mapping[str, Tensor], head: str, num_classes: int, num_stuff: int) -> Imported:
    """Recognise the program that wrote a state dict, rename its tensors and describe its network.

    Args:
        state: tensors by the program's names.
        head: a key of :data:`PROGRAMS`.
        num_classes: classes of the data set; num_stuff: the stuff classes among them.

    Raises:
        ConfigError: no checkpoints of this head can be read.
        CheckpointError: of no known program, or of another number of classes.
    """
    if head not in PROGRAMS:
        raise ConfigError(f"head={head}: checkpoints can be converted for {', '.join(PROGRAMS)}.")
    program = _recognised(state, head)
    not_needed = [name for name in state if any(re.fullmatch(p, name) for p in backbones.NOT_NEEDED)]
    needed = {name: value for name, value in state.items() if name not in set(not_needed)}
    weights, source = rename(needed, program.rules)
    taken = {name for old in source.values() for name in old.split(" + ")}
    try:
        weights = weights if program.layout is None else program.layout(weights)
        parts = {k.removeprefix("head."): v for k, v in weights.items() if k.startswith("head.")}
        options = program.options(parts, num_classes, num_stuff)
    except KeyError as error:
        lacking = str(error.args[0]).removeprefix("head.")
        raise CheckpointError(f"The file lacks the tensor that would be {lacking!r} here.") from error
    body = {k.removeprefix("backbone.model."): v for k, v in weights.items() if k.startswith("backbone.model.")}
    return Imported(
        program=program,
        weights=weights,
        source=source,
        unused=[name for name in needed if name not in taken],
        not_needed=not_needed,
        backbone={**backbones.describe(body), **program.backbone},
        head=options,
        model=dict(program.model),
    )


def _recognised(state: Mapping[str, Tensor], head: str) -> Program:
    """The program that wrote a state dict.

    Raises:
        CheckpointError: none that can be read for this head; the message says what it is, if that is known.
    """
    known = " or ".join(p.name for p in PROGRAMS[head])
    other = program_of(state)
    by_head = {
        h: p for h, programs in PROGRAMS.items() for p in programs if any(re.fullmatch(p.sign, n) for n in state)
    }
    if other is None and head in by_head:
        return by_head[head]
    if other is None and by_head:
        theirs, program = next(iter(by_head.items()))
        raise CheckpointError(
            f"The file is no checkpoint of {known} but of {program.name}. Is head={head} right? Give head={theirs}."
        )
    names = ", ".join(repr(n) for n in list(state)[:3]) or "no tensors"
    if other is None:
        raise CheckpointError(f"The file is no checkpoint of {known}: it has {names}. Is head={head} right?")
    raise CheckpointError(
        f"The file is no checkpoint of {known} but of {other} (it has {names}), which cannot be converted to "
        f"head={head}."
    )


@dataclass
class Comparison:
    """What fits between imported weights and a model, by the model's names; ``fresh``: what no such file has."""

    loaded: list[str]
    missing: list[str]
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    unused: list[str]
    fresh: list[str]

    @property
    def complete(self) -> bool:
        """Whether all of the model came from the file, but for what no such file has, and nothing was left."""
        return not (self.missing or self.misshapen or self.unused)


def compare(imported: Imported, own: Mapping[str, Tensor]) -> Comparison:
    """Compare with a model's ``state_dict()``; names of the file are the file's own where it is the file's fault."""
    fits, misshapen, unused = [], [], list(imported.unused)
    for name, value in imported.weights.items():
        if name not in own:
            unused.append(f"{imported.source[name]} (as {name})")
        elif own[name].shape != value.shape:
            misshapen.append((f"{imported.source[name]} (as {name})", tuple(value.shape), tuple(own[name].shape)))
        else:
            fits.append(name)
    missing = [name for name in own if name not in imported.weights]
    pattern = imported.program.fresh
    fresh = [name for name in own if pattern and re.fullmatch(pattern, name)]
    if not set(fresh) <= set(missing):
        fresh = []  # some are there: then all must be
    return Comparison(fits, [name for name in missing if name not in set(fresh)], misshapen, unused, fresh)
