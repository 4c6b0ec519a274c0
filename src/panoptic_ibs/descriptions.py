"""What a checkpoint says of its network (its entry ``panoptic_ibs``), checked before anything is built from it.

Imported where a checkpoint is read, not before: its schemas need pydantic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NotRequired, cast

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from torch import Tensor
from typing_extensions import TypedDict

from .errors import CheckpointError
from .schemas import Fault, faults_in, told
from .weight_files import ENTRY, check_numbers

PARTS = ("backbone", "head")
STRICT = ConfigDict(strict=True)
OWN = "It is damaged, or of another version of this package. Give a checkpoint of panoptic_ibs.train or .convert."

Finite = Annotated[float, Field(allow_inf_nan=False)]
Byte = Annotated[int, Field(ge=0, le=255)]
Part = Annotated[dict[str, Any], Field(min_length=1)]


@with_config(STRICT)
class SavedClass(TypedDict):
    """A row of the class table."""

    name: str
    dataset_id: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    is_thing: bool
    color: Annotated[list[Byte], Field(min_length=3, max_length=3)]


@with_config(STRICT)
class SeenImages(TypedDict, total=False):
    """How a network sees images; what else it is made of is checked by its constructors."""

    pixel_mean: Annotated[list[Finite], Field(min_length=3, max_length=3)]
    pixel_std: Annotated[list[Annotated[Finite, Field(gt=0)]], Field(min_length=3, max_length=3)]
    channel_order: str


class StartedModel(SeenImages, total=False):
    """What fine-tuning looks at in a network's options."""

    backbone: Part


class SavedModel(SeenImages):
    """Options of :func:`panoptic_ibs.construction.build_model`."""

    backbone: Part
    head: Part
    refine: NotRequired[list[Part] | None]


class Description(TypedDict):
    """The entry of a checkpoint that can be loaded, evaluated and resumed."""

    version: NotRequired[str]
    model: SavedModel
    packages: NotRequired[list[str]]  # that made it, beside this one
    classes: Annotated[list[SavedClass], Field(min_length=1)]
    data: NotRequired[dict[str, Any]]
    run: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, Any]]


class Start(TypedDict):
    """The entry of a checkpoint to start from."""

    model: StartedModel
    classes: NotRequired[list[SavedClass]]


Count = Annotated[int, Field(ge=0)]


@with_config(STRICT)
class Counts(TypedDict):
    """Lightning's counters of one thing."""

    ready: Count
    completed: Count
    started: NotRequired[Count]
    processed: NotRequired[Count]


class Progress(TypedDict):
    """Counters over the run and within the epoch."""

    total: Counts
    current: Counts


class OptimizerSteps(TypedDict):
    """Counters of one optimiser."""

    step: Progress
    zero_grad: Progress


class Optimizers(TypedDict):
    """Counters of the optimiser."""

    optimizer: OptimizerSteps


FitLoop = TypedDict(
    "FitLoop",
    {
        "epoch_loop.state_dict": dict[str, Any],
        "epoch_loop.batch_progress": Progress,
        "epoch_loop.scheduler_progress": Progress,
        "epoch_loop.automatic_optimization.optim_progress": Optimizers,
        "epoch_progress": Progress,
    },
)


class Loops(TypedDict):
    """Where training stood."""

    fit_loop: FitLoop


@with_config(STRICT)
class Schedule(TypedDict):
    """State of the learning rate's schedule."""

    base_lrs: Annotated[list[Finite], Field(min_length=1)]
    last_epoch: Count


RunState = TypedDict(
    "RunState",
    {
        "state_dict": dict[str, Any],
        "optimizer_states": Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)],
        "lr_schedulers": Annotated[list[Schedule], Field(min_length=1, max_length=1)],
        "loops": Loops,
        "callbacks": dict[str, dict[str, Any]],
        "epoch": Annotated[int, Field(strict=True, ge=0)],
        "global_step": Annotated[int, Field(strict=True, ge=0)],
        "pytorch-lightning_version": Annotated[str, Field(pattern=r"^\d+(\.\w+)+([.+-]\w+)*$")],
        "PanopticDataModule": NotRequired[dict[str, Annotated[int, Field(strict=True, ge=0)]]],
    },
)

