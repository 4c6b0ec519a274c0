"""Predict an image, or all images of a folder, with a checkpoint.

python -m panoptic_ibs.predict ckpt_path=FILE input=IMAGE_OR_FOLDER output=DIR [device=cpu] [labels=false]

DIR gets panoptic.json and panoptic/*.png (COCO panoptic format) and overlay/*.png.
+overrides.head.inference.mask_threshold=0.4 changes an option of the checkpoint's model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli
from .errors import ConfigError, DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from PIL import Image


def predict(config: DictConfig) -> int:
    """Predict all images of ``input``; returns the exit status."""
    import numpy as np
    from PIL import Image
    from rich.progress import track

    from .files import write_atomically
    from .model import load
    from .results import PanopticWriter, file_stem, find_images, image_names
    from .visualize import overlay

    images = find_images(config.input)
    device = _device(config.device)
    model = load(config.ckpt_path, map_location=device, overrides=cli.plain(config.overrides))
    output = Path(config.output)
    writer = PanopticWriter(output, model.classes)
    for path, name in zip(track(images, description="predicting"), image_names(images), strict=True):
        image = _read(path)
        prediction = model.predict(image)[0].cpu()
        prediction.image_id = name
        writer.add(prediction)
        drawn = overlay(
            np.array(image),
            prediction.id_map.numpy(),
            prediction.class_ids.tolist(),
            model.classes,
            labels=bool(config.labels),
        )
        target = output / "overlay" / f"{file_stem(name)}.png"
        write_atomically(target, lambda p, drawn=drawn: Image.fromarray(drawn).save(p))  # type: ignore[misc]
    writer.close()
    print(f"{len(images)} image(s): {output / 'panoptic.json'}, {output / 'panoptic'}, {output / 'overlay'}")
    return 0


def _read(path: Path) -> Image.Image:
    from PIL import Image

    from .functional.pictures import BROKEN

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except BROKEN as error:
        raise DataError(f"{path}: cannot be read as an image ({error}).") from error


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except Exception as error:  # torch raises several kinds
        raise ConfigError(f"device={name} is not usable here; try device=cpu.") from error
    return name


def main() -> int:
    """Entry point."""
    return cli.run_command("predict", predict, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
