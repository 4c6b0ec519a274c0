"""What a thing's embedding finds on the pixels of its own and of other crops: the quantity that IBS acts on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.structures import SegmentEmbeddings, Target


@dataclass(frozen=True)
class Things:
    """T things of a batch with one embedding each.

    Attributes:
        crop: (T,) int64, the crop that each is in.
        row: (T,) int64, its row in the crop's target.
        embeddings: (T, C), the weighted mean of a thing's embeddings.
        members: (T, S) the weights with which the S embeddings of the head make up the things; rows sum to one.
    """

    crop: Tensor
    row: Tensor
    embeddings: Tensor
    members: Tensor

    def __len__(self) -> int:
        return len(self.crop)


def merge_things(output: SegmentEmbeddings) -> Things:
    """One row a thing, by crop and row of the target, where a head gives it several embeddings.

    Raises:
        ValueError: the head does not say which segments its embeddings belong to (``segment_index``).
    """
    if output.segment_index is None:
        raise ValueError("The embeddings have no segment_index: the head does not say which segments they belong to.")
    image, segment = output.image_index.cpu(), output.segment_index.cpu()
    things = output.is_thing.cpu().nonzero().squeeze(1)
    keys, member = torch.stack([image[things], segment[things]], 1).unique(dim=0, return_inverse=True)
    embeddings = output.embeddings.detach()
    weight = torch.ones(len(image)) if output.weight is None else output.weight.detach().float().cpu()
    members = torch.zeros(len(keys), len(image))
    members[member, things] = weight[things]
    # Weights of zero only (nothing matched on that level) leave the plain mean.
    empty = members.sum(1) == 0
    members[member, things] = torch.where(empty[member], 1.0, weight[things])
    members = (members / members.sum(1, keepdim=True)).to(embeddings.device)
    return Things(keys[:, 0], keys[:, 1], members @ embeddings.float(), members)


def responses(output: SegmentEmbeddings, things: Things, crop: int) -> Tensor:
    """How strongly each thing answers on every pixel of a crop: (T, h, w) in [0, 1], at the features' stride.

    It is the sigmoid of the head's logits, averaged over a thing's embeddings with their weights: what the losses see.
    """
    features = output.features.detach()[crop]
    probabilities = output.logits(output.embeddings.detach(), features.flatten(1)).float().sigmoid()
    return (things.members @ probabilities).unflatten(1, features.shape[-2:])


def mean_responses(output: SegmentEmbeddings, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Mean response of every thing of a batch on four sets of pixels, (T,) each; NaN where the set is empty.

    ``own mask``: the thing itself; ``own crop, rest``: all else in its crop; ``other crops``: all pixels of the other
    crops; ``other crops, same class``: the pixels of its look-alikes there. The very same instance in another crop of
    the same image counts nowhere, and void pixels of other crops count in ``other crops`` as in IBS.

    Args:
        output: embeddings and features of one supervised output.
        targets: the crops' targets, whose id maps have the size of the crops.
    """
    things = merge_things(output)
    classes = torch.stack([targets[c].class_ids[r] for c, r in _places(things)]) if len(things) else torch.zeros(0)
    sums: dict[str, list[Tensor]] = {}
    for crop, target in enumerate(targets):
        maps = responses(output, things, crop).cpu().flatten(1)
        ids = _at(target.id_map, output.features.shape[-2:]).flatten()
        same = torch.cat([torch.tensor([-1]), torch.where(target.is_thing, target.class_ids, -1)])[ids]
        for t, (home, row) in enumerate(_places(things)):
            here = ids == row + 1
            sets = {"own mask": here, "own crop, rest": ~here} if crop == home else {}
            if crop != home and not _holds(target, targets[home], row):
                sets = {"other crops": torch.ones_like(here), "other crops, same class": same == classes[t]}
            for name, pixels in sets.items():
                add = sums.setdefault(name, [torch.zeros(len(things)), torch.zeros(len(things))])
                add[0][t] += maps[t][pixels].sum()
                add[1][t] += pixels.sum()
    return {name: total / count for name, (total, count) in sums.items()}


def _places(things: Things) -> list[tuple[int, int]]:
    return list(zip(things.crop.tolist(), things.row.tolist(), strict=True))


def _at(id_map: Tensor, size: torch.Size) -> Tensor:
    """Ids (h, w) int64 at the stride of the features, nearest."""
    return F.interpolate(id_map.cpu().float()[None, None], size=tuple(size), mode="nearest-exact")[0, 0].long()


def _holds(target: Target, home: Target, row: int) -> bool:
    """Whether a crop holds the very segment of another."""
    if target.image_index != home.image_index or home.image_index < 0:
        return False
    return bool((target.segment_ids == home.segment_ids[row]).any())
