"""What a run left in its folder, read tolerantly: only ``metrics.json`` is required."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from panoptic_ibs.errors import DataError

Curve = tuple[list[float], list[float]]

_HEADS = {
    "panoptic_fcn": "Panoptic FCN", "mask2former": "Mask2Former", "ciae": "CIAE", "panoptic_fpn": "Panoptic FPN",
    "upsnet": "UPSNet", "cascade_upsnet": "Cascade UPSNet", "htc": "Hybrid Task Cascade", "eomt": "EoMT",
    "dense_affinity": "Dense affinity",
}  # fmt: skip


@dataclass
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        metrics: ``metrics.json``.
        curves: column of ``metrics.csv`` -> (steps, values), finite values only.
        baselines: name -> metrics, from ``baselines.json``.
        timing: ``timing.json``.
        choices: Hydra's group choices (``head``, ``data``, ``sampling``, ``ibs``, ...), from ``.hydra/hydra.yaml``.
        overrides: what was typed after ``python -m panoptic_ibs.train``, from ``.hydra/overrides.yaml``.
        notes: optional files that exist but could not be read, one sentence each.
    """

    path: Path
    metrics: dict[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, empty where there is none."""
        config = self.metrics.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def step(self) -> int | None:
        """Optimisation steps done, or None (predictions of another program)."""
        value = number(self.metrics.get("step"))
        return None if value is None else int(value)

    @property
    def seed(self) -> int | None:
        """The seed, or None."""
        value = number(self.config.get("seed"))
        return None if value is None else int(value)

    def metric(self, key: str) -> float | None:
        """A number of ``metrics.json``; ``confusion@50`` looks into its confusion table, ``a.b`` into the object a."""
        return metric(self.metrics, key)

    def choice(self, group: str) -> str:
        """Option of a configuration group, such as ``panoptic_fcn`` for ``head``; an en dash where unknown."""
        node = self.config.get(group)
        if isinstance(node, str):
            return node
        if isinstance(node, dict):
            for key in ("name", "partners"):
                if isinstance(node.get(key), str):
                    return str(node[key])
        if group in self.choices:
            return self.choices[group]
        if group == "ibs" and group in self.config and not node:
            return "none"
        target = str(node.get("_target_", "")) if isinstance(node, dict) else ""
        return target.rsplit(".", 1)[-1] or "–"

    @property
    def foreign(self) -> bool:
        """Whether these are scores of a file of predictions, not of a network trained here."""
        return self.step is None or self.choice("head") == "–"

    @property
    def evaluated_only(self) -> bool:
        """Whether the folder is of ``panoptic_ibs.evaluate``, whose sampling is not that of the training."""
        return "predictions" in self.config

    @property
    def head_label(self) -> str:
        """The head's name as its paper writes it."""
        head = self.choice("head")
        return _HEADS.get(head, head)


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def metric(metrics: dict[str, Any], key: str) -> float | None:
    """A number of a metrics table; ``confusion@50`` means ``confusion["50"]``, ``a.b`` means ``a["b"]``."""
    if key.startswith("confusion@"):
        if key in metrics:
            return number(metrics[key])
        confusion = metrics.get("confusion")
        return number(confusion.get(key.partition("@")[2])) if isinstance(confusion, dict) else None
    first, _, rest = key.partition(".")
    if rest:
        inner = metrics.get(first)
        return metric(inner, rest) if isinstance(inner, dict) else None
    return number(metrics.get(key))


def confusion_curve(confusion: Any) -> Curve:
    """(thresholds in percent, shares) in order of the threshold, from ``{"25": 0.1, ...}``."""
    points = []
    if isinstance(confusion, dict):
        for key, value in confusion.items():
            try:
                threshold = float(key)
            except (TypeError, ValueError):
                continue
            share = number(value)
            if share is not None:
                points.append((threshold, share))
    points.sort()
    return [p[0] for p in points], [p[1] for p in points]


def load_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: if ``metrics.json`` is missing, is not JSON, or lacks ``pq`` (and ``ap``, of instances); the message
            names the file.
    """
    file = path / "metrics.json"
    metrics = _read_json(file)
    scored = isinstance(metrics, dict) and (number(metrics.get("pq")) is not None or "ap" in metrics)
    if not scored:
        raise DataError(f"{file}: no number 'pq' in it. Evaluate again: python -m panoptic_ibs.evaluate ckpt_path=...")
    run = Run(path, metrics)
    run.curves = _optional(run, "metrics.csv", read_curves) or {}
    run.baselines = _named_tables(_optional(run, "baselines.json", _read_json))
    timing = _optional(run, "timing.json", _read_json)
    run.timing = timing if isinstance(timing, dict) else {}
    hydra = _optional(run, ".hydra/hydra.yaml", _read_yaml)
    choices = _dig(hydra, "hydra", "runtime", "choices")
    if isinstance(choices, dict):
        run.choices = {str(k): str(v) for k, v in choices.items() if v is not None and not str(k).startswith("hydra/")}
    overrides = _optional(run, ".hydra/overrides.yaml", _read_yaml)
    run.overrides = [str(o) for o in overrides] if isinstance(overrides, list) else []
    return run


def read_curves(file: Path) -> dict[str, Curve]:
    """Columns of a CSV as Lightning's CSVLogger writes it: most cells are empty; ``step`` is the x axis.

    Rows without a step are numbered by their position; cells that are no finite number are left out.
    """
    curves: dict[str, Curve] = {}
    with file.open(newline="", encoding="utf-8") as stream:
        for i, row in enumerate(csv.DictReader(stream)):
            step = _to_float(row.get("step"))
            for name, cell in row.items():
                value = _to_float(cell)
                if name and name not in ("step", "epoch") and value is not None:
                    xs, ys = curves.setdefault(name, ([], []))
                    xs.append(i if step is None else step)
                    ys.append(value)
    return curves


def _to_float(cell: Any) -> float | None:
    try:
        return number(float(cell))
    except (TypeError, ValueError):
        return None


def _optional(run: Run, name: str, read: Any) -> Any:
    """Read a file that may be missing; one that is there and broken becomes a note in the report."""
    file = run.path / name
    if not file.is_file():
        return None
    try:
        return read(file)
    except (DataError, OSError, UnicodeDecodeError, csv.Error) as error:
        run.notes.append(f"{name} was left out: {error}")
        return None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file} is missing. A run folder gets it from training or evaluation.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file}: not readable as JSON ({error}).") from None


def _read_yaml(file: Path) -> Any:
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # omegaconf and yaml share no base class
        raise DataError(f"not readable as YAML ({type(error).__name__})") from None


def _named_tables(value: Any) -> dict[str, dict[str, Any]]:
    return {str(k): v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
