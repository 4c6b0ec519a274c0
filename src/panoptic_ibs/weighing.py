"""How the loss terms of a head become one loss: fixed weights, or weights that are learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import ConfigError

Terms = dict[str, Tensor]


class Fixed(nn.Module):
    """Every term times the head's own weight of it."""

    def forward(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Terms:
        """The weighted terms, whose sum is the loss.

        Args:
            terms: the head's unweighted loss terms by name.
            weights: the head's weights by name.

        Raises:
            ConfigError: a term without a weight, or a weight without a term.
        """
        check_terms(terms, weights)
        return {name: term if weights[name] == 1 else weights[name] * term for name, term in terms.items()}

    def prepare(self, weights: Mapping[str, float]) -> None:
        """Nothing has to be made for a head."""

    def report(self) -> Terms:
        """What is logged beside the weighted terms, by name."""
        return {}


class Uncertainty(nn.Module):
    """Learnt weights by task uncertainty (Kendall et al., "Multi-Task Learning Using Uncertainty", 2018, Eq. 10).

    The terms of a group are added up with the head's weights to L. With the group's learnt log-variance s it becomes
    ``exp(-s) L + s / 2``, or ``exp(-s) L / 2 + s / 2`` for a regression. Terms in no group keep their fixed weights.
    The total may be negative: at the best s of a group its part is (1 + log(2 L)) / 2.

    Args:
        groups: terms by the name of their group; None makes every term a group of its own.
        regression: groups that are regressions.
        initial: first s of every group.
        limit: s is held between minus and plus this.

    Raises:
        ConfigError: no group; a group without terms, a term in two groups; a regression that is no group.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]] | None = None,
        regression: Sequence[str] = (),
        initial: float = 0.0,
        limit: float = 5.0,
    ) -> None:
        super().__init__()
        self.groups = None if groups is None else {name: tuple(terms) for name, terms in groups.items()}
        self.regression, self.initial, self.limit = tuple(regression), initial, limit
        self.log_variance = nn.ParameterDict()
        self._raw: Terms = {}
        if self.groups is not None:
            self._check_groups(self.groups)
            self._make(self.groups)

    def _check_groups(self, groups: Mapping[str, Sequence[str]]) -> None:
        listed = [term for terms in groups.values() for term in terms]
        if not groups or not all(groups.values()):
            raise ConfigError("weigh.groups: every group needs at least one loss term; null makes each term a group.")
        if twice := sorted({term for term in listed if listed.count(term) > 1}):
            raise ConfigError(f"weigh.groups: the loss term {twice[0]} is in two groups. Keep it in one.")

    def _make(self, names: Mapping[str, Sequence[str]]) -> None:
        if unknown := sorted(set(self.regression) - set(names)):
            raise ConfigError(f"weigh.regression: {unknown[0]} is no group; there are {', '.join(names)}.")
        for name in names:
            self.log_variance[name] = nn.Parameter(torch.tensor(float(self.initial)))

    def prepare(self, weights: Mapping[str, float]) -> None:
        """Make the parameters for a head with these weights, before the optimiser is built.

        Raises:
            ConfigError: a group holds a term that the head does not have.
        """
        if self.groups is None:
            self.groups = {name: (name,) for name in weights}
            self._make(self.groups)
        for group, terms in self.groups.items():
            if unknown := sorted(set(terms) - set(weights)):
                raise ConfigError(
                    f"weigh.groups.{group}: the head has no loss term {unknown[0]}; it has {', '.join(weights)}."
                )

    def forward(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Terms:
        """The weighted terms, one a group, whose sum is the loss; arguments and errors as :meth:`Fixed.forward`."""
        check_terms(terms, weights)
        if self.groups is None:
            raise ConfigError("weigh=uncertainty: prepare(head.weights) comes before the first step.")
        left, found = dict(terms), {}
        for group, names in self.groups.items():
            raw = torch.stack([weights[name] * left.pop(name).float() for name in names]).sum()
            self._raw[group] = raw.detach()
            s = self.log_variance[group].clamp(-self.limit, self.limit)
            found[group] = (0.5 if group in self.regression else 1.0) * torch.exp(-s) * raw + 0.5 * s
        return found | {name: weights[name] * term for name, term in left.items()}

    def report(self) -> Terms:
        """``raw_GROUP``, the loss before it is weighed, and ``log_variance_GROUP``."""
        values = {f"log_variance_{name}": s.detach() for name, s in self.log_variance.items()}
        return {f"raw_{name}": raw for name, raw in self._raw.items()} | values


Weighing = Fixed | Uncertainty


def check_weights(weights: object, head: str) -> None:
    """Make sure at start-up that a head has weights at all; the first step shows whether they are those of its terms.

    Args:
        weights: of the head.
        head: its name, for messages.

    Raises:
        ConfigError: it has none, or some that are no finite numbers.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(
            f"head={head}: it has no loss weights. Its constructor sets self.weights = {{TERM: WEIGHT}}, with every "
            "loss term by name."
        )
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"head={head}: its loss weight of {name} is {weight!r}; it must be a finite number.")


def check_terms(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    """Make sure that a head's terms and weights have the same names.

    Raises:
        ConfigError: they have not.
    """
    if terms.keys() == weights.keys():
        return
    lacking, idle = sorted(terms.keys() - weights.keys()), sorted(weights.keys() - terms.keys())
    said = f"its loss term {lacking[0]} has no weight" if lacking else f"its weight {idle[0]} has no loss term"
    raise ConfigError(f"The head's `weights` and the terms of `losses` must have the same names: {said}.")
