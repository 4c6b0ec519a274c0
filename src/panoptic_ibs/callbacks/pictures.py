"""What comes of validated images: prediction files, pictures of the report and of loggers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.coco_writer import PanopticWriter
from panoptic_ibs.functional.embedding_views import PrincipalColors
from panoptic_ibs.ranges import Whole
from panoptic_ibs.report_pages import GalleryWriter
from panoptic_ibs.report_pages.embeddings import choose_query, describe, draw_view, fit_colors, side_by_side
from panoptic_ibs.segments import Prediction
from panoptic_ibs.staging import undisturbed
from panoptic_ibs.structures import Batch
from panoptic_ibs.visualize import Picture, overlay


def image_of(batch: Batch, i: int) -> Picture:
    """Image ``i`` of a batch as (H, W, 3) uint8 at its original size, without padding."""
    size = batch.sizes[i]
    pixels = batch.images[i, :, : size.valid[0], : size.valid[1]].permute(1, 2, 0).cpu().numpy()
    if size.valid == size.original:
        return np.ascontiguousarray(pixels)
    return np.asarray(Image.fromarray(pixels).resize(size.original[::-1], Image.Resampling.BILINEAR))


class WritePredictions(Callback):
    """Writes every validated image to ``predictions/`` (COCO panoptic format) and offers it to the report's gallery.

    Args:
        run_dir: the run folder.
        classes: the class table.
        integer_ids: write image ids as numbers.
        gallery: pictures for the report; with several processes they are chosen from the first one's images.
    """

    def __init__(self, run_dir: Path, classes: ClassTable, integer_ids: bool = False, gallery: int = 8) -> None:
        self.run_dir, self.classes, self.integer_ids, self.limit = Path(run_dir), classes, integer_ids, gallery

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the writers."""
        self.writer = PanopticWriter(self.run_dir / "predictions", self.classes, self.integer_ids)
        self.gallery = GalleryWriter(self.run_dir, self.classes, self.limit)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the PNGs."""
        self.add(outputs, batch, pictures=trainer.is_global_zero)

    def add(self, predictions: Sequence[Prediction], batch: Batch, pictures: bool = True) -> None:
        """Write the predictions of a batch."""
        for i, prediction in enumerate(predictions):
            prediction = prediction.cpu()
            self.writer.add(prediction)
            if pictures:
                self.gallery.add(image_of(batch, i), prediction, batch.targets[i].to("cpu"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the segments of all processes and write the JSON."""
        entries = [self.writer.entries]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self.writer.entries)
            entries = gathered
        first, barrier = trainer.is_global_zero, trainer.strategy.barrier
        with undisturbed():
            if first:
                self.writer.retire([entry for part in entries for entry in part])
            barrier("predictions retired")
            self.writer.move()
            barrier("predictions moved")
            if first:
                self.writer.finish()
        if first:
            self.gallery.close()
        barrier("predictions")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the former predictions as they were."""
        if hasattr(self, "writer"):
            self.writer.discard()


class LogPictures(Callback):
    """Logs overlays of the same images at every validation to loggers that take pictures (W&B, TensorBoard, MLflow).

    From heads that have a view of their embeddings a panel of it too, in colours fit to the validation's first image.

    Args:
        images: how many, from the start of the split.
    """

    def __init__(self, images: Whole = 4) -> None:
        self.images = images
        self._colors: PrincipalColors | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log one picture: input with ground truth, and with prediction; and one of the embeddings."""
        loggers = [logger for logger in trainer.loggers if hasattr(logger, "log_image")]
        if not loggers or batch_idx >= self.images or not outputs or not trainer.is_global_zero:
            return
        image, prediction, target = image_of(batch, 0), outputs[0].cpu(), batch.targets[0].to("cpu")
        classes: ClassTable = pl_module.model.classes  # type: ignore[union-attr, assignment]
        pair = [
            overlay(image, target.id_map.numpy(), target.class_ids.tolist(), classes),
            overlay(image, prediction.id_map.numpy(), prediction.class_ids.tolist(), classes, labels=True),
        ]
        picture = Image.fromarray(np.concatenate(pair, axis=1))
        name = f"val/{batch_idx:02d}_{target.image_id}"
        for logger in loggers:
            logger.log_image(name, [picture], step=trainer.global_step)
        view = prediction.view() if prediction.view is not None else None
        if view is None:
            return
        if batch_idx == 0 or self._colors is None:
            self._colors = fit_colors(view)
        chosen = choose_query(view, target)
        panel = Image.fromarray(side_by_side(draw_view(image, view, self._colors, chosen, target.id_map.numpy())))
        caption = [describe(view, chosen, classes, target)]
        for logger in loggers:
            logger.log_image(f"{name}_embedding", [panel], step=trainer.global_step, caption=caption)
