"""Mask2Former (Cheng et al., CVPR 2022): queries that attend inside their own masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.heads.base import Head
from panoptic_ibs.ranges import AtLeastOne, OptionsOf, Share, Whole
from panoptic_ibs.segments import EmbeddingView, Prediction, SoftSegments
from panoptic_ibs.structures import FeatureLevel, HeadLosses, ImageSize, Target

from .inference import confident, panoptic, semantic
from .inference import instances as _instances
from .losses import LossOptions, all_losses, usable_rows
from .network import Mask2FormerOutput, PixelDecoder, QueryDecoder

__all__ = ["LossOptions", "Mask2Former", "Mask2FormerOutput"]


class Mask2Former(Head):
    """Mask2Former on a backbone with outputs at strides 4 to 32.

    Args:
        classes: the class table.
        levels: the backbone's levels.
        queries: number of queries.
        channels: width of decoder, embeddings and features.
        encoder_hidden: width inside the pixel decoder's feed-forward networks.
        encoder_depth: layers of the pixel decoder.
        decoder_hidden: width inside the query decoder's feed-forward networks.
        decoder_depth: layers of the query decoder.
        score_threshold: least class score of a segment (0.8; Vistas 0.0).
        overlap_threshold: least share of a mask that must be left after the competition for pixels.
        task: ``"panoptic"``, or ``"instance"``: things are the only segments and classes, in training as at test.
        instances: predict instances (masks that may overlap) beside the panoptic result; always with ``"instance"``.
        top_instances: (query, class) pairs kept for them.
        crop_fix: segments that the crop removed (one pixel or fewer left) are no targets (de Geus and Dubbelman, 2023,
            Section 5.2). Off only has an effect with a dataset that keeps removed segments.
        loss: overrides of :class:`LossOptions` by name.
    """

    def __init__(
        self,
        classes: ClassTable,
        levels: Sequence[FeatureLevel],
        queries: AtLeastOne = 100,
        channels: AtLeastOne = 256,
        encoder_hidden: AtLeastOne = 1024,
        encoder_depth: Whole = 6,
        decoder_hidden: AtLeastOne = 2048,
        decoder_depth: Whole = 9,
        score_threshold: Share = 0.8,
        overlap_threshold: Share = 0.8,
        task: Literal["panoptic", "instance"] = "panoptic",
        instances: bool = False,
        top_instances: AtLeastOne = 100,
        crop_fix: bool = True,
        loss: Annotated[Mapping[str, Any], OptionsOf(f"{__name__}.LossOptions")] | None = None,
    ) -> None:
        super().__init__(classes, levels)
        unknown = set(loss or {}) - set(LossOptions.__dataclass_fields__)
        if unknown:
            known = ", ".join(LossOptions.__dataclass_fields__)
            raise ConfigError(f"head.loss has no option {', '.join(sorted(unknown))}; the options are {known}.")
        self.loss = o = LossOptions(**(loss or {}))
        self.weights = {"class": o.class_weight, "mask": o.mask_weight, "dice": o.dice_weight}
        self.score_threshold, self.overlap_threshold = score_threshold, overlap_threshold
        self.crop_fix = crop_fix
        self.makes_instances, self.top_instances = instances or task == "instance", top_instances
        self._channels(classes, task)
        self.pixel_decoder = PixelDecoder(levels, channels, encoder_hidden, encoder_depth)
        self.query_decoder = QueryDecoder(
            len(self.class_of_channel), channels, queries, decoder_depth, heads=8, hidden=decoder_hidden
        )

    def _channels(self, classes: ClassTable, task: str) -> None:
        """Maps between contiguous classes and the classifier's channels; -1 where there is none."""
        if task not in ("panoptic", "instance"):
            raise ConfigError(f"head.task is {task!r}; choose 'panoptic' or 'instance'.")
        known = range(len(classes)) if task == "panoptic" else classes.thing_ids
        if not known:
            raise ConfigError("head.task=instance needs at least one thing class; the class table has none.")
        self.class_of_channel = torch.tensor(list(known))
        self.channel_of_class = torch.full((len(classes),), -1)
        self.channel_of_class[self.class_of_channel] = torch.arange(len(known))
        self.is_thing = torch.tensor(classes.is_thing)[self.class_of_channel]

    def forward(self, features: Sequence[Tensor]) -> Mask2FormerOutput:
        """Class logits and mask embeddings of all predictions, and the mask features.

        The pixel decoder computes in float32 under autocast too, as published: half precision is too coarse for the
        places that deformable attention looks at.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            levels, mask_features = self.pixel_decoder([f.float() for f in features])
        output: Mask2FormerOutput = self.query_decoder(levels, mask_features)
        return output

    def losses(self, output: Mask2FormerOutput, targets: Sequence[Target]) -> HeadLosses:
        """Terms ``class``, ``mask`` and ``dice``, summed over the predictions, and the embeddings for IBS.

        IBS gets the matched queries of every prediction but that of the learnable queries.
        """
        targets = [replace(t, class_ids=self.channel_of_class[t.class_ids]) for t in targets]
        rows = [r[t.class_ids[r] >= 0] for t in targets for r in [usable_rows(t, self.crop_fix)]]
        losses, segments = all_losses(output, targets, rows, self.loss)
        return losses, segments[1:]

    @torch.no_grad()
    def segments(
        self, output: Mask2FormerOutput, sizes: Sequence[ImageSize], targets: Sequence[Target] | None = None
    ) -> Iterator[SoftSegments]:
        """Mask logits of the last layer's queries that pass the score threshold, with instances if asked for."""
        for (logits, masks), size in zip(_last(output), sizes, strict=True):
            kept, channels, scores = confident(logits, self.score_threshold)
            found = None
            if self.makes_instances:
                found = _instances(logits, masks, self.is_thing, size, self.top_instances)
                found.class_ids = self.class_of_channel[found.class_ids]
            yield SoftSegments(
                masks=masks[kept].float(),
                class_ids=self.class_of_channel.to(channels.device)[channels],
                is_thing=self.is_thing.to(channels.device)[channels],
                scores=scores,
                size=size,
                instances=found,
            )

    @torch.no_grad()
    def fuse(self, soft: SoftSegments) -> Prediction:
        """The published panoptic post-processing."""
        masks, scores, classes = soft.masks, soft.scores, soft.class_ids
        found = panoptic(masks, scores, classes, soft.is_thing, soft.size, self.overlap_threshold, stride=soft.stride)
        return Prediction(*found, instances=soft.instances)

    @torch.no_grad()
    def embedding_view(
        self, output: Mask2FormerOutput, image: int, size: ImageSize, target: Target | None = None
    ) -> EmbeddingView:
        """The mask features, and the last mask embeddings of the things that pass the score threshold."""
        score, channel = output.logits[-1][image].float().softmax(-1).max(-1)
        is_thing = torch.cat([self.is_thing, self.is_thing.new_zeros(1)]).to(channel.device)
        order = score.argsort(descending=True)
        order = order[(is_thing[channel] & (score > self.score_threshold))[order]]
        classes = self.class_of_channel.to(channel.device)[channel[order]]
        queries, features = output.embeddings[-1][image].float(), output.features[image].float()
        return EmbeddingView(features, size, queries[order], classes, score[order], cosine=False)

    @torch.no_grad()
    def predict_semantic(self, output: Mask2FormerOutput, sizes: Sequence[ImageSize]) -> list[Tensor]:
        """Semantic segmentation: one (H, W) map of contiguous class ids an image, at the original sizes."""
        maps = [semantic(logits, masks, size) for (logits, masks), size in zip(_last(output), sizes, strict=True)]
        return [self.class_of_channel.to(scores.device)[scores.argmax(dim=0)] for scores in maps]


def _last(output: Mask2FormerOutput) -> Iterator[tuple[Tensor, Tensor]]:
    """Class logits (Q, C + 1) and mask logits (Q, h, w) of the last prediction, one image after the other."""
    for logits, embedding, feature in zip(output.logits[-1], output.embeddings[-1], output.features, strict=True):
        yield logits, (embedding @ feature.flatten(1)).unflatten(1, feature.shape[-2:])
