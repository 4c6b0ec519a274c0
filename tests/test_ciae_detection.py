"""CIAE's detector against torchvision's FCOS and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from helpers import class_table, random_target, target_from_map
from panoptic_ibs.heads.ciae import CIAEOutput
from panoptic_ibs.heads.ciae.detection import (
    decode,
    detection_losses,
    flatten_levels,
    location_targets,
    locations,
    propose,
)
from panoptic_ibs.structures import Target

RANGES = [(0.0, 16.0), (16.0, 32.0), (32.0, 64.0), (64.0, 128.0), (128.0, float("inf"))]
STRIDES = (8, 16, 32, 64, 128)


def level_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    return [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]


def make_output(size: tuple[int, int] = (64, 96), things: int = 3, seed: int = 0, count: int = 2) -> CIAEOutput:
    g = torch.Generator().manual_seed(seed)
    sizes = level_sizes(size)
    return CIAEOutput(
        [torch.randn(count, things, *s, generator=g) for s in sizes],
        [torch.randn(count, 1, *s, generator=g) for s in sizes],
        [torch.rand(count, 4, *s, generator=g) * stride * 2 + 1 for s, stride in zip(sizes, STRIDES, strict=True)],
        torch.randn(count, 6, size[0] // 4, size[1] // 4, generator=g),
    )


def box_target(size: tuple[int, int], boxes: list[list[int]], channels: list[int], image_index: int = 0) -> Target:
    id_map = torch.zeros(size, dtype=torch.int32)
    for k, (x1, y1, x2, y2) in enumerate(boxes, start=1):
        id_map[y1:y2, x1:x2] = k
    return target_from_map(id_map, [2 + c for c in channels], class_table(), image_index=image_index)


def test_detection_losses_against_torchvision() -> None:
    """With boxes for masks, and the published level ranges, the losses are torchvision's."""
    size = (128, 192)
    targets = [
        box_target(size, [[3, 5, 61, 97], [65, 1, 75, 11], [81, 33, 187, 125]], [0, 2, 1]),
        box_target(size, [[9, 9, 150, 101]], [2], 1),
    ]
    output = make_output(size)
    ranges = [(0.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, float("inf"))]
    wanted = location_targets(targets, torch.tensor([-1, -1, 0, 1, 2]), level_sizes(size), ranges)
    ours = detection_losses(output, wanted)

    backbone = nn.Identity()
    backbone.out_channels = 32
    generator = AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * 5)
    peer = FCOS(backbone, 3, anchor_generator=generator, center_sampling_radius=1e6)
    points = locations(level_sizes(size), torch.device("cpu")).float()
    counts = [h * w for h, w in level_sizes(size)]
    stride = torch.cat([torch.full((n, 1), float(s)) for n, s in zip(counts, STRIDES, strict=True)])
    anchors = torch.cat([points - stride / 2, points + stride / 2], dim=1)
    outputs = {
        "cls_logits": flatten_levels(output.classes),
        "bbox_regression": flatten_levels(output.boxes) / stride,
        "bbox_ctrness": flatten_levels(output.centerness),
    }
    truth = [{"boxes": t.boxes, "labels": t.class_ids - 2} for t in targets]
    expected = peer.compute_loss(truth, outputs, [anchors, anchors], counts)
    assert (wanted.channel >= 0).sum() > 20
    torch.testing.assert_close(ours["class"], expected["classification"])
    torch.testing.assert_close(ours["box"], expected["bbox_regression"])
    torch.testing.assert_close(ours["centerness"], expected["bbox_ctrness"])


