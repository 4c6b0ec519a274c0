"""Which options reach ``timm.create_model``: those of the architecture, none that read files or fetch anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from panoptic_ibs.errors import ConfigError

_OWN = """
pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict pretrained_filter_fn pretrained_model_args
checkpoint_path cache_dir features_only scriptable exportable no_jit pruned model_cfg feature_cfg kwargs_filter
"""
_WORDS = """
act_layer act_type agg attn attn_act_layer attn_layer attn_stage attn_type attn_types attn_upsample aa_layer
block_type block_types dw_act_layer down_op down_ops downsample embed_norm_layer fc_act_layer feature_cls
feature_location force_act_layer fuse_method gate_layer global_pool head head_fn interpolation_mode
local_mbconv_norm mode norm_layer norm_layer_cl output_fmt pad_type padding padding_mode partition_type
pconv_fw_type pool pool_type pos_embed pos_embed_interp_mode post_layers proj_type reduction rel_pos_type
rope_grid_indexing rope_type se_layer spatial_conv stem_type token_mixer_type token_mixers type types union
upsample_mode version weight_init
"""
OWN = frozenset(_OWN.split())
"""What ``create_model`` and its builder take for themselves: weights, files, forms of the result."""
WORDS = frozenset(_WORDS.split())
"""Options of timm's architectures whose values are words. Files are named by text, so no other option may be text."""

SIZES = frozenset({"layers", "depths", "channels", "dims", "embed_dims"})
"""Lists of timm's architectures with a stage's blocks or width each: a stage without any has no output to take."""


def check_options(options: Mapping[str, Any], key: str = "backbone.options") -> None:
    """Make sure that options name no file, address or object: they may come from a checkpoint of anybody.

    Args:
        options: numbers, flags, words of :data:`WORDS`, and lists and mappings of these.
        key: where they stand, for messages.

    Raises:
        ConfigError: names the option.
    """
    for name, value in options.items():
        if not isinstance(name, str) or name in OWN:
            raise ConfigError(
                f"{key}.{name}: is no option of an architecture and is not passed on to timm. Weights are given as "
                "backbone.weights=FILE or backbone.pretrained=true."
            )
        _check(name, value, f"{key}.{name}")


def _check(name: str, value: Any, key: str) -> None:
    if isinstance(value, Mapping):
        check_options(value, key)
    elif isinstance(value, list | tuple):
        for element in value:
            _check(name, element, key)
    elif isinstance(value, str):
        if name not in WORDS or not re.fullmatch(r"\w*", value):
            raise ConfigError(
                f"{key}: {value[:80]!r} is text; only options that choose a kind of layer (act_layer, norm_layer, ...) "
                "may be text, and only one word, so that no option names a file or an address."
            )
    elif name in SIZES and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{key} holds {value}; expected: whole numbers >= 1, one a stage.")
    elif value is not None and not isinstance(value, int | float):
        raise ConfigError(f"{key} is a {type(value).__name__}; expected a number, true, false, a word or a list.")
