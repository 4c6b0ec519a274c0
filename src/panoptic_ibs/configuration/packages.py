"""Packages of the user's own: ``packages=NAME[,NAME]`` imports them and puts their folder ``conf`` on the search path.

Imported while a command runs, not before: it needs Hydra.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from panoptic_ibs.errors import ConfigError

KEY = "packages"
_searched: list[tuple[str, Path]] = []  # packages and their folders of options, at the moment


def named(arguments: Sequence[str]) -> list[str]:
    """Names of the packages on a command line, as in ``packages=one,two`` or ``packages=[one,two]``.

    Raises:
        ConfigError: what is no name of a package.
    """
    text = next((word.partition("=")[2] for word in reversed(arguments) if _is_key(word)), "")
    names = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
    return checked([name for name in names if name not in ("", "null")])


def as_list(arguments: Sequence[str]) -> list[str]:
    """The command line with its packages as a list: Hydra would take ``packages=one,two`` for a sweep."""
    listed = f"{KEY}=[{','.join(named(arguments))}]"
    return [listed if _is_key(word) else word for word in arguments]


def _is_key(word: str) -> bool:
    key, sign, _ = word.partition("=")
    return bool(sign) and key.lstrip("+") == KEY


def checked(names: Sequence[str]) -> list[str]:
    """The names, each once.

    Raises:
        ConfigError: what is no name of a package as ``import`` takes it.
    """
    for name in names:
        if not name.isidentifier():
            raise ConfigError(f"packages={name}: give the name that Python imports the package by, such as own_head.")
    return list(dict.fromkeys(names))


@contextmanager
def searched(names: Sequence[str]) -> Iterator[None]:
    """Import packages; within the block Hydra finds the options in their folders ``conf``, after this package's own.

    Raises:
        ConfigError: one cannot be imported.
    """
    found = [(name, folder) for name in names for folder in _option_folders(name)]
    if PackagesOnSearchPath not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(PackagesOnSearchPath)
    former = list(_searched)
    _searched[:] = found
    try:
        yield
    finally:
        _searched[:] = former


def _option_folders(name: str) -> list[Path]:
    try:
        package = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever its code raises
        told = " ".join(str(error).split())
        raise ConfigError(
            f"packages={name}: the package cannot be imported ({type(error).__name__}: {told}). Install it into the "
            "Python that runs this command, or repair it."
        ) from error
    folders = [Path(place) / "conf" for place in getattr(package, "__path__", ())]
    return [folder for folder in folders if folder.is_dir()]


class PackagesOnSearchPath(SearchPathPlugin):
    """Tells Hydra where the options of the named packages are."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra's way to ask."""
        for name, folder in _searched:
            search_path.append(provider=name, path=f"file://{folder}")
