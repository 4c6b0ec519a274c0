"""What configurations compute: the resolvers of OmegaConf, and the tables of options."""

from __future__ import annotations

from collections.abc import Sequence

from . import options, recipes


def user_cache() -> str:
    """The user's cache folder of this package."""
    import platformdirs

    return str(platformdirs.user_cache_path("panoptic_ibs"))


def register_resolvers(swept: Sequence[str] = ()) -> None:
    """Make the resolvers of the configurations known to OmegaConf, and the options that stand in tables to Hydra.

    Args:
        swept: keys that the command line gives several values.
    """
    from omegaconf import OmegaConf

    from panoptic_ibs.sweeps import member_name

    recipes.register()
    options.register()
    OmegaConf.register_new_resolver("user_cache", user_cache, replace=True)
    OmegaConf.register_new_resolver("member", lambda *, _root_: member_name(_root_, swept), replace=True)


class Resolvers:
    """Registers the resolvers when it is made, so also in a launcher's worker process that unpickles it."""

    def __init__(self, swept: Sequence[str]) -> None:
        self.swept = swept
        register_resolvers(swept)

    def __reduce__(self) -> tuple[type[Resolvers], tuple[Sequence[str]]]:
        return Resolvers, (self.swept,)
