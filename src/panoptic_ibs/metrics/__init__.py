"""Panoptic quality, pixel quality of things, confusion and average precision, as ``torchmetrics`` metrics."""

from .boundary import BoundaryQuality
from .instances import InstanceAP, instances_from_panoptic
from .panoptic import ConfusionCurve, PanopticMetrics, PanopticQuality, ThingPixelQuality

__all__ = [
    "BoundaryQuality",
    "ConfusionCurve",
    "InstanceAP",
    "PanopticMetrics",
    "PanopticQuality",
    "ThingPixelQuality",
    "instances_from_panoptic",
]
