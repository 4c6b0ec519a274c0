"""Score a folder of predictions of any program, in COCO panoptic format: no network is needed.

python examples/score_predictions.py PREDICTIONS DATA [SPLIT]

PREDICTIONS holds a JSON and its PNGs; DATA is a data set in COCO panoptic layout (docs/own_data.md).
"""

from __future__ import annotations

import sys
from typing import Any

from panoptic_ibs import score_files


def main(predictions: str, data: str, split: str = "val2017") -> dict[str, Any]:
    """Score, and print the numbers that matter."""
    metrics = score_files(predictions, data="coco_panoptic", root=data, val=split, bootstrap=0)
    print(f"{metrics['num_images']} images")
    for key in ("pq", "pq_things", "pq_stuff", "acc_things", "prec_things"):
        print(f"{key:12} {100 * metrics[key]:5.1f} %")
    print(f"things that cover more than half of two or more true ones: {100 * metrics['confusion']['50']:.1f} %")
    worst = min(metrics["per_class"].items(), key=lambda item: item[1]["pq"])
    print(f"worst class: {worst[0]}, PQ {100 * worst[1]['pq']:.1f} %")
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:])
