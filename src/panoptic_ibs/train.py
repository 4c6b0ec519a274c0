"""Train a panoptic segmentation network, evaluate it on whole images and write a report.

python -m panoptic_ibs.train                      the embedded data set, a small Panoptic FCN with IBS on paired crops
python -m panoptic_ibs.train data=cityscapes head=panoptic_fcn sampling=paired_crop ibs=paired data.root=DIR
python -m panoptic_ibs.train data=coco_panoptic data.root=DIR recipe=none trainer.max_steps=1000   (own data)
python -m panoptic_ibs.train ckpt_path=RUN/checkpoints/last.ckpt trainer.max_steps=2000      (resume a run)
python -m panoptic_ibs.train init_from=FILE                                                  (start from weights)
python -m panoptic_ibs.train sweep=table2_ibs seed=0,1,2                           (a sweep; repeated: what is left)

The run's folder (run_dir=) gets checkpoints/last.ckpt, metrics.json, metrics.csv, predictions/, report/ and .hydra/.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import commands, cores, instantiation, processes, runs, settings, streams, sweeps
from .configuration import recipes
from .errors import ConfigError, IncompleteError

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from .callbacks import StopOnInterrupt
    from .data.datamodule import PanopticDataModule
    from .model import PanopticModel
    from .task import PanopticTask


def train(config: DictConfig) -> int | float:
    """One run, or what is left of a sweep's member; returns the exit status, or the sweep's objective."""
    if not commands.in_sweep():
        run_dir = commands.run_folder()
        with runs.alone(run_dir):
            runs.check_unused(run_dir, config.ckpt_path)
            return run(config)
    sweeps.own_start_method()
    overrides = commands.job_overrides()
    result: int | float = sweeps.run_member(config, commands.run_folder(), run, overrides)
    return result


def run(config: DictConfig) -> int:
    """One run; returns the exit status."""
    started = time.perf_counter()
    import lightning
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from .callbacks import CheckpointFiles, SeedSteps, StopOnInterrupt, TrainingCost
    from .trackers import close_loggers

    streams.quiet()
    run_dir = commands.run_folder()
    runs.keep_configuration(config, run_dir)
    if runs.keeper() and (note := recipes.note(instantiation.plain(config))):
        print(f"note: {note}", flush=True)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    task, data, resumed = make_task(config, run_dir)
    plain = instantiation.instantiate(config.trainer, _partial_=True)(logger=False, enable_checkpointing=False)
    if (status := commands.in_several_processes("panoptic_ibs.train", plain)) is not None:
        return status
    ckpt_path = Path(config.ckpt_path) if config.ckpt_path else None
    interrupt = StopOnInterrupt()
    training = TrainingCost()
    chosen = filter(None, map(instantiation.instantiate, config.callbacks.values()))
    callbacks = [interrupt, training, SeedSteps(config.seed), *chosen]
    loggers = make_loggers(config, run_dir, ckpt_path, int(resumed["global_step"]) if resumed else None)
    trainer: Trainer = instantiation.instantiate(config.trainer, _partial_=True)(
        default_root_dir=run_dir,
        logger=loggers,
        callbacks=callbacks,
        plugins=CheckpointFiles(),
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        **({} if any(isinstance(c, ProgressBar) for c in callbacks) else {"enable_progress_bar": False}),
    )
    try:
        fit_started = time.perf_counter()
        on_cpu = trainer.strategy.root_device.type == "cpu"
        with interrupt, cores.fitted(task.model, on_cpu, trainer.num_devices):
            if resumed and ckpt_path:
                make_up_validation(trainer, task, data, ckpt_path, resumed)
            trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        # epochs that were begun; Lightning counts the last one only if it has trained
        begun = trainer.current_epoch + bool(resumed and resumed["global_step"] == trainer.global_step)
        task.place = {"step": trainer.global_step, "epoch": begun}
        cost: dict[str, float | None] = {"setup_seconds": fit_started - started, "peak_memory_mb": training.megabytes}
        cost["train_seconds"] = training.seconds
        cost["seconds_per_step"] = training.seconds / training.steps if training.steps else None
        finish(config, run_dir, trainer, task, data, interrupt, cost)
    finally:
        close_loggers(loggers)
    if trainer.is_global_zero:
        if not commands.in_sweep():
            tell_how_to_go_on(run_dir) if interrupt.interrupted else tell_next(config, run_dir, task.model.head.embeds)
        print(f"run folder: {run_dir}", flush=True)
        tell_left_out(task.results, aloud=commands.in_sweep() or interrupt.interrupted)
    return interrupt.status


def tell_next(config: DictConfig, run_dir: Path, embeds: bool = True) -> None:
    """Say where the report is and, after a run on an embedded data set, three things to try.

    ``embeds``: whether the head can be trained with IBS; in place of one that cannot, another is proposed.
    """
    run_dir = commands.from_here(run_dir)
    page = run_dir / "report" / "index.html"
    if page.is_file():
        print(f"report: {page}")
    if not config.data.get("synthetic"):
        return
    program, has_ibs = commands.program(), config.ibs.partners != "none"
    other = {"ibs": "none"} if has_ibs else {"ibs": "paired", "sampling": "paired_crop"}
    other["run_dir"] = f"{run_dir}_{'without' if has_ibs else 'with'}_ibs"
    what = f"the same {'without' if has_ibs else 'with'} IBS"
    if not embeds:
        what, other = "a head that IBS works on", {"head": "panoptic_fcn", **other}
    typed = [word for word in commands.job_overrides() if not _replaced(word, other)]
    pictures = Path(config.data.root) / "leftImg8bit" / "val"
    last = run_dir / "checkpoints" / "last.ckpt"
    print(
        "three things to try next:\n"
        f"  {what}, then both side by side:\n"
        f"    {program}train {shlex.join([*typed, *(f'{k}={v}' for k, v in other.items())])}\n"
        f"    {program}report {shlex.join([f'runs={run_dir.parent}'])}\n"
        "  segment pictures, a folder of yours or these:\n"
        f"    {program}predict {shlex.join([f'ckpt_path={last}', f'input={pictures}', 'output=predictions'])}\n"
        "  data of your own, in COCO's panoptic layout:\n"
        f"    {program}prepare check data=coco_panoptic data.root=DIR data.train=SPLIT data.val=SPLIT"
    )


def _replaced(word: str, other: Mapping[str, str]) -> bool:
    """Whether a typed word says what ``other`` says anew; with another head its options and recipe go as well."""
    key = word.partition("=")[0]
    return key in other or ("head" in other and (key == "recipe" or key.startswith("head.")))


def tell_how_to_go_on(run_dir: Path) -> None:
    """After a run that was stopped: the command that resumes it."""
    last = run_dir / "checkpoints" / "last.ckpt"
    if last.is_file():
        typed = [word for word in commands.job_overrides() if word.partition("=")[0] not in ("ckpt_path", "run_dir")]
        words = [*typed, f"ckpt_path={last}", f"run_dir={run_dir}"]
        print(f"to go on where it stopped:\n  {commands.program()}train {shlex.join(words)}")


def tell_left_out(results: dict[str, Any], aloud: bool) -> None:
    """Say what the evaluation had to leave out.

    Args:
        results: of the evaluation.
        aloud: say it and no more: a sweep goes on all the same, and a run that was stopped has its own status.

    Raises:
        IncompleteError: files of single images were broken; everything else is written.
    """
    from .whole_images import incomplete

    left_out = incomplete(results)
    if left_out and not aloud:
        raise IncompleteError(left_out)
    if left_out:
        print(f"warning: {left_out}", file=sys.stderr, flush=True)


def make_up_validation(
    trainer: Trainer, task: PanopticTask, data: PanopticDataModule, ckpt_path: Path, checkpoint: dict[str, Any]
) -> None:
    """Do the validation that a run was ended in, so that its curve has no hole; the weights are not touched by it."""
    from .callbacks import validation_owed
    from .loggers import MetricsCSV

    loggers, step = trainer.loggers, int(checkpoint["global_step"])
    rows = next(logger.rows for logger in loggers if isinstance(logger, MetricsCSV))
    if not validation_owed(checkpoint, rows) or 0 <= trainer.max_steps <= step:
        return
    trainer.loggers = []  # Lightning would log it at step 0
    task.place = {"step": step, "epoch": int(checkpoint["epoch"])}
    try:
        trainer.validate(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
    finally:
        trainer.loggers, task.place = loggers, {}
    for logger in loggers:
        logger.log_metrics({**task.logged_values(), "epoch": int(checkpoint["epoch"])}, step - 1)


def make_task(config: DictConfig, run_dir: Path) -> tuple[PanopticTask, PanopticDataModule, dict[str, Any] | None]:
    """Task, data and the checkpoint that is resumed, or None; everything that can be wrong is found here, before
    training.
    """
    from hydra.utils import get_class

    from . import __version__
    from .checkpoints import check_resume
    from .construction import foreign_packages
    from .task import PanopticTask, check_embeddings, check_supervision
    from .weighing import check_weights

    if config.ckpt_path and config.init_from:
        raise ConfigError("ckpt_path= resumes a run, init_from= starts a new one from weights: give one of them.")
    data = instantiation.make_data(config)
    ibs = instantiation.instantiate(config.ibs)
    sampler = getattr(data.sampling, "func", data.sampling)
    check_supervision(ibs, data.crops_per_device, paired=getattr(sampler, "crops_per_item", 1) == 2)
    check_embeddings(ibs, get_class(config.head._target_))  # before data are drawn or read
    data.prepare_data()
    data.setup("fit")
    network = instantiation.model_config(config, data.eval_resize)
    description: dict[str, Any] = {
        "version": __version__,
        "model": network,
        "packages": foreign_packages(network),
        "classes": data.classes.to_list(),
        "data": {"name": data.layout, "integer_ids": data.reader("val").integer_ids, **data.fingerprint()},
        "run": {
            "head": config.head.name,
            "sampling": config.sampling.name,
            "ibs": config.ibs.partners,
            "seed": config.seed,
        },
        "settings": settings.decisive(instantiation.plain(config)),
    }
    resumed = None
    if config.ckpt_path:
        resumed = check_resume(config.ckpt_path, description)
        check_left(config, run_dir, int(resumed["global_step"]))
    model, weigh = make_model(config, description["model"], data), instantiation.instantiate(config.weigh)
    check_weights(model.head.weights, config.head.name)
    task = PanopticTask(model, instantiation.instantiate(config.optim), ibs, description, weigh)
    if resumed is not None:
        task.check_fits(config.ckpt_path, resumed)
    return task, data, resumed


def check_left(config: DictConfig, run_dir: Path, step: int) -> None:
    """Make sure that a resumed run has something left to do: steps, or an evaluation that it was killed in.

    Raises:
        ConfigError: it has not.
    """
    wanted, ckpt_path = config.trainer.max_steps, Path(config.ckpt_path)
    if not 0 < wanted <= step or commands.in_sweep() or not runs.keeper():  # a member may lack its evaluation alone
        return
    finished = not runs.owed(run_dir, bool(config.evaluation.baselines), step)
    if wanted == step and runs.of_folder(ckpt_path, run_dir) and not finished:
        return
    its_own = ckpt_path.resolve().parent.parent
    owing = runs.owed(its_own, step=step) if ckpt_path.resolve().parent.name == "checkpoints" else []
    finish = f" To finish its evaluation add run_dir={its_own}." if owing and wanted == step else ""
    raise ConfigError(
        f"{ckpt_path} is at step {step}, trainer.max_steps={wanted}: nothing is left to train. Raise "
        f"trainer.max_steps, or use panoptic_ibs.evaluate.{finish}"
    )


def make_model(config: DictConfig, model: dict[str, Any], data: PanopticDataModule) -> PanopticModel:
    """The network with its first weights; those of ``init_from`` where they fit."""
    from lightning.pytorch.utilities import rank_zero_only

    from .checkpoints import check_start, load_weights
    from .construction import build_model

    if config.ckpt_path or config.init_from:  # all weights come from there: nothing to fetch
        model = {**model, "backbone": {**model["backbone"], "pretrained": False, "weights": None}}
    network = build_model(model, data.classes, instantiation.packages(config))
    if config.init_from:
        check_start(config.init_from, model, data.classes.names)
        report = load_weights(network, config.init_from)
        rank_zero_only(print)(f"weights from {report.path}\n{report}", flush=True)
    return network


def make_loggers(config: DictConfig, run_dir: Path, ckpt_path: Path | None, resume_step: int | None) -> list[Any]:
    """``metrics.csv`` always, and what ``logger=`` names."""
    from .loggers import MetricsCSV
    from .trackers import Described, chosen

    # rows are numbered from 0: that of the step before; what comes later is trained, or evaluated, again
    loggers: list[Any] = [MetricsCSV(run_dir / "metrics.csv", None if resume_step is None else resume_step - 1)]
    name = "-".join((config.head.name, config.sampling.name, config.ibs.partners, f"seed{config.seed}"))
    run = Described(run_dir, name, config.get("sweep_name"), instantiation.plain(config), ckpt_path, resume_step)
    return loggers + chosen(instantiation.plain(config.logger), run, instantiation.instantiate)


def finish(
    config: DictConfig,
    run_dir: Path,
    trainer: Trainer,
    task: PanopticTask,
    data: PanopticDataModule,
    interrupt: StopOnInterrupt,
    cost: dict[str, float | None],
) -> None:
    """Evaluate what was reached, score the baselines, write metrics.json and the report, print the table."""
    from . import baselines, whole_images
    from .callbacks import best_of
    from .files import write_json
    from .report_pages import log_report, write_report_if_possible

    started = time.perf_counter()
    options = config.evaluation
    if trainer.is_global_zero:
        runs.clear_results(run_dir)
    data.val_limit = options.interrupted_images if interrupt.interrupted else (options.limit or data.val_limit)
    rows = {"trained": whole_images.evaluate(trainer, task, data, run_dir)}
    if trainer.is_global_zero:
        rows["trained"] = whole_images.write_metrics(
            run_dir,
            rows["trained"],
            step=trainer.global_step,
            interrupted=interrupt.interrupted,
            **({"best": best} if (best := best_of(run_dir / "checkpoints")) else {}),
            config=instantiation.plain(config),
            versions=runs.versions(),
            command=commands.command_line(),
        )
    if options.baselines and not interrupt.interrupted:
        device = trainer.strategy.root_device
        model = task.description["model"]
        rows |= baselines.baselines(
            data, model, options.baseline_images, config.seed, device, instantiation.packages(config)
        )
    processes.part()
    if not trainer.is_global_zero:
        return
    if len(rows) > 1:
        write_json(run_dir / "baselines.json", {k: v for k, v in rows.items() if k != "trained"})
    cost["evaluation_seconds"] = time.perf_counter() - started
    write_json(run_dir / "timing.json", cost)
    write_report_if_possible(run_dir)
    log_report(run_dir, trainer.loggers, trainer.global_step)
    from .report_pages.terminal import print_table

    print_table("validation", rows)
    if best := rows["trained"].get("best"):
        value = f"{best['monitor']} {100 * best['value']:.1f} % after step {best['step']}"
        print(f"best checkpoint: {run_dir / 'checkpoints' / 'best.ckpt'} ({value})", flush=True)


def main() -> int:
    """Entry point."""
    return commands.run_command("config", train, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
