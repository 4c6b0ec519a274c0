"""Renaming tensors by rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Rule = tuple[str, str]
"""A pattern that must match a whole name, and its replacement. ``NAME#0``, ``NAME#1`` ... are parts of one tensor that
are joined along their first dimension."""


def rename(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Apply the first rule that matches each name.

    Args:
        state: tensors by their old names.
        rules: see :data:`Rule`.

    Returns:
        Tensors by their new names, and the old name of each new one; names that no rule matches are left out.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    found: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for name, value in state.items():
        for pattern, replacement in compiled:
            match = pattern.fullmatch(name)
            if match:
                new = match.expand(replacement)
                found[new], source[new] = value, name
                break
    return join_parts(found, source)


def join_parts(found: dict[str, Tensor], source: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Join ``NAME#0``, ``NAME#1`` ... to ``NAME``."""
    whole = {new: value for new, value in found.items() if "#" not in new}
    old = {new: source[new] for new in whole}
    for stem in dict.fromkeys(new.partition("#")[0] for new in found if "#" in new):
        parts = sorted(new for new in found if new.startswith(stem + "#"))
        whole[stem] = torch.cat([found[p] for p in parts])
        old[stem] = " + ".join(source[p] for p in parts)
    return whole, old


def under(prefix: str, rules: Sequence[Rule], place: str) -> list[Rule]:
    """Rules for names below ``prefix`` (a pattern), whose new names lie below ``place``."""
    return [(prefix + pattern, place + replacement) for pattern, replacement in rules]


def numbered(rule: Rule, numbers: Iterable[int], offset: int) -> list[Rule]:
    """One rule for each number n: ``{n}`` in the pattern is n, ``{m}`` in the replacement is n + offset."""
    pattern, replacement = rule
    return [(pattern.replace("{n}", str(n)), replacement.replace("{m}", str(n + offset))) for n in numbers]
