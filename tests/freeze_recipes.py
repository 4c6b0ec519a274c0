"""Writes ``published_recipes.json`` and ``former_runs.json``: what the configurations of an earlier version resolve to.

Both were made by ``PYTHONPATH=src python FREEZE_RECIPES TESTS``, in a checkout of commit b6190ad, whose recipes were
files of their own (``conf/experiment/``). Its values were held against the papers and their configurations when they
were written; the copy keeps them from changing unseen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from panoptic_ibs import commands
from panoptic_ibs.configuration import resolvers

RECIPES = [
    *(f"cityscapes_{name}" for name in ("panoptic_fcn_full", "panoptic_fcn_crop", "panoptic_fcn_crop_ibs",
      "mask2former_full", "mask2former_crop", "mask2former_crop_ibs", "ciae", "ciae_ibs")),
    *(f"vistas_{name}" for name in ("panoptic_fcn_full", "panoptic_fcn_crop", "panoptic_fcn_crop_ibs",
      "panoptic_fcn_crop_random_ibs", "mask2former_full", "mask2former_crop", "mask2former_crop_ibs",
      "mask2former_instance", "mask2former_instance_ibs")),
    *(f"coco_{name}" for name in ("panoptic_fcn_full", "mask2former_full", "mask2former_crop", "mask2former_crop_ibs",
      "ciae_r50", "ciae_r101", "ciae_r101_dcn", "ciae_x101_dcn", "ciae_ablation")),
]  # fmt: skip
COMMANDS = [f"experiment={name}" for name in RECIPES] + [
    f"experiment={small} head={head}"
    for small in ("demo", "lots", "nuclei")
    for head in ("panoptic_fcn", "mask2former", "ciae")
]
RUNS = [
    "sweep=embedded_benchmark head=mask2former sweep/components=full_image seed=2",
    "sweep=embedded_lots head=panoptic_fcn sweep/components=paired_crop_ibs seed=1",
    "sweep=embedded_lots head=ciae sweep/components=random_crop",
    "sweep=nuclei head=ciae sweep/components=random_crop_ibs data.root=DIR",
    "sweep=ibs_weight ibs.weight=3.0",
    "sweep=table2_ibs experiment=none head=mask2former sweep/components=crop_ibs_paired",
    "sweep=ciae_margin experiment=coco_ciae_ablation head.loss.margin=0.2 data.root=DIR",
    "sweep=published/table2_ibs experiment=vistas_panoptic_fcn_crop_ibs roots.vistas=DIR",
]
PARTS = ("data", "sampling", "backbone", "head", "ibs", "optim", "trainer", "model")


def resolved(command: str) -> tuple[dict[str, Any], str]:
    """The configuration of a command, and the folder of a sweep's member."""
    config = compose("config", command.split(), return_hydra_config=True)
    folder = str(config.hydra.sweep.subdir) if "sweep=" in command else ""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    own._set_parent(None)
    return OmegaConf.to_container(own, resolve=True), folder  # type: ignore[return-value]


def main() -> None:
    """Write both files."""
    recipes: dict[str, Any] = {}
    former: dict[str, Any] = {}
    resolvers.register_resolvers()
    with initialize_config_dir(str(commands.conf_dir()), version_base="1.3"):
        for command in COMMANDS:
            config, _ = resolved(f"{command} data.root=DIR")
            config["data"] = {k: v for k, v in config["data"].items() if k not in ("sampling", "cache_dir", "root")}
            del config["sampling"]["sampler"]
            recipes[command] = {part: config[part] for part in PARTS}
        for command in RUNS:
            config, folder = resolved(command)
            former[command] = {"folder": folder, "config": config}
    for name, content in (("published_recipes", recipes), ("former_runs", former)):
        lines = [f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in content.items()]
        (Path(sys.argv[1]) / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
