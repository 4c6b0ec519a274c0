"""Names and shapes of backbones: ResNet and Swin of detectron2 and of transformers, as timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from panoptic_ibs.errors import CheckpointError

from .renaming import Rule, numbered, rename

_REST = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK, _NEW_BLOCK = r"layers\.{n}\.blocks\.(\d+)\.", r"layers_{m}.blocks.\1."

DETECTRON2_RESNET: list[Rule] = [
    (r"stem\.conv1\.weight", r"conv1.weight"),
    (rf"stem\.conv1\.norm\.{_REST}", r"bn1.\1"),
    *numbered((r"res{n}\.(\d+)\.conv(\d)\.weight", r"layer{m}.\1.conv\2.weight"), range(2, 6), -1),
    *numbered((rf"res{{n}}\.(\d+)\.conv(\d)\.norm\.{_REST}", r"layer{m}.\1.bn\2.\3"), range(2, 6), -1),
    *numbered((r"res{n}\.(\d+)\.shortcut\.weight", r"layer{m}.\1.downsample.0.weight"), range(2, 6), -1),
    *numbered((rf"res{{n}}\.(\d+)\.shortcut\.norm\.{_REST}", r"layer{m}.\1.downsample.1.\2"), range(2, 6), -1),
]

# The oldest pickles (MSRA/R-50.pkl): batch norms folded into a scale and a shift.
_BRANCH = {"branch1": "downsample.{i}", "branch2a": "{c}1", "branch2b": "{c}2", "branch2c": "{c}3"}
CAFFE2_RESNET: list[Rule] = [
    (r"conv1_w", r"conv1.weight"),
    (r"res_conv1_bn_s", r"bn1.weight"),
    (r"res_conv1_bn_b", r"bn1.bias"),
    *(
        rule
        for branch, place in _BRANCH.items()
        for suffix, kind, i, name in [
            ("w", "conv", 0, "weight"),
            ("bn_s", "bn", 1, "weight"),
            ("bn_b", "bn", 1, "bias"),
        ]
        for rule in numbered(
            (rf"res{{n}}_(\d+)_{branch}_{suffix}", rf"layer{{m}}.\1.{place.format(i=i, c=kind)}.{name}"),
            range(2, 6),
            -1,
        )
    ),
]

TRANSFORMERS_RESNET: list[Rule] = [
    (r"embedder\.embedder\.convolution\.weight", r"conv1.weight"),
    (rf"embedder\.embedder\.normalization\.{_REST}", r"bn1.\1"),
    *(
        rule
        for k in range(3)
        for rule in [
            *numbered(
                (rf"encoder\.stages\.{{n}}\.layers\.(\d+)\.layer\.{k}\.convolution\.weight",
                 rf"layer{{m}}.\1.conv{k + 1}.weight"), range(4), 1),
            *numbered(
                (rf"encoder\.stages\.{{n}}\.layers\.(\d+)\.layer\.{k}\.normalization\.{_REST}",
                 rf"layer{{m}}.\1.bn{k + 1}.\2"), range(4), 1),
        ]
    ),
    *numbered(
        (r"encoder\.stages\.{n}\.layers\.(\d+)\.shortcut\.convolution\.weight", r"layer{m}.\1.downsample.0.weight"),
        range(4), 1),
    *numbered(
        (rf"encoder\.stages\.{{n}}\.layers\.(\d+)\.shortcut\.normalization\.{_REST}", r"layer{m}.\1.downsample.1.\2"),
        range(4), 1),
]  # fmt: skip

# timm downsamples at the start of a stage, the others at the end of the one before.
DETECTRON2_SWIN: list[Rule] = [
    (r"(patch_embed\.(?:proj|norm)\..*)", r"\1"),
    *numbered((_BLOCK + r"((?:norm|attn|mlp).*)", _NEW_BLOCK + r"\2"), range(4), 0),
    *numbered((r"layers\.{n}\.downsample\.(.*)", r"layers_{m}.downsample.\1"), range(4), 1),
]

TRANSFORMERS_SWIN: list[Rule] = [
    (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"embeddings\.norm\.(.*)", r"patch_embed.norm.\1"),
    *(
        rule
        for pattern, new in [
            (r"attention\.(?:self\.query|q_proj)\.(.*)", r"attn.qkv.\2#0"),
            (r"attention\.(?:self\.key|k_proj)\.(.*)", r"attn.qkv.\2#1"),
            (r"attention\.(?:self\.value|v_proj)\.(.*)", r"attn.qkv.\2#2"),
            (r"attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
             r"attn.relative_position_bias_table"),
            (r"attention\.(?:output\.dense|o_proj)\.(.*)", r"attn.proj.\2"),
            (r"layernorm_before\.(.*)", r"norm1.\2"),
            (r"layernorm_after\.(.*)", r"norm2.\2"),
            (r"(?:intermediate\.dense|mlp\.fc1)\.(.*)", r"mlp.fc1.\2"),
            (r"(?:output\.dense|mlp\.fc2)\.(.*)", r"mlp.fc2.\2"),
        ]
        for rule in numbered((r"encoder\." + _BLOCK + pattern, _NEW_BLOCK + new), range(4), 0)
    ),
    *numbered((r"encoder\.layers\.{n}\.downsample\.(.*)", r"layers_{m}.downsample.\1"), range(4), 1),
]  # fmt: skip

# The norms on Swin's outputs, which timm does not have.
DETECTRON2_OUTPUT_NORMS: list[Rule] = [(r"norm([0-3])\.(weight|bias)", r"\1.\2")]
TRANSFORMERS_OUTPUT_NORMS: list[Rule] = numbered(
    (r"hidden_states_norms\.stage{n}\.(weight|bias)", r"{m}.\1"), range(1, 5), -1
)

NOT_NEEDED = (
    r"proposal_generator\.anchor_generator\.cell_anchors\.\d+",  # made from the options
    r".*relative_position_index",  # made from the window's size
    r".*criterion\.empty_weight",  # the no-object weight of the class loss
    r"(?:.*\.)?pixel_(?:mean|std)",
    r".*encoder\.swin\.layernorm\..*",  # the classifier's norm
)


def classifier_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageNet weights of a ResNet in detectron2's names (``ImageNetPretrained/...pkl``) as timm's; else unchanged."""
    if "conv1_w" in state:
        found, _ = rename(state, CAFFE2_RESNET)
        for name, value in list(found.items()):
            if name.endswith(("bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight")):
                stem = name.removesuffix("weight")
                found[stem + "running_mean"] = torch.zeros_like(value)
                found[stem + "running_var"] = torch.ones_like(value) - 1e-5  # plus epsilon it is one
        return found
    return rename(state, DETECTRON2_RESNET)[0] if "stem.conv1.weight" in state else dict(state)


