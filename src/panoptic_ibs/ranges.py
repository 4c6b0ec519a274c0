"""What a number, a list or a group of options may be: marks for ``typing.Annotated`` in constructors' signatures.

They say it once: readers of a signature see it, and the checker of configurations (``panoptic_ibs.configuration``)
enforces it. Nothing is imported here, so that the core needs no validator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

LARGEST = 2**63 - 1  # of a whole number without an upper bound: int64


@dataclass(frozen=True)
class Bounds:
    """Range of a finite number.

    Attributes:
        least: smallest value, itself allowed.
        above: all values are larger than it.
        most: largest value, itself allowed.
        below: all values are smaller than it.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        if self.least is not None and self.least == self.most:
            return f"{self.least}"
        parts = [(">=", self.least), (">", self.above), ("<=", self.most), ("<", self.below)]
        return " and ".join(f"{sign} {bound}" for sign, bound in parts if bound is not None)


@dataclass(frozen=True)
class Items:
    """Number of values in a list: ``exactly`` so many, or at ``least`` so many."""

    exactly: int | None = None
    least: int = 0

    def __str__(self) -> str:
        count = f"{self.exactly}" if self.exactly is not None else f"at least {self.least}"
        return f"of {count} value{'' if count.endswith(' 1') or count == '1' else 's'}"


@dataclass(frozen=True)
class Like:
    """Text of a form: a regular expression for the whole of it, and the words for it."""

    pattern: str
    words: str


@dataclass(frozen=True)
class OptionsOf:
    """A mapping whose keys are the parameters of a class or function, with their types and ranges.

    Attributes:
        target: dotted name of the class or function, imported when a configuration is checked.
        partly: whether keys of others are welcome too.
    """

    target: str
    partly: bool = False


AtLeastOne = Annotated[int, Bounds(least=1)]
Whole = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]
Cosine = Annotated[float, Bounds(least=-1, most=1)]
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1)]
