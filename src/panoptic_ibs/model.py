"""Backbone and head together, without Lightning: normalisation, losses, prediction; ready models from checkpoints."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoints import model_weights, read_checkpoint
from .classes import ClassTable
from .errors import CheckpointError, ConfigError
from .functional.resizing import resized_size
from .heads.base import Head
from .structures import Batch, HeadLosses, ImageSize, Prediction
from .weighing import Fixed, Weighing

Picture = Tensor | np.ndarray | Image.Image


class PanopticModel(nn.Module):
    """A backbone and a head.

    Args:
        backbone: maps (B, 3, H, W) to features; has ``levels``.
        head: makes segments from the features.
        classes: the class table.
        pixel_mean: subtracted from the channels, in RGB order, of pixels from 0 to 255.
        pixel_std: divides them.
        channel_order: ``"rgb"`` or ``"bgr"``, the order that the backbone's weights expect.
        size_divisor: inputs are padded at the bottom and right, with zeros after normalisation, to a multiple of it.
        test_size: (shortest side, longest side) that :meth:`predict` resizes to; None keeps a side free.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        classes: ClassTable,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        channel_order: str = "rgb",
        size_divisor: int = 32,
        test_size: Sequence[int | None] = (None, None),
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.classes = backbone, head, classes
        self.bgr = channel_order == "bgr"
        self.size_divisor = size_divisor
        self.test_size = (test_size[0], test_size[1])
        self.register_buffer("mean", torch.tensor(list(pixel_mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(pixel_std)).view(1, 3, 1, 1), persistent=False)

    def normalize(self, images: Tensor, sizes: Sequence[ImageSize]) -> Tensor:
        """(B, 3, H, W) uint8 RGB to normalised float32, zero outside each image's valid part, padded to the divisor."""
        x = (images.float() - self.mean) / self.std
        for i, (height, width) in enumerate(size.valid for size in sizes):
            if (height, width) != x.shape[-2:]:
                x[i, :, height:] = 0
                x[i, :, :, width:] = 0
        bottom, right = (-x.shape[-2] % self.size_divisor, -x.shape[-1] % self.size_divisor)
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return x.flip(1) if self.bgr else x

    def forward(self, batch: Batch) -> Any:
        """The head's raw output."""
        return self.head.run(self.backbone, self.normalize(batch.images, batch.sizes))

    def losses(self, batch: Batch, weigh: Weighing | None = None) -> HeadLosses:
        """The head's loss terms, weighted, and segment embeddings for a training batch.

        Args:
            batch: crops.
            weigh: multiplies; the head's own weights when None.

        Raises:
            ConfigError: the head's terms and its weights have other names.
        """
        height, width = batch.images.shape[-2:]
        if height % self.size_divisor or width % self.size_divisor:
            batch = _pad_batch(batch, self.size_divisor)
        terms, segments = self.head.losses(self(batch), batch.targets)
        return (weigh or Fixed())(terms, self.head.weights), segments

    def predict_batch(self, batch: Batch, views: bool = False) -> list[Prediction]:
        """Panoptic predictions at ``batch.sizes[i].original``, named by the targets' image ids.

        Args:
            batch: the images.
            views: give every prediction a ``view``, which keeps the head's raw output alive.
        """
        if not len(batch):
            return []
        head: Any = self.head
        truth = [batch.targets] if getattr(head, "predicts_from_targets", False) else []  # oracle modes
        output = self(batch)
        predictions: list[Prediction] = head.predict(output, batch.sizes, *truth)
        for prediction, target in zip(predictions, batch.targets, strict=False):
            prediction.image_id = target.image_id
        if views:
            precision = _autocast(self.mean.device.type)
            for i, prediction in enumerate(predictions):
                make = partial(head.embedding_view, output, i, batch.sizes[i], *batch.targets[i : i + 1])
                prediction.view = partial(_call_under, precision, make)
        return predictions

    @torch.inference_mode()
    def predict(self, images: Picture | Sequence[Picture]) -> list[Prediction]:
        """Predict images of any size, one at a time; the model is put in evaluation mode.

        Args:
            images: uint8 RGB images: (H, W, 3) arrays, (3, H, W) tensors or PIL images; one or several.
        """
        self.eval()
        pictures = [images] if isinstance(images, Tensor | np.ndarray | Image.Image) else list(images)
        predictions = []
        for picture in pictures:
            image = _to_pil(picture)
            original = (image.height, image.width)
            valid = resized_size(original, *self.test_size)
            if valid != original:
                image = image.resize((valid[1], valid[0]), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.mean.device)
            batch = Batch(pixels, [], [ImageSize(valid, original)], torch.tensor([-1]))
            predictions += self.predict_batch(batch)
        return predictions


def _autocast(device: str) -> Callable[[], Any]:
    """Makes a context with the mixed precision that holds now."""
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _call_under(context: Callable[[], Any], function: Callable[[], Any]) -> Any:
    with context():
        return function()


def _pad_batch(batch: Batch, divisor: int) -> Batch:
    """Pad images and id maps (with void) to a multiple of the divisor."""
    height, width = batch.images.shape[-2:]
    padding = (0, -width % divisor, 0, -height % divisor)
    targets = [type(t)(**{**vars(t), "id_map": F.pad(t.id_map, padding)}) for t in batch.targets]
    return Batch(F.pad(batch.images, padding), targets, batch.sizes, batch.pairs, batch.file_names)


def _to_pil(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).cpu().numpy()
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"An image must be uint8 RGB of shape (H, W, 3); got {picture.dtype} {picture.shape}.")
    return Image.fromarray(np.ascontiguousarray(picture))


