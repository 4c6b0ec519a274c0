"""Predict an image, or all images of a folder, with a checkpoint.

python -m panoptic_ibs.predict ckpt_path=FILE input=IMAGE_OR_FOLDER output=DIR [device=cpu] [labels=false]

DIR gets panoptic.json and panoptic/*.png (COCO panoptic format) and overlay/*.png, all at once at the end; images that
cannot be read are listed and end in status 2, the others are predicted. Pictures are turned upright (EXIF).
+overrides.head.inference.mask_threshold=0.4 changes an option of the checkpoint's model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import commands, instantiation
from .errors import ConfigError, DataError, IncompleteError, out_of_memory, printable, told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from .coco_writer import PanopticWriter
    from .model import PanopticModel
    from .visualize import Picture


def predict(config: DictConfig) -> int:
    """Predict all images of ``input``; returns the exit status.

    One broken image does not end it: the others are predicted and written. If it is stopped, what was predicted so far
    is written as a complete set.
    """
    from .coco_writer import PanopticWriter
    from .configuration.checking import check_changes
    from .construction import load
    from .image_files import find_images

    images = find_images(config.input)
    device = _device(config.device)
    changes, packages = instantiation.plain(config.overrides), instantiation.packages(config)
    model = load(config.ckpt_path, device, packages=packages, overrides=changes, check=check_changes)
    writer = PanopticWriter(config.output, model.classes)
    turned: list[Path] = []
    try:
        faults = _predict_all(images, model, writer, bool(config.labels), turned)
    except BaseException as stopped:  # also Ctrl-C and SIGTERM
        _keep(writer, len(images), stopped)
        raise
    if not writer.entries:
        writer.discard()
        raise DataError(faults[0] if len(images) == 1 else told("No image could be predicted:", faults))
    writer.close()
    if turned:
        first = printable(str(turned[0]))
        print(f"{len(turned)} image(s) were turned upright, as their EXIF orientation says, the first: {first}")
    output = writer.folder
    print(f"{len(writer.entries)} image(s): {output / 'panoptic.json'}, {output / 'panoptic'}, {output / 'overlay'}")
    if faults:
        head = f"{len(faults)} of {len(images)} images could not be predicted; the others were:"
        raise IncompleteError(told(head, faults))
    return 0


def _predict_all(
    images: Sequence[Path], model: PanopticModel, writer: PanopticWriter, labels: bool, turned: list[Path]
) -> list[str]:
    """Predict and write; returns what is wrong with images that could not be."""
    import torch
    from PIL import Image
    from rich.progress import track

    from .image_files import image_names
    from .visualize import overlay

    faults = []
    for path, name in zip(track(images, description="predicting"), image_names(images), strict=True):
        try:
            image = _read(path, turned)
            prediction = model.predict(image)[0].cpu()
        except DataError as error:
            faults.append(str(error))
            continue
        except Exception as error:
            if not out_of_memory(error):
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            faults.append(f"{path}: memory does not suffice for this image.")
            continue
        prediction.image_id = name
        ids = prediction.id_map.numpy()
        drawn = overlay(image, ids, prediction.class_ids.tolist(), model.classes, labels=labels)
        png = writer.name(name)
        Image.fromarray(drawn).save(writer.staging / f"overlay/{png}")
        writer.add(prediction, png)
    return faults


def _keep(writer: PanopticWriter, images: int, stopped: BaseException) -> None:
    """Write what was predicted before the end came; where that fails, too, leave the folder as it was."""
    try:
        if writer.entries:
            writer.close()
            print(f"{len(writer.entries)} of {images} image(s) were predicted: {writer.folder / 'panoptic.json'}")
    except OSError as error:  # a full disk
        stopped.add_note(f"What was predicted so far could not be written either ({error.strerror}).")
    finally:
        writer.discard()


def _read(path: Path, turned: list[Path] | None = None) -> Picture:
    """(H, W, 3) uint8, upright; ``turned`` gets the path if it had to be turned for that.

    Raises:
        DataError: it cannot be read.
    """
    import numpy as np

    from .functional.pictures import opened, orientation, upright_rgb

    with opened(path) as image:
        if turned is not None and orientation(image) != 1:
            turned.append(path)
        return np.asarray(upright_rgb(image, path))


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
    return commands.run_command("predict", predict, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
