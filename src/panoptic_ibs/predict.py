"""Predict an image, or all images of a folder and of the folders in it, with a checkpoint.

python -m panoptic_ibs.predict ckpt_path=FILE input=IMAGE_OR_FOLDER output=DIR [batch_size=N] [labels=false]

DIR gets panoptic.json and panoptic/*.png (COCO panoptic format) and overlay/*.png, in the input's folders, all at once
at the end; images that cannot be read are listed and end in status 2, the others are predicted. Pictures are turned
upright (EXIF). batch_size=N sends N images of one size through the network together; the results stay the same.
+overrides.head.inference.mask_threshold=0.4 changes an option of the checkpoint's model, refine=dense_crf sharpens its
segments by the colours of the photographs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import commands, instantiation
from .errors import ConfigError, DataError, IncompleteError, out_of_memory, printable, told
from .threads import Pending, ahead

if TYPE_CHECKING:
    import numpy as np
    from omegaconf import DictConfig

    from .coco_writer import PanopticWriter
    from .model import PanopticModel
    from .segments import Prediction

T = TypeVar("T")
THREADS = 4  # that read files, and as many that draw and write: both take longer than a network on a GPU


def predict(config: DictConfig) -> int:
    """Predict all images of ``input``; returns the exit status.

    One broken image does not end it: the others are predicted and written. If it is stopped, what was predicted so far
    is written as a complete set.
    """
    from .coco_writer import PanopticWriter
    from .configuration.checking import check_changes
    from .construction import load
    from .image_files import find_images, image_names

    folder, output = Path(config.input), Path(config.output)
    images = find_images(folder, without=(output, output / "panoptic", output / "overlay"))
    device = _device(config.device)
    changes, packages = instantiation.plain(config.overrides), instantiation.packages(config)
    model = load(config.ckpt_path, device, packages=packages, overrides=changes, check=check_changes)
    instantiation.add_refinement(model, config)
    writer = PanopticWriter(output, model.classes)
    work = Work(model, writer, bool(config.labels), int(config.batch_size))
    try:
        work.run(images, image_names(images, folder if folder.is_dir() else None))
    except BaseException as stopped:  # also Ctrl-C and SIGTERM
        _keep(writer, len(images), stopped)
        raise
    faults = [work.faults[path] for path in images if path in work.faults]
    if not writer.entries:
        writer.discard()
        raise DataError(faults[0] if len(images) == 1 else told("No image could be predicted:", faults))
    writer.close()
    if work.turned:
        first = printable(str(min(work.turned)))
        print(f"{len(work.turned)} image(s) were turned upright, as their EXIF orientation says, the first: {first}")
    print(f"{len(writer.entries)} image(s): {output / 'panoptic.json'}, {output / 'panoptic'}, {output / 'overlay'}")
    if faults:
        head = f"{len(faults)} of {len(images)} images could not be predicted; the others were:"
        raise IncompleteError(told(head, faults))
    return 0


class Work:
    """Reads, predicts and writes images. Files are read ahead and written behind by other threads.

    Images that cannot be read, or for which memory does not suffice, end up in ``faults``.

    Args:
        model: predicts.
        writer: takes the predictions.
        labels: write class names on the overlays.
        batch_size: images of one size that go through the network together.
    """

    def __init__(self, model: PanopticModel, writer: PanopticWriter, labels: bool, batch_size: int) -> None:
        self.model, self.writer, self.labels, self.batch_size = model, writer, labels, batch_size
        self.faults: dict[Path, str] = {}
        self.turned: list[Path] = []

    def run(self, images: Sequence[Path], names: Sequence[str]) -> None:
        """Do all of them, with a progress bar. Whatever ends it, what was predicted by then is written."""
        from rich.progress import track

        waiting: dict[tuple[int, ...], list[tuple[Path, str, np.ndarray]]] = {}  # by size
        with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
            self.written = Pending(writers, 4 * THREADS)
            read = ahead(readers, _read, images, self.batch_size + THREADS)
            for path, name, found in zip(images, names, track(read, "predicting", total=len(images)), strict=True):
                image = self._guarded(path, found.result)
                if image is None:
                    continue
                group = waiting.setdefault(image[0].shape, [])
                group.append((path, name, image[0]))
                self.turned += [path] * image[1]
                full = len(group) >= self.batch_size or sum(map(len, waiting.values())) >= 4 * self.batch_size
                if full:
                    self._predict(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
            for group in waiting.values():
                self._predict(group)
            self.written.wait()

    def _predict(self, group: Sequence[tuple[Path, str, np.ndarray]]) -> None:
        """Predict images of one size, and have them written; one at a time where memory does not suffice for all."""
        if len(group) > 1:
            try:
                found = self.model.predict([image for _, _, image in group], batch_size=len(group))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                _free_memory()
                for one in group:
                    self._predict([one])
                return
        else:
            ((path, _, image),) = group
            alone = self._guarded(path, lambda: self.model.predict(image))
            if alone is None:
                return
            found = alone
        for (_, name, image), prediction in zip(group, found, strict=True):
            prediction = prediction.cpu()
            prediction.image_id = name
            self.written.add(self._write, prediction, image, self.writer.name(name, folders=True))

    def _write(self, prediction: Prediction, image: np.ndarray, png: str) -> None:
        from PIL import Image

        from .visualize import overlay

        ids, classes = prediction.id_map.numpy(), prediction.class_ids.tolist()
        drawn = overlay(image, ids, classes, self.model.classes, labels=self.labels)
        Image.fromarray(drawn).save(self.writer.staging / f"overlay/{png}")
        self.writer.add(prediction, png)

    def _guarded(self, path: Path, job: Callable[[], T]) -> T | None:
        """What a job gives; None, and a fault, where the image is broken or memory does not suffice for it."""
        try:
            return job()
        except DataError as error:
            self.faults[path] = str(error)
        except Exception as error:
            if not out_of_memory(error):
                raise
            _free_memory()
            self.faults[path] = f"{path}: memory does not suffice for this image."
        return None


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def _read(path: Path) -> tuple[np.ndarray, bool]:
    """(H, W, 3) uint8, upright, and whether it had to be turned for that.

    Raises:
        DataError: it cannot be read.
    """
    import numpy as np

    from .functional.pictures import opened, orientation, upright_rgb

    with opened(path) as image:
        turned = orientation(image) != 1
        return np.asarray(upright_rgb(image, path)), turned


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
