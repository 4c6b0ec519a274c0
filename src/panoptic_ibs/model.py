"""Backbone and head together, without Lightning: normalisation, losses, prediction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .classes import ClassTable
from .errors import ConfigError
from .functional.pictures import Picture, as_pil
from .functional.precision import under_this_precision
from .functional.resizing import resized_size
from .heads.base import Head
from .inputs import check_inputs, pad_batch, single_value
from .predictions import Prediction
from .ranges import AtLeastOne, Items, Positive
from .refine import Refinement, check_order
from .segments import SoftSegments
from .structures import Batch, HeadLosses, ImageSize
from .weighing import Fixed, Weighing


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
        refine: steps between the head's soft segments and their fusing, in this order; see :mod:`panoptic_ibs.refine`.

    Raises:
        ConfigError: a value that none of these can be; refine steps in a wrong order.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        classes: ClassTable,
        pixel_mean: Annotated[Sequence[float], Items(3)] = (123.675, 116.28, 103.53),
        pixel_std: Annotated[Sequence[Positive], Items(3)] = (58.395, 57.12, 57.375),
        channel_order: Literal["rgb", "bgr"] = "rgb",
        size_divisor: AtLeastOne = 32,
        test_size: Annotated[Sequence[AtLeastOne | None], Items(2)] = (None, None),
        refine: Sequence[Refinement] = (),
    ) -> None:
        super().__init__()
        check_inputs(pixel_mean, pixel_std, channel_order, size_divisor, test_size)
        self.refine = check_order(refine)
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
        """The head's raw output.

        Raises:
            ConfigError: a normalisation layer has a single value to normalise over.
        """
        images = self.normalize(batch.images, batch.sizes)
        try:
            return self.head.run(self.backbone, images)
        except ValueError as error:
            if "Expected more than 1 " in str(error):  # torch's batch, group and instance norms
                raise ConfigError(single_value(images, self.training)) from error
            raise

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
            batch = pad_batch(batch, self.size_divisor)
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
        output = self(batch)
        refine = partial(self._refined, batch) if self.refine else None
        found = self.head.predict(output, batch.sizes, batch.targets or None, refine)
        predictions = [Prediction.of(prediction, self.classes) for prediction in found]
        for prediction, target in zip(predictions, batch.targets, strict=False):
            prediction.image_id = target.image_id
        if views:
            for i, prediction in enumerate(predictions):
                make = partial(self.head.embedding_view, output, i, batch.sizes[i], *batch.targets[i : i + 1])
                prediction.view = under_this_precision(self.mean.device.type, make)
        return predictions

    def _refined(self, batch: Batch, i: int, soft: SoftSegments) -> SoftSegments:
        """Soft segments of image i after all refine steps."""
        height, width = batch.sizes[i].valid
        for step in self.refine:
            soft = step(batch.images[i, :, :height, :width], soft)
        return soft

    @torch.inference_mode()
    def predict(self, images: Picture | Sequence[Picture], batch_size: int = 1) -> list[Prediction]:
        """Predict images of any size; the model is put in evaluation mode.

        Args:
            images: uint8 RGB images, (H, W, 3) arrays or (3, H, W) tensors, or PIL images of 8 or 16 bits a channel in
                any mode, which are turned upright first (EXIF orientation); one or several.
            batch_size: so many at most go through the network together: those that follow each other and have one
                size, so that none is padded and each gets the prediction that it gets alone.

        Raises:
            ValueError: an array or tensor of another type or shape.
            DataError: a PIL image of floating-point pixels, or one that cannot be decoded.
        """
        self.eval()
        pictures = [images] if isinstance(images, Tensor | np.ndarray | Image.Image) else list(images)
        predictions: list[Prediction] = []
        waiting: list[tuple[Tensor, ImageSize]] = []
        for picture in pictures:
            pixels, size = self._prepared(picture)
            if waiting and (len(waiting) >= batch_size or size.valid != waiting[0][1].valid):
                predictions += self._predict_together(waiting)
                waiting = []
            waiting.append((pixels, size))
        return predictions + (self._predict_together(waiting) if waiting else [])

    def _prepared(self, picture: Picture) -> tuple[Tensor, ImageSize]:
        """A picture as (3, H, W) uint8 at the size that the network sees."""
        image = as_pil(picture)
        original = (image.height, image.width)
        valid = resized_size(original, *self.test_size)
        if valid != original:
            image = image.resize((valid[1], valid[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), ImageSize(valid, original)

    def _predict_together(self, images: Sequence[tuple[Tensor, ImageSize]]) -> list[Prediction]:
        """Predictions of pictures of one size."""
        pixels = torch.stack([image for image, _ in images]).to(self.mean.device)
        return self.predict_batch(Batch(pixels, [], [size for _, size in images], torch.full((len(images),), -1)))
