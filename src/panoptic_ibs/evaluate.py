"""Score a checkpoint, or predictions of any program in COCO panoptic format, on the validation split.

python -m panoptic_ibs.evaluate ckpt_path=FILE data=NAME data.root=DIR [data.val=SPLIT] [run_dir=DIR]
python -m panoptic_ibs.evaluate predictions=FILE.json data=NAME data.root=DIR [run_dir=DIR]

The id PNGs of FILE.json lie in the folder FILE. The run's folder gets metrics.json, predictions/ and report/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cli
from .errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from .data.datamodule import PanopticDataModule


def evaluate(config: DictConfig) -> int:
    """One evaluation; returns the exit status."""
    if bool(config.ckpt_path) == bool(config.predictions):
        raise ConfigError("Give either ckpt_path=FILE (a checkpoint) or predictions=FILE.json (COCO panoptic format).")
    cli.quiet()
    run_dir = cli.run_folder()
    config.data.train = None  # only the validation split is needed
    data = cli.make_data(config)
    data.val_limit = config.evaluation.limit or data.val_limit
    data.prepare_data()
    data.setup("validate")
    results, extra = (_checkpoint if config.ckpt_path else _predictions)(config, data, run_dir)
    if results is None:
        return 0  # not the first process
    from .evaluation import write_metrics
    from .reporting import write_report

    extra["config"] = {**cli.plain(config), **extra.get("config", {})}  # what the checkpoint says of itself wins
    metrics = write_metrics(run_dir, results, **extra, versions=cli.versions(), command=cli.command_line())
    write_report(run_dir)
    cli.print_table("validation", {Path(config.ckpt_path or config.predictions).name: metrics})
    print(f"run folder: {run_dir}", flush=True)
    return 0


def _checkpoint(
    config: DictConfig, data: PanopticDataModule, run_dir: Path
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Results of a network, and what ``metrics.json`` says about it."""
    from hydra.core.hydra_config import HydraConfig

    from . import evaluation
    from .checkpoints import read_checkpoint
    from .data.geometry import ShortestSide
    from .model import load
    from .task import PanopticTask

    model = load(config.ckpt_path)
    cli.check_classes(config.ckpt_path, model.classes, data)
    state = read_checkpoint(config.ckpt_path)
    if not any(o.lstrip("+").startswith("data.eval_resize") for o in HydraConfig.get().overrides.task):
        shortest, longest = model.test_size  # as in training, unless the command line says otherwise
        data.eval_resize = ShortestSide(choices=[shortest], longest=longest or float("inf")) if shortest else None
    trainer = cli.instantiate(config.trainer, _partial_=True)(
        default_root_dir=run_dir, logger=False, callbacks=[cli.progress_bar()], enable_checkpointing=False
    )
    results = evaluation.evaluate(trainer, PanopticTask(model), data, run_dir)
    description = state["panoptic_ibs"]
    names = {"head": {"name": description.get("run", {}).get("head")}, "model": description["model"]}
    trained = {k: {"name": v} for k, v in description.get("run", {}).items() if k in ("ibs", "sampling")}
    extra = {"step": int(state.get("global_step", 0)), "config": {**names, **trained}}
    return (results if trainer.is_global_zero else None), extra


def _predictions(
    config: DictConfig, data: PanopticDataModule, run_dir: Path
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Results of a predictions file."""
    from .evaluation import evaluate_predictions

    return evaluate_predictions(Path(config.predictions), data, run_dir), {"step": None}


def main() -> int:
    """Entry point."""
    return cli.run_command("evaluate", evaluate, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
