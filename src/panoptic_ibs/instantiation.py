"""What a configuration describes, made: networks, data, optimisers. Nothing heavy is imported at the top."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from .classes import ClassTable
    from .data.datamodule import PanopticDataModule
    from .model import PanopticModel


def instantiate(config: Any, **extra: Any) -> Any:
    """``hydra.utils.instantiate`` with readable errors; None for a node without ``_target_``.

    Raises:
        UserError: what the constructor raised; ConfigError for an option it does not know.
    """
    import hydra.errors
    import hydra.utils

    if config is None or config.get("_target_") is None:
        return None
    try:
        return hydra.utils.instantiate(config, _convert_="all", **extra)
    except hydra.errors.InstantiationException as error:
        from .configuration.translation import sentence

        cause: BaseException | None = error.__cause__
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            root, cause = cause, cause.__cause__
        where = re.search(r"full_key: (\S+)", str(error))
        name = where[1] if where else config["_target_"]
        if error.__cause__ is None:
            raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
        text = sentence(root) or f"{type(root).__name__}: {' '.join(str(root).split())}"
        raise ConfigError(f"{name}: {text.removeprefix(f'{name}: ')}") from error


def plain(config: Any) -> Any:
    """A configuration node as resolved plain containers."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def packages(config: DictConfig) -> list[str]:
    """Packages beside this one whose classes the user lets us make."""
    return list(config.packages or ())


def model_config(config: DictConfig, eval_resize: Any = None) -> dict[str, Any]:
    """The network's plain description, as in checkpoints; see :func:`panoptic_ibs.construction.build_model`.

    Args:
        config: the composed configuration.
        eval_resize: the data's size policy in evaluation, which becomes the model's ``test_size``.
    """
    model = dict(plain(config.get("model", {})))
    model["backbone"] = plain(config.backbone)
    model["head"] = {k: v for k, v in plain(config.head).items() if k != "name"}
    if eval_resize is not None:
        shortest = max(eval_resize.choices or eval_resize.range)
        longest = eval_resize.longest
        model["test_size"] = [int(shortest), None if longest == float("inf") else int(longest)]
    return model


def add_refinement(model: PanopticModel, config: DictConfig) -> None:
    """Put the refine step that ``refine`` names, if it does, behind those that the network has."""
    from .refine import check_order

    step = instantiate(config.refine)
    if step is not None:
        model.refine = check_order([*model.refine, step])


def make_data(config: DictConfig) -> PanopticDataModule:
    """The data module of the configuration."""
    data: PanopticDataModule = instantiate(config.data)
    return data


def check_classes(ckpt_path: Path | str, have: ClassTable, data: PanopticDataModule) -> None:
    """Make sure that a checkpoint and a data set have the same classes.

    Raises:
        CheckpointError: they differ.
    """
    from .errors import CheckpointError

    want = data.classes
    if have.names == want.names and have.is_thing == want.is_thing:
        return
    differ = sorted(set(have.names) ^ set(want.names))
    raise CheckpointError(
        f"{ckpt_path}: was trained on {len(have)} classes, data={data.layout} at {data.root} has {len(want)} (first "
        f"differences: {', '.join(differ[:4]) or 'order or thing flags'}). Give the data set that it was trained on."
    )
