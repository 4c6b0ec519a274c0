"""Errors that a user can put right. Entry points print them without a traceback."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Control characters but for the line feed, halves of surrogate pairs, and what turns the direction of writing.
_HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text from a file as a terminal or a log may have it: what would act on them is spelled out, as ``\\x1b``."""
    return _HIDDEN.sub(lambda found: ascii(found.group())[1:-1], text)


class UserError(Exception):
    """Bad input: the message names the file or key, what is wrong with it and the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


class DataError(UserError):
    """A defect of a data set: a missing, truncated or contradictory file."""


class IncompleteError(DataError):
    """What is sound was done and written; the message lists what is not. Raised last of all."""


class ConfigError(UserError):
    """A contradiction in the configuration."""


class CheckpointError(UserError):
    """A checkpoint that does not fit: another head, class count or file format."""


class DivergedError(UserError, FloatingPointError):
    """The network's outputs are no longer finite; the message names the images."""


def told(head: str, faults: Sequence[str], most: int = 20) -> str:
    """A message of several lines: what happened, then the first ``most`` faults."""
    rest = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "\n  ".join([head, *faults[:most], *rest])


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, the host's or a GPU's; torch need not be imported."""
    kind = type(error).__name__
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in str(error)
