"""A run in plain words."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from panoptic_ibs.metrics.names import named

from .records import Run, metric, number

_EXPLAINED = ("pq", "sq", "rq", "pq_by_size.small.pq", "miou", "boundary_pq", "ap", "acc_things", "prec_things")
TERMS = (
    *((named(key).name, named(key).help) for key in (*_EXPLAINED, "confusion@50")),
    ("Interval", "where the number lies for 95 of 100 draws of as many of these images, with replacement"),
)
_SAMPLING = {
    "paired_crop": "paired crops",
    "instance_crop": "crops around instances",
    "random_crop": "random crops",
    "full_image": "full images",
}
_DATA = {
    "lots": "the embedded synthetic car parks",
    "nuclei": "photographs of nuclei (Data Science Bowl 2018)",
    "synthetic": "the embedded synthetic street scenes",
    "coco_panoptic": "COCO panoptic",
    "cityscapes": "Cityscapes",
    "vistas": "Mapillary Vistas",
}
_COCO = (None, "val2017", "train2017", "test-dev2017")  # splits of COCO itself
_IBS = {
    "paired": "Intra-Batch Supervision between paired crops",
    "random": "Intra-Batch Supervision with random partners",
}


def network_phrase(run: Run) -> str:
    """The network and its supervision."""
    ibs = run.choice("ibs")
    if ibs == "–":
        return run.head_label
    if ibs == "none":
        return f"{run.head_label} without Intra-Batch Supervision"
    return f"{run.head_label} with {_IBS.get(ibs, f'Intra-Batch Supervision ({ibs})')}"


def origin_sentence(run: Run) -> str:
    """What was trained on what, for how long; or which checkpoint or predictions were scored."""
    step, seconds = run.step, training_seconds(run)
    if run.foreign or step is None:
        kind = "Predictions in COCO panoptic" if run.metric("pq") is not None else "Instances in COCO's results"
        given = run.config.get("predictions")
        file = f" ({PurePath(given).name})" if isinstance(given, str) and given else ""
        return f"{kind} format{file} were scored; which program made them is not known here."
    if run.evaluated_only:
        return f"A checkpoint of {network_phrase(run)}, trained for {step:,} steps, was evaluated on {data_label(run)}."
    sampling, data = run.choice("sampling"), run.choice("data")
    where = "" if sampling == "–" else f" on {_SAMPLING.get(sampling, sampling)}"
    where += "" if data == "–" else f" {'of' if where else 'on'} {data_label(run)}"
    how_long = f"for {step:,} {'step' if step == 1 else 'steps'}" + (f" in {duration(seconds)}" if seconds else "")
    seed = f" (seed {run.seed})" if run.seed is not None else ""
    return f"{network_phrase(run)} was trained{where} {how_long}{seed}."


def scored_sentence(run: Run) -> str:
    """On how many images the numbers were measured; empty where that is not known."""
    images = number(run.metrics.get("num_images"))
    if images is None or images < 1:
        return ""
    return f"Scored on {int(images):,} full {'image' if images == 1 else 'images'}."


def data_label(run: Run) -> str:
    """The data set's name; one of the user's own in COCO's layout is called after its folder."""
    chosen, data = run.choices.get("data", ""), run.config.get("data")
    options = data if isinstance(data, dict) else {}
    if run.choice("data") == "coco_panoptic" and chosen != "nuclei" and options.get("val") not in _COCO:
        folder = PurePath(str(options.get("root") or "")).name
        return f"{folder} (in COCO panoptic format)" if folder else "a data set in COCO panoptic format"
    scenes = options.get("synthetic")
    if isinstance(scenes, dict) and scenes.get("scenes") == "lots":
        return _DATA["lots"]
    return _DATA.get(chosen) or _DATA.get(run.choice("data"), run.choice("data"))


def headline(run: Run) -> str:
    """One sentence: what reaches which PQ."""
    where = "" if run.choice("data") == "–" else f" on {data_label(run)}"
    compared = run.metrics.get("comparison")
    if isinstance(compared, dict) and isinstance(compared.get("sets"), list) and compared["sets"]:
        names = " and ".join((", ".join(map(str, compared["sets"][:-1])), str(compared["sets"][-1])))
        return f"{names} side by side{where}"
    subject = "These predictions reach" if run.foreign else f"{run.head_label} reaches"
    return f"{subject} {_result(run)}{where}"


