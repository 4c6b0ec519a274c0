"""Open predictions in FiftyOne, with the confusion of every object as a field to sort and filter by.

python examples/to_fiftyone.py PREDICTIONS DATA SPLIT OUT.json          (needs no FiftyOne)

PREDICTIONS and DATA are as in score_predictions.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from panoptic_ibs.interactive import data_module, override
from panoptic_ibs.prediction_files import write_objects

OPEN = """import fiftyone as fo

dataset = fo.Dataset.from_dir(
    dataset_type=fo.types.COCODetectionDataset, data_path={images!r}, labels_path={out!r},
    label_types=["segmentations"], label_field="predictions", extra_attrs=True,
)
fo.launch_app(dataset.sort_by("predictions.detections.confusion", reverse=True))"""


def main(predictions: str, data: str, split: str, out: str) -> Path:
    """Write the objects, and print how FiftyOne opens them."""
    module = data_module("data=coco_panoptic", override("data.root", data), override("data.val", split),
                         override("data.train", split))  # fmt: skip
    path = write_objects(predictions, module.reader("val"), out)
    print(OPEN.format(images=str(Path(data) / split), out=str(path)))
    return path


if __name__ == "__main__":
    main(*sys.argv[1:])
