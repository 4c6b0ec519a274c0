"""A panoptic prediction that can write and draw itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from . import segments
from .classes import ClassTable
from .coco_writer import PanopticWriter, segments_info
from .errors import DataError
from .functional.pictures import Picture, as_pil
from .image_files import file_stem


@dataclass
class Prediction(segments.Prediction):
    """What a model says of one image.

    Attributes:
        classes: the class table that ``class_ids`` index; models set it.
    """

    classes: ClassTable | None = None

    @classmethod
    def of(cls, found: segments.Prediction, classes: ClassTable) -> Self:
        """A head's prediction with its class table; tensors are shared."""
        held = {field.name: getattr(found, field.name) for field in fields(segments.Prediction)}
        return cls(**held, classes=classes)

    def to_coco(self) -> dict[str, Any]:
        """The entry of a COCO panoptic JSON's ``annotations``: ``image_id``, ``file_name`` of the PNG and
        ``segments_info`` (id, category_id, area, bbox, iscrowd and score of each segment; areas and boxes in pixels).

        Raises:
            DataError: the class table is missing.
        """
        segments = segments_info(self, self._table())
        return {"image_id": self.image_id, "file_name": f"{file_stem(self.image_id)}.png", "segments_info": segments}

    def save(self, folder: Path | str, name: str | None = None) -> Path:
        """Write COCO panoptic format: ``folder/panoptic.json`` and an id PNG in ``folder/panoptic``.

        What the folder holds of other images stays. Many images are written faster by ``panoptic_ibs.predict``.

        Args:
            folder: made if it is missing.
            name: image id; that of the prediction when None.

        Returns:
            The JSON.

        Raises:
            DataError: no name, no class table, or a folder with predictions of others or of other classes.
        """
        classes, name = self._table(), self.image_id if name is None else name
        if not name:
            raise DataError("This prediction has no image_id: give its image a name, save(folder, name=NAME).")
        writer = PanopticWriter(folder, classes)
        try:
            writer.go_on(without=name)
            writer.add(segments.Prediction(self.id_map, self.class_ids, self.scores, name, self.instances))
            return writer.close()
        finally:
            writer.discard()

    def plot(self, image: Picture | None = None, labels: bool = True) -> Image.Image:
        """A picture of the segments: coloured, with contours and, where there is room, class names.

        Args:
            image: the predicted image, uint8 RGB at the size of ``id_map``; grey when None.
            labels: write class names.

        Raises:
            DataError: the class table is missing.
            ValueError: an image of another size or type.
        """
        from .visualize import overlay

        ids = self.id_map.cpu().numpy()
        pixels = np.full((*ids.shape, 3), 128, np.uint8) if image is None else np.asarray(as_pil(image))
        return Image.fromarray(overlay(pixels, ids, self.class_ids.tolist(), self._table(), labels=labels))

    def _table(self) -> ClassTable:
        if self.classes is None:
            raise DataError(
                "This prediction has no class table: set prediction.classes = model.classes (models do so themselves)."
            )
        return self.classes