def _result(run: Run) -> str:
    """PQ, or of instances AP."""
    pq, ap = run.metric("pq"), run.metric("ap")
    if pq is None:
        return "no AP: there is nothing to find" if ap is None else f"{100 * ap:.1f} AP"
    return f"{100 * pq:.1f} PQ" + ("" if ap is None else f" and {100 * ap:.1f} AP")


def best_sentence(run: Run) -> str:
    """Which checkpoint of the run was the best one in its validations; empty where none was kept."""
    best = run.metrics.get("best")
    step, value = (number(best.get(key)) for key in ("step", "value")) if isinstance(best, dict) else (None, None)
    if step is None or value is None or not isinstance(best, dict):
        return ""
    metric = str(best.get("monitor", "")).removeprefix("val/")
    try:
        name = named(metric).name
    except KeyError:
        name = metric
    which = "the last one" if step == run.step else f"the one after step {step:,.0f}"
    return (
        f"Of the checkpoints that were validated, {which} is best by {name} ({100 * value:.1f}): checkpoints/best.ckpt."
    )


def caution_sentences(run: Run) -> list[str]:
    """What a reader must know before any number: training was interrupted, images were left out."""
    sentences = []
    if run.metrics.get("interrupted") is True:
        sentences.append("Training was interrupted: these are the results of what was reached, on a few images.")
    faults = run.metrics.get("faults")
    if run.metrics.get("complete") is False and isinstance(faults, list):
        rest = f" (the first: {faults[0]})" if faults else ""
        sentences.append(f"Not every image could be judged; all numbers are those of the others{rest}.")
    return sentences


def result_sentences(run: Run) -> list[str]:
    """What came out; how far from the baselines."""
    sentences = []
    images = number(run.metrics.get("num_images"))
    where = f"On {int(images):,} full {'image' if images == 1 else 'images'}" if images else "On the evaluated images"
    acc, prec = run.metric("acc_things"), run.metric("prec_things")
    reference = reference_set(run)
    subject = f"{reference} reaches" if reference else "they reach" if run.foreign else "it reaches"
    result = f"{where} {subject} {_result(run)}"
    if acc is not None and prec is not None:
        result += (
            f"; {100 * acc:.1f} % of the true thing pixels lie in correct segments, "
            f"and {100 * prec:.1f} % of the predicted ones are right"
        )
    sentences.append(result + ".")
    if sentence := best_sentence(run):
        sentences.append(sentence)
    gains = [
        f"{100 * value:.1f} ({name})"
        for name, table in run.baselines.items()
        if (value := metric(table, "pq")) is not None
    ]
    if gains:
        sentences.append(f"For comparison, PQ of the baselines: {', '.join(gains)}.")
    return sentences


def reference_set(run: Run) -> str:
    """Of several sets of predictions the one whose numbers are shown; empty otherwise."""
    compared = run.metrics.get("comparison")
    reference = compared.get("reference") if isinstance(compared, dict) else None
    return reference if isinstance(reference, str) else ""


def confusion_sentence(run: Run) -> str:
    """How many predicted things swallow several instances; empty where it was not measured."""
    share = run.metric("confusion@50")
    if share is None:
        return ""
    if share == 0:
        return "No predicted thing covers more than half of two or more true instances."
    return (
        f"{100 * share:.1f} % of the predicted things are confused: "
        "they cover more than half of two or more true instances."
    )


def training_seconds(run: Run) -> float | None:
    """Seconds of training from ``timing.json``: ``train_seconds``, else ``total_seconds``, else anything alike."""
    for key in ("train_seconds", "training_seconds", "fit_seconds", "train", "fit", "total_seconds", "total"):
        value: Any = number(run.timing.get(key))
        if value is not None:
            return float(value)
    return None


def duration(seconds: float) -> str:
    """Seconds as "48 s", "3 min 20 s" or "5 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
