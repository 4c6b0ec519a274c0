"""Soft segments between a head and its fusing rule: what they say, and steps that change them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import class_table, random_batch
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.refine import Refinement, check_order
from panoptic_ibs.segments import SoftSegments
from panoptic_ibs.structures import Batch, ImageSize
from recorder import HEADS, model_of


class Same(Refinement):
    """Changes nothing, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Size, SoftSegments]] = []

    def __call__(self, image: Tensor, soft: SoftSegments) -> SoftSegments:
        assert image.dtype == torch.uint8
        self.seen.append((image.shape, soft))
        return soft


class WithoutThings(Refinement):
    """Drops all things."""

    after = ("Same",)

    def __call__(self, image: Tensor, soft: SoftSegments) -> SoftSegments:
        stuff = ~soft.is_thing
        return replace(
            soft, masks=soft.masks[stuff], class_ids=soft.class_ids[stuff], is_thing=soft.is_thing[stuff],
            scores=soft.scores[stuff], boxes=None if soft.boxes is None else soft.boxes[:0],
        )  # fmt: skip


def images(size: tuple[int, int] = (64, 96), count: int = 2) -> Batch:
    return random_batch(class_table(), size, count=count, segments=4, seed=3)


def predict(model: PanopticModel, batch: Batch, refine: tuple[Refinement, ...] = ()) -> list:
    model.refine = check_order(refine)
    with torch.inference_mode():
        return model.eval().predict_batch(batch)


@pytest.mark.parametrize("head", HEADS)
def test_steps_see_and_change_what_is_fused(head: str) -> None:
    model, batch, same = model_of(head), images(), Same()
    batch.sizes = [ImageSize((64, 90), (64, 90)), ImageSize((64, 96), (80, 120))]
    plain = predict(model, batch)
    again = predict(model, batch, (same,))
    bare = predict(model, batch, (same, WithoutThings()))
    things = torch.tensor(class_table().is_thing)
    for i, (before, after, left) in enumerate(zip(plain, again, bare, strict=True)):
        assert torch.equal(before.id_map, after.id_map)
        assert before.id_map.shape == batch.sizes[i].original
        shape, soft = same.seen[i]
        assert shape == (3, *batch.sizes[i].valid)
        assert soft.masks.shape == (len(soft), 16, 24)
        assert soft.masks.dtype == torch.float32
        assert soft.things == int(things[soft.class_ids[soft.class_ids >= 0]].sum()) > 0
        assert {len(x) for x in (soft.class_ids, soft.is_thing, soft.scores)} == {len(soft)}
        assert set(before.class_ids.tolist()) <= set(soft.class_ids.tolist())
        assert things[before.class_ids].any()
        assert not things[left.class_ids].any()


def test_predict_is_fuse_of_segments() -> None:
    for head in HEADS:
        model, batch = model_of(head).eval(), images(count=1)
        with torch.inference_mode():
            output = model(batch)
            (soft,) = model.head.segments(output, batch.sizes)
            assert torch.equal(model.head.fuse(soft).id_map, model.head.predict(output, batch.sizes)[0].id_map)


@pytest.mark.parametrize("head", HEADS)
def test_masks_of_another_stride_are_fused_as_well(head: str) -> None:
    """Maps at the full size (stride 1) give what their own upsampling gives."""

    class Upsampled(Refinement):
        def __call__(self, image: Tensor, soft: SoftSegments) -> SoftSegments:
            full = torch.nn.functional.interpolate(soft.masks[None], scale_factor=4, mode="bilinear")[0]
            return replace(soft, masks=full, stride=1)

    model, batch = model_of(head), images(count=1)
    (plain,), (fine,) = predict(model, batch), predict(model, batch, (Upsampled(),))
    same = plain.class_ids.tolist() == fine.class_ids.tolist() and torch.equal(plain.id_map, fine.id_map)
    if head == "panoptic_fcn":  # its probabilities are upsampled, not its logits: nearly the same
        moved = plain.class_ids[plain.id_map.long() - 1] == fine.class_ids[fine.id_map.long() - 1]
        same = bool(moved.float().mean() > 0.9)
    assert same


def test_a_wrong_order_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="WithoutThings must come after Same; change their order"):
        check_order([WithoutThings(), Same()])
    assert len(check_order([Same(), WithoutThings()])) == 2
