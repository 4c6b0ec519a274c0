"""The embedded data sets: procedural street scenes, and car parks from above, in the layout of Cityscapes. Synthetic,
and they say so.

``render`` and ``render_lot`` make one picture with its labels, ``write_dataset`` a whole set on disk. See ``scene`` for
what stands in a street, ``vehicles``, ``figures`` and ``street`` for how it is drawn; ``lots`` for the car parks.
"""

from .lots import LOT_CLASSES, render_lot
from .picture import CLASSES, MIN_PIXELS, SyntheticImage
from .render import render
from .write import write_dataset

__all__ = ["CLASSES", "LOT_CLASSES", "MIN_PIXELS", "SyntheticImage", "render", "render_lot", "write_dataset"]
