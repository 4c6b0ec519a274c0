"""Optional libraries: ``pip install panoptic-ibs`` goes without them, and what needs one says how to get it."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import ConfigError

# The library, and the extra in pyproject.toml that brings it.
EXTRAS = {
    "albumentations": "augment",
    "jinja2": "report",
    "matplotlib": "report",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "sqlalchemy": "mlflow",
    "alembic": "mlflow",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}
# What each option of the group logger needs.
LOGGERS = {"wandb": ("wandb",), "tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


def missing(*libraries: str) -> list[str]:
    """Those of some libraries that are not installed; nothing is imported to find out."""
    return [name for name in libraries if find_spec(name) is None]


def remedy(*libraries: str) -> str:
    """How some libraries are installed.

    >>> remedy("jinja2", "matplotlib", "wandb")
    'pip install "panoptic-ibs[report,wandb]"'
    """
    return f'pip install "panoptic-ibs[{",".join(sorted({EXTRAS[name] for name in libraries}))}]"'


def lack(*libraries: str) -> str:
    """Which of some libraries are not installed, and how to get them; empty where all are."""
    if not (absent := missing(*libraries)):
        return ""
    verb = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {verb} not installed: {remedy(*absent)}"


def require(what: str, *libraries: str, instead: str = "") -> None:
    """Make sure that optional libraries are installed, before anything is done that would be lost without them.

    Args:
        what: what needs them, for the message: a key and its value, or a command.
        libraries: their names.
        instead: another remedy, begun with "or".

    Raises:
        ConfigError: one is not installed.
    """
    if told := lack(*libraries):
        raise ConfigError(f"{what}: {told}{f', {instead}' if instead else ''}.")
