"""A plain Panoptic FPN with the names of the reference program (detectron2), written from its published description.

Network and inference of one image: an oracle for imported checkpoints. Nothing of the package is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, roi_align

from reference_panoptic_fcn import Conv, ResNet

MEAN_BGR = (103.53, 116.28, 123.675)


class Pyramid(nn.Module):
    def __init__(self, depths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.bottom_up = ResNet(depths)
        for k in range(2, 6):
            setattr(self, f"fpn_lateral{k}", nn.Conv2d(64 << k, channels, 1))
            setattr(self, f"fpn_output{k}", nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.bottom_up(x)
        above = None
        results: list[Tensor] = []
        for k in range(5, 1, -1):
            here = getattr(self, f"fpn_lateral{k}")(features[k - 2])
            above = here if above is None else here + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
            results.insert(0, getattr(self, f"fpn_output{k}")(above))
        return [*results, F.max_pool2d(results[-1], 1, stride=2)]


class BoxHead(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels * 49, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))


class BoxPredictor(nn.Module):
    """The background is the last class."""

    def __init__(self, width: int, things: int, agnostic: bool) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(width, things + 1), nn.Linear(width, 4 if agnostic else 4 * things)
        nn.init.normal_(self.cls_score.weight, std=0.5)
        nn.init.normal_(self.bbox_pred.weight, std=0.2)


def apply(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Deltas (N, K, 4) to boxes (N, 4)."""
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    d = deltas / torch.tensor(weights)
    limit = math.log(1000 / 16)
    x = d[..., 0] * wide[:, None] + (boxes[:, 0] + 0.5 * wide)[:, None]
    y = d[..., 1] * high[:, None] + (boxes[:, 1] + 0.5 * high)[:, None]
    w, h = d[..., 2].clamp(max=limit).exp() * wide[:, None], d[..., 3].clamp(max=limit).exp() * high[:, None]
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.stack([b.clamp(0, s) for b, s in zip(boxes.unbind(-1), (size[1], size[0]) * 2, strict=True)], -1)


