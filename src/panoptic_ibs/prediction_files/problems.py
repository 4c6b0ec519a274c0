"""Everything that is wrong with predictions, told at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from panoptic_ibs.errors import DataError

SHOWN = 20  # of each kind
# Kind -> (what it is, remedy), in the order of the message.
KINDS = {
    "malformed": ("malformed entry", "Write COCO panoptic format, or COCO's results format"),
    "duplicate": ("image predicted twice", "Keep one prediction an image"),
    "outside": (
        "PNG outside of the folder of the predictions",
        "Take '..' and absolute paths out of file_name, or set data.allow_outside=true",
    ),
    "classes": ("category ids that are not the data set's", "Write the data set's own category ids"),
    "missing": ("no prediction", "Predict every image of the split"),
    "extra": ("image that the split does not have", "Check data.val, or take the prediction out"),
    "unknown class": ("unknown category", "Write the data set's own category ids"),
    "no file": ("PNG that is missing", "Check the PNG's name and folder"),
    "broken file": ("PNG that cannot be decoded", "Write the file again"),
    "size": ("prediction of another size", "Predict at the size of the annotation"),
    "twice": ("segments_info lists an id twice", "Ids of the segments of an image must differ"),
    "unlisted": ("id in the PNG that segments_info does not list", "List the segment, or paint it 0 (void)"),
    "absent": ("id in segments_info that the PNG does not hold", "Take the segment out of segments_info"),
    "truth": ("defect of the ground truth", "Run panoptic_ibs.prepare check"),
}
FATAL = ("malformed", "duplicate", "outside", "classes")
"""Faults of the whole set: they are found before the first image is read, and nothing is scored then."""


class Problems:
    """Collects faults by kind; one message at the end, with the first :data:`SHOWN` of each kind.

    Args:
        source: the file that is judged, for the message.
        remedies: by kind, in place of those of :data:`KINDS`.
    """

    def __init__(self, source: object, remedies: Mapping[str, str] | None = None) -> None:
        self.source, self.remedies = source, dict(remedies or {})
        self.found: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __len__(self) -> int:
        return sum(self.counts.values())

    @property
    def fatal(self) -> bool:
        """Whether the whole set is concerned."""
        return not self.counts.keys().isdisjoint(FATAL)

    def add(self, kind: str, text: str) -> None:
        """Note a fault of one of :data:`KINDS`; memory does not grow with their number."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        kept = self.found.setdefault(kind, [])
        if len(kept) < SHOWN:
            kept.append(text)

    def merge(self, other: Problems) -> None:
        """Take over what another one found."""
        for kind, texts in other.found.items():
            kept = self.found.setdefault(kind, [])
            kept += texts[: SHOWN - len(kept)]
            self.counts[kind] = self.counts.get(kind, 0) + other.counts[kind]

    def message(self, done: str = "Nothing was scored") -> str:
        """One line for one fault; else a line for each kind. ``done`` says what was scored all the same."""
        if len(self) == 1:
            ((kind, (text,)),) = self.found.items()
            what, remedy = self._words(kind)
            return f"{self.source}: {text}: {what}. {remedy}. {done}."
        lines = [f"{self.source}: {len(self)} faults; {done[:1].lower()}{done[1:]}."]
        for kind in KINDS:
            if kind in self.counts:
                what, remedy = self._words(kind)
                rest = self.counts[kind] - len(self.found[kind])
                more = f"; and {rest} more" if rest else ""
                lines.append(f"  {what} ({self.counts[kind]}): {'; '.join(self.found[kind])}{more}. {remedy}.")
        return "\n".join(lines)

    def listed(self) -> list[str]:
        """The faults one by one, for a file: the first :data:`SHOWN` of each kind, and how many more there are."""
        lines = []
        for kind, (what, _) in KINDS.items():
            texts = self.found.get(kind, [])
            rest = self.counts.get(kind, 0) - len(texts)
            lines += [f"{text}: {what}" for text in texts] + ([f"and {rest} more: {what}"] if rest else [])
        return lines

    def _words(self, kind: str) -> tuple[str, str]:
        what, remedy = KINDS[kind]
        return what, self.remedies.get(kind, remedy)


def raise_all(found: Iterable[Problems]) -> None:
    """Raise what several sets have.

    Raises:
        DataError: one of them holds a fault.
    """
    bad = [p.message() for p in found if p]
    if bad:
        raise DataError("\n".join(bad))