def describe(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of :class:`panoptic_ibs.backbones.TimmBackbone` for a backbone's tensors in timm's names.

    Raises:
        CheckpointError: neither a ResNet nor a Swin.
    """
    if "patch_embed.proj.weight" in weights:
        return _swin(weights)
    if "conv1.weight" in weights and "layer1.0.conv1.weight" in weights:
        return _resnet(weights)
    raise CheckpointError(
        "The backbone in the file is neither a ResNet nor a Swin; those are the backbones that can be converted."
    )


def _counts(weights: Mapping[str, Tensor], pattern: str) -> list[int]:
    """Blocks of each stage; the pattern's groups are the stage and the block."""
    found: dict[int, int] = {}
    for name in weights:
        if match := re.match(pattern, name):
            stage, block = int(match[1]), int(match[2])
            found[stage] = max(found.get(stage, 0), block + 1)
    return [found[stage] for stage in sorted(found)]


def _resnet(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    bottleneck = "layer1.0.conv3.weight" in weights
    depths = _counts(weights, r"layer(\d)\.(\d+)\.")
    known: dict[tuple[int, ...], str] = {
        (False, 2, 2, 2, 2): "resnet18", (False, 3, 4, 6, 3): "resnet34", (True, 3, 4, 6, 3): "resnet50",
        (True, 3, 4, 23, 3): "resnet101", (True, 3, 8, 36, 3): "resnet152",
    }  # fmt: skip
    name = known.get((bottleneck, *depths))
    options: dict[str, Any] = {} if name else {"layers": depths}
    # A fixed batch norm keeps no count of batches; one that was trained does.
    frozen = not any(k.endswith("num_batches_tracked") for k in weights)
    return {"name": name or ("resnet50" if bottleneck else "resnet18"), "freeze_norm": frozen, "options": options}


def _swin(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    depths = _counts(weights, r"layers_(\d)\.blocks\.(\d+)\.")
    tables = [weights[f"layers_{i}.blocks.0.attn.relative_position_bias_table"] for i in range(len(depths))]
    width, window = weights["patch_embed.proj.weight"].shape[0], (round(tables[0].shape[0] ** 0.5) + 1) // 2
    heads = [int(t.shape[1]) for t in tables]
    known: dict[tuple[int, ...], str] = {
        (96, 2, 2, 6, 2, 7): "swin_tiny_patch4_window7_224", (96, 2, 2, 18, 2, 7): "swin_small_patch4_window7_224",
        (128, 2, 2, 18, 2, 7): "swin_base_patch4_window7_224", (128, 2, 2, 18, 2, 12): "swin_base_patch4_window12_384",
        (192, 2, 2, 18, 2, 12): "swin_large_patch4_window12_384",
    }  # fmt: skip
    name = known.get((width, *depths, window))
    sizes = {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": window}
    return {
        "name": name or "swin_tiny_patch4_window7_224",
        "output_norm": True,
        "options": {} if name else sizes,
    }
