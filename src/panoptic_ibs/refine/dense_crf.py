"""Dense CRF: pixels that look alike and are near get the same label (Kraehenbuehl and Koltun, 2011)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_ibs.errors import ConfigError, DataError
from panoptic_ibs.functional.box_masks import paste_logits
from panoptic_ibs.functional.fusion import scale_boxes, upsample
from panoptic_ibs.functional.mean_field import Kernel, Lattice, Window, mean_field, pixel_features
from panoptic_ibs.functional.panoptic_logits import input_windows, label_planes, winners
from panoptic_ibs.ranges import AtLeastOne, NonNegative, Positive, Whole
from panoptic_ibs.segments import SoftSegments
from panoptic_ibs.structures import ImageSize

from . import Refinement

LEAST = 1e-5  # of a unary probability, as in pydensecrf
CLEAR = 4.0  # a winner's mask logit is at least this, a loser's at most minus this
CHUNK = 8  # maps brought to full size at a time
PIXELS = 65536  # at a time where all labels of a pixel are looked at


@dataclass(frozen=True)
class Parameters:
    """Of the CRF; positions in pixels of the network's input, colours in steps of 1/255.

    Attributes:
        appearance_weight: of the kernel that compares positions and colours.
        appearance_position: its standard deviation of positions.
        appearance_colour: and of colours.
        smoothness_weight: of the kernel that compares positions alone.
        smoothness_position: its standard deviation.
        iterations: steps of the mean field.
    """

    appearance_weight: float
    appearance_position: float
    appearance_colour: float
    smoothness_weight: float
    smoothness_position: float
    iterations: int


PRESETS = {
    "pydensecrf": Parameters(10, 80, 13, 3, 3, 5),  # the example of pydensecrf's README
    "deeplab_coco": Parameters(4, 67, 3, 3, 1, 10),  # DeepLab v2 on COCO-Stuff, in a public PyTorch port of it
}


class DenseCRF(Refinement):
    """Mean field of a fully connected CRF over the pixels of the network's input, with Potts compatibility.

    Labels are the segments, the stuff classes of semantic logits that are somewhere the best, and void. How their
    probabilities follow from what a head hands out is our reading: panoptic logits, and masks that can only be
    compared, are a softmax; mask logits give score times probability, and what they leave over is void. Refined masks
    have stride 1 and are won by the label of the highest probability; the head's own rules (thresholds of area, of
    overlap) are applied after that.

    Args:
        preset: ``"pydensecrf"`` or ``"deeplab_coco"``; the other options replace its values where they are given.
        appearance_weight, appearance_position, appearance_colour, smoothness_weight, smoothness_position, iterations:
            see :class:`Parameters`.
        similarity_scale: of masks of kind ``"similarity"`` before the softmax.
        window: exact kernels, but of pixels at most so many rows and columns apart, in place of nearly exact ones of
            the whole image; slow unless it is small.

    Raises:
        ConfigError: a value that none of these can be.
    """

    def __init__(
        self,
        preset: Literal["pydensecrf", "deeplab_coco"] = "pydensecrf",
        appearance_weight: NonNegative | None = None,
        appearance_position: Positive | None = None,
        appearance_colour: Positive | None = None,
        smoothness_weight: NonNegative | None = None,
        smoothness_position: Positive | None = None,
        iterations: Whole | None = None,
        similarity_scale: Positive = 10.0,
        window: AtLeastOne | None = None,
    ) -> None:
        if preset not in PRESETS:
            raise ConfigError(f"dense_crf.preset is {preset!r}; choose {' or '.join(map(repr, PRESETS))}.")
        given = {
            "appearance_weight": appearance_weight, "appearance_position": appearance_position,
            "appearance_colour": appearance_colour, "smoothness_weight": smoothness_weight,
            "smoothness_position": smoothness_position, "iterations": iterations,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in {**given, "similarity_scale": similarity_scale, "window": window}.items():
            if value is not None:
                _check(name, value)
        self.parameters = replace(PRESETS[preset], **given)  # type: ignore[arg-type]
        self.similarity_scale, self.window = similarity_scale, window

    def kernels(self, image: Tensor) -> list[Kernel]:
        """The kernels of an image (3, H, W), but those without weight."""
        p = self.parameters
        wanted = [
            (p.smoothness_weight, pixel_features(image, p.smoothness_position)),
            (p.appearance_weight, pixel_features(image, p.appearance_position, p.appearance_colour)),
        ]
        size = (image.shape[-2], image.shape[-1])
        return [
            Lattice(features, weight) if self.window is None else Window(features, size, self.window, weight)
            for weight, features in wanted
            if weight > 0
        ]

    @torch.no_grad()
    def __call__(self, image: Tensor, soft: SoftSegments) -> SoftSegments:
        """The refined segments.

        Raises:
            DataError: the image is not RGB, or of another size than the segments.
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.shape[1:] != soft.size.valid:
            raise DataError(
                f"The dense CRF compares colours of an RGB image: it needs (3, {soft.size.valid[0]}, "
                f"{soft.size.valid[1]}) of type uint8, and got {tuple(image.shape)} of {image.dtype}."
            )
        if soft.kind == "panoptic":
            return self._panoptic(image, soft)
        soft = _present(soft)
        if not len(soft) and soft.semantic is None:
            return soft
        labels = _full_size(soft)
        for rows in _parts(labels):
            labels[rows] = _log_probabilities(labels[rows], soft, rows, self.similarity_scale)
        found = mean_field(labels, self.kernels(image), self.parameters.iterations)
        del labels
        for rows in _parts(found):
            found[rows] = _written(found[rows], soft)
        maps = found.T.unflatten(1, soft.size.valid)
        n = len(soft)
        semantic = None if soft.semantic is None else maps[n:-1].contiguous()
        return replace(soft, masks=maps[:n].contiguous(), semantic=semantic, stride=1, in_boxes=False)

    def _panoptic(self, image: Tensor, soft: SoftSegments) -> SoftSegments:
        """Labels are the instances, the stuff that is somewhere the best, and "unknown"; they become whole masks."""
        soft = _whole(soft) if soft.in_boxes else soft
        labels = soft.masks.flatten(1).T.contiguous()
        for rows in _parts(labels):
            labels[rows] = labels[rows].softmax(1).clamp_(min=LEAST).log_()
        found = mean_field(labels, self.kernels(image), self.parameters.iterations)
        for rows in _parts(found):
            found[rows] = found[rows].clamp(min=1e-12).log_()
        return replace(soft, masks=found.T.unflatten(1, soft.size.valid).contiguous(), stride=1)


