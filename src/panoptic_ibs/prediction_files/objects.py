"""Predicted segments as COCO objects with masks, and how confused each is: what FiftyOne and the like open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from panoptic_ibs.coco_writer import segments_info
from panoptic_ibs.data.readers.panoptic import PanopticReader
from panoptic_ibs.errors import DataError
from panoptic_ibs.files import write_json
from panoptic_ibs.functional.rle import encode_id_map
from panoptic_ibs.metrics.overlap import Array, segment_overlap
from panoptic_ibs.segments import Prediction
from panoptic_ibs.structures import Target

from .browse import read_pair
from .panoptic_files import PredictionSet, open_predictions


def confusion_of(prediction: Prediction, target: Target, classes: int) -> Array:
    """How confused each predicted segment is: of the true things it covers, the second largest covered share.

    A thing counts as confused at T % (IBS paper, Section 5) where this is above T / 100.

    Args:
        prediction: of one image.
        target: its ground truth; crowds are no things here.
        classes: number of classes.

    Returns:
        (P,) shares from 0 to 1; 0 where fewer than two true things are touched.
    """
    overlap = segment_overlap(prediction, target, classes)
    rows = (target.is_thing & ~target.is_crowd).cpu().numpy() & (overlap.target_areas > 0)
    shares = overlap.shared[rows] / overlap.target_areas[rows, None]
    return np.sort(shares, axis=0)[-2] if len(shares) > 1 else np.zeros(len(prediction))


def write_objects(predictions: Path | str, reader: PanopticReader, out: Path | str) -> Path:
    """Write predictions of any program as one JSON of COCO objects, for ``COCODetectionDataset`` of FiftyOne.

    Every segment is an object with a mask as run lengths, ``score`` and two numbers more: ``confusion``, see
    :func:`confusion_of` (0 for stuff), and ``thing``, 1 or 0. FiftyOne is not needed to write it.

    Args:
        predictions: a file or folder, see :func:`panoptic_ibs.prediction_files.open_predictions`.
        reader: the split that was predicted.
        out: the JSON.

    Raises:
        DataError: instances in place of panoptic predictions, or an image that cannot be read.
    """
    found = open_predictions(predictions, reader)
    if not isinstance(found, PredictionSet):
        raise DataError(f"{predictions}: holds instances, not panoptic predictions; those are COCO objects already.")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in found.indices:
        prediction, target = read_pair(found, index)
        height, width = prediction.id_map.shape
        name = Path(str(reader.table.image_files[index])).as_posix()
        images.append({"id": len(images) + 1, "file_name": name, "height": height, "width": width})
        annotations += _objects(prediction, target, reader, len(images), len(annotations))
    categories = reader.classes.to_coco()
    write_json(Path(out), {"images": images, "annotations": annotations, "categories": categories})
    return Path(out)


def _objects(
    prediction: Prediction, target: Target, reader: PanopticReader, image: int, before: int
) -> list[dict[str, Any]]:
    confusion = confusion_of(prediction, target, len(reader.classes))
    runs = encode_id_map(prediction.id_map.cpu().numpy(), len(prediction))
    found: list[dict[str, Any]] = []
    for segment in segments_info(prediction, reader.classes):
        row = segment["id"] - 1
        thing = reader.classes[int(prediction.class_ids[row])].is_thing
        mask = {"size": list(runs[row]["size"]), "counts": runs[row]["counts"].decode()}
        numbers = {"confusion": round(float(confusion[row]), 4) if thing else 0.0, "thing": int(thing)}
        own = {"id": before + len(found) + 1, "image_id": image, "segmentation": mask}
        found.append({**segment, **own, **numbers})
    return found
