"""A head's view of its embeddings, the pictures made of it, and where they go."""

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

import panoptic_ibs.heads.panoptic_fcn as panoptic_fcn
from helpers import class_table, random_batch, random_target, target_from_map
from panoptic_ibs.callbacks import LogPictures
from panoptic_ibs.model import build_model
from panoptic_ibs.reporting import GalleryWriter, log_report, write_report
from panoptic_ibs.reporting.embeddings import (
    MIN_CELLS,
    VIEW_KINDS,
    Chosen,
    choose_query,
    describe,
    draw_view,
    fit_colors,
    side_by_side,
)
from panoptic_ibs.structures import Batch, EmbeddingView, ImageSize, Prediction, Target
from test_ciae_detection import plant, planted
from test_ciae_head import make_head as ciae_head
from test_mask2former import small_features, small_head
from test_model import make as small_model
from test_panoptic_fcn import make_head as fcn_head
from test_panoptic_fcn import make_output as fcn_output
from test_report import write_run
from test_report_beside import Taker

CLASSES = class_table()  # contiguous 0, 1 stuff; 2, 3, 4 things
SIZES = [ImageSize((64, 96), (64, 96)), ImageSize((60, 90), (120, 270))]


def some_proposals() -> Any:
    """Three proposals of levels P3 to P5; the third repeats the first."""
    output = planted()
    plant(output, 0, 2, 3, 1, 3.0, [10.0, 9.0, 30.0, 20.0])
    plant(output, 1, 2, 4, 0, 2.0, [12.0, 12.0, 12.0, 12.0])
    plant(output, 0, 3, 3, 1, 1.0, [5.0, 5.0, 5.0, 5.0])
    return output


# --- the views of the heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("duplicates", [None, -1.0])
def test_ciae_points_are_the_pixels_that_inference_reads(
    size: ImageSize, duplicates: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = ciae_head(inference={"duplicates": duplicates}).eval()
    output = some_proposals()
    used = []
    fuse = head.fuse
    monkeypatch.setattr(head, "fuse", lambda maps, things, *rest: used.append(things) or fuse(maps, things, *rest))
    head.predict(output, [size])
    view = head.embedding_view(output, 0, size)
    assert len(view) == (3 if duplicates is None else 2)
    assert view.cosine
    assert torch.equal(view.queries, used[0].embeddings)
    assert torch.equal(view.boxes, used[0].boxes)
    assert view.class_ids.tolist() == used[0].class_ids.tolist() == [3, 2, 3][: len(view)]
    assert view.scores.tolist() == sorted(view.scores.tolist(), reverse=True)
    full = F.interpolate(output.embeddings[:1], scale_factor=4, mode="bilinear")[0]
    ratio = torch.tensor([size.valid[1] / size.original[1], size.valid[0] / size.original[0]])
    pixels = (view.points * ratio).floor().long()
    assert pixels.tolist() == [[28, 20], [72, 40], [28, 28]][: len(view)]
    for query, (x, y) in zip(view.queries, pixels.tolist(), strict=True):
        torch.testing.assert_close(F.normalize(full[:, y, x], dim=0), query)
    torch.testing.assert_close(view.points * ratio - pixels, torch.full_like(view.points, 0.5))  # centres of pixels


def test_ciae_without_proposals_and_in_oracle_mode() -> None:
    view = ciae_head().eval().embedding_view(planted(), 0, SIZES[0])
    assert len(view) == 0
    assert view.queries.shape == (0, 6)
    target = random_target(CLASSES, (64, 96))
    oracle = ciae_head(inference={"oracle": True}).eval().embedding_view(planted(), 0, SIZES[0], target)
    assert oracle.points is None
    seen = target.is_thing & (target.areas > 0)
    assert oracle.class_ids.tolist() == target.class_ids[seen].tolist()


def test_panoptic_fcn_products_are_the_masks_that_are_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    head = fcn_head(inference={"center_threshold": 0.3, "instance_threshold": 0.1}).eval()
    output = fcn_output(head, batch=2, seed=4)
    pasted = []
    combine = panoptic_fcn.combine
    monkeypatch.setattr(panoptic_fcn, "combine", lambda *a, **k: pasted.append(a) or combine(*a, **k))
    sizes = [ImageSize((64, 128), (64, 128))] * 2
    head.predict(output, sizes)
    view = head.embedding_view(output, 1, sizes[1])
    masks, classes, scores = pasted[1][:3]
    assert len(view) > 1
    assert not view.cosine
    torch.testing.assert_close(torch.einsum("nc,chw->nhw", view.queries, view.embeddings).sigmoid(), masks)
    assert torch.equal(view.class_ids, classes)
    assert torch.equal(view.scores, scores)


def test_mask2former_queries_are_the_confident_things() -> None:
    head = small_head(score_threshold=0.3).eval()
    with torch.no_grad():
        output = head(small_features())
    output.logits[-1] = 2 * torch.randn(output.logits[-1].shape, generator=torch.Generator().manual_seed(3))
    view = head.embedding_view(output, 1, ImageSize((64, 128), (64, 128)))
    expected = []
    for q, logits in enumerate(output.logits[-1][1].tolist()):
        total = sum(math.exp(v) for v in logits)
        c = max(range(len(logits)), key=logits.__getitem__)
        if c < len(CLASSES) and CLASSES[c].is_thing and math.exp(logits[c]) / total > 0.3:
            expected.append((math.exp(logits[c]) / total, c, q))
    expected.sort(reverse=True)
    assert 1 < len(expected) < 12
    assert view.class_ids.tolist() == [c for _, c, _ in expected]
    assert view.scores.tolist() == pytest.approx([s for s, _, _ in expected], abs=1e-6)
    assert torch.equal(view.queries, output.embeddings[-1][1][[q for _, _, q in expected]])
    assert torch.equal(view.embeddings, output.features[1])


def test_predictions_have_a_view_only_where_it_is_asked_for() -> None:
    config = {
        "backbone": {
            "_target_": "panoptic_ibs.backbones.TimmBackbone",
            "name": "resnet18",
            "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
        },
        "head": {"_target_": "panoptic_ibs.heads.ciae.CIAE", "dimension": 6, "channels": 16, "embedding_channels": 16,
                 "depth": 1, "inference": {"score_threshold": 0.0, "proposals": 5}},
    }  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config, CLASSES).eval()
    batch = random_batch(CLASSES, (64, 96))
    with torch.no_grad():
        output = model(batch)
        predictions = model.predict_batch(batch, views=True)
        assert all(p.view is None for p in model.predict_batch(batch))
    for i, prediction in enumerate(predictions):
        view = prediction.cpu().view()
        torch.testing.assert_close(view.embeddings, output.embeddings[i])
        assert len(view) == 5


def test_a_view_is_made_under_the_precision_of_its_prediction() -> None:
    """Panoptic FCN has a layer between its raw output and the queries, which mixed types would stop."""
    model = small_model().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prediction = model.predict_batch(random_batch(CLASSES), views=True)[0]
    view = prediction.view()
    assert len(view) > 0
    assert view.queries.dtype == view.embeddings.dtype == torch.float32


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
