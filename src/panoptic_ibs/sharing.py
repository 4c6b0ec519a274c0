"""A checkpoint for others: the network alone, with a card that says what it is."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoints import read_checkpoint, sound_weights
from .descriptions import described
from .files import read_json_or_none
from .hub import FILE, SCHEME, parsed, send
from .weight_files import ENTRY

SHOWN = ("pq", "pq_things", "pq_stuff", "acc_things", "prec_things")


def push(ckpt: str | Path, name: str, private: bool = False) -> str:
    """Put a checkpoint on the Hugging Face hub, for ``panoptic_ibs.load("hf://OWNER/NAME")``.

    It gets the network's weights (the moving average if there is one) and its description, not the optimiser; and a
    card with classes and, of a run of ``panoptic_ibs.train``, its numbers. ``HF_TOKEN`` or ``hf auth login`` says who
    you are.

    Args:
        ckpt: a checkpoint of this package.
        name: ``OWNER/NAME``, with or without ``hf://``.
        private: a repository that is made is for you alone.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: no such checkpoint, no such name, no access, or no connection.
    """
    repo, *_ = parsed(name if name.startswith(SCHEME) else f"{SCHEME}{name}")
    state = read_checkpoint(ckpt)
    description = described(state, ckpt)
    weights = {f"model.{key}": value for key, value in sound_weights(state, ckpt).items()}
    with tempfile.TemporaryDirectory() as folder:
        content = {ENTRY: description, "state_dict": weights, "global_step": int(state.get("global_step", 0))}
        torch.save(content, Path(folder) / FILE)
        metrics = read_json_or_none(Path(ckpt).resolve().parent.parent / "metrics.json")
        (Path(folder) / "README.md").write_text(card(repo, description, metrics), encoding="utf-8")
        return send(Path(folder), repo, private)


def card(repo: str, description: Mapping[str, Any], metrics: Any) -> str:
    """The repository's page.

    Args:
        repo: ``OWNER/NAME``.
        description: of the checkpoint.
        metrics: ``metrics.json`` of the run, or None.
    """
    run, classes = description.get("run", {}), description["classes"]
    things = [row["name"] for row in classes if row["is_thing"]]
    stuff = [row["name"] for row in classes if not row["is_thing"]]
    lines = ["---", "library_name: panoptic-ibs", "pipeline_tag: image-segmentation", "---", f"# {repo}", ""]
    trained = ", ".join(f"{key} {value}" for key, value in run.items())
    lines += [f"A panoptic segmentation network of panoptic_ibs {description.get('version', '')}: {trained}.", ""]
    lines += ["```python", "import panoptic_ibs", "", f'model = panoptic_ibs.load("{SCHEME}{repo}")', "```", ""]
    lines += [f"Things: {', '.join(things)}.", "", f"Stuff: {', '.join(stuff)}.", ""]
    numbers = {key: metrics[key] for key in SHOWN if isinstance(metrics.get(key), float)} if metrics else {}
    if numbers:
        lines += [f"On {metrics['num_images']} validation images, in percent:", "", f"| {' | '.join(numbers)} |"]
        lines += ["|" + "---|" * len(numbers), f"| {' | '.join(f'{100 * v:.1f}' for v in numbers.values())} |", ""]
    return "\n".join(lines)
