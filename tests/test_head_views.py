"""What heads show of their embeddings is what inference uses: maps, queries, points."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import panoptic_ibs.heads.panoptic_fcn as panoptic_fcn
from helpers import class_table, random_batch, random_target
from panoptic_ibs.construction import build_model
from panoptic_ibs.structures import ImageSize
from test_ciae_detection import plant, planted
from test_ciae_head import make_head as ciae_head
from test_mask2former import small_features, small_head
from test_model import make as small_model
from test_panoptic_fcn import make_head as fcn_head
from test_panoptic_fcn import make_output as fcn_output

CLASSES = class_table()  # contiguous 0, 1 stuff; 2, 3, 4 things
SIZES = [ImageSize((64, 96), (64, 96)), ImageSize((60, 90), (120, 270))]


def some_proposals() -> Any:
    """Three proposals of levels P3 to P5; the third repeats the first."""
    output = planted()
    plant(output, 0, 2, 3, 1, 3.0, [10.0, 9.0, 30.0, 20.0])
    plant(output, 1, 2, 4, 0, 2.0, [12.0, 12.0, 12.0, 12.0])
    plant(output, 0, 3, 3, 1, 1.0, [5.0, 5.0, 5.0, 5.0])
    return output


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("duplicates", [None, -1.0])
def test_ciae_points_are_the_pixels_that_inference_reads(
    size: ImageSize, duplicates: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = ciae_head(inference={"duplicates": duplicates}).eval()
    output = some_proposals()
    used = []
    soft = head.soft
    monkeypatch.setattr(head, "soft", lambda maps, things, *rest: used.append(things) or soft(maps, things, *rest))
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