def _whole(soft: SoftSegments) -> SoftSegments:
    """Panoptic logits of segments in boxes as masks of the whole input: stuff, instances, "unknown".

    They are those that win a pixel somewhere. The semantic logits, which have a say in the head's rules later, are
    brought there as well: the same stuff, and the things that are somewhere the best.
    """
    assert soft.semantic is not None
    assert soft.semantic_classes is not None
    assert soft.channels is not None
    stuff, size = int((soft.semantic_classes >= 0).sum()), soft.size.valid
    found = winners(soft.semantic, stuff, soft.channels, input_windows(soft), soft.masks, size, soft.stride)
    label, best = found.label.unique().tolist(), found.semantic.unique().tolist()
    kept = sorted({k for k in [*label, *best] if k < stuff})
    things = sorted(k - stuff for k in label if stuff <= k < stuff + len(soft))
    wanted = [*kept, *(stuff + i for i in things), stuff + len(soft)]
    masks = soft.masks.new_empty(len(wanted), *size)
    for k, plane in label_planes(soft, stuff, wanted):
        masks[wanted.index(k)] = plane
    channels = [*kept, *(k for k in best if k >= stuff)]
    full = ImageSize(size, size)
    semantic = torch.cat([upsample(part, full, soft.stride) for part in soft.semantic[channels].split(CHUNK)])
    classes, one = soft.semantic_classes[channels], soft.scores.new_ones(1)
    row = torch.arange(len(wanted))
    return replace(
        soft, masks=masks, stride=1, boxes=None, in_boxes=False, channels=None, semantic=semantic,
        semantic_classes=classes, is_thing=(row >= len(kept)) & (row < len(wanted) - 1),
        class_ids=torch.cat([classes[: len(kept)], soft.class_ids[things], classes.new_tensor([-1])]),
        scores=torch.cat([one.expand(len(kept)), soft.scores[things], 0 * one]),
    )  # fmt: skip


def _check(name: str, value: float) -> None:
    """Raises ConfigError for a number that an option cannot be."""
    least = 1 if name == "window" else 0
    positive = name.endswith(("position", "colour", "scale"))
    if not math.isfinite(value) or value < least or (positive and value == 0):
        expected = "a number above 0" if positive else f"a number of at least {least}"
        raise ConfigError(f"dense_crf.{name} is {value}; give {expected}.")


def _present(soft: SoftSegments) -> SoftSegments:
    """With channel 0 of the semantic logits the best that is no stuff, and of stuff what is somewhere the best."""
    if soft.semantic is None or soft.semantic_classes is None:
        return soft
    classes = soft.semantic_classes
    others = soft.semantic[classes < 0]
    merged = others.amax(0) if len(others) else torch.full_like(soft.semantic[0], -torch.inf)
    all_channels = torch.cat([merged[None], soft.semantic[classes >= 0]])
    best = torch.cat(
        [torch.zeros(1, dtype=torch.long, device=classes.device), all_channels.argmax(0).unique()]
    ).unique()
    names = torch.cat([classes.new_tensor([-1]), classes[classes >= 0]])
    return replace(soft, semantic=all_channels[best].clamp(min=-1e4), semantic_classes=names[best])