_RUN: TypeAdapter[RunState] = TypeAdapter(RunState)
_DESCRIPTION: TypeAdapter[Description] = TypeAdapter(Description)
_START: TypeAdapter[Start] = TypeAdapter(Start)
_STEP: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(strict=True, ge=0)])


def described(state: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The description in a checkpoint: ``model``, ``classes`` and, if it has them, ``version``, ``data``, ``run``.

    Args:
        state: the checkpoint.
        source: the file, for messages.

    Raises:
        CheckpointError: there is none, or it is not as this version writes it; all faults in one message.
    """
    if ENTRY not in state:
        raise CheckpointError(f"{source}: not a checkpoint of panoptic_ibs (it has no {ENTRY!r} entry).")
    _check(_DESCRIPTION, state[ENTRY], source)
    model = state[ENTRY]["model"]
    nested = [step for part in model for step in _targets(model[part], (ENTRY, "model", part), part in PARTS)]
    nested = [steps for steps in nested if len(steps) != 5 or steps[2] != "refine"]  # ENTRY model refine 0 _target_
    _faults([Fault(steps, "is there; only backbone and head name a class") for steps in nested], source)
    return dict(state[ENTRY])


def started_from(state: Mapping[str, Any], source: object) -> Mapping[str, Any]:
    """The description in a checkpoint to start from, as far as fine-tuning looks at it: ``model``, maybe ``classes``.

    Raises:
        CheckpointError: the entry is damaged.
    """
    _check(_START, state[ENTRY], source)
    return cast(Mapping[str, Any], state[ENTRY])


def step_of(state: Mapping[str, Any], source: object) -> int:
    """Training steps behind a checkpoint; 0 where none is given.

    Raises:
        CheckpointError: no whole number of 0 or more.
    """
    step = state.get("global_step", 0)
    _faults([Fault(("global_step",), f.text) for f in faults_in(_STEP, step)], source)
    return int(step)


def check_run(state: Mapping[str, Any], source: object) -> None:
    """Make sure that what Lightning keeps of a run in a checkpoint is whole, so that the run can go on.

    Raises:
        CheckpointError: it is not; all faults in one message, or the first number of the optimiser that is not finite.
    """
    _faults(faults_in(_RUN, state), source)
    done = state["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    if done["total"]["completed"] != state["global_step"]:
        text = f"is {state['global_step']}; but the loop's counter is at {done['total']['completed']}"
        _faults([Fault(("global_step",), text)], source)
    kept = state["optimizer_states"][0].get("state")
    each = kept.items() if isinstance(kept, Mapping) else ()
    values = {(i, name): v for i, entry in each if isinstance(entry, Mapping) for name, v in entry.items()}
    check_numbers({f"optimiser's {n} of {i}": v for (i, n), v in values.items() if isinstance(v, Tensor)}, source)


def _check(schema: TypeAdapter[Any], entry: Any, source: object) -> None:
    _faults([Fault((ENTRY, *f.steps), f.text) for f in faults_in(schema, entry)], source)


def _targets(value: Any, steps: tuple[str | int, ...], allowed: bool = False) -> Iterator[tuple[str | int, ...]]:
    """The ways to entries that ask for something to be imported."""
    if isinstance(value, Mapping):
        if "_target_" in value and not allowed:
            yield (*steps, "_target_")
        for key, entry in value.items():
            yield from _targets(entry, (*steps, key))
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from _targets(entry, (*steps, number))


def _faults(faults: list[Fault], source: object) -> None:
    if faults:
        raise CheckpointError(told(source, faults, OWN))
