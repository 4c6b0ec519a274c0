"""A network as one function from an image to named tensors, for formats of other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .errors import ConfigError
from .model import PanopticModel


class RawNetwork(nn.Module):
    """From an image of 8 bits a channel to the head's raw outputs by name, such as ``features`` and ``kernels.0``.

    Args:
        model: backbone and head; its normalisation is part of the network.
    """

    def __init__(self, model: PanopticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(1, 3, H, W) uint8, red first, to what the head exports, by name; lists by number."""
        pixels = (image.float() - self.model.mean) / self.model.std
        output = self.model.head.run(self.model.backbone, pixels.flip(1) if self.model.bgr else pixels)
        return dict(named_tensors(self.model.head.exported(output)))

    def example(self, size: Sequence[int]) -> Tensor:
        """An image of noise.

        Raises:
            ConfigError: the network's strides do not divide the size.
        """
        divisor = self.model.size_divisor
        height, width = size
        if height < 1 or width < 1 or height % divisor or width % divisor:
            raise ConfigError(f"size={list(size)}: height and width must be multiples of {divisor} for this network.")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)

    def about(self, size: Sequence[int], outputs: Sequence[str]) -> str:
        """What the file's numbers mean, as JSON."""
        return json.dumps(
            {
                "program": f"panoptic_ibs {__version__}",
                "head": type(self.model.head).__name__,
                "input": {"shape": [1, 3, *size], "type": "uint8", "channels": "RGB"},
                "outputs": list(outputs),
                "classes": self.model.classes.to_list(),
            }
        )


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a head's raw output: fields of dataclasses and keys by name, items of lists by number.

    Raises:
        ConfigError: something that is neither a tensor, a container nor None.
    """
    if isinstance(output, Tensor):
        yield name or "output", output
        return
    if is_dataclass(output):
        items: Any = ((field.name, getattr(output, field.name)) for field in fields(output))
    elif isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    elif output is None:
        return
    else:
        raise ConfigError(
            f"The raw output of this head holds a {type(output).__name__} ({name}); only tensors can be exported."
        )
    for key, value in items:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))