def _build(config: Mapping[str, Any], allowed: Sequence[str], **extra: Any) -> Any:
    """Call a ``_target_`` with its options. Only ``allowed`` packages are imported: files are not trusted."""
    options = {k: v for k, v in config.items() if k != "_target_"}
    target = str(config.get("_target_", ""))
    module, _, name = target.rpartition(".")
    if module.split(".")[0] not in allowed or not name.isidentifier():
        raise CheckpointError(
            f"_target_ {target!r} is not in {', '.join(allowed)}. If you trust the file, pass its package's name "
            "with `packages=`."
        )
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"_target_ {target!r} does not exist in this version of the package.") from error
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise CheckpointError(f"_target_ {target!r} is not a network module.")
    return made(**extra, **options)


def build_model(
    config: Mapping[str, Any], classes: ClassTable, packages: Sequence[str] = ("panoptic_ibs",)
) -> PanopticModel:
    """Build a model from plain containers.

    Args:
        config: ``backbone`` and ``head``, each with ``_target_`` and options, and the options of
            :class:`PanopticModel` (``pixel_mean``, ``pixel_std``, ``channel_order``, ``size_divisor``, ``test_size``).
        classes: the class table.
        packages: packages that ``_target_`` may name.

    Raises:
        CheckpointError: a ``_target_`` outside ``packages`` or unknown.
        ConfigError: options that contradict each other.
    """
    options = {k: v for k, v in config.items() if k not in ("backbone", "head")}
    backbone = _build(config["backbone"], packages)
    head = _build(config["head"], packages, classes=classes, levels=backbone.levels)
    return PanopticModel(backbone, head, classes, **options)


def overridden(options: Mapping[str, Any], changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options with some of them changed, however deep: ``{"head": {"inference": {"mask_threshold": 0.4}}}``.

    Raises:
        ConfigError: a change of something that is no option.
    """
    result = dict(options)
    for key, value in changes.items():
        if key not in options:
            raise ConfigError(f"{prefix}{key} is no option of this model; it has: {', '.join(map(str, options))}.")
        old = options[key]
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = overridden(old, value, f"{prefix}{key}.") if nested else value
    return result


def load(
    ckpt: str | Path,
    map_location: str | torch.device = "cpu",
    packages: Sequence[str] = ("panoptic_ibs",),
    overrides: Mapping[str, Any] | None = None,
) -> PanopticModel:
    """A ready model, in evaluation mode, from a checkpoint of ``panoptic_ibs.train`` and no other file.

    Weights are the moving average if the run kept one. Nothing in the file is executed.

    Args:
        ckpt: the file.
        map_location: where the model goes.
        packages: packages that the file's ``_target_`` may name.
        overrides: options of the model to change, e.g. thresholds of inference; see :func:`overridden`.

    Raises:
        CheckpointError: not such a checkpoint, truncated, or of a model this version does not know.
        ConfigError: ``overrides`` names something that is no option.
    """
    state = read_checkpoint(ckpt, map_location)
    if "panoptic_ibs" not in state:
        raise CheckpointError(f"{ckpt}: not a checkpoint of panoptic_ibs (it has no 'panoptic_ibs' entry).")
    config = overridden(state["panoptic_ibs"]["model"], overrides or {})
    config["backbone"] = {**config["backbone"], "pretrained": False, "weights": None}
    model = build_model(config, ClassTable.from_list(state["panoptic_ibs"]["classes"]), packages)
    try:
        model.load_state_dict(model_weights(state))
    except RuntimeError as error:
        raise CheckpointError(f"{ckpt}: its weights do not fit its own model description: {error}") from error
    return model.to(map_location).eval()
