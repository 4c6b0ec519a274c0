"""How every command ends: its exit status, and one message where something is wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from panoptic_ibs import processes, signals
from panoptic_ibs.errors import UserError, printable

BAD_INPUT, DEFECT, INTERRUPTED = 2, 1, 130


def reported(job: Callable[[], int | float], settings: Mapping[str, Any] | None = None) -> int | float:
    """What ``job`` returns. An error that a user can put right becomes one message on stderr and status 2; Ctrl-C gives
    130 and SIGTERM 143; anything else is a defect of the program: traceback and status 1. With
    PANOPTIC_IBS_TRACEBACK=1 in the environment every error has its traceback.

    Args:
        job: the work.
        settings: the configuration or the typed KEY=VALUE, for the key behind a path.
    """
    try:
        with signals.handled():
            return job()
    except signals.Stopped as stopped:
        return processes.tell(str(stopped), 128 + stopped.number)
    except KeyboardInterrupt:
        return processes.tell("interrupted", INTERRUPTED)
    except Exception as error:
        text, status = message(error, settings)
        return processes.tell(text, status)


def message(error: Exception, settings: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """What there is to say about an error, and the exit status."""
    from .translation import sentence

    if "torch" in sys.modules and not isinstance(error, UserError) and (told := processes.explained(error)) is not None:
        return f"error: {told}", DEFECT if isinstance(told, processes.LostProcessError) else BAD_INPUT
    text = sentence(error, settings)
    trace = "".join(traceback.format_exception(error)).rstrip()
    if text is None:
        return trace, DEFECT
    shown = f"{trace}\n" if os.environ.get("PANOPTIC_IBS_TRACEBACK") == "1" else ""
    return f"{shown}error: {printable(text)}", BAD_INPUT
