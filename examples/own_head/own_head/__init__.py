"""Learnt queries times pixel features, matched to segments: about the least that trains with IBS."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs import structures as types
from panoptic_ibs.classes import ClassTable
from panoptic_ibs.functional.matching import hungarian, pairwise_dice
from panoptic_ibs.heads.base import Head
from panoptic_ibs.heads.mask2former.inference import confident, panoptic
from panoptic_ibs.segments import Prediction, SoftSegments

Output = tuple[Tensor, Tensor, Tensor]
"""Class logits (B, Q, classes + 1), embeddings (B, Q, C) and features (B, C, H / 4, W / 4)."""


class OwnHead(Head):
    """A head needs its loss weights and four methods: forward, losses, segments, fuse."""

    def __init__(
        self, classes: ClassTable, levels: Sequence[types.FeatureLevel], queries: int = 24, channels: int = 32,
        score_threshold: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__(classes, levels)
        self.weights = {"class": 1.0, "dice": 2.0}
        self.score_threshold = score_threshold
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, channels, 1) for level in levels)
        self.smooth = nn.Sequential(nn.GroupNorm(8, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.query = nn.Embedding(queries, channels)
        self.mix = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.classify = nn.Linear(channels, len(classes) + 1)
        self.is_thing = torch.tensor(classes.is_thing)

    def forward(self, features: Sequence[Tensor]) -> Output:
        """Queries that know the mean of the image, and features at stride 4."""
        size = features[0].shape[-2:]
        maps = self.smooth(sum(F.interpolate(conv(x), size) for conv, x in zip(self.lateral, features)))
        mixed = self.mix(self.query.weight + maps.mean((2, 3))[:, None])
        return self.classify(mixed), mixed, maps

    def losses(self, output: Output, targets: Sequence[types.Target]) -> types.HeadLosses:
        """Match queries and segments by dice; classify all queries; what IBS needs is the last line."""
        logits, embeddings, maps = output
        rows = [((~t.is_crowd) & (t.areas > 1)).nonzero().squeeze(1) for t in targets]
        maps4 = [t.id_map[None, ::4, ::4] for t in targets]
        masks = [(m == r.to(m.device)[:, None, None] + 1).flatten(1).float() for m, r in zip(maps4, rows)]
        soft = [(e @ f.flatten(1)).float() for e, f in zip(embeddings, maps)]
        costs = [pairwise_dice(s.detach(), m) for s, m in zip(soft, masks)]
        pairs = hungarian(costs, [t.image_id for t in targets])
        wanted = torch.full(logits.shape[:2], len(self.classes))
        dice = [maps.sum() * 0]
        for i, (query, column) in enumerate(pairs):
            wanted[i, query] = targets[i].class_ids[rows[i][column]]
            p, m = soft[i][query].sigmoid(), masks[i][column]
            dice.append((1 - (2 * (p * m).sum(1) + 1) / (p.sum(1) + m.sum(1) + 1)).sum())
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        row = torch.cat([rows[i][column] for i, (_, column) in enumerate(pairs)])
        thing = torch.cat([targets[i].is_thing[rows[i][column]] for i, (_, column) in enumerate(pairs)])
        classes = F.cross_entropy(logits.flatten(0, 1), wanted.flatten().to(logits.device))
        terms = {"class": classes, "dice": torch.stack(dice).sum() / max(1, len(row))}
        return terms, [types.SegmentEmbeddings(embeddings[image, query], maps, image, thing, segment_index=row)]

    def segments(
        self, output: Output, sizes: Sequence[types.ImageSize], targets: Sequence[types.Target] | None = None
    ) -> Iterator[SoftSegments]:
        """The queries that are some class."""
        for logits, embeddings, maps, size in zip(*output, sizes):
            kept, label, score = confident(logits, self.score_threshold)
            masks = (embeddings[kept] @ maps.flatten(1)).unflatten(1, maps.shape[-2:]).float()
            yield SoftSegments(masks, label, self.is_thing.to(label.device)[label], score, size)

    def fuse(self, soft: SoftSegments) -> Prediction:
        """As Mask2Former does."""
        return Prediction(*panoptic(soft.masks, soft.scores, soft.class_ids, soft.is_thing, soft.size, 0.5))
