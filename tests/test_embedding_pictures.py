"""Pictures of embeddings, and where they go: gallery, report, Weights & Biases."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.nn import functional as F

from helpers import class_table, random_target, target_from_map
from panoptic_ibs.callbacks import LogPictures
from panoptic_ibs.report_pages import GalleryWriter, log_report, write_report
from panoptic_ibs.report_pages.embeddings import (
    MIN_CELLS,
    VIEW_KINDS,
    Chosen,
    choose_query,
    describe,
    draw_view,
    fit_colors,
    side_by_side,
)
from panoptic_ibs.segments import EmbeddingView, Prediction
from panoptic_ibs.structures import Batch, ImageSize, Target
from test_ciae_detection import planted
from test_ciae_head import make_head as ciae_head
from test_report import write_run
from test_report_beside import Taker

CLASSES = class_table()  # contiguous 0, 1 stuff; 2, 3, 4 things
SIZES = [ImageSize((64, 96), (64, 96)), ImageSize((60, 90), (120, 270))]


# --- the query that is shown ---------------------------------------------------------------------------------------


def a_view(size: ImageSize, target: Target, seed: int = 0, count: int = 6, cosine: bool = True) -> EmbeddingView:
    """Random embeddings; proposals at random pixels of things, with boxes that reach beyond them."""
    g = torch.Generator().manual_seed(seed)
    h, w = -(-size.valid[0] // 32) * 8, -(-size.valid[1] // 32) * 8
    height, width = size.original
    things = [(y, x) for y, x in (target.id_map > 2).nonzero().tolist()]
    places = [things[int(torch.randint(len(things), (), generator=g))] for _ in range(count)]
    points = torch.tensor([[x + 0.5, y + 0.5] for y, x in places]).reshape(-1, 2)
    reach = torch.tensor([width / 3, height / 3])
    low, high = (points - reach).clamp(min=0), torch.minimum(points + reach, torch.tensor([width, height]))
    return EmbeddingView(
        torch.randn(5, h, w, generator=g), size, F.normalize(torch.randn(count, 5, generator=g), dim=1),
        torch.full((count,), 3), torch.linspace(0.9, 0.5, count), cosine, points, torch.cat([low, high], dim=1),
    )  # fmt: skip


def naive_choice(view: EmbeddingView, target: Target) -> tuple[int, int, float]:
    """Query, other instance and its mean similarity by loops over cells."""
    (valid_h, valid_w), (height, width) = view.size
    best = (-1, -1, -math.inf)
    for k in range(len(view)):
        x, y = view.points[k].tolist()
        own = int(target.id_map[int(y), int(x)]) - 1
        values: dict[int, list[float]] = {}
        for i in range(-(-valid_h // 4)):
            for j in range(-(-valid_w // 4)):
                cx = min((j + 0.5) * 4 * width / valid_w, width - 0.5)
                cy = min((i + 0.5) * 4 * height / valid_h, height - 0.5)
                left, top, right, bottom = view.boxes[k].tolist() if view.boxes is not None else (0, 0, width, height)
                if not (left <= cx <= right and top <= cy <= bottom):
                    continue
                pixel, query = view.embeddings[:, i, j], view.queries[k]
                length = float(pixel.norm() * query.norm()) if view.cosine else 1.0
                values.setdefault(int(target.id_map[int(cy), int(cx)]) - 1, []).append(float(pixel @ query) / length)
        if own < 0 or not target.is_thing[own] or target.is_crowd[own]:
            continue
        for row, found in values.items():
            usable = row >= 0 and row != own and bool(target.is_thing[row]) and not bool(target.is_crowd[row])
            if usable and len(found) >= MIN_CELLS and sum(found) / len(found) > best[2]:
                best = (k, row, sum(found) / len(found))
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("boxes", [True, False])
def test_the_chosen_query_is_the_one_most_at_risk(seed: int, cosine: bool, boxes: bool) -> None:
    size = ImageSize((94, 126), (141, 252))
    target = random_target(CLASSES, size.original, segments=6, seed=seed)
    target.is_crowd[4] = True
    view = a_view(size, target, seed, cosine=cosine)
    view = view if boxes else replace(view, boxes=None)
    query, other, value = naive_choice(view, target)
    chosen = choose_query(view, target)
    assert query >= 0
    assert (chosen.query, chosen.other) == (query, other)
    assert chosen.other_similarity == pytest.approx(value, abs=1e-5)
    assert chosen.anchor == tuple(view.points[query].tolist())
    assert chosen.own == int(target.id_map[int(chosen.anchor[1]), int(chosen.anchor[0])]) - 1


def test_without_a_rival_the_best_scored_query_is_chosen() -> None:
    size = SIZES[0]
    id_map = torch.ones(64, 96, dtype=torch.int32)
    id_map[20:40, 20:40] = 2
    target = target_from_map(id_map, [0, 3], CLASSES)
    view = a_view(size, target_from_map(id_map + 1, [0, 1, 3], CLASSES))
    chosen = choose_query(view, target)
    assert (chosen.query, chosen.own, chosen.other) == (0, 1, None)
    assert "best-scored" in describe(view, chosen, CLASSES, target)
    on_stuff = replace(view, points=torch.full((6, 2), 2.5))
    assert choose_query(on_stuff, target) == Chosen(0, (2.5, 2.5))


def test_a_query_without_a_place_is_marked_where_it_is_most_similar() -> None:
    target = random_target(CLASSES, (64, 96))
    view = replace(a_view(SIZES[0], target, count=1), points=None, boxes=None)
    view.embeddings[:, 5, 7] = 9 * view.queries[0]
    assert choose_query(view, target).anchor == (4 * 7 + 2, 4 * 5 + 2)


# --- the pictures --------------------------------------------------------------------------------------------------


def test_pictures_show_places_colours_and_similarity() -> None:
    size = ImageSize((64, 96), (128, 192))
    target = random_target(CLASSES, size.original, seed=1)
    view = a_view(size, target, count=2)
    view.points[:] = torch.tensor([[40.5, 60.5], [150.5, 90.5]])
    view.boxes[:] = torch.tensor([[20.0, 40.0, 70.0, 100.0], [100.0, 10.0, 180.0, 120.0]])
    image = np.zeros((128, 192, 3), np.uint8)
    chosen = choose_query(view, target)
    pictures = draw_view(image, view, fit_colors(view), chosen, target.id_map.numpy())
    assert list(pictures) == list(VIEW_KINDS)
    assert all(p.shape == image.shape and p.dtype == np.uint8 for p in pictures.values())
    assert side_by_side(pictures).shape == (128, 3 * 192, 3)
    dots = [tuple(pictures["proposals"][y, x]) for x, y in ((40, 60), (150, 90))]
    for dot, (left, top, right, bottom) in zip(dots, view.boxes.int().tolist(), strict=True):
        for y, x in ((top, left + 9), (bottom - 1, left + 9), (top + 9, left), (top + 9, right - 1)):
            assert tuple(pictures["proposals"][y, x]) == dot  # of its box's colour
    assert dots[0] != dots[1]
    anchor = int(chosen.anchor[1]), int(chosen.anchor[0])
    assert tuple(pictures["similarity"][anchor]) == (255, 255, 255)
    half = draw_view(image[::2, ::2], view, fit_colors(view), chosen)
    assert half["similarity"].shape == (64, 96, 3)
    assert tuple(half["proposals"][30, 20]) == dots[0]


@pytest.mark.parametrize("cosine", [True, False])
def test_more_similar_is_lighter(cosine: bool) -> None:
    embeddings = torch.zeros(2, 16, 24)
    embeddings[0] = torch.linspace(-2, 2, 24)
    embeddings[1] = 1
    view = EmbeddingView(embeddings, SIZES[0], torch.tensor([[1.0, 0.0]]), torch.tensor([2]), torch.ones(1), cosine)
    picture = draw_view(np.zeros((64, 96, 3), np.uint8), view, fit_colors(view), Chosen(0, (90.5, 8.5)))["similarity"]
    light = picture[20].astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(light) >= -0.5).all()
    assert light[-1] > 180 > 60 > light[0]


def test_colours_of_the_padding_and_of_other_images_are_those_of_the_fit() -> None:
    size = ImageSize((40, 60), (40, 60))
    target = random_target(CLASSES, (40, 60))
    view = a_view(size, target)
    colors = fit_colors(view)
    spoilt = replace(view, embeddings=view.embeddings.clone())
    spoilt.embeddings[:, 10:] = 1e4  # below the image
    spoilt.embeddings[:, :, 15:] = -1e4
    torch.testing.assert_close(fit_colors(spoilt).axes, colors.axes)
    other = a_view(size, target, seed=9)
    image = np.zeros((40, 60, 3), np.uint8)
    own, foreign = (draw_view(image, other, c)["embedding"] for c in (fit_colors(other), colors))
    assert (own != foreign).any()


def test_no_proposals_no_query() -> None:
    view = ciae_head().eval().embedding_view(planted(), 0, SIZES[0])
    target = random_target(CLASSES, (64, 96))
    chosen = choose_query(view, target)
    assert chosen is None
    pictures = draw_view(np.zeros((64, 96, 3), np.uint8), view, fit_colors(view), chosen, target.id_map.numpy())
    assert list(pictures) == ["proposals", "embedding"]
    assert describe(view, chosen, CLASSES, target) == "No proposals: there is no query to show."


# --- gallery, report, Weights & Biases -----------------------------------------------------------------------------


def offer(writer: GalleryWriter, i: int, view: EmbeddingView | None) -> None:
    size = view.size.original if view else (128, 192)
    target = random_target(CLASSES, size, seed=0, image_index=i)
    image = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
    scores = torch.full((len(target),), 0.5)
    make = None if view is None else lambda: view
    writer.add(image, Prediction(target.id_map, target.class_ids, scores, f"image{i}", view=make), target)


def empty(view: EmbeddingView) -> EmbeddingView:
    return EmbeddingView(
        view.embeddings, view.size, view.queries[:0], view.class_ids[:0], view.scores[:0], True, view.points[:0],
        view.boxes[:0],
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose first image has all pictures, the second no proposals, the third no view."""
    run = write_run(tmp_path / "run")
    writer = GalleryWriter(run, CLASSES)
    size = ImageSize((64, 96), (128, 192))
    view = a_view(size, random_target(CLASSES, size.original, seed=0))
    for i, shown in enumerate((view, empty(view), None)):
        offer(writer, i, shown)
    assert writer.close() == run / "gallery"
    return run


