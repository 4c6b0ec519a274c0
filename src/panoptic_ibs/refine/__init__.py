"""Steps between a head's soft segments and their fusing: ``PanopticModel(refine=[...])``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from panoptic_ibs.errors import ConfigError
from panoptic_ibs.segments import SoftSegments


class Refinement(ABC):
    """A step that changes the soft segments of one image.

    Attributes:
        after: names of classes of steps that must come before this one where both are used.
    """

    after: Sequence[str] = ()

    @abstractmethod
    def __call__(self, image: Tensor, soft: SoftSegments) -> SoftSegments:
        """The changed segments.

        Args:
            image: (3, H, W) uint8 RGB, the network's input without padding (``soft.size.valid``).
            soft: of that image; masks may be replaced, never changed in place.
        """


def check_order(steps: Sequence[Refinement]) -> tuple[Refinement, ...]:
    """The steps, if each stands behind those it must follow.

    Raises:
        ConfigError: one does not.
    """
    names = [type(step).__name__ for step in steps]
    for position, step in enumerate(steps):
        late = [name for name in names[position + 1 :] if name in step.after]
        if late:
            raise ConfigError(f"refine: {names[position]} must come after {late[0]}; change their order.")
    return tuple(steps)
