"""Scoring of anybody's predictions: reading and checking them, counting in threads, confidence intervals."""

from .bootstrap import Bootstrap, compare
from .browse import ConfusedSegment, confused_segments, read_pair, window_around
from .instance_files import InstanceFile
from .objects import confusion_of, write_objects
from .panoptic_files import PredictionSet, open_predictions
from .problems import Problems
from .score import ImageError, Score, Scorer

__all__ = [
    "Bootstrap",
    "ConfusedSegment",
    "ImageError",
    "InstanceFile",
    "PredictionSet",
    "Problems",
    "Score",
    "Scorer",
    "compare",
    "confused_segments",
    "confusion_of",
    "open_predictions",
    "read_pair",
    "window_around",
    "write_objects",
]
