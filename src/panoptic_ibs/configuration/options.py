"""Options of configuration groups: a file each in ``conf/GROUP/``, or an entry each in ``conf/options/GROUP.yaml``.

Such a table is for options of a few lines. An entry is what a file of the group would hold with ``@package _global_``,
and has four words of its own: ``like: NAME`` begins with another option of the group, ``begin: {GROUP: OPTION}`` with
options of groups that nothing has chosen before, ``choose: {GROUP: OPTION}`` chooses options of the others (the command
line wins), and ``axes: {KEY: "A,B"}`` is what a sweep varies. Names that begin with an underscore are for YAML's
anchors.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """The configuration folder: inside an installed package, else the top-level ``conf`` of the repository."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / "conf"


@functools.cache
def tables() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Group -> option -> entry, as they are written."""
    from omegaconf import OmegaConf

    root = conf_dir() / "options"
    found: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for path in sorted(root.rglob("*.yaml")):
        entries: Any = OmegaConf.to_container(OmegaConf.load(path))
        group = path.relative_to(root).with_suffix("").as_posix()
        found[group] = {str(name): entry for name, entry in entries.items() if not str(name).startswith("_")}
    return found


def groups() -> list[str]:
    """All configuration groups."""
    root = conf_dir()
    folders = {path.parent.relative_to(root).as_posix() for path in root.glob("*/**/*.yaml")}
    return sorted({*(f for f in folders if f.partition("/")[0] != "options"), *tables()})


def options(group: str) -> list[str]:
    """The options of a group; none for what is no group."""
    return sorted([*(path.stem for path in (conf_dir() / group).glob("*.yaml")), *tables().get(group, {})])


def register() -> None:
    """Make the tables' options known to Hydra."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if "none.yaml" in store.repo.get("experiment", {}):
        return  # done before
    for group, entries in tables().items():
        for name in entries:
            inner, _, last = name.rpartition("/")
            place = f"{group}/{inner}" if inner else group
            store.store(name=last, node=node(group, name), group=place, package="_global_", provider="panoptic_ibs")


def node(group: str, name: str) -> dict[str, Any]:
    """An entry as the configuration that Hydra reads."""
    entry = tables()[group][name]
    made = {key: value for key, value in entry.items() if key not in ("like", "begin", "choose", "axes")}
    like = [entry["like"]] if "like" in entry else []
    begun = [{f"/{key}": value} for key, value in entry.get("begin", {}).items()]
    made["defaults"] = [*like, *begun, *({f"override /{key}": value} for key, value in entry.get("choose", {}).items())]
    if group == "sweep":
        made["sweep_name"] = name.replace("/", "_")
    if "axes" in entry:
        hydra = made.get("hydra", {})
        made["hydra"] = {**hydra, "sweeper": {**hydra.get("sweeper", {}), "params": entry["axes"]}}
    return made
