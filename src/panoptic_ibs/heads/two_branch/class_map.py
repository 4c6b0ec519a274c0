"""Which output of a two-branch network stands for which class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import ConfigError

IGNORE = 255
"""Semantic label of pixels that no loss counts: void and padding."""

Semantic = Literal["all", "merged"]


@dataclass(frozen=True)
class ClassMap:
    """Maps between contiguous class ids, labels of the detector and channels of the semantic branch; -1 for none.

    Attributes:
        class_of_label: (T + 1,) class of each detector label; label 0 is the background (-1).
        label_of_class: (C,) detector label of each class, 1 to T; -1 for stuff.
        class_of_channel: (K,) class of each semantic channel; -1 for the one that stands for all things.
        channel_of_class: (C,) semantic channel of each class.
        stuff_channels: (K,) bool, the channels of stuff.
    """

    class_of_label: Tensor
    label_of_class: Tensor
    class_of_channel: Tensor
    channel_of_class: Tensor
    stuff_channels: Tensor

    @classmethod
    def of(cls, classes: ClassTable, semantic: Semantic = "all") -> ClassMap:
        """The maps of a class table.

        Args:
            classes: the class table.
            semantic: channels of the semantic branch: ``"all"``, the stuff classes and then the thing classes, each in
                the table's order; ``"merged"``, one channel for all things and then the stuff classes.

        Raises:
            ConfigError: an unknown choice; more channels than labels of a byte.
        """
        if semantic not in ("all", "merged"):
            raise ConfigError(f"head.semantic_classes is {semantic!r}; choose 'all' or 'merged'.")
        things, stuff = torch.tensor(classes.thing_ids).long(), torch.tensor(classes.stuff_ids).long()
        none = torch.tensor([-1])
        channels = torch.cat([stuff, things] if semantic == "all" else [none, stuff])
        if len(channels) > IGNORE:
            raise ConfigError(
                f"The semantic branch needs {len(channels)} channels and can have {IGNORE}; give "
                "head.semantic_classes=merged, or a data set of fewer classes."
            )
        label_of_class = torch.full((len(classes),), -1)
        label_of_class[things] = torch.arange(1, len(things) + 1)
        channel_of_class = torch.zeros(len(classes), dtype=torch.long)
        known = channels >= 0
        channel_of_class[channels[known]] = torch.arange(len(channels))[known]
        is_stuff = torch.zeros(len(classes) + 1, dtype=torch.bool)  # the last for -1
        is_stuff[stuff] = True
        return cls(torch.cat([none, things]), label_of_class, channels, channel_of_class, is_stuff[channels])
