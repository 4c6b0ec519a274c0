"""Recipes: what a data set and a head need of the other groups (published: ``conf/recipe/DATA_HEAD.yaml``).

A recipe chooses backbone, optimiser and trainer, sets options of the head and the data, and its node ``recipe`` holds
what options of other groups ask for by ``${recipe:KEY,DEFAULT}``: what depends on the sampling under
``recipe.sampling``, the rest beside it. An optimiser asks under its own name, so that another one, chosen by the user,
has its own rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

UNKNOWN = "default"  # the recipe of what has none of its own
COCO_SPLIT = "train2017"
_NOTHING = object()


def register() -> None:
    """Make ``${recipe_of:DATA,HEAD}``, ``${recipe:KEY,DEFAULT}`` and ``${recipe_devices:}`` known to OmegaConf."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("recipe_of", recipe_of, replace=True)
    OmegaConf.register_new_resolver("recipe", asked, replace=True)
    OmegaConf.register_new_resolver("recipe_devices", devices, replace=True)


def recipe_of(data: str, head: str) -> str:
    """The recipe of a data set and a head, in the folders where Hydra looks for configurations.

    Of folders in ``hydra.searchpath`` Hydra knows only as it goes on: ``recipe=NAME`` takes one from there.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType

    loader = GlobalHydra.instance().config_loader()
    name = f"{data}_{head}"
    return name if name in loader.get_group_options("recipe", ObjectType.CONFIG) else UNKNOWN


def with_own_data(words: Sequence[str]) -> list[str]:
    """The arguments of a training, with ``recipe=own_data`` where they name a data set of the user's own.

    ``data=coco_panoptic`` is COCO with COCO's recipes, and the layout of anybody's data: those name another training
    split. Arguments that choose a recipe, an experiment or a sweep stay as they are.
    """
    typed = dict(word.lstrip("+").partition("=")[::2] for word in words)
    split = typed.get("data.train", COCO_SPLIT).strip("'\"")
    own = typed.get("data") == "coco_panoptic" and split != COCO_SPLIT
    return [*words, "recipe=own_data"] if own and not {"recipe", "experiment", "sweep"} & set(typed) else list(words)


def asked(key: str, default: Any = None, *, _root_: DictConfig) -> Any:
    """A value of the recipe: that of the sampling, or of the nearest sampling that has one, else that of all."""
    from omegaconf import OmegaConf

    otherwise = OmegaConf.create(default) if isinstance(default, list | dict) else default  # else it cannot be resolved
    recipe = _root_.get("recipe")
    if recipe is None:
        return otherwise
    name = OmegaConf.select(_root_, "sampling.name")
    rows = recipe.get("sampling") or {}
    names = (name, (recipe.get("nearest") or {}).get(name))
    row = next((rows[n] for n in names if n is not None and n in rows), None)
    for place in (row, recipe):
        found = _NOTHING if place is None else _value(place, key)
        if found is not _NOTHING:
            return found
    return otherwise


def devices(*, _root_: DictConfig) -> Any:
    """The number of GPUs of the recipe; one device where ``trainer.accelerator=cpu`` was typed."""
    return 1 if _root_.trainer.accelerator == "cpu" else asked("devices", "auto", _root_=_root_)


def _value(place: Any, key: str) -> Any:
    for step in key.split("."):
        if step not in (place or ()):
            return _NOTHING
        place = place[step]
    return place


def note(settings: Mapping[str, Any]) -> str | None:
    """What is to be said at start-up where the chosen options are no published recipe; None for nothing.

    Args:
        settings: a composed configuration in plain containers.
    """
    recipe = settings.get("recipe") or {}
    published: Mapping[str, list[str]] = recipe.get("published") or {}
    if not published:
        return recipe.get("note")
    sampling, partners = settings["sampling"]["name"], settings["ibs"]["partners"]
    if partners in published.get(sampling, ()):
        return None
    near = sampling if sampling in published else (recipe.get("nearest") or {}).get(sampling, next(iter(published)))
    used = [f"sampling={near} ibs={published[near][0]}"]
    with_ibs = [f"sampling={s} ibs={p}" for s, all_partners in published.items() for p in all_partners if p != "none"]
    if partners != "none" and with_ibs and used[0] not in with_ibs:
        used.append(f"for IBS those of {with_ibs[0]}")
    chosen = f"data={settings['data']['name']} head={settings['head']['name']} sampling={sampling} ibs={partners}"
    return f"no recipe is published for {chosen}: the values of {', '.join(used)} are used"
