"""Keys of the commands' configurations, and the options of what others wrote with loose types (``lightning.Trainer``).

What a node with ``_target_`` may hold is not said here: its constructor's signature says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

from panoptic_ibs.ranges import AtLeastOne, Bounds, Items, Like, NonNegative, OptionsOf, Seed, Whole


@dataclass(frozen=True)
class Component:
    """A node with ``_target_``.

    Attributes:
        extra: keys beside the parameters of the target.
        fallback: whose parameters the keys are when ``_target_`` is null.
    """

    extra: tuple[str, ...] = ()
    fallback: str | None = None


Node = Annotated[Mapping[str, Any], Component()]
Head = Annotated[Mapping[str, Any], Component(extra=("name",))]
Ibs = Annotated[Mapping[str, Any], Component(fallback="panoptic_ibs.ibs.IntraBatchSupervision", extra=("partners",))]
Refine = Annotated[Mapping[str, Any], Component(fallback="panoptic_ibs.refine.dense_crf.DenseCRF")]
Sampling = Annotated[Mapping[str, Any], OptionsOf("panoptic_ibs.configuration.schema.sampling_options")]
Model = Annotated[Mapping[str, Any], OptionsOf("panoptic_ibs.model.PanopticModel")]
Free = Mapping[str, Any]


class TrainEvaluation(TypedDict, total=False):
    """``evaluation`` of train."""

    limit: AtLeastOne | None
    baselines: bool
    baseline_images: AtLeastOne | None
    interrupted_images: AtLeastOne | None


class Evaluation(TypedDict, total=False):
    """``evaluation`` of evaluate."""

    limit: AtLeastOne | None
    bootstrap: Whole
    boundary: bool
    ap_from_panoptic: bool
    gallery: Whole
    workers: AtLeastOne | None


class Paths(TypedDict, total=False):
    """``paths``."""

    cache: str


class Roots(TypedDict, total=False):
    """``roots`` of the published sweeps: folders by data set."""

    cityscapes: str | None
    vistas: str | None
    coco_panoptic: str | None


class Wandb(TypedDict, total=False):
    """Options of Weights & Biases."""

    project: str
    entity: str | None
    mode: Literal["online", "offline", "disabled", "shared", "dryrun", "run"] | None
    group: str | None
    name: str | None
    tags: list[str] | None
    notes: str | None
    job_type: str | None
    log_model: bool | Literal["all"]


class Tensorboard(TypedDict, total=False):
    """Options of TensorBoard."""

    folder: str | None


class Mlflow(TypedDict, total=False):
    """Options of MLflow."""

    tracking_uri: str | None
    experiment_name: str
    run_name: str | None
    tags: Mapping[str, str | float | bool]


class Logger(TypedDict, total=False):
    """``logger``; other names hold a node with ``_target_``."""

    wandb: Wandb | None
    tensorboard: Tensorboard | None
    mlflow: Mlflow | None


class Train(TypedDict, total=False):
    """``conf/config.yaml``."""

    seed: Seed
    run_dir: str
    ckpt_path: str | None
    init_from: str | None
    objective: str | None
    packages: list[str] | None
    sweep_name: str
    recipe: Free
    evaluation: TrainEvaluation
    paths: Paths
    roots: Roots
    data: Node
    sampling: Sampling
    backbone: Node
    head: Head
    ibs: Ibs
    optim: Node
    weigh: Node
    trainer: Node
    logger: Logger
    callbacks: Mapping[str, Node | None]
    model: Model


class Evaluate(TypedDict, total=False):
    """``conf/evaluate.yaml``."""

    seed: Seed
    run_dir: str
    ckpt_path: str | None
    packages: list[str] | None
    overrides: Free
    predictions: str | list[str] | None
    refine: Refine
    evaluation: Evaluation
    paths: Paths
    data: Node
    sampling: Sampling
    trainer: Node
    logger: Logger


class Predict(TypedDict, total=False):
    """``conf/predict.yaml``."""

    ckpt_path: str
    packages: list[str] | None
    input: str
    output: str
    overrides: Free
    refine: Refine
    device: str
    batch_size: AtLeastOne
    labels: bool


class Export(TypedDict, total=False):
    """``conf/export.yaml``."""

    ckpt_path: str
    packages: list[str] | None
    format: Literal["torch", "onnx"]
    out: str
    size: Annotated[list[AtLeastOne], Items(2)]
    overrides: Free


class ConvertOverrides(TypedDict, total=False):
    """``overrides`` of convert."""

    backbone: Free
    head: Free
    model: Free


class Convert(TypedDict, total=False):
    """``conf/convert.yaml``."""

    seed: Seed
    source: str
    out: str
    allow_partial: bool
    overrides: ConvertOverrides
    paths: Paths
    data: Node
    head: Head
    sampling: Sampling


OTHER_KEYS: dict[Any, Any] = {Logger: Node | None}  # what keys hold that such a dictionary does not name

COMMANDS: dict[str, Any] = {"config": Train, "evaluate": Evaluate, "predict": Predict, "convert": Convert,
                            "export": Export}  # fmt: skip

Count = AtLeastOne | Annotated[int, Bounds(least=-1, most=-1)]  # -1: no limit, or all
Part = Whole | Annotated[float, Bounds(least=0, most=1)] | None  # so many, or a share
Precision = Literal[
    "64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "transformer-engine",
    "transformer-engine-float16", "64", "32", "16", "bf16", 64, 32, 16,
]  # fmt: skip


class Trainer(TypedDict, total=False):
    """Options of ``lightning.Trainer`` that are set in configurations; the others are those of its signature."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
    devices: Literal["auto"] | Count | list[Whole] | Annotated[str, Like(r"\d+(,\d+)*", 'text such as "0,1"')]
    num_nodes: AtLeastOne
    precision: Precision | None
    sync_batchnorm: bool
    max_steps: Count
    min_steps: AtLeastOne | None
    max_epochs: Count | None
    min_epochs: AtLeastOne | None
    accumulate_grad_batches: AtLeastOne
    check_val_every_n_epoch: AtLeastOne | None
    val_check_interval: AtLeastOne | Annotated[float, Bounds(above=0, most=1)] | None
    limit_train_batches: AtLeastOne | Annotated[float, Bounds(above=0, most=1)] | None
    limit_val_batches: Part
    limit_test_batches: Part
    limit_predict_batches: Part
    overfit_batches: Whole | Annotated[float, Bounds(least=0, most=1)]
    num_sanity_val_steps: Annotated[int, Bounds(least=-1)]
    log_every_n_steps: AtLeastOne
    gradient_clip_val: NonNegative | None
    fast_dev_run: bool | Whole
    benchmark: bool | None
    deterministic: bool | Literal["warn"] | None
    use_distributed_sampler: bool
    detect_anomaly: bool
    inference_mode: bool
    enable_model_summary: bool | None


def trainer_options() -> dict[str, Any]:
    """Annotations of the trainer's options; the strategies are those that Lightning knows."""
    from lightning.pytorch.strategies import StrategyRegistry

    from panoptic_ibs.expectations import fields_of

    names = ("auto", *StrategyRegistry.available_strategies())
    return {**fields_of(Trainer), "strategy": Literal[names] | Node}


def sampling_options() -> dict[str, Any]:
    """Keys of ``sampling``: those that every sampler may refer to; values are checked where the sampler gets them."""
    from panoptic_ibs.data import sampling
    from panoptic_ibs.expectations import fields_of

    samplers = [kind for kind in vars(sampling).values() if isinstance(kind, type)]
    known = {key: Any for kind in samplers if issubclass(kind, sampling.RequestSampler) for key in fields_of(kind)}
    return {**known, "name": str, "batch_size": AtLeastOne, "sampler": Node}


# By dotted name: annotations that hold in place of, or beside, those of the signature.
LOOSELY_TYPED = dict.fromkeys(
    ("panoptic_ibs.trainer.Trainer", "lightning.Trainer", "lightning.pytorch.Trainer"), trainer_options
)
