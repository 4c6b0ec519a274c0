"""The pictures of docs/eleme.md: the loss terms of a training run, and what the dense CRF changes in one image.

python -m panoptic_ibs.train data=lots head=cascade_upsnet sampling=random_crop ibs=none trainer.log_every_n_steps=5 \\
    run_dir=RUN
python scripts/draw_eleme.py RUN docs/images

The folder gets eleme_losses.png and eleme_crf.png. The image is the validation image of the run where the CRF changes
the most pixels; it shows what the step does, not how often that helps.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import panoptic_ibs
from panoptic_ibs.predictions import Prediction
from panoptic_ibs.refine.dense_crf import DenseCRF
from panoptic_ibs.report_pages.figures import HALF_WIDTH, LIGHT, Theme, line_chart, render
from panoptic_ibs.report_pages.records import load_run
from panoptic_ibs.report_pages.run_figures import loss_terms
from panoptic_ibs.visualize import overlay

SCALE, GAP, TITLE = 3, 12, 34  # enlargement; pixels between the panels, and above them
CHANGED = (236, 28, 118)
TITLES = ("a car park", "before", "after the dense CRF", "changed")


def draw_losses(run: Path, out: Path) -> None:
    """The terms of the loss over the steps."""
    lines, _ = loss_terms(load_run(run))

    def draw(figure: Any, theme: Theme) -> None:
        line_chart(figure.subplots(), lines, theme, "Loss and its terms (log scale)", "step", log=True)

    picture = Image.open(io.BytesIO(render(draw, LIGHT, 1.6 * HALF_WIDTH, 4.6)))
    picture.convert("RGB").quantize(64).save(out, optimize=True)


def draw_crf(run: Path, out: Path) -> None:
    """An image, its segments before and after the dense CRF, and the pixels whose class or segment is another."""
    model = panoptic_ibs.load(run / "checkpoints" / "last.ckpt")
    root = Path(load_run(run).config["data"]["root"])
    found = []
    for path in sorted((root / "leftImg8bit" / "val").rglob("*.png")):
        image = np.asarray(Image.open(path).convert("RGB"))
        model.refine = ()
        before = model.predict(image)[0]
        model.refine = (DenseCRF(),)
        after = model.predict(image)[0]
        found.append((image, before, after, changed(before, after)))
    shares = [float(item[-1].mean()) for item in found]
    image, before, after, other = found[int(np.argmax(shares))]
    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB")).copy()
    grey[other] = CHANGED
    coloured = [overlay(image, p.id_map.numpy(), p.class_ids.tolist(), model.classes) for p in (before, after)]
    height, width = (SCALE * side for side in image.shape[:2])
    sheet = Image.new("RGB", (2 * width + GAP, 2 * (height + TITLE)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (panel, title) in enumerate(zip((image, *coloured, grey), TITLES, strict=True)):
        left, top = (i % 2) * (width + GAP), (i // 2) * (height + TITLE)
        sheet.paste(Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST), (left, top + TITLE))
        pen.text((left, top + 4), title, fill=(20, 20, 20), font=ImageFont.load_default(24))
    sheet.quantize(128).save(out, optimize=True)
    most, mean = 100 * max(shares), 100 * float(np.mean(shares))
    print(f"{out}: {most:.1f} % of the pixels changed, {mean:.1f} % in the mean of {len(found)} images")


def changed(before: Prediction, after: Prediction) -> NDArray[np.bool_]:
    """Where the class differs, or the segment is not the one that holds most of the old segment's pixels."""
    old, new = before.id_map.numpy(), after.id_map.numpy()
    other = np.zeros(old.shape, bool)
    for k in np.unique(old):
        inside = old == k
        values, counts = np.unique(new[inside], return_counts=True)
        other |= inside & (new != values[counts.argmax()])
    return other


def main(run: Path, folder: Path) -> None:
    """Draw and write both pictures."""
    draw_losses(run, folder / "eleme_losses.png")
    draw_crf(run, folder / "eleme_crf.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