def _full_size(soft: SoftSegments) -> Tensor:
    """(H W, N + K + 1) masks and semantic logits at the size of the input; the last column is empty."""
    n, size = len(soft), ImageSize(soft.size.valid, soft.size.valid)
    channels = 0 if soft.semantic is None else len(soft.semantic)
    result = soft.masks.new_empty(size.valid[0] * size.valid[1], n + channels + 1, dtype=torch.float32)
    for start in range(0, n, CHUNK):
        part = slice(start, start + CHUNK)
        if soft.in_boxes and soft.boxes is not None:
            boxes = scale_boxes(soft.boxes[part], ImageSize(valid=soft.size.original, original=soft.size.valid))
            full = paste_logits(soft.masks[part].float(), boxes, size.valid)
        else:
            full = upsample(soft.masks[part].float(), size, soft.stride)
        result[:, start : start + len(full)] = full.flatten(1).T
    for start in range(0, channels, CHUNK):
        assert soft.semantic is not None
        full = upsample(soft.semantic[start : start + CHUNK].float(), size, soft.stride)
        result[:, n + start : n + start + len(full)] = full.flatten(1).T
    return result


def _parts(pixels: Tensor) -> Iterator[slice]:
    for start in range(0, len(pixels), PIXELS):
        yield slice(start, start + PIXELS)


def _log_probabilities(part: Tensor, soft: SoftSegments, rows: slice, scale: float) -> Tensor:
    """Logarithms of the unary probabilities of some pixels, for every mask, semantic channel and void.

    Args:
        part: (n, N + K + 1), see :func:`_full_size`.
        soft: the segments.
        rows: which pixels they are.
        scale: of similarities.
    """
    n, classes = len(soft), soft.class_ids.to(part.device)
    masks, semantic = part[:, :n], part[:, n:-1]
    is_thing = soft.is_thing.to(part.device)
    if soft.kind == "similarity":
        masks, thing = _compared(masks * scale, soft, rows, part.device)
        void = torch.zeros_like(part[:, :1])
    else:
        inside = masks.sigmoid()
        thing = F.pad((inside * is_thing), (1, 0)).amax(1, keepdim=True)
        void = 1 - F.pad(inside, (1, 0)).amax(1, keepdim=True) if soft.semantic is None else torch.zeros_like(thing)
        masks = torch.where(classes < 0, inside * (1 - thing), inside * soft.scores.float().to(part.device))
    if soft.semantic is not None:
        semantic = semantic.softmax(1)
        if soft.kind == "similarity":
            masks = masks * semantic[:, :1]
        semantic = torch.cat([semantic[:, :1] * (1 - thing), semantic[:, 1:]], 1)
    return torch.cat([masks, semantic, void], 1).clamp_(min=LEAST).log_()


def _compared(masks: Tensor, soft: SoftSegments, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Softmax of masks that can only be compared, zeros where a pixel is in no box; and whether any thing is there."""
    if soft.boxes is not None and soft.things:
        index = torch.arange(rows.start, rows.start + len(masks), device=device)
        (height, width), (full_height, full_width) = soft.size.valid, soft.size.original
        y = (index // width + 0.5) * (full_height / height)
        x = (index % width + 0.5) * (full_width / width)
        left, upper, right, lower = soft.boxes.to(device).unbind(1)
        inside = (y[:, None] >= upper) & (y[:, None] <= lower) & (x[:, None] >= left) & (x[:, None] <= right)
        inside = F.pad(inside, (0, masks.shape[1] - inside.shape[1]), value=True)
        masks = masks.masked_fill(~inside, -torch.inf)
    any_mask = F.pad(masks, (1, 0), value=-torch.inf).amax(1, keepdim=True) > -torch.inf
    return masks.softmax(1).nan_to_num(0.0), any_mask.float()


def _written(part: Tensor, soft: SoftSegments) -> Tensor:
    """Masks and semantic logits of some pixels (n, N + K + 1) from the labels' probabilities.

    Mask logits are positive for the best label alone. A mask, or semantic channel, that only competes stands for the
    things as well: where a thing wins, so does it.
    """
    n, device = len(soft), part.device
    logs = part.clamp(min=1e-12).log()
    is_thing, competes = soft.is_thing.to(device), soft.class_ids.to(device) < 0
    things = torch.where(is_thing, logs[:, :n], -torch.inf)
    best_thing = F.pad(things, (1, 0), value=-torch.inf).amax(1, keepdim=True)
    competing = F.pad(competes, (0, part.shape[1] - n))
    if soft.semantic is not None:
        competing[n] = True
    raised = torch.where(competing, torch.maximum(logs, best_thing), logs)
    if soft.kind == "similarity":
        return raised
    first, second = F.pad(logs, (0, 1), value=-torch.inf).topk(2, dim=1).values[:, :, None].unbind(1)
    rival = torch.where(logs == first, second, first)  # the best of the other labels
    margin = logs - rival
    clear = (margin + torch.where(margin >= 0, CLEAR, -CLEAR)).clamp(-4 * CLEAR, 4 * CLEAR)
    thing = F.pad(torch.where(is_thing, clear[:, :n], -torch.inf), (1, 0), value=-torch.inf).amax(1, keepdim=True)
    clear = torch.where(competing, torch.maximum(clear, thing), clear)
    return torch.cat([clear[:, :n], raised[:, n:]], 1)
