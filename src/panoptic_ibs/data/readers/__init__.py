"""One JSON + PNG panoptic reader, and the layouts of the data sets that it serves."""

from .layouts import DEFAULT_SPLITS, LAYOUTS, cityscapes, coco_panoptic, different_classes, make_reader, vistas
from .memory import ImageMemory
from .panoptic import PanopticReader
from .records import Defect, Record, RecordTable, SegmentIndex, Segments

__all__ = [
    "DEFAULT_SPLITS",
    "LAYOUTS",
    "Defect",
    "ImageMemory",
    "PanopticReader",
    "Record",
    "RecordTable",
    "SegmentIndex",
    "Segments",
    "cityscapes",
    "coco_panoptic",
    "different_classes",
    "make_reader",
    "vistas",
]
