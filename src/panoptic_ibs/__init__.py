"""Panoptic segmentation on high-resolution images with Intra-Batch Supervision (IBS)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import fit, score_files
    from .construction import build_model, load
    from .data.datamodule import PanopticDataModule
    from .heads.base import Head
    from .ibs import IntraBatchSupervision
    from .metrics import PanopticMetrics
    from .predictions import Prediction
    from .sharing import push
    from .structures import SegmentEmbeddings
    from .task import PanopticTask

__version__ = "0.1.0"
__all__ = [
    "Head",
    "IntraBatchSupervision",
    "PanopticDataModule",
    "PanopticMetrics",
    "PanopticTask",
    "Prediction",
    "SegmentEmbeddings",
    "__version__",
    "build_model",
    "fit",
    "load",
    "push",
    "score_files",
]
_PLACES = {
    "Head": "heads.base",
    "IntraBatchSupervision": "ibs",
    "PanopticDataModule": "data.datamodule",
    "PanopticMetrics": "metrics",
    "PanopticTask": "task",
    "Prediction": "predictions",
    "SegmentEmbeddings": "structures",
    "build_model": "construction",
    "fit": "api",
    "load": "construction",
    "push": "sharing",
    "score_files": "api",
}


def __getattr__(name: str) -> Any:
    """Import the heavy parts when they are asked for, so that ``--help`` answers at once."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
