"""The embedded data set: procedural street scenes in the layout of Cityscapes. Synthetic, and it says so.

``render`` makes one picture with its labels, ``write_dataset`` a whole set on disk. See ``scene`` for what stands in a
picture, ``vehicles``, ``figures`` and ``street`` for how it is drawn.
"""

from .render import CLASSES, MIN_PIXELS, SyntheticImage, render
from .write import write_dataset

__all__ = ["CLASSES", "MIN_PIXELS", "SyntheticImage", "render", "write_dataset"]
