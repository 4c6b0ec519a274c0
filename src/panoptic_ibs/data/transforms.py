"""Photometric augmentation. The only file that imports albumentations, and only when a pixel is asked for."""

from __future__ import annotations

import os
from typing import Annotated, Any

import numpy as np

from panoptic_ibs.extras import require
from panoptic_ibs.ranges import Bounds, NonNegative, Share

Turn = Annotated[float, Bounds(least=-0.5, most=0.5)]


class ColorJitter:
    """SSD-style colour jitter: brightness, contrast, saturation and hue, each applied with probability one half.

    Ranges after SSD (Liu et al., 2016, as Mask2Former uses it): brightness plus or minus 32 of 255, contrast and
    saturation times 0.5 to 1.5, hue plus or minus 18 degrees. Labels are not touched.

    Args:
        brightness: (low, high) factors.
        contrast: (low, high) factors.
        saturation: (low, high) factors.
        hue: (low, high) in turns of the colour circle.
        probability: of each of the four.

    Raises:
        ConfigError: albumentations is not installed.
    """

    def __init__(
        self,
        brightness: tuple[NonNegative, NonNegative] = (0.875, 1.125),
        contrast: tuple[NonNegative, NonNegative] = (0.5, 1.5),
        saturation: tuple[NonNegative, NonNegative] = (0.5, 1.5),
        hue: tuple[Turn, Turn] = (-0.05, 0.05),
        probability: Share = 0.5,
    ) -> None:
        require("data.transforms, photometric augmentation", "albumentations", instead="or set data.transforms=null")
        self.settings = {
            "brightness": tuple(brightness),
            "contrast": tuple(contrast),
            "saturation": tuple(saturation),
            "hue": tuple(hue),
        }
        self.probability = probability
        self._steps: list[Any] | None = None

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Jitter an (H, W, 3) uint8 image; the same seed gives the same result."""
        if self._steps is None:
            self._steps = self._build()
        seeds = np.random.default_rng(seed).integers(2**32, size=len(self._steps))
        for step, own in zip(self._steps, seeds, strict=True):  # a Compose would give all four the same random numbers
            step.set_random_seed(int(own))
            image = step(image=image)["image"]
        return np.asarray(image)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": None}  # each worker builds its own

    def _build(self) -> list[Any]:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no question to the network at import
        import albumentations

        neutral = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
        return [
            albumentations.ColorJitter(**{**neutral, name: bounds}, p=self.probability)
            for name, bounds in self.settings.items()
        ]
