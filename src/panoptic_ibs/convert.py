"""Convert a published checkpoint of Panoptic FCN, Mask2Former or Panoptic FPN to one of this package.

python -m panoptic_ibs.convert source=model_final.pkl head=mask2former data=cityscapes out=mask2former.ckpt
python -m panoptic_ibs.convert source=model_final.pth head=panoptic_fcn data=vistas out=panoptic_fcn.ckpt
python -m panoptic_ibs.convert source=model_final.pkl head=panoptic_fpn data=coco_panoptic out=panoptic_fpn.ckpt
python -m panoptic_ibs.convert source=FOLDER_OF_A_TRANSFORMERS_MODEL head=mask2former data=coco_panoptic out=m2f.ckpt

Classes are matched by name where the file has names (config.json of transformers); the order that was assumed is
printed. Nothing in the file is executed. Every tensor that is unused, missing or misshapen is listed, and then nothing
is written unless allow_partial=true. The result goes to evaluate and predict as ckpt_path=, and to train as init_from=.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import commands, instantiation
from .configuration import options
from .errors import CheckpointError, ConfigError, printable

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from .classes import ClassTable
    from .importing import Comparison, Imported


def convert(config: DictConfig) -> int:
    """Convert one checkpoint; returns the exit status."""
    from .construction import build_model
    from .importing import compare, import_checkpoint

    out = Path(config.out)
    classes = class_table(config)
    imported = import_checkpoint(weights_of(config), config.head.name, len(classes), len(classes.stuff_ids))
    print(in_order(imported, classes, config), flush=True)
    description, recipe = describe(config, imported)
    model = build_model(description, classes)
    own = model.state_dict()
    found = compare(imported, own)
    print_names(imported, found, str(config.source))
    if not found.complete and not config.allow_partial:
        raise CheckpointError(
            f"{config.source}: {len(found.unused)} tensors are unused, {len(found.missing)} missing and "
            f"{len(found.misshapen)} misshapen (listed above). Nothing was written; give allow_partial=true to write "
            "what fits, or backbone, head and model options under overrides."
        )
    model.load_state_dict({name: imported.weights[name] for name in found.loaded}, strict=False)
    write(out, config, description, classes, model.state_dict())
    print(f"{imported.program.name}, {recipe}: {out}", flush=True)
    return 0


def weights_of(config: DictConfig) -> dict[str, Tensor]:
    """The network's weights in the source.

    Raises:
        CheckpointError: they cannot be read, are not finite, or need no conversion.
    """
    from .checkpoints import sound_weights
    from .importing.class_order import folder_model
    from .weight_files import ENTRY, read_tensors

    folder = folder_model(Path(config.source)) if Path(config.source).is_dir() else None
    if folder is not None and folder.model_type not in ("mask2former", ""):
        raise CheckpointError(
            f"{config.source}: is a {folder.kind} (transformers, model_type {folder.model_type!r} in its config.json); "
            "of transformers' models only Mask2Former can be converted."
        )
    state = read_tensors(config.source)
    if ENTRY in state:
        raise CheckpointError(
            f"{config.source}: is a checkpoint of this package already; give it as ckpt_path= or init_from=."
        )
    return sound_weights(state, config.source)


def in_order(imported: Imported, classes: ClassTable, config: DictConfig) -> str:
    """Bring the tensors of classes into the data set's order by name; what was done or assumed, in a sentence.

    Names come from ``config.json`` of a ``transformers`` model. Other files name no classes: theirs are taken to be the
    published ones where the data set has the same, else those of the data set in its order.

    Raises:
        CheckpointError: the file's classes are others.
    """
    from .data.class_tables import published_classes
    from .importing.class_order import folder_model, order_of, reordered

    named = folder_model(Path(config.source)) if imported.program.labelled else None
    things_alone = imported.head.get("task") == "instance"
    own = [c for c in classes.classes if c.is_thing or not things_alone]
    published = published_classes(config.data.name)
    if named is not None and named.classes is not None:
        names, where = named.classes, str(named.path)
    elif published is not None and sorted(published.names) == sorted(classes.names):
        names = tuple(c.name for c in published.classes if c.is_thing or not things_alone)
        where = "the published classes"
    else:
        return (
            "class order: the file names no classes; its outputs are taken for the data set's classes in their order: "
            f"{', '.join(f'{i} {c.name}' for i, c in enumerate(own))}"
        )
    order = order_of(names, own, where)
    if order.same:
        return f"class order: that of the data set (by {where})"
    rows = imported.program.rows(imported.head, order.classes, order.things, order.stuff)
    imported.weights = reordered(imported.weights, {f"head.{name}": row for name, row in rows.items()})
    return f"class order: rows of {', '.join(rows)} were moved by name from that of {where} to the data set's"


def class_table(config: DictConfig) -> ClassTable:
    """The data set's classes: from its annotations if ``data.root`` is given, else the published ones.

    Raises:
        ConfigError: a data set without published classes and no ``data.root``.
    """
    from .data.class_tables import published_classes
    from .data.readers import make_reader

    data = config.data
    if data.root and data.name != "synthetic":
        options = {"photographs": False, "allow_outside": bool(data.get("allow_outside", False))}
        return make_reader(data.name, data.root, data.val, **options).classes
    found = published_classes(data.name)
    if found is None:
        raise ConfigError(
            f"data={data.name} has no published classes; choose cityscapes, vistas or coco_panoptic, or give the data "
            "set's folder with data.root=DIR."
        )
    return found


def describe(config: DictConfig, imported: Imported) -> tuple[dict[str, Any], str]:
    """The network's description, see :func:`panoptic_ibs.construction.build_model`, and where its thresholds come from.

    Tensors say what the network is; thresholds and test size come from the data set's published recipe.
    """
    from hydra import compose

    from .configuration.checking import check_changes

    data, head_name = config.data.name, config.head.name
    name = f"{data}_{head_name}"
    recipe = compose("config", overrides=[f"data={data}", f"head={head_name}", "data.root=none"])
    published = instantiation.model_config(recipe, instantiation.instantiate(recipe.data.eval_resize))
    overrides: Mapping[str, Any] = instantiation.plain(config.overrides)
    backbone = {"_target_": "panoptic_ibs.backbones.TimmBackbone", **imported.backbone, **overrides["backbone"]}
    head = {**published["head"], **imported.head, **overrides["head"]}
    rest = {k: v for k, v in published.items() if k not in ("backbone", "head")}
    description = {**rest, **imported.model, **overrides["model"], "backbone": backbone, "head": head}
    check_changes(description, {part: overrides[part] for part in ("backbone", "head")})
    check_changes(description, overrides["model"], "overrides.model")
    found = f"recipe/{name}" if name in options.options("recipe") else f"head/{head_name}"
    return description, f"thresholds of conf/{found}.yaml"


def write(
    out: Path, config: DictConfig, description: Mapping[str, Any], classes: ClassTable, weights: Mapping[str, Any]
) -> None:
    """Write the checkpoint, whole or not at all."""
    import torch

    from . import __version__
    from .files import write_atomically

    run = {"head": config.head.name, "sampling": None, "ibs": None, "seed": None}
    entry = {
        "version": __version__,
        "model": dict(description),
        "classes": classes.to_list(),
        "data": {"name": config.data.name, "integer_ids": config.data.name == "coco_panoptic"},
        "run": {**run, "source": Path(config.source).name},
    }
    state = {f"model.{name}": value for name, value in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: torch.save({"state_dict": state, "global_step": 0, "panoptic_ibs": entry}, path))


def print_names(imported: Imported, found: Comparison, source: str) -> None:
    """Print what became of every tensor: a count for what fits, a line for everything else."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(f"{Path(source).name}: {imported.program.name}")), pad_edge=False)
    table.add_column("tensors")
    table.add_column("number", justify="right")
    table.add_column("names", overflow="fold")
    shapes = [f"{name}: {theirs} in the file, {ours} here" for name, theirs, ours in found.misshapen]
    rows = [("loaded", found.loaded[:2] + (["..."] if len(found.loaded) > 2 else []), len(found.loaded))]
    rows += [
        ("not needed", imported.not_needed[:2] + ["..."] * (len(imported.not_needed) > 2), len(imported.not_needed))
    ]
    if found.fresh:
        rows += [("start untrained", [*found.fresh[:2], "..."], len(found.fresh))]
    rows += [("unused", found.unused, len(found.unused)), ("missing", found.missing, len(found.missing))]
    rows += [("misshapen", shapes, len(shapes))]
    for kind, names, count in rows:
        table.add_row(kind, str(count), Text(printable("\n".join(names))))
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def main() -> int:
    """Entry point."""
    return commands.run_command("convert", convert, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
