"""The answer of a folder of runs: which setting is best, by how much, and whether that is more than chance."""

from __future__ import annotations

from dataclasses import dataclass

from panoptic_ibs.metrics.names import Metric, named

from .collection import Collection, Setting, mean_and_deviation, short_label
from .contrasts import Difference, difference
from .wording import data_label

KEYS = ("pq", "pq_things", "confusion@50", "prec_things")
LONGEST = 70  # letters of a setting's name in a sentence
INSTANCES = ("ap", "ap50", "ap75")


@dataclass(frozen=True)
class Lead:
    """The best setting in one number.

    Attributes:
        metric: the number.
        best: the setting with the best mean over its seeds.
        value: that mean and its deviation, in percent.
        second: the next best; None where there is none with this number.
        gap: the best over the second, paired over the seeds that both have; None where they share none.
        first: the plainest setting, where it is neither of the two, and ``over_first`` the difference to it.
    """

    metric: Metric
    best: Setting
    value: str
    second: Setting | None = None
    gap: Difference | None = None
    first: Setting | None = None
    over_first: Difference | None = None

    @property
    def good(self) -> bool:
        """Whether the best is shown to be better than the second: the interval of the difference leaves out zero."""
        return self.gap is not None and self.gap.clear and (self.gap.mean < 0) == self.metric.lower


@dataclass(frozen=True)
class Answer:
    """What the runs of one head and data set say."""

    group: Collection
    leads: list[Lead]

    @property
    def title(self) -> str:
        """Head and data set."""
        run = self.group.runs[0]
        return f"{'Predictions' if run.foreign else run.head_label} on {data_label(run)}"

    def label(self, setting: Setting) -> str:
        """A setting in few words: what tells it apart, or the folder of its first run where that is much."""
        label = short_label(setting, self.group)
        return label if len(label) <= LONGEST else self.group.place(setting.runs[0])

    @property
    def headline(self) -> str:
        """Which setting is best."""
        lead = self.leads[0]
        name, value = self.label(lead.best), f"{lead.value} {lead.metric.short}"
        if len(self.group.settings) == 1:
            return f"One setting, {value}"
        return f"Best is {name}: {value}" if lead.good else f"None is shown to be best; {name} leads with {value}"

    @property
    def said(self) -> str:
        """By how much the best leads, and how sure that is."""
        lead, number = self.leads[0], self.leads[0].metric.short
        if lead.second is None:
            return "There is no other setting to set it beside."
        said = [f"{self.label(lead.best)} over {self.label(lead.second)}: {interval(lead.gap, number)}."]
        if lead.first is not None:
            said.append(f"Over {self.label(lead.first)}: {interval(lead.over_first, number)}.")
        if (settings := len(self.group.settings)) > 2 and lead.gap is not None and lead.gap.half is not None:
            said.append(f"Intervals are not corrected for picking the best of {settings} settings.")
        return " ".join(said)


def interval(gap: Difference | None, number: str) -> str:
    """A difference in words.

    >>> interval(Difference(0.012, 0.015, 3), "PQ")
    '+1.2 points of PQ, 95 % interval -0.3 to +2.7 of 3 pairs of runs; that holds zero, so it may be chance'
    >>> interval(Difference(0.012, None, 1), "PQ")
    '+1.2 points of PQ of one pair of runs; without an interval it may be chance'
    """
    if gap is None:
        return f"a difference of {number} that is not known, as they share no seed"
    amount = f"{100 * gap.mean:+.1f} points of {number}"
    if gap.half is None:
        return f"{amount} of one pair of runs; without an interval it may be chance"
    ends = f"{100 * (gap.mean - gap.half):+.1f} to {100 * (gap.mean + gap.half):+.1f}"
    chance = "" if gap.clear else "; that holds zero, so it may be chance"
    return f"{amount}, 95 % interval {ends} of {gap.pairs} pairs of runs{chance}"


def answers(collection: Collection) -> list[Answer]:
    """The answers of each head and data set that has any number; the first number of each is PQ, or AP of instances."""
    found = []
    for group in collection.groups().values():
        panoptic = any(s.values("pq") for s in group.settings)
        leads = [_lead(group, named(key)) for key in (KEYS if panoptic else INSTANCES)]
        if known := [lead for lead in leads if lead is not None]:
            found.append(Answer(group, known))
    return found


def _lead(group: Collection, metric: Metric) -> Lead | None:
    """The best setting and the second by their means; the earlier, plainer one of equals."""
    sign = 1 if metric.lower else -1
    means = [(sign * mean, i, s) for i, s in enumerate(group.settings) if (mean := s.mean(metric.key)) is not None]
    means.sort(key=lambda m: m[:2])
    if not means:
        return None
    best, value = means[0][2], mean_and_deviation(means[0][2], metric.key)
    if len(means) == 1:
        return Lead(metric, best, value)
    second, first = means[1][2], group.settings[0]
    lead = Lead(metric, best, value, second, difference(best, second, metric.key))
    if first in (best, second) or first.mean(metric.key) is None:
        return lead
    return Lead(metric, best, value, second, lead.gap, first, difference(best, first, metric.key))
