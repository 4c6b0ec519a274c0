"""The README's picture of confusion, from the predictions of a run on the embedded car parks.

python -m panoptic_ibs.train data=lots head=panoptic_fcn sampling=random_crop ibs=none trainer.max_steps=1200 \\
    run_dir=RUN
python scripts/draw_confusion.py RUN docs/images/confusion.png

A piece of a validation image: the image, the true masks of the vehicles in a colour each, and the predicted mask that
covers the most vehicles, in one colour. The piece is chosen by that, and nothing else is drawn by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SCALE, GAP, TITLE = 4, 14, 60  # enlargement; pixels between the panels, and above them
PIECE = (88, 128)  # height and width
COVERED = 0.6  # a vehicle counts when so much of it is covered
ONE = (236, 28, 118)
MANY = [(230, 120, 20), (30, 130, 220), (40, 165, 90), (160, 80, 200), (20, 165, 175), (200, 170, 30), (120, 90, 60)]
TITLES = ("a car park", "right: one mask each", "confused: one for {}")


class Case(NamedTuple):
    """A predicted mask that covers several vehicles, all (H, W)."""

    image: NDArray[np.uint8]
    truth: NDArray[np.int64]
    vehicles: list[int]
    mask: NDArray[np.bool_]
    covered: list[int]


def ids_of(path: Path) -> NDArray[np.int64]:
    """The ids of an id PNG."""
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(np.int64)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def most_confused(run: Path) -> Case:
    """The predicted mask over most vehicles; of several the one that covers them best."""
    root = Path(json.loads((run / "metrics.json").read_text())["config"]["data"]["root"])
    truths = json.loads((root / "gtFine" / "cityscapes_panoptic_val.json").read_text())["annotations"]
    predicted = json.loads((run / "predictions" / "panoptic.json").read_text())["annotations"]
    by_image = {entry["image_id"]: entry for entry in predicted}
    best, case = (1, 0.0), None
    for entry in truths:
        truth = ids_of(root / "gtFine" / "cityscapes_panoptic_val" / entry["file_name"])
        vehicles = [s["id"] for s in entry["segments_info"] if s["id"] > 1000 and s["area"] > 300]
        other = by_image[entry["image_id"]]
        found = ids_of(run / "predictions" / "panoptic" / other["file_name"])
        for segment in other["segments_info"]:
            mask = found == segment["id"]
            shares = {v: float(mask[truth == v].mean()) for v in vehicles}
            covered = [v for v, share in shares.items() if share > COVERED]
            rating = (len(covered), sum(shares[v] for v in covered))
            if rating > best:
                photo = next((root / "leftImg8bit" / "val").rglob(f"{entry['image_id']}_leftImg8bit.png"))
                best, case = rating, Case(np.asarray(Image.open(photo)), truth, vehicles, mask, covered)
    if case is None:
        raise SystemExit(f"{run}: no mask covers two vehicles.")
    return case


def paint(image: NDArray[np.uint8], masks: list[tuple[NDArray[np.bool_], tuple[int, int, int]]]) -> Image.Image:
    """Masks in their colours, with white outlines, on the enlarged image in grey."""

    def large(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return array.repeat(SCALE, axis=0).repeat(SCALE, axis=1)

    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    canvas = large(grey).astype(np.float64) * 0.55 if masks else large(image).astype(np.float64)
    for mask, color in masks:
        inside = large(mask.astype(np.uint8)).astype(bool)
        canvas[inside] = 0.35 * canvas[inside] + 0.75 * np.array(color)
        edge = inside.copy()
        for axis in (0, 1):
            for step in (-2, 2):
                edge &= np.roll(inside, step, axis)
        canvas[inside & ~edge] = 255
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def main(run: Path, out: Path) -> None:
    """Draw and write the picture."""
    case = most_confused(run)
    rows, columns = np.nonzero(case.mask & np.isin(case.truth, case.covered))
    top = int(np.clip(rows.mean() - PIECE[0] / 2, 0, case.mask.shape[0] - PIECE[0]))
    left = int(np.clip(columns.mean() - PIECE[1] / 2, 0, case.mask.shape[1] - PIECE[1]))
    piece = np.s_[top : top + PIECE[0], left : left + PIECE[1]]
    vehicles = [v for v in case.vehicles if (case.truth[piece] == v).any()]
    right = [((case.truth == v)[piece], MANY[i % len(MANY)]) for i, v in enumerate(vehicles)]
    panels = [[], right, [(case.mask[piece], ONE)]]
    width, height = PIECE[1] * SCALE, PIECE[0] * SCALE
    sheet = Image.new("RGB", (3 * width + 2 * GAP, height + TITLE), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (masks, title) in enumerate(zip(panels, TITLES, strict=True)):
        sheet.paste(paint(case.image[piece], masks), (i * (width + GAP), TITLE))
        text = title.format({2: "two", 3: "three", 4: "four"}.get(len(case.covered), len(case.covered)))
        draw.text((i * (width + GAP), 6), text, fill=(20, 20, 20), font=ImageFont.load_default(44))
    sheet.quantize(128).save(out, optimize=True)
    print(f"{out}: one mask over {len(case.covered)} of {len(case.vehicles)} vehicles")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
