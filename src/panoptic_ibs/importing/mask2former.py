"""Names and shapes of Mask2Former: the reference program (detectron2) and transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from panoptic_ibs.errors import CheckpointError

from .renaming import Rule

_ATTENTION = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value",
              "output_proj": "output"}  # fmt: skip

# "pixel_decoder" is missing in checkpoints from before the reference program's second version, and "query_feat" was
# "static_query".
_PIXEL, _QUERY = r"sem_seg_head\.(?:pixel_decoder\.)?", r"sem_seg_head\.predictor\."
_ENCODER = _PIXEL + r"transformer\.encoder\.layers\.(\d+)\."

DETECTRON2: list[Rule] = [
    (_QUERY + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.in_proj_(weight|bias)",
     r"query_decoder.layers.\1.cross.input.\2"),
    (_QUERY + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.out_proj\.(weight|bias)",
     r"query_decoder.layers.\1.cross.output.\2"),
    (_QUERY + r"transformer_cross_attention_layers\.(\d+)\.norm\.(.*)", r"query_decoder.layers.\1.norm1.\2"),
    (_QUERY + r"transformer_self_attention_layers\.(\d+)\.self_attn\.in_proj_(weight|bias)",
     r"query_decoder.layers.\1.own.input.\2"),
    (_QUERY + r"transformer_self_attention_layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)",
     r"query_decoder.layers.\1.own.output.\2"),
    (_QUERY + r"transformer_self_attention_layers\.(\d+)\.norm\.(.*)", r"query_decoder.layers.\1.norm2.\2"),
    (_QUERY + r"transformer_ffn_layers\.(\d+)\.(linear[12]\..*)", r"query_decoder.layers.\1.\2"),
    (_QUERY + r"transformer_ffn_layers\.(\d+)\.norm\.(.*)", r"query_decoder.layers.\1.norm3.\2"),
    (_QUERY + r"decoder_norm\.(.*)", r"query_decoder.norm.\1"),
    (_QUERY + r"(?:query_feat|static_query)\.weight", r"query_decoder.query.weight"),
    (_QUERY + r"query_embed\.weight", r"query_decoder.place.weight"),
    (_QUERY + r"level_embed\.weight", r"query_decoder.level_embed.weight"),
    (_QUERY + r"class_embed\.(.*)", r"query_decoder.classify.\1"),
    (_QUERY + r"mask_embed\.(layers\..*)", r"query_decoder.embed.\1"),
    *((_ENCODER + rf"self_attn\.{theirs}\.(.*)", rf"pixel_decoder.layers.\1.attention.{ours}.\2")
      for theirs, ours in _ATTENTION.items()),
    (_ENCODER + r"((?:norm|linear)[12]\..*)", r"pixel_decoder.layers.\1.\2"),
    (_PIXEL + r"transformer\.level_embed", r"pixel_decoder.level_embed"),
    (_PIXEL + r"input_proj\.(.*)", r"pixel_decoder.project.\1"),
    (_PIXEL + r"mask_features\.(.*)", r"pixel_decoder.mask_features.\1"),
    (_PIXEL + r"adapter_1\.weight", r"pixel_decoder.lateral.0.weight"),
    (_PIXEL + r"adapter_1\.norm\.(.*)", r"pixel_decoder.lateral.1.\1"),
    (_PIXEL + r"layer_1\.weight", r"pixel_decoder.output.0.weight"),
    (_PIXEL + r"layer_1\.norm\.(.*)", r"pixel_decoder.output.1.\1"),
]  # fmt: skip

_HF_PIXEL, _HF_QUERY = r"model\.pixel_level_module\.decoder\.", r"model\.transformer_module\."
_HF_ENCODER = _HF_PIXEL + r"encoder\.layers\.(\d+)\."
_HF_LAYER = _HF_QUERY + r"decoder\.layers\.(\d+)\."

TRANSFORMERS: list[Rule] = [
    (_HF_LAYER + r"cross_attn\.in_proj_(weight|bias)", r"query_decoder.layers.\1.cross.input.\2"),
    (_HF_LAYER + r"cross_attn\.out_proj\.(.*)", r"query_decoder.layers.\1.cross.output.\2"),
    (_HF_LAYER + r"cross_attn_layer_norm\.(.*)", r"query_decoder.layers.\1.norm1.\2"),
    *((_HF_LAYER + rf"self_attn\.{part}_proj\.(weight|bias)", rf"query_decoder.layers.\1.own.input.\2#{i}")
      for i, part in enumerate("qkv")),
    (_HF_LAYER + r"self_attn\.out_proj\.(.*)", r"query_decoder.layers.\1.own.output.\2"),
    (_HF_LAYER + r"self_attn_layer_norm\.(.*)", r"query_decoder.layers.\1.norm2.\2"),
    (_HF_LAYER + r"fc([12])\.(.*)", r"query_decoder.layers.\1.linear\2.\3"),
    (_HF_LAYER + r"final_layer_norm\.(.*)", r"query_decoder.layers.\1.norm3.\2"),
    (_HF_QUERY + r"decoder\.layernorm\.(.*)", r"query_decoder.norm.\1"),
    (_HF_QUERY + r"decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.(.*)", r"query_decoder.embed.layers.\1.\2"),
    (_HF_QUERY + r"queries_features\.weight", r"query_decoder.query.weight"),
    (_HF_QUERY + r"queries_embedder\.weight", r"query_decoder.place.weight"),
    (_HF_QUERY + r"level_embed\.weight", r"query_decoder.level_embed.weight"),
    (r"class_predictor\.(.*)", r"query_decoder.classify.\1"),
    *((_HF_ENCODER + rf"self_attn\.{theirs}\.(.*)", rf"pixel_decoder.layers.\1.attention.{ours}.\2")
      for theirs, ours in _ATTENTION.items()),
    (_HF_ENCODER + r"self_attn_layer_norm\.(.*)", r"pixel_decoder.layers.\1.norm1.\2"),
    (_HF_ENCODER + r"fc([12])\.(.*)", r"pixel_decoder.layers.\1.linear\2.\3"),
    (_HF_ENCODER + r"final_layer_norm\.(.*)", r"pixel_decoder.layers.\1.norm2.\2"),
    (_HF_PIXEL + r"level_embed", r"pixel_decoder.level_embed"),
    (_HF_PIXEL + r"input_projections\.(.*)", r"pixel_decoder.project.\1"),
    (_HF_PIXEL + r"mask_projection\.(.*)", r"pixel_decoder.mask_features.\1"),
    (_HF_PIXEL + r"adapter_1\.(.*)", r"pixel_decoder.lateral.\1"),
    (_HF_PIXEL + r"layer_1\.(.*)", r"pixel_decoder.output.\1"),
]  # fmt: skip


def options(weights: Mapping[str, Tensor], num_classes: int, num_stuff: int) -> dict[str, Any]:
    """Options of :class:`panoptic_ibs.heads.mask2former.Mask2Former` from the head's tensors.

    A network that knows as many classes as the data set has things is one of instance segmentation.

    Raises:
        CheckpointError: another number of classes.
    """
    found = weights["query_decoder.classify.weight"].shape[0] - 1
    tasks = {num_classes - num_stuff: "instance", num_classes: "panoptic"}
    if found not in tasks:
        raise CheckpointError(
            f"The file's network tells {found} classes apart; the data set has {num_classes}, of which "
            f"{num_classes - num_stuff} are things."
        )

    def depth(prefix: str) -> int:
        return 1 + max(int(m[1]) for m in (re.match(rf"{prefix}\.layers\.(\d+)\.", n) for n in weights) if m)

    queries, channels = weights["query_decoder.query.weight"].shape
    return {
        "task": tasks[found],
        "queries": int(queries),
        "channels": int(channels),
        "encoder_depth": depth("pixel_decoder"),
        "decoder_depth": depth("query_decoder"),
        "encoder_hidden": int(weights["pixel_decoder.layers.0.linear1.weight"].shape[0]),
        "decoder_hidden": int(weights["query_decoder.layers.0.linear1.weight"].shape[0]),
    }


def rows(options: Mapping[str, Any], classes: list[int], things: list[int], stuff: list[int]) -> dict[str, list[int]]:
    """Tensors whose rows are classes, and from which row of the file each is taken; see ``Program.rows``."""
    order = classes if options["task"] == "panoptic" else things
    return {f"query_decoder.classify.{kind}": [*order, len(order)] for kind in ("weight", "bias")}  # last: no object
