"""One sentence for what the system and the libraries raise: key, value, what is wrong, remedy.

Libraries' errors are known by the names of their classes, so that nothing is imported for them. What is not known here
is a defect of the program.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from panoptic_ibs.errors import UserError

_SYSTEM = {
    errno.ENOSPC: "the disk is full. Free some space, or choose another folder",
    errno.EDQUOT: "your share of the disk is used up. Free some space, or choose another folder",
    errno.EROFS: "the file system is read-only. Choose another folder",
    errno.EACCES: "permission is missing. Choose another path, or change its permissions",
    errno.EPERM: "the system does not allow it. Choose another path, or change its permissions",
    errno.ENAMETOOLONG: "a name is too long. Choose a shorter path",
    errno.ENOTDIR: "a part of the path is a file, where a folder is needed. Choose another path",
    errno.EISDIR: "it is a folder, where a file is needed. Choose another path",
    errno.EEXIST: "there is a file of this name, where a folder is needed. Choose another path, or move the file away",
    errno.ENOENT: "it does not exist, or was deleted meanwhile",
    errno.ELOOP: "it is a link in a ring. Correct the link",
    errno.EMFILE: "too many files are open. Raise the limit ('ulimit -n 65536'), or lower data.num_workers",
    errno.ENFILE: "too many files are open on this machine. Close some programs, or lower data.num_workers",
    errno.ENOMEM: "the memory is used up. Lower sampling.batch_size, the sizes of the images or data.num_workers",
    errno.EIO: "the device does not answer as it should. Look into the system's log",
    errno.ESTALE: "the network file system has lost it. Start again",
}
_OUTPUTS = ("run_dir", "output", "out", "root", "runs", "run")
_WRITING = ("PytorchStreamWriter failed", "file write failed", "iostream error", "No space left on device")
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_DEVICE = (
    "No CUDA GPUs are available",
    "Found no NVIDIA driver",
    "CUDA error",
    "not compiled with CUDA",
    "CUDA driver",
)
_REMEDY_OF_MEMORY = (
    "Lower sampling.batch_size, sampling.crop_size or the sizes in data.presets (for evaluation: data.eval_resize), or "
    "raise trainer.accumulate_grad_batches in place of the batch."
)


def sentence(error: BaseException, settings: Mapping[str, Any] | None = None) -> str | None:
    """What a user can do about an error; None for a defect of the program.

    Args:
        error: what was raised.
        settings: the configuration, or the typed KEY=VALUE, for the key behind a path.
    """
    settings = settings or {}
    if isinstance(error, UserError):
        return str(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"HydraException", "OmegaConfBaseException"}:
        return _configuration(error, settings)
    if "YAMLError" in names:
        return f"configuration: a file is no valid YAML: {_line(error)}"
    if "MisconfigurationException" in names:
        return f"trainer: {_line(error)}"
    text = _line(error)
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or _has(error, _MEMORY):
        return f"the memory is used up ({text[:200] or type(error).__name__}). {_REMEDY_OF_MEMORY}"
    if _has(error, _WRITING):
        return f"{_output(settings)}a file could not be written: {_SYSTEM[errno.ENOSPC]} ({text[:120]})."
    if _has(error, _DEVICE):
        return f"trainer.accelerator: the GPU cannot be used ({text[:200]}). Set trainer=cpu, or device=cpu in predict."
    if isinstance(error, OSError):
        return _system(error, settings)
    return None


def flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """All texts of nested settings: (dotted key, text)."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(settings, str) and settings:
        yield prefix, settings


def _has(error: BaseException, signs: Sequence[str]) -> bool:
    return isinstance(error, RuntimeError | ValueError) and any(sign in str(error) for sign in signs)


def _line(error: object) -> str:
    return " ".join(str(error).split())


def _output(settings: Mapping[str, Any]) -> str:
    return next((f"{key}={settings[key]}: " for key in _OUTPUTS if settings.get(key)), "")


def _system(error: OSError, settings: Mapping[str, Any]) -> str:
    reason = _SYSTEM.get(error.errno or 0) or f"{error.strerror or _line(error)}"
    if error.filename is None or isinstance(error.filename, int):
        if error.errno == errno.ENOENT:
            return "the folder that this command was started in was deleted. Change to one that exists."
        return f"{_output(settings)}a file could not be read or written: {reason}."
    path = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else str(error.filename)
    within = [(len(value), key, value) for key, value in flat(settings) if len(value) > 1 and path.startswith(value)]
    _, key, value = max(within, default=(0, "", ""))
    named = f"{key}={path}" if value == path else f"{key}={value}: {path}" if key else path
    if len(named) > 600:
        named = f"{named[:200]}...{named[-100:]}"
    return f"{named}: {reason}."


def _configuration(error: BaseException, settings: Mapping[str, Any]) -> str:
    """A mistake on the command line, or in a configuration file, that Hydra or OmegaConf found."""
    options = getattr(error, "options", None)
    missing = getattr(error, "missing_cfg_file", None)
    if missing:
        group, _, option = str(missing).rpartition("/")
        known = f"choose one of {', '.join(options)}" if options else "--help lists the groups"
        return f"{group}={option}: there is no such option; {known}." if group else f"{missing}: no such file; {known}."
    text = _without_links(str(error))
    override = re.search(r"Could not override '([^']+)'", text)
    cause = error.__cause__
    if override and cause is not None:
        return _no_key(override[1], cause, settings)
    if type(error).__name__.startswith("Interpolation") or "nterpolation" in text:
        key = getattr(error, "full_key", "") or ""
        lines = [line for line in text.splitlines() if not re.match(r"\s*(full_key|object_type)", line)]
        value = settings.get(key)
        shown = f"{key}={value}" if value else key or "configuration"
        return f"{shown}: {_line(' '.join(lines))}. Give a value, or name a key that exists."
    if cause is not None and _line(cause) not in _line(text):
        text = f"{text} {cause}"
    return f"configuration: {_line(text)}"


def _without_links(text: str) -> str:
    kept = [line for line in text.splitlines() if "hydra.cc" not in line and not line.startswith("Set the env")]
    return "\n".join(kept)


def _no_key(key: str, cause: BaseException, settings: Mapping[str, Any]) -> str:
    """A key that the configuration does not have."""
    parent = getattr(cause, "parent_node", None)
    try:
        siblings = [str(k) for k in parent] if parent is not None else []
    except Exception:
        siblings = []
    outer, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, siblings, n=1)
    if not siblings and "not in struct" not in str(cause):
        return f"{key}={settings.get(key, '')}: {_line(cause).partition(' full_key:')[0]}."
    hint = f"did you mean {f'{outer}.' if outer else ''}{near[0]}?" if near else f"there are {', '.join(siblings)}."
    more = f" An option that is not listed but known to what the group makes is added by +{key}=VALUE." if outer else ""
    return f"{key}={settings.get(key, '')}: there is no key '{key}'; {hint}{more}"