def test_location_targets_against_loops() -> None:
    """Positive only inside the mask, on the instance's level; crowd counts nowhere; background beyond the image."""
    classes = class_table()
    targets = [random_target(classes, (96, 160), 8, seed, seed) for seed in range(2)]
    targets[0].is_crowd[4] = True
    sizes = level_sizes((96, 160))
    wanted = location_targets(targets, torch.tensor([-1, -1, 0, 1, 2]), sizes, RANGES)
    positives = 0
    for b, target in enumerate(targets):
        index = 0
        for (h, w), stride, (low, high) in zip(sizes, STRIDES, RANGES, strict=True):
            for i in range(h):
                for j in range(w):
                    x, y = j * stride + stride // 2, i * stride + stride // 2
                    assert wanted.points[index].tolist() == [x, y]
                    row = int(target.id_map[y, x]) - 1 if y < 96 and x < 160 else -1
                    x1, y1, x2, y2 = target.boxes[row].tolist()
                    sides = [x - x1, y - y1, x2 - x, y2 - y]
                    crowd = row >= 0 and bool(target.is_crowd[row])
                    thing = row >= 0 and bool(target.is_thing[row]) and not crowd
                    assert wanted.counted[b, index] == (0 if crowd else 1)
                    if thing and low < max(sides) <= high:
                        positives += 1
                        assert wanted.channel[b, index] == target.class_ids[row] - 2
                        torch.testing.assert_close(wanted.boxes[b, index], target.boxes[row])
                        ratio = min(sides[0], sides[2]) / max(sides[0], sides[2])
                        ratio *= min(sides[1], sides[3]) / max(sides[1], sides[3])
                        assert wanted.centerness[b, index].item() == pytest.approx(ratio**0.5, abs=1e-6)
                    else:
                        assert wanted.channel[b, index] == -1
                        assert wanted.centerness[b, index] == 0
                    index += 1
    assert positives > 20


def planted(size: tuple[int, int] = (64, 96)) -> CIAEOutput:
    """No score anywhere but at the locations set by hand."""
    output = make_output(size)
    for maps in (output.classes, output.centerness):
        for m in maps:
            m.fill_(-20.0)
    return output


def plant(output: CIAEOutput, level: int, i: int, j: int, channel: int, logit: float, sides: list[float]) -> None:
    output.classes[level][0, channel, i, j] = logit
    output.centerness[level][0, 0, i, j] = 3.0
    output.boxes[level][0, :, i, j] = torch.tensor(sides)


def test_proposals_by_hand() -> None:
    output = planted()
    plant(output, 0, 2, 3, 1, 4.0, [10, 8, 12, 9])  # at x 28, y 20
    plant(output, 0, 2, 4, 1, 3.0, [18, 8, 4, 9])  # the same box from x 36: suppressed
    plant(output, 1, 0, 1, 0, 2.0, [14, 100, 6, 8])  # at x 24, y 8: overlaps little; clipped at the top
    plant(output, 0, 2, 5, 2, 1.0, [26, 8, -4, 9])  # the same box again, of another class
    plant(output, 2, 0, 2, 0, 9.0, [5, 5, 5, 5])  # at x 80: in the padding
    found = propose(output, 0, (60, 72), score_threshold=0.3)
    assert found.channels.tolist() == [1, 0, 2]
    assert found.boxes.tolist() == [[18, 12, 40, 29], [10, 0, 30, 16], [18, 12, 40, 29]]
    assert found.points.tolist() == [[28, 20], [24, 8], [44, 20]]
    score = torch.sigmoid(torch.tensor([4.0, 2.0, 1.0])) * torch.sigmoid(torch.tensor(3.0))
    torch.testing.assert_close(found.scores, score.sqrt())
    assert propose(output, 0, (60, 72), score_threshold=0.3, agnostic=True).channels.tolist() == [1, 0]
    assert propose(output, 0, (60, 72), score_threshold=0.3, limit=1).channels.tolist() == [1]
    assert len(propose(output, 0, (60, 72), score_threshold=1.0).scores) == 0


def test_decode_by_hand() -> None:
    boxes = decode(torch.tensor([[10, 20]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert boxes.tolist() == [[9.0, 18.0, 13.0, 24.0]]
