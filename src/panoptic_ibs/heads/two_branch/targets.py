"""What a two-branch network is trained on, from id maps and tables of segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.functional.ragged import padded
from panoptic_ibs.structures import Target

from .class_map import IGNORE, ClassMap


@dataclass
class InstanceTargets:
    """Things of B crops, filled up to G a crop; crowds apart: no box matches them, and boxes in them are no background.

    Attributes:
        boxes: (B, G, 4) float32, tight; zeros for filling.
        labels: (B, G) int64, detector labels 1 to T; 0 for filling.
        rows: (B, G) int64, rows of the crops' tables; -1 for filling.
        crowds: (B, Q, 4) boxes of crowd regions, zeros for filling; Q may be 0.
        id_maps: (B, H, W) integer.
        counts: number of things of each crop.
    """

    boxes: Tensor
    labels: Tensor
    rows: Tensor
    crowds: Tensor
    id_maps: Tensor
    counts: list[int]

    @property
    def valid(self) -> Tensor:
        """(B, G) bool: what is no filling."""
        return self.labels > 0


def instance_targets(targets: Sequence[Target], classes: ClassMap) -> InstanceTargets:
    """The things of crops that have a pixel left; tables are made on the CPU and copied once."""
    rows, crowds = [], []
    for t in targets:
        seen = t.is_thing & (t.areas > 0)
        rows.append((seen & ~t.is_crowd).nonzero().squeeze(1))
        crowds.append(t.boxes[seen & t.is_crowd])
    labels = [classes.label_of_class[t.class_ids[r]] for t, r in zip(targets, rows, strict=True)]
    boxes = [t.boxes[r] for t, r in zip(targets, rows, strict=True)]
    id_maps = torch.stack([t.id_map for t in targets])
    nothing = torch.zeros(1, 4)  # a table of no rows has no largest
    table = torch.cat(
        [padded(_with_one(boxes, nothing), 0), padded(_with_one(labels, nothing[:, 0].long()), 0)[..., None].float(),
         padded(_with_one(rows, nothing[:, 0].long() - 1), -1)[..., None].float()], -1
    )  # fmt: skip
    table = copied(table, id_maps.device)
    return InstanceTargets(
        boxes=table[..., :4],
        labels=table[..., 4].long(),
        rows=table[..., 5].long(),
        crowds=copied(padded(crowds, 0), id_maps.device),
        id_maps=id_maps,
        counts=[len(r) for r in rows],
    )


def _with_one(parts: Sequence[Tensor], filling: Tensor) -> list[Tensor]:
    """The parts, with one row of filling where they are all empty."""
    return list(parts) if any(map(len, parts)) else [filling] * len(parts)


def copied(table: Tensor, device: torch.device) -> Tensor:
    """A table of the CPU on the device, without waiting for it."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def semantic_labels(targets: Sequence[Target], classes: ClassMap) -> Tensor:
    """(B, H, W) uint8 semantic channels of the pixels; :data:`IGNORE` for void. Crowds have their class's."""
    id_maps = torch.stack([t.id_map for t in targets])
    tables = [F.pad(classes.channel_of_class[t.class_ids], (1, 0), value=IGNORE) for t in targets]
    table = copied(padded(tables, IGNORE).to(torch.uint8), id_maps.device)
    return table.gather(1, id_maps.flatten(1).long()).view(id_maps.shape)
