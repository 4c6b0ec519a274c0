"""Score a checkpoint, or predictions of any program in COCO panoptic format, on the validation split.

python -m panoptic_ibs.evaluate ckpt_path=FILE data=NAME data.root=DIR [data.val=SPLIT] [run_dir=DIR]
python -m panoptic_ibs.evaluate predictions=FILE_OR_FOLDER data=NAME data.root=DIR [run_dir=DIR]
python -m panoptic_ibs.evaluate predictions=[A.json,B.json] data=NAME data.root=DIR [run_dir=DIR]

The id PNGs of FILE.json (COCO panoptic format) lie in the folder FILE or beside it. A folder holds such a JSON, or PNGs
with Cityscapes' names and ids. A JSON list in COCO's results format is scored by AP. Several sets are compared, the
first being the reference. PQ and its like get bootstrap confidence intervals; evaluation.boundary=true adds boundary
PQ, evaluation.ap_from_panoptic=true the AP of panoptic results. The run's folder gets metrics.json (docs/metrics.md),
report/ and, from a checkpoint, predictions/.
+overrides.head.inference.mask_threshold=0.4 changes an option of the checkpoint's model. refine=dense_crf sharpens its
segments by the colours of the photographs; the results without it are scored as well, in sets/without_refine.
logger=wandb, tensorboard or mlflow gives the report's tables and pictures to it as well; W&B offline without a key.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import commands, instantiation, processes, runs, streams
from .errors import ConfigError, IncompleteError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from .data.datamodule import PanopticDataModule
    from .prediction_files.sets import ScoringOptions


def evaluate(config: DictConfig) -> int:
    """One evaluation; returns the exit status."""
    if bool(config.ckpt_path) == bool(config.predictions):
        raise ConfigError("Give either ckpt_path=FILE (a checkpoint) or predictions=FILE.json (COCO panoptic format).")
    if config.predictions and config.refine.get("_target_") is not None:
        raise ConfigError(
            "refine needs a network's soft segments, which files of predictions have not: give ckpt_path."
        )
    with own_folder(config) as run_dir:
        return _evaluate(config, run_dir)


@contextmanager
def own_folder(config: DictConfig) -> Iterator[Path]:
    """The evaluation's folder, kept for it alone.

    Raises:
        ConfigError: another command is at work in it, or it holds a run of training.
    """
    run_dir = commands.run_folder()
    with runs.alone(run_dir):
        runs.check_no_training(run_dir)
        runs.keep_configuration(config, run_dir)
        yield run_dir


def validation_data(config: DictConfig) -> PanopticDataModule:
    """The validation split that a configuration names, set up."""
    streams.quiet()
    config.data.train = None  # only the validation split is needed
    data = instantiation.make_data(config)
    data.val_limit = config.evaluation.limit or data.val_limit
    data.photographs = not config.predictions
    data.prepare_data()
    data.setup("validate")
    return data


def _evaluate(config: DictConfig, run_dir: Path) -> int:
    data = validation_data(config)
    if config.predictions:
        scores, left_out = score_predictions(config, data, run_dir)
        _print(scores)
    else:
        results, unrefined, extra = _checkpoint(config, data, run_dir)
        if isinstance(results, int):
            return results  # the status of several processes, or this is not the first one
        said = extra.get("config", {})  # what the checkpoint says of itself wins
        extra["config"] = {**instantiation.plain(config), **said}
        from .whole_images import incomplete

        left_out = incomplete(results)
        name = Path(config.ckpt_path).name
        rows = {name: _write(run_dir, results, extra)}
        if unrefined is not None:
            rows |= {"without refine": _write_beside(run_dir, results, unrefined, extra)}
        _print(rows)
    _log(config, run_dir)
    if (page := run_dir / "report" / "index.html").is_file():
        print(f"report: {page}")
    print(f"run folder: {run_dir}", flush=True)
    if left_out:
        raise IncompleteError(left_out)
    return 0


def _log(config: DictConfig, run_dir: Path) -> None:
    """Give the finished report to the loggers that ``logger=`` names."""
    options = instantiation.plain(config.logger)
    if all(given is None for given in options.values()):
        return
    from .report_pages import log_report
    from .trackers import Described, chosen, close_loggers

    run = Described(run_dir, run_dir.name, None, instantiation.plain(config), trains=False)
    loggers = chosen(options, run, instantiation.instantiate)
    try:
        log_report(run_dir, loggers)
    finally:
        close_loggers(loggers)


def _write(run_dir: Path, results: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Write ``metrics.json`` and the page; returns all that was written."""
    from .report_pages import write_report_if_possible
    from .whole_images import write_metrics

    run_dir.mkdir(parents=True, exist_ok=True)
    metrics = write_metrics(run_dir, results, **extra, versions=runs.versions(), command=commands.command_line())
    write_report_if_possible(run_dir)
    return metrics


def _write_beside(
    run_dir: Path, results: dict[str, Any], unrefined: dict[str, Any], extra: dict[str, Any]
) -> dict[str, Any]:
    """Write what an evaluation with refine steps and the one without have for themselves; returns the latter."""
    from .whole_images import REFINED, UNREFINED

    own = {k: v for k, v in results.items() if k != "comparison"}
    _write(run_dir / "sets" / REFINED, own, extra)
    config = {**extra["config"], "refine": {"_target_": None}}
    return _write(run_dir / "sets" / UNREFINED, unrefined, {**extra, "config": config})


