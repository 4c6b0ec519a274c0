"""Standard output and error as every command needs them: no letter and no closed pipe ends a run."""

from __future__ import annotations

import io
import os
import stat
import sys
from typing import TextIO

QUIET = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")  # loggers


def start_command() -> None:
    """Make what is printed safe; every command calls it first.

    Letters that the terminal's encoding lacks become ``?``. Where a reader has gone (``... | head``), what is printed
    is dropped from then on, with one remark: a run of hours does not end because nobody looks.
    """
    sys.stdout = _safe(sys.stdout)
    sys.stderr = _safe(sys.stderr)


def _safe(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # a notebook's, or a test's
    stream.reconfigure(errors="replace")
    try:
        number = stream.fileno()
        mode = os.fstat(number).st_mode
    except (OSError, ValueError):  # closed
        return stream
    if number not in (1, 2) or isinstance(stream.buffer, _Buffer) or not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return stream
    stream.flush()
    buffer = _Buffer(_Pipe(number, "wb", closefd=False))
    return io.TextIOWrapper(
        buffer, encoding=stream.encoding, errors="replace", line_buffering=number == 2, write_through=False
    )


class _Buffer(io.BufferedWriter):
    """Marks a stream that is safe already."""


class _Pipe(io.FileIO):
    """A pipe whose reader may go."""

    def write(self, data: object) -> int:
        try:
            return super().write(data) or 0  # type: ignore[arg-type]
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.fileno() == 1 and sys.stderr is not None:
                print("warning: nobody reads the output any more; the command goes on without it.", file=sys.stderr)
            return len(data)  # type: ignore[arg-type]


def quiet() -> None:
    """Leave out Lightning's remarks that do not concern a user of this program; warnings of ours stay."""
    import logging
    import warnings

    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*suggested max number of worker in current system.*",  # on a small machine the loaders wait, no more
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*LeafSpec.*",
        ".*your dataloader is not resumable.*",  # ours is: the data module keeps the position
        ".*overridden `transfer_batch_to_device`.*",
        ".*called before the ``update`` method.*",  # no image of this process could be read
        ".*sync_dist=True.*",  # validation results are computed over all processes already
    ):
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