def test_gallery_and_report_show_the_embeddings(run: Path) -> None:
    index = json.loads((run / "gallery" / "index.json").read_text())
    kinds = [[kind for kind in VIEW_KINDS if kind in item] for item in index]
    assert kinds == [list(VIEW_KINDS), ["proposals", "embedding"], []]
    assert index[1]["view_note"].startswith("No proposals")
    assert "view_note" not in index[2]
    page = write_report(run).read_text()
    assert page.count('<h2 id="embeddings">') == 1
    assert "6 proposals. Query (dot): thing1, score 0." in page
    assert "No proposals: there is no query to show." in page
    section = page.split('<h2 id="embeddings">')[1].split('<h2 id="curves">')[0]
    assert section.count('src="data:image/jpeg') == 5
    assert section.count("<section") == 2
    for i, found in enumerate(kinds):
        for kind in VIEW_KINDS:
            file = run / "report" / f"gallery_{i:02d}_{kind}.png"
            assert file.is_file() == (kind in found)
    with Image.open(run / "report" / "gallery_00_similarity.png") as picture:
        assert picture.size == (192, 128)


def test_a_run_without_views_has_no_such_section(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    writer = GalleryWriter(run, CLASSES)
    offer(writer, 0, None)
    writer.close()
    assert "embeddings" not in write_report(run).read_text()


def test_a_missing_picture_is_named_and_left_out(run: Path) -> None:
    next((run / "gallery").glob("00_*_similarity.png")).unlink()
    page = write_report(run).read_text()
    assert "_similarity.png is missing or broken" in page
    assert page.count('src="data:image/jpeg') > 10


def test_views_of_images_that_are_not_kept_are_never_made(tmp_path: Path) -> None:
    def refuse() -> EmbeddingView:
        raise AssertionError("made a view of an image that is not shown")

    writer = GalleryWriter(tmp_path, CLASSES, limit=1)
    offer(writer, 0, None)
    target = random_target(CLASSES, (64, 96), seed=1)
    scores = torch.full((len(target),), 0.5)
    writer.add(
        np.zeros((64, 96, 3), np.uint8), Prediction(target.id_map, target.class_ids, scores, view=refuse), target
    )


def test_loggers_get_the_embeddings_with_the_gallery(run: Path) -> None:
    write_report(run)
    taker = Taker()
    log_report(run, [taker], 600)
    images, captions = taker.images["report/gallery_00"]
    assert [c.partition(": ")[2].partition(".")[0] for c in captions[4:]] == list(VIEW_KINDS)
    assert "Query (dot)" in captions[6]
    assert images[6].size == (192, 128)
    assert len(taker.images["report/gallery_01"][0]) == 6
    assert len(taker.images["report/gallery_02"][0]) == 4


class OfflineLogger(WandbLogger):
    """Takes what would be sent."""

    def __init__(self) -> None:
        self.images: dict[str, list[Any]] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images.setdefault(key, []).append((images[0], kwargs.get("caption")))


def test_training_logs_the_same_names_each_time() -> None:
    size = ImageSize((64, 96), (64, 96))
    logger = OfflineLogger()
    trainer = SimpleNamespace(loggers=[logger], is_global_zero=True, global_step=7)
    module = SimpleNamespace(model=SimpleNamespace(classes=CLASSES))
    callback = LogPictures(images=2)
    target = random_target(CLASSES, (64, 96))
    view = a_view(size, target)
    batch = Batch(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), [target], [size], torch.tensor([-1]))
    views: list[Any] = [lambda: view, lambda: empty(view), lambda: view]
    for _ in range(2):
        for i, make in enumerate(views):
            prediction = Prediction(target.id_map, target.class_ids, torch.ones(len(target)), view=make)
            callback.on_validation_batch_end(trainer, module, [prediction], batch, i)
    assert set(logger.images) == {f"val/0{i}_image0{end}" for i in (0, 1) for end in ("", "_embedding")}
    assert {len(found) for found in logger.images.values()} == {2}
    panel, caption = logger.images["val/00_image0_embedding"][0]
    assert panel.size == (3 * 96, 64)
    assert caption[0].startswith("6 proposals.")
    assert np.asarray(panel)[:, 96:192].std() > 10
    assert logger.images["val/01_image0_embedding"][0][0].size == (2 * 96, 64)
    callback.on_validation_batch_end(
        trainer, module, [Prediction(target.id_map, target.class_ids, torch.ones(len(target)))], batch, 1
    )
    assert len(logger.images["val/01_image0_embedding"]) == 2  # heads without a view log none
