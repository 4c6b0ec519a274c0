"""Average precision of instances, by pycocotools' own matching and averaging.

The IoU tables of each image are made when it is added, from run lengths or from the overlap of two id maps, and only
these small tables are kept: no mask, no run length. At the end ``COCOeval`` matches and averages with them.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import Metric

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.functional.rle import encode_id_map
from panoptic_ibs.segments import Instances, Prediction
from panoptic_ibs.structures import Target

from .overlap import Array, SegmentOverlap, segment_overlap

MAX_DETECTIONS = 100  # COCO: the best so many of a class in an image are judged
AREA_RANGES = {"ap_small": 1, "ap_medium": 2, "ap_large": 3}  # position in COCOeval's area ranges, after "all"
AP_KEYS = ("ap", "ap50", "ap75", *AREA_RANGES)


@dataclass(frozen=True)
class ClassTablesOfImage:
    """What one class of one image leaves behind: D predictions, best first, and G ground-truth instances.

    Attributes:
        class_id: contiguous class id.
        scores: (D,) floats.
        areas: (D,) pixels of the predictions.
        truth_areas: (G,) pixels of the ground truth.
        crowd: (G,) 0 or 1.
        ious: (D, G); against a crowd the share of the prediction that it covers, as COCO defines.
    """

    class_id: int
    scores: list[float]
    areas: list[int]
    truth_areas: list[int]
    crowd: list[int]
    ious: list[list[float]]


class InstanceAP(Metric):
    """Average precision (COCO) of ``Prediction.instances`` against the things of the ground-truth id map.

    The ground truth of a panoptic id map has no overlaps: a mask ends where the next instance begins. Areas, and with
    them COCO's small, medium and large, are counted in the id map. Crowds are as COCO has them: neither missed, nor
    are predictions that lie in them wrong. Ground-truth rows without a pixel are no instances (COCO has none either).

    ``compute`` returns ``ap ap50 ap75 ap_small ap_medium ap_large`` and ``ap_per_class`` (thing class -> AP), fractions
    from 0 to 1. Where there is no ground truth to find (a class, a size) there is no value: None, never COCO's -1.

    With several processes all get the same numbers as one process would, equal scores included, as long as images
    differ in ``Target.image_index`` or ``image_id``. The state is text: one line an image, about 20 bytes a pair.

    Args:
        classes: the class table; its things are judged.
        panoptic: judge the things of the panoptic id map, each with its score, in place of ``Prediction.instances``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    lines: list[Tensor]

    def __init__(self, classes: ClassTable, panoptic: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes, self.panoptic = classes, panoptic
        self.add_state("lines", [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add images.

        Args:
            predictions: one an image, with ``instances`` at the size of the ground truth.
            targets: one an image.

        Raises:
            ValueError: if numbers or sizes differ, ``instances`` is None, or a class is not a thing.
        """
        if len(predictions) != len(targets):
            raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets; expected one each.")
        for prediction, target in zip(predictions, targets, strict=True):
            if self.panoptic:
                overlap = segment_overlap(prediction, target, len(self.classes))
                self.add(target, tables_of_overlap(overlap, prediction.scores.cpu().numpy(), self.classes))
            else:
                self.add(target, tables_of_instances(prediction, target, self.classes))

    def add(self, target: Target, tables: Iterable[ClassTablesOfImage]) -> None:
        """Add one image whose tables are already made."""
        line = json.dumps([target.image_index, target.image_id, *map(asdict, tables)], separators=(",", ":")) + "\n"
        self.lines.append(torch.frombuffer(bytearray(line.encode()), dtype=torch.uint8).to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather from all processes. One without an image takes part with no bytes, rather than with no tensor."""
        if isinstance(self.lines, list) and not self.lines:
            self.lines.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Any]:
        """Average precision over all images and processes."""
        parts = [self.lines] if isinstance(self.lines, Tensor) else self.lines  # gathering leaves one tensor
        text = b"".join(part.cpu().numpy().tobytes() for part in parts).decode()
        images = sorted((json.loads(line) for line in text.splitlines()), key=lambda image: (image[0], image[1]))
        return average_precision([[ClassTablesOfImage(**t) for t in image[2:]] for image in images], self.classes)


def instances_from_panoptic(prediction: Prediction, classes: ClassTable) -> Instances:
    """The thing segments of a panoptic prediction as instances with their scores; those without a pixel are left out.

    Average precision needs a score per segment. Programs that write none give 1 to all: such a result is a ranking of
    equals, and its AP is low for that reason alone.
    """
    id_map = prediction.id_map.cpu().numpy()
    class_ids = prediction.class_ids.cpu()
    present = np.bincount(id_map.ravel(), minlength=len(class_ids) + 1)[1:] > 0
    rows = np.flatnonzero(np.array(classes.is_thing)[class_ids.numpy()] & present)
    rles = encode_id_map(id_map, len(class_ids))
    return Instances([rles[int(r)] for r in rows], class_ids[rows], prediction.scores.cpu()[rows])


def tables_of_instances(prediction: Prediction, target: Target, classes: ClassTable) -> list[ClassTablesOfImage]:
    """Tables of one image from run lengths.

    Raises:
        ValueError: as :meth:`InstanceAP.update`.
    """
    name = target.image_id or prediction.image_id or f"number {target.image_index}"
    instances = prediction.instances
    if instances is None:
        raise ValueError(f"Image {name}: the prediction has no instances; ask the head for them, or judge the panoptic "
                         "result (panoptic=True).")  # fmt: skip
    is_thing, size = np.array(classes.is_thing), list(target.id_map.shape)
    class_ids = instances.class_ids.cpu().numpy()
    inside = (class_ids >= 0) & (class_ids < len(classes))
    if not (inside.all() and is_thing[class_ids].all()):
        raise ValueError(f"Image {name}: instances must be of things (contiguous ids {list(classes.thing_ids)}).")
    wrong = next((list(r["size"]) for r in instances.rles if list(r["size"]) != size), None)
    if wrong is not None:
        raise ValueError(f"Image {name}: an instance has size {wrong}, the ground truth {size}.")
    truth_rles = encode_id_map(target.id_map.cpu().numpy(), len(target))
    areas, truth_areas = _areas(instances.rles), _areas(truth_rles)
    truth_classes, crowd = target.class_ids.cpu().numpy(), target.is_crowd.cpu().numpy().astype(np.int64)
    things = is_thing[truth_classes] & (truth_areas > 0)
    scores = instances.scores.cpu().numpy().astype(np.float64)
    tables = []
    for c in np.union1d(class_ids, truth_classes[things]):
        rows, truth = _best(class_ids == c, scores), np.flatnonzero(things & (truth_classes == c))
        pair = [instances.rles[int(r)] for r in rows], [truth_rles[int(t)] for t in truth]
        ious = coco_mask.iou(*pair, crowd[truth].tolist()) if rows.size and truth.size else np.zeros((rows.size, 0))
        tables.append(_table(int(c), scores[rows], areas[rows], truth_areas[truth], crowd[truth], ious))
    return tables


def tables_of_overlap(overlap: SegmentOverlap, scores: Array, classes: ClassTable) -> list[ClassTablesOfImage]:
    """Tables of the things of a panoptic prediction, from pixels that were counted already.

    Args:
        overlap: prediction and ground truth of one image.
        scores: (P,) of the predicted segments.
        classes: the class table.
    """
    is_thing = np.array(classes.is_thing)
    things = is_thing[overlap.predicted_classes] & (overlap.predicted_areas > 0)
    true_things = is_thing[overlap.target_classes] & (overlap.target_areas > 0)
    crowd, scores = overlap.target_crowd.astype(np.int64), scores.astype(np.float64)
    tables = []
    for c in np.union1d(overlap.predicted_classes[things], overlap.target_classes[true_things]):
        rows = _best(things & (overlap.predicted_classes == c), scores)
        truth = np.flatnonzero(true_things & (overlap.target_classes == c))
        shared, areas = overlap.shared[truth][:, rows].T, overlap.predicted_areas[rows]
        union = areas[:, None] + np.where(crowd[truth], 0, overlap.target_areas[truth] - shared)
        tables.append(_table(int(c), scores[rows], areas, overlap.target_areas[truth], crowd[truth], shared / union))
    return tables


def _best(chosen: Array, scores: Array) -> Array:
    """Rows of the chosen, best first, equal ones in their order, as many as COCO judges."""
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(-scores[rows], kind="stable")][:MAX_DETECTIONS]


def _areas(rles: list[dict[str, Any]]) -> Array:
    return coco_mask.area(rles).astype(np.int64) if rles else np.zeros(0, np.int64)


def _table(class_id: int, *arrays: Array) -> ClassTablesOfImage:
    return ClassTablesOfImage(class_id, *(a.tolist() for a in arrays))


class _TableEval(COCOeval):
    """``COCOeval`` that is given the IoU tables instead of masks."""

    def __init__(self, truth: COCO, predicted: COCO, tables: dict[tuple[int, int], ClassTablesOfImage]) -> None:
        super().__init__(truth, predicted, "bbox")  # "segm" would ask for masks; matching is the same
        self.tables = tables

    def computeIoU(self, imgId: int, catId: int) -> Any:
        """(D, G) IoUs of a class of an image, best prediction first; empty where there are none."""
        table = self.tables.get((int(imgId), int(catId)))
        return np.array(table.ious) if table and table.scores and table.truth_areas else []


def average_precision(images: Sequence[Sequence[ClassTablesOfImage]], classes: ClassTable) -> dict[str, Any]:
    """COCO's average precision from the tables of all images, see :class:`InstanceAP`."""
    truth: list[dict[str, Any]] = []
    predicted: list[dict[str, Any]] = []
    tables: dict[tuple[int, int], ClassTablesOfImage] = {}
    for number, image in enumerate(images):
        for table in image:
            tables[number, table.class_id] = table
            place = {"image_id": number, "category_id": table.class_id}
            for area, crowd in zip(table.truth_areas, table.crowd, strict=True):  # ids from 1: 0 means unmatched
                truth.append({**place, "id": len(truth) + 1, "area": area, "iscrowd": crowd})
            for area, score in zip(table.areas, table.scores, strict=True):
                predicted.append({**place, "id": len(predicted) + 1, "area": area, "score": score})
    if not truth or not classes.thing_ids:
        return dict.fromkeys(AP_KEYS) | {"ap_per_class": {classes[c].name: None for c in classes.thing_ids}}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on stdout
        evaluation = _TableEval(_coco(truth, len(images), classes), _coco(predicted, len(images), classes), tables)
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (IoU threshold, recall, class, area range)
    per_class = {classes[c].name: _mean(precision[:, :, i, 0]) for i, c in enumerate(classes.thing_ids)}
    return {
        "ap": _mean(precision[..., 0]),
        "ap50": _mean(precision[0, ..., 0]),
        "ap75": _mean(precision[5, ..., 0]),
        **{key: _mean(precision[..., i]) for key, i in AREA_RANGES.items()},
        "ap_per_class": per_class,
    }


def _coco(annotations: list[dict[str, Any]], images: int, classes: ClassTable) -> COCO:
    container = COCO()
    container.dataset = {
        "images": [{"id": i} for i in range(images)],
        "categories": [{"id": c} for c in classes.thing_ids],
        "annotations": annotations,
    }
    container.createIndex()
    return container


def _mean(precision: Array) -> float | None:
    """Mean over what was measured; None where nothing was (COCO's -1)."""
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else None
