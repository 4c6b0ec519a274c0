"""Backbones: any timm model with ``features_only``, with weights from timm or from a file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from panoptic_ibs.errors import CheckpointError, ConfigError
from panoptic_ibs.importing.backbones import classifier_to_timm
from panoptic_ibs.ranges import AtLeastOne, Whole
from panoptic_ibs.structures import FeatureLevel
from panoptic_ibs.weight_files import check_numbers, read_tensors

from .folding import fold_norms
from .options import check_options
from .swin import SWIN_OPTIONS, pad_first


class TimmBackbone(nn.Module):
    """Feature pyramid of a timm model.

    Args:
        name: timm's model name, e.g. ``resnet50``.
        pretrained: fetch timm's weights (needs a network or a filled cache).
        weights: file with weights of the whole timm model (``.pth``, ``.pt``, ``.safetensors``, ``.pkl``), instead of
            fetching. Names must be timm's, or detectron2's of a ResNet; where none fits, tensors are matched by their
            order if all shapes agree.
        min_stride: finer levels are left out.
        frozen_stages: freeze the stem and this many stages (2: stem and stride-4 stage, as detectron2's FREEZE_AT).
        freeze_norm: batch norms as fixed affine maps.
        stride_in_1x1: ResNets of bottleneck blocks: stride in each block's first 1 x 1 convolution, as in the MSRA
            weights, instead of the 3 x 3 one.
        output_norm: a layer norm on each output, as networks on Swin have it.
        options: further arguments of ``timm.create_model``: those of the architecture, see
            :func:`panoptic_ibs.backbones.options.check_options`.

    Attributes:
        levels: strides and channels of the outputs, finest first.

    Raises:
        ConfigError: unknown model; an option that is none of an architecture; weights that cannot be fetched.
        CheckpointError: a weights file that does not fit.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str | Path | None = None,
        min_stride: AtLeastOne = 4,
        frozen_stages: Whole = 0,
        freeze_norm: bool = False,
        stride_in_1x1: bool = False,
        output_norm: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        check_options(options or {})
        arguments = {**(SWIN_OPTIONS if name.startswith("swin_") else {}), **(options or {})}
        self.model: Any = _create(name, pretrained, Path(weights) if weights else None, arguments)
        pad_first(self.model)
        if stride_in_1x1:
            _move_stride(name, self.model)
        reductions = self.model.feature_info.reduction()
        channels = self.model.feature_info.channels()
        self.selected = [i for i, r in enumerate(reductions) if r >= min_stride]
        self.levels = tuple(FeatureLevel(int(reductions[i]), int(channels[i])) for i in self.selected)
        if freeze_norm:
            self.model = freeze_batch_norm_2d(self.model)
            fold_norms(self.model)
        self._freeze(frozen_stages)
        widths = [level.channels for level in self.levels] if output_norm else []
        self.output_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def _freeze(self, stages: int) -> None:
        """Freeze the modules up to the end of a stage; ``feature_info`` names the module that ends each stage."""
        if stages <= 0:
            return
        infos = [i for i in self.model.feature_info.info if i["reduction"] >= 4]
        last = str(infos[min(max(stages - 2, 0), len(infos) - 1)]["module"])
        path = [last.replace(".", "_")] if hasattr(self.model, last.replace(".", "_")) else last.split(".")
        before = _modules_before(self.model, path)
        if before is None:
            raise ConfigError(f"backbone.frozen_stages: the stages of {self.name!r} cannot be told apart; set it to 0.")
        for module in [*before, *([self.model.get_submodule(".".join(path))] if stages > 1 else [])]:
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images to features (B, C_l, H / stride_l, W / stride_l), finest first."""
        features = self.model(images)
        chosen: list[Tensor] = []
        for i, level in zip(self.selected, self.levels, strict=True):
            feature = features[i]
            last = feature.shape[1] != level.channels and feature.shape[-1] == level.channels  # Swin and its like
            if self.output_norms:
                feature = feature if last else feature.permute(0, 2, 3, 1)
                feature, last = self.output_norms[len(chosen)](feature), True
            chosen.append(feature.permute(0, 3, 1, 2).contiguous() if last else feature)
        return chosen


def _modules_before(root: nn.Module, path: Sequence[str]) -> list[nn.Module] | None:
    """Modules in front of the one at ``path``, at its depth and above; None if there is none at ``path``."""
    before: list[nn.Module] = []
    for name, child in root.named_children():
        if name == path[0]:
            inner = _modules_before(child, path[1:]) if len(path) > 1 else []
            return None if inner is None else [*before, *inner]
        before.append(child)
    return None


def _move_stride(name: str, model: nn.Module) -> None:
    """Bring the stride of every bottleneck block from its 3 x 3 to its first 1 x 1 convolution."""
    blocks = [m for m in model.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ConfigError(f"backbone.stride_in_1x1: {name!r} has no ResNet bottleneck blocks; set it to false.")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _create(name: str, pretrained: bool, weights: Path | None, options: dict[str, Any]) -> Any:
    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models():
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise ConfigError(f"backbone.name: timm has no model {name!r}; near names: {', '.join(near) or 'none'}.")
    if weights is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights.pth"
            torch.save(_read_weights(name, weights), file)
            overlay = {"file": str(file)}
            return timm.create_model(
                name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **options
            )
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise ConfigError(f"backbone.name={name}: timm cannot make it with features_only: {error}") from error
        raise ConfigError(
            f"backbone.pretrained: the weights of {name!r} could not be downloaded "
            f"({type(error).__name__}). Give them as a file with backbone.weights=FILE, or train from scratch with "
            "backbone.pretrained=false."
        ) from error


def _read_weights(name: str, path: Path) -> dict[str, Tensor]:
    """State dict in timm's names from a file; nothing in the file is executed."""
    if not path.is_file():
        raise CheckpointError(f"backbone.weights: there is no file {path}.")
    state: Any = read_tensors(path)
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(state.get(key), dict):
            state = state[key]
    state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    check_numbers(state, path)
    state = classifier_to_timm(state)
    own = timm.create_model(name, pretrained=False).state_dict()
    if any(k in own and own[k].shape == v.shape for k, v in state.items()):
        misshapen = [k for k in own if k in state and own[k].shape != state[k].shape and own[k].ndim > 1]
        missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
        config = timm.get_pretrained_cfg(name)
        classifier = (config.classifier if config else None) or "fc"
        broken = [k for k in missing + misshapen if not k.startswith(classifier)]
        if broken:
            raise CheckpointError(
                f"{path}: does not hold the weights of {name!r}: {len(broken)} tensors are missing or misshapen, "
                f"first {broken[0]!r}. Set backbone.name to the model that the file was made from."
            )
        return state
    if [v.shape for v in own.values()] == [v.shape for v in state.values()]:
        return dict(zip(own, state.values(), strict=True))
    raise CheckpointError(
        f"{path}: none of its {len(state)} tensors fits timm's {name!r} ({len(own)} tensors), neither by name nor by "
        "order. Set backbone.name to the model that the file was made from."
    )
