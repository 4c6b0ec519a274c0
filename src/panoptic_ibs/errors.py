"""Errors that a user can mend. Entry points print them without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message names the file or key, what is wrong with it and the remedy."""


class DataError(UserError):
    """A defect of a data set: a missing, truncated or contradictory file."""


class ConfigError(UserError):
    """A contradiction in the configuration."""


class CheckpointError(UserError):
    """A checkpoint that does not fit: another head, class count or file format."""


class DivergedError(UserError, FloatingPointError):
    """The network's outputs are no longer finite; the message names the images."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, the host's or a GPU's; torch need not be imported."""
    kind = type(error).__name__
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in str(error)
