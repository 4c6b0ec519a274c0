"""What a network is given: options that say how it sees images, and batches whose sides fit its strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError
from .structures import Batch


def pad_batch(batch: Batch, divisor: int) -> Batch:
    """Pad images and id maps (with void) to a multiple of the divisor."""
    height, width = batch.images.shape[-2:]
    padding = (0, -width % divisor, 0, -height % divisor)
    targets = [type(t)(**{**vars(t), "id_map": F.pad(t.id_map, padding)}) for t in batch.targets]
    return Batch(F.pad(batch.images, padding), targets, batch.sizes, batch.pairs, batch.file_names)


def single_value(images: Tensor, training: bool) -> str:
    """What to say when a normalisation layer meets one value a channel or group."""
    count, _, height, width = images.shape
    if training:
        return (
            f"A normalisation layer meets a single value a channel on {count} crop(s) of {height}x{width} pixels and "
            "cannot be trained on it: raise sampling.batch_size or sampling.crop_size, or fix the backbone's batch "
            "norms with backbone.freeze_norm=true."
        )
    return (
        f"A normalisation layer of the network meets a single value a group on an image of {height}x{width} pixels: "
        "use larger images (data.eval_resize, or the model's test_size), or a network with fewer groups a group norm."
    )


def check_inputs(
    mean: Sequence[float], std: Sequence[float], channel_order: str, divisor: int, test_size: Sequence[float | None]
) -> None:
    """What the constructor of a model may be given.

    Raises:
        ConfigError: names the key.
    """
    for name, values, least in (("pixel_mean", mean, -math.inf), ("pixel_std", std, 0.0)):
        if len(values) != 3 or not all(math.isfinite(v) and v > least for v in values):
            raise ConfigError(
                f"model.{name} is {list(values)}; it must be three finite numbers{' above 0' * (least == 0)}, one a "
                "channel in RGB order."
            )
    if channel_order not in ("rgb", "bgr"):
        raise ConfigError(f"model.channel_order is {channel_order!r}; choose 'rgb' or 'bgr'.")
    if divisor < 1 or divisor != int(divisor):
        raise ConfigError(f"model.size_divisor is {divisor}; it must be a whole number of 1 or more.")
    if len(test_size) != 2 or not all(side is None or 1 <= side < math.inf for side in test_size):
        raise ConfigError(
            f"model.test_size is {list(test_size)}; it must be [shortest side, longest side] in pixels, each 1 or more "
            "or null."
        )
