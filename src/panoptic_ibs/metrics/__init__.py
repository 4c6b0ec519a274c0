"""Panoptic quality, pixel quality of things, and confusion, as ``torchmetrics`` metrics."""

from .panoptic import ConfusionCurve, PanopticMetrics, PanopticQuality, ThingPixelQuality

__all__ = ["ConfusionCurve", "PanopticMetrics", "PanopticQuality", "ThingPixelQuality"]