class ReferencePanopticFPN(nn.Module):
    def __init__(
        self, things: int, semantic: int, channels: int = 32, width: int = 48, cascade: bool = False,
        depths: tuple[int, ...] = (1, 1, 1, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        self.stages = 3 if cascade else 1
        self.backbone = Pyramid(depths, channels)
        self.proposal_generator = nn.Module()
        rpn = self.proposal_generator.rpn_head = nn.Module()
        rpn.conv = nn.Conv2d(channels, channels, 3, padding=1)
        rpn.objectness_logits, rpn.anchor_deltas = nn.Conv2d(channels, 3, 1), nn.Conv2d(channels, 12, 1)
        roi = self.roi_heads = nn.Module()
        heads = [BoxHead(channels, width) for _ in range(self.stages)]
        predictors = [BoxPredictor(width, things, cascade) for _ in range(self.stages)]
        roi.box_head = nn.ModuleList(heads) if cascade else heads[0]
        roi.box_predictor = nn.ModuleList(predictors) if cascade else predictors[0]
        mask = roi.mask_head = nn.Module()
        for k in range(1, 5):
            setattr(mask, f"mask_fcn{k}", Conv(channels, channels, 3, padding=1, relu=True))
        mask.deconv, mask.predictor = nn.ConvTranspose2d(channels, channels, 2, 2), nn.Conv2d(channels, things, 1)
        nn.init.normal_(mask.predictor.weight, std=1.0)
        semseg = self.sem_seg_head = nn.Module()
        for k in range(2, 6):
            layers: list[nn.Module] = []
            for step in range(max(k - 2, 1)):
                norm = nn.GroupNorm(32, 64)
                layers.append(Conv(64 if step else channels, 64, 3, padding=1, norm=norm, relu=True))
                layers += [nn.Upsample(scale_factor=2, mode="bilinear")] * (k > 2)
            setattr(semseg, f"p{k}", nn.Sequential(*layers))
        semseg.predictor = nn.Conv2d(64, semantic, 1)

    def semantic(self, levels: list[Tensor]) -> Tensor:
        """Logits at the size of the input."""
        total = sum(getattr(self.sem_seg_head, f"p{k}")(x) for k, x in zip(range(2, 6), levels[:4], strict=True))
        return F.interpolate(self.sem_seg_head.predictor(total), scale_factor=4, mode="bilinear")

    def proposals(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        rpn, boxes, scores, group = self.proposal_generator.rpn_head, [], [], []
        for k, x in enumerate(levels):
            stride = 4 << k
            area = (8.0 * stride) ** 2
            sides = [((area / r) ** 0.5, (area / r) ** 0.5 * r) for r in (0.5, 1.0, 2.0)]
            anchors = torch.tensor(
                [
                    [c * stride - w / 2, r * stride - h / 2, c * stride + w / 2, r * stride + h / 2]
                    for r in range(x.shape[2]) for c in range(x.shape[3]) for w, h in sides
                ]
            )  # fmt: skip
            t = F.relu(rpn.conv(x))
            logits = rpn.objectness_logits(t)[0].permute(1, 2, 0).flatten()
            deltas = rpn.anchor_deltas(t)[0].unflatten(0, (3, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            best, index = logits.topk(min(1000, len(logits)))
            found = clipped(apply(deltas[index, None], anchors[index], (1.0,) * 4)[:, 0], size)
            some = ((found[:, 2] - found[:, 0]) > 0) & ((found[:, 3] - found[:, 1]) > 0)
            boxes.append(found[some])
            scores.append(best[some])
            group.append(torch.full((int(some.sum()),), k))
        all_boxes, all_scores = torch.cat(boxes), torch.cat(scores)
        return all_boxes[batched_nms(all_boxes, all_scores, torch.cat(group), 0.7)[:1000]]

    def pooled(self, levels: list[Tensor], boxes: Tensor, size: int) -> Tensor:
        rows = []
        for box in boxes:
            side = float((box[2] - box[0]) * (box[3] - box[1])) ** 0.5
            k = min(max(math.floor(4 + math.log2(side / 224 + 1e-8)), 2), 5)
            rows.append(roi_align(levels[k - 2], [box[None]], size, 1 / (1 << k), 0, True))
        return torch.cat(rows)

    def instances(self, levels: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes, scores, classes and mask probabilities."""
        roi, boxes, all_scores = self.roi_heads, self.proposals(levels, size), []
        coding = [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)]
        for k in range(self.stages):
            head = roi.box_head[k] if self.stages > 1 else roi.box_head
            predictor = roi.box_predictor[k] if self.stages > 1 else roi.box_predictor
            x = head(self.pooled(levels, boxes, 7))
            all_scores.append(predictor.cls_score(x).softmax(1))
            moved = apply(predictor.bbox_pred(x).unflatten(1, (-1, 4)), boxes, coding[k])
            moved = clipped(moved, size)
            boxes = moved[:, 0]
        score = torch.stack(all_scores).mean(0)[:, :-1]
        moved = moved.expand(-1, score.shape[1], 4)
        row, label = (score > 0.05).nonzero(as_tuple=True)
        keep = batched_nms(moved[row, label], score[row, label], label, 0.5)[:100]
        boxes, score, label = moved[row, label][keep], score[row, label][keep], label[keep]
        x = self.pooled(levels, boxes, 14)
        for k in range(1, 5):
            x = getattr(roi.mask_head, f"mask_fcn{k}")(x)
        x = roi.mask_head.predictor(F.relu(roi.mask_head.deconv(x)))
        return boxes, score, label, x[torch.arange(len(x)), label].sigmoid()

    def panoptic(self, image: Tensor, stuff_area: int) -> tuple[Tensor, list[tuple[bool, int, float]]]:
        """Id map, and for each of its segments whether it is a thing, its class among those, and its score.

        Args:
            image: (3, H, W) uint8 RGB, with sides that are multiples of 32.
        """
        size = (image.shape[1], image.shape[2])
        levels = self.backbone(image.flip(0)[None].float() - torch.tensor(MEAN_BGR)[:, None, None])
        boxes, scores, labels, masks = self.instances(levels, size)
        id_map, segments = torch.zeros(size, dtype=torch.long), []
        y, x = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
        for box, score, label, mask in zip(boxes, scores, labels, masks, strict=True):
            if score < 0.5:
                break
            grid_y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
            grid_x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
            grid = torch.stack([grid_x.expand(size), grid_y[:, None].expand(size)], -1)
            pasted = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
            area, taken = int(pasted.sum()), int((pasted & (id_map > 0)).sum())
            if area == 0 or taken / area > 0.5:
                continue
            segments.append((True, int(label), float(score)))
            id_map[pasted & (id_map == 0)] = len(segments)
        best = self.semantic(levels)[0].argmax(0)
        for channel in best.unique().tolist():
            region = (best == channel) & (id_map == 0)
            if channel and int(region.sum()) >= stuff_area:
                segments.append((False, channel - 1, 1.0))
                id_map[region] = len(segments)
        return id_map, segments
