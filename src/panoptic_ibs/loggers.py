"""Where numbers go: ``metrics.csv`` always, Weights & Biases on request, and never with a prompt."""

from __future__ import annotations

import csv
import io
import netrc
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from .errors import ConfigError
from .extras import require

RUN_ID = "wandb_run_id.txt"
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # the last two are older names


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: one row a step, ``step`` and ``epoch`` first, empty cells for what was not logged.

    A resumed run keeps the rows up to the step it resumes from, so that its curves continue.

    Args:
        path: the file.
        resume_step: rows after this step are dropped; None starts anew.
    """

    def __init__(self, path: Path | str, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = ["step", "epoch"]
        self.rows: dict[int, dict[str, Any]] = {}
        self._last: tuple[int, int] | None = None  # the step of the file's last row, and where that row begins
        if resume_step is not None and self.path.is_file():
            whole, end, _ = self.path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
            for row in csv.DictReader(io.StringIO(whole + end, newline="")):
                self._keep(row, resume_step)

    @property
    def name(self) -> str:
        """Kind of logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Not used."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsCSV:
        """Itself."""
        return self

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Hydra keeps the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step. What comes before the last row is written again only if it changes."""
        step, columns = int(step or 0), len(self.columns)
        self._merge(step, {k: float(v) for k, v in metrics.items()})
        if self._last is None or step < self._last[0] or len(self.columns) > columns or not self.path.is_file():
            self._write_all()
        else:
            self._write_last(step, *self._last)

    def _keep(self, row: Mapping[str, Any], last: int) -> None:
        """Take up a row of the file, unless a full disk or a kill has torn it."""
        cells = {k: v for k, v in row.items() if v not in ("", None)}
        try:
            step = int(float(cells["step"]))
            {k: float(v) for k, v in cells.items()}
        except (KeyError, TypeError, ValueError, OverflowError):
            return
        if step <= last:
            self._merge(step, cells)

    def _merge(self, step: int, values: Mapping[str, Any]) -> None:
        self.columns += sorted(k for k in values if k not in self.columns)
        self.rows.setdefault(step, {}).update(values, step=step)
        if "epoch" in values:
            self.rows[step]["epoch"] = int(float(values["epoch"]))

    def _write_all(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        *earlier, last = [self._line(row) for _, row in sorted(self.rows.items())]
        before = "".join([self._line(dict(zip(self.columns, self.columns, strict=True))), *earlier]).encode()
        try:
            temporary.write_bytes(before + last.encode())
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._last = (max(self.rows), len(before))

    def _write_last(self, step: int, last_step: int, begin: int) -> None:
        """Write the row of a step over the file's last row, or after it if that is of an earlier step."""
        with self.path.open("r+b") as file:
            place = file.seek(begin) if step == last_step else file.seek(0, os.SEEK_END)
            file.write(self._line(self.rows[step]).encode())
            file.truncate()
        self._last = (step, place)

    def _line(self, row: Mapping[str, Any]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="").writerow(row)
        return text.getvalue()


def wandb_mode(mode: str | None = None) -> str:
    """``mode`` if given, else ``WANDB_MODE``, else online with a key (environment or netrc), else offline.

    Raises:
        ConfigError: Weights & Biases has no such mode.
    """
    if chosen := mode or os.environ.get("WANDB_MODE"):
        if chosen not in WANDB_MODES:
            place = "logger.wandb.mode" if mode else "the environment's WANDB_MODE"
            raise ConfigError(f"{place} is {chosen!r}; choose online, offline or disabled.")
        return chosen
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def wandb_logger(
    run_dir: Path, options: Mapping[str, Any], config: Any, ckpt_path: Path | None = None, keep_id: bool = True
) -> WandbLogger:
    """A logger that never asks. Its run id is kept beside the checkpoint, so that a resumed run continues its curve.

    Args:
        run_dir: the run folder.
        options: ``project entity mode group name tags`` of ``conf/logger/wandb.yaml``.
        config: the resolved configuration, kept with the run.
        ckpt_path: the checkpoint that the run resumes, or None.
        keep_id: write the run's id into its folder of checkpoints; an evaluation has none and is not resumed.

    Raises:
        ConfigError: wandb is not installed.
    """
    require("logger=wandb", "wandb", instead="or leave it out")
    run_id = _run_id(ckpt_path.parent / RUN_ID if ckpt_path else None)
    if keep_id:
        _keep(run_id, run_dir / "checkpoints" / RUN_ID)
    return _connect(run_dir, options, config, run_id)


def share_summary(runs: Path, options: Mapping[str, Any] | None = None) -> str:
    """Give the summary of a folder of runs to Weights & Biases: a run of their group, of the type "summary".

    Called again it is the same run, with the tables as they are by then. The runs' own options (project, entity, mode)
    hold where ``options`` says nothing; the group is that of the runs, their sweep, or the folder's name.

    Returns:
        Where it is to be seen: an address, or the folder of an offline run.

    Raises:
        ConfigError: if Weights & Biases refuses, or is not installed.
        DataError: see :func:`panoptic_ibs.report_pages.collect`.
    """
    require("logger=wandb", "wandb", instead="or leave it out")
    import wandb

    from .report_pages import collect, log_summary

    given = {k: v for k, v in (options or {}).items() if v is not None}
    configs = [run.config for run in collect(runs).runs]
    used = {**_shared_options(configs), **given}
    group = used.get("group") or next((c["sweep_name"] for c in configs if c.get("sweep_name")), runs.resolve().name)
    used.update(group=group, name=given.get("name", f"{group} summary"), job_type="summary")
    kept = runs / "report" / RUN_ID
    run_id = _run_id(kept)
    _keep(run_id, kept)
    try:
        logger = _connect(runs, used, {"runs": len(configs)}, run_id)
        log_summary(runs, [logger])
        online = wandb_mode(used.get("mode")) == "online"
        return str(logger.experiment.url if online else Path(logger.experiment.dir).parent)
    except wandb.Error as error:
        raise ConfigError(
            f"Weights & Biases: {error}. The same tables are in {runs}; logger.wandb.mode=offline keeps them on this "
            "machine for 'wandb sync'."
        ) from None
    finally:
        wandb.finish()


def _shared_options(configs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of the first run that went to Weights & Biases, but for its name."""
    for config in configs:
        logger = config.get("logger")
        found = logger.get("wandb") if isinstance(logger, dict) else None
        if isinstance(found, dict):
            return {k: v for k, v in found.items() if k != "name"}
    return {"project": "panoptic-ibs"}


def _run_id(kept: Path | None) -> str:
    """The id that a file holds, else a new one."""
    return kept.read_text().strip() if kept and kept.is_file() else uuid.uuid4().hex[:8]


def _keep(run_id: str, kept: Path) -> None:
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(run_id + "\n")


def _connect(folder: Path, options: Mapping[str, Any], config: Any, run_id: str) -> WandbLogger:
    import wandb

    mode = wandb_mode(options.get("mode"))
    return WandbLogger(
        save_dir=folder,
        id=run_id,
        mode=mode,
        resume="allow" if mode == "online" else None,  # offline runs are joined by their id when they are synced
        config=config,
        settings=wandb.Settings(silent=True),
        **{k: v for k, v in options.items() if k != "mode" and v is not None},
    )