def _print(rows: dict[str, dict[str, Any]]) -> None:
    """Tables of panoptic results and of average precision, in percent."""
    from .report_pages.terminal import print_rows

    panoptic = {name: metrics for name, metrics in rows.items() if "pq" in metrics}
    if panoptic:
        from .report_pages.terminal import print_table

        print_table("validation", panoptic)
    keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    judged = {name: m if "ap" in m else m.get("ap_from_panoptic") for name, m in rows.items()}
    judged = {name: m for name, m in judged.items() if m}
    if judged:
        lines = []
        for name, values in judged.items():
            cells = [(values or {}).get(key) for key in keys]
            lines.append([name, *("–" if cell is None else f"{100 * cell:.1f}" for cell in cells)])
        head = ["", *(key.replace("_", " ").upper() for key in keys)]
        print_rows("average precision, percent", head, lines, overflow="fold")


def _checkpoint(
    config: DictConfig, data: PanopticDataModule, run_dir: Path
) -> tuple[dict[str, Any] | int, dict[str, Any] | None, dict[str, Any]]:
    """Results of a network, or an exit status where others have them; those without the refine steps that ``refine``
    names, if it does; and what ``metrics.json`` says about it.
    """
    from hydra.core.hydra_config import HydraConfig

    from . import whole_images
    from .callbacks.steps import progress_bar
    from .checkpoints import read_checkpoint
    from .configuration.checking import check_changes
    from .construction import changed_network, load
    from .data.geometry import ShortestSide
    from .descriptions import step_of
    from .task import PanopticTask

    changes = instantiation.plain(config.overrides)
    model = load(config.ckpt_path, packages=instantiation.packages(config), overrides=changes, check=check_changes)
    instantiation.check_classes(config.ckpt_path, model.classes, data)
    state = read_checkpoint(config.ckpt_path)
    step = step_of(state, config.ckpt_path)
    if not any(o.lstrip("+").startswith("data.eval_resize") for o in HydraConfig.get().overrides.task):
        shortest, longest = model.test_size  # as in training, unless the command line says otherwise
        data.eval_resize = ShortestSide(choices=[shortest], longest=longest or float("inf")) if shortest else None
    trainer = instantiation.instantiate(config.trainer, _partial_=True)(
        default_root_dir=run_dir, logger=False, callbacks=[progress_bar()], enable_checkpointing=False
    )
    if (status := commands.in_several_processes("panoptic_ibs.evaluate", trainer)) is not None:
        return status, None, {}
    task, unrefined = PanopticTask(model), None
    if config.refine.get("_target_") is not None:
        unrefined = dict(whole_images.evaluate(trainer, task, data, run_dir / "sets" / whole_images.UNREFINED))
        instantiation.add_refinement(model, config)
    results = whole_images.evaluate(trainer, task, data, run_dir)
    processes.part()
    description = state["panoptic_ibs"]
    names = {
        "head": {"name": description.get("run", {}).get("head")},
        "model": changed_network(description, changes),
    }
    trained = {k: {"name": v} for k, v in description.get("run", {}).items() if k in ("ibs", "sampling")}
    extra = {"step": step, "config": {**names, **trained}}
    if not trainer.is_global_zero:
        return 0, None, extra
    options = scoring_options(config)
    if unrefined is None:
        return whole_images.complete(results, data, run_dir, options), None, extra
    return *whole_images.beside_unrefined(results, unrefined, data, run_dir, options), extra


def scoring_options(config: DictConfig) -> ScoringOptions:
    """What is counted of predictions in files."""
    from .prediction_files.sets import ScoringOptions

    known = {field.name for field in fields(ScoringOptions)}
    chosen = {key: value for key, value in instantiation.plain(config.evaluation).items() if key in known}
    return ScoringOptions(**chosen, seed=config.seed)


def prediction_paths(config: DictConfig) -> list[str]:
    """Files and folders of ``predictions``."""
    given = instantiation.plain(config)["predictions"]
    return [given] if isinstance(given, str) else list(given)


def score_predictions(
    config: DictConfig, data: PanopticDataModule, run_dir: Path
) -> tuple[dict[str, dict[str, Any]], str]:
    """Score files of predictions, write each set's results and, of several, their comparison.

    Returns metrics by the set's name, and what is wrong with images that were left out.
    """
    from .prediction_files.sets import evaluate_predictions, set_folder
    from .report_pages import write_summary

    paths = prediction_paths(config)
    left_out: list[str] = []
    results = evaluate_predictions(paths, data, run_dir, scoring_options(config), left_out.append)
    extra = {"step": None, "config": instantiation.plain(config)}
    if len(results) > 1:
        for path, (name, metrics) in zip(paths, results.items(), strict=True):
            own = {k: v for k, v in metrics.items() if k != "comparison"}
            _write(set_folder(run_dir, name), own, {**extra, "config": {**extra["config"], "predictions": path}})
        write_summary(run_dir / "sets")
    _write(run_dir, next(iter(results.values())), extra)
    return results, "\n".join(left_out)


def main() -> int:
    """Entry point."""
    return commands.run_command("evaluate", evaluate, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
