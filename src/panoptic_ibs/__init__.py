"""Panoptic segmentation on high-resolution images with Intra-Batch Supervision (IBS)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from .model import load


def __getattr__(name: str) -> Any:
    """Import the heavy parts when they are asked for, so that ``--help`` answers at once."""
    if name == "load":
        from .model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
