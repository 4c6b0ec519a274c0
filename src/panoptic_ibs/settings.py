"""Configurations as dotted keys: what two of them differ in, and which keys decide what a run learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# What decides the weights of a run. A resumed run must agree in it.
DECISIVE = ("seed", "data", "sampling", "backbone", "head", "ibs", "weigh", "optim", "model", "callbacks.ema")
# Under these: where files lie, how they are loaded, what evaluation does, first weights, and repetitions of other keys.
FREE = (
    "data.root", "data.cache_dir", "data.num_workers", "data.memory_mb", "data.val_limit", "data.eval_resize",
    "data.presets", "data.sampling", "data.batch_size", "data.seed", "data.synthetic.num_val", "sampling.sampler",
    "backbone.pretrained", "backbone.weights", "model.refine",
)  # fmt: skip

# Keys that runs of earlier versions lack, with the value that they had in fact.
SINCE: Mapping[str, Any] = {
    "callbacks.early_stopping._target_": "panoptic_ibs.callbacks.StopEarly",
    "callbacks.early_stopping.monitor": "val/pq",
    "callbacks.early_stopping.patience": None,
    "callbacks.early_stopping.least": 0.0,
    "weigh._target_": "panoptic_ibs.weighing.Fixed",
    "data.allow_outside": False,
    "packages": None,
    **{f"{place}.resize.range": None for place in ("sampling", "sampling.sampler", "data.sampling")},
    "data.presets.full_resize.range": None,
}
# What another place of the package has taken over: values of earlier versions, as this one writes them.
MOVED: Mapping[str, str] = {
    "panoptic_ibs.optim.MovingAverage": "panoptic_ibs.callbacks.averaging.MovingAverage",
    "lightning.Trainer": "panoptic_ibs.trainer.Trainer",
}
GONE = (
    "recipe",
    "full_images",
    "data.pad_fill",
    "head.memory.steps",
    "head.memory.batches_per_step",
    "trainer.float32_matmul",  # how, not what: panoptic_ibs.execution
    "trainer.compile",
    "trainer.checkpoint_activations",
    "trainer.channels_last",
)  # what says nothing of its own


def flat(settings: Mapping[str, Any], without: Iterable[str] = (), places: Iterable[Any] = ()) -> dict[str, Any]:
    """Values by dotted key.

    Args:
        settings: plain containers.
        without: keys that are left out with all below them.
        places: folders that may lie anywhere; in values they are named by their number.
    """
    left_out, found = set(without), {}

    def walk(prefix: str, node: Any) -> None:
        if prefix in left_out:
            return
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
            return
        if isinstance(node, str):
            for number, place in enumerate(places):
                node = node.replace(place, f"<{number}>") if place else node
        found[prefix] = node

    walk("", settings)
    return found


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a whole configuration, by dotted key, that decide what a run learns."""
    flattened = flat(settings, FREE)
    return {k: v for k, v in flattened.items() if any(k == d or k.startswith(f"{d}.") for d in DECISIVE)}


def alike(values: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration of any version as this version would write it, for comparisons: IBS has one weight, the
    product of ``ibs.weight`` and ``ibs.scale``, and no options where it is off.
    """
    found = {k: v for k, v in values.items() if not any(k == gone or k.startswith(f"{gone}.") for gone in GONE)}
    if found.get("ibs.partners") == "none":
        found = {k: v for k, v in found.items() if not k.startswith("ibs.") or k in ("ibs.partners", "ibs._target_")}
    scale = found.pop("ibs.scale", 1.0)
    if isinstance(found.get("ibs.weight"), int | float) and isinstance(scale, int | float):
        found["ibs.weight"] *= scale
    moved = {k: MOVED[v] for k, v in found.items() if isinstance(v, str) and v in MOVED}
    return {**SINCE, **found, **moved}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What two flat configurations differ in, in words: ``seed: 0 there, 1 here; ...``; empty if they agree.

    Runs of earlier versions are compared by what they did: :func:`alike`.
    """
    nothing = "nothing"
    theirs, ours = alike(theirs), alike(ours)
    keys = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k, nothing) != ours.get(k, nothing))
    shown = [f"{k}: {theirs.get(k, nothing)} there, {ours.get(k, nothing)} here" for k in keys[:20]]
    return "; ".join([*shown, f"and {len(keys) - 20} more"] if len(keys) > 20 else shown)
