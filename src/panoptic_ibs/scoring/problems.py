"""Everything that is wrong with predictions, told at once."""

from __future__ import annotations

from panoptic_ibs.errors import DataError

SHOWN = 20  # of each kind
# Kind -> (what it is, remedy), in the order of the message.
KINDS = {
    "malformed": (
        "malformed entry",
        "Write COCO panoptic format: image_id, file_name, segments_info (id, category_id)",
    ),
    "duplicate": ("image predicted twice", "Keep one prediction an image"),
    "missing": ("no prediction", "Predict every image of the split"),
    "extra": ("image that the split does not have", "Check data.val, or take the prediction out"),
    "classes": ("category ids that are not the data set's", "Write the data set's own category ids"),
    "unknown class": ("unknown category", "Write the data set's own category ids"),
    "no file": ("PNG that is missing", "Check the PNG's name and folder"),
    "broken file": ("PNG that cannot be decoded", "Write the file again"),
    "size": ("prediction of another size", "Predict at the size of the annotation"),
    "twice": ("segments_info lists an id twice", "Ids of the segments of an image must differ"),
    "unlisted": ("id in the PNG that segments_info does not list", "List the segment, or paint it 0 (void)"),
    "absent": ("id in segments_info that the PNG does not hold", "Take the segment out of segments_info"),
    "truth": ("defect of the ground truth", "Run panoptic_ibs.prepare check"),
}


class Problems:
    """Collects faults by kind; one message at the end, with the first :data:`SHOWN` of each kind.

    Args:
        source: the file that is judged, for the message.
    """

    def __init__(self, source: object) -> None:
        self.source = source
        self.found: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __len__(self) -> int:
        return sum(self.counts.values())

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

    def message(self) -> str:
        """One line for one fault; else a line for each kind."""
        if len(self) == 1:
            ((kind, (text,)),) = self.found.items()
            return f"{self.source}: {text}: {KINDS[kind][0]}. {KINDS[kind][1]}. Nothing was scored."
        lines = [f"{self.source}: {len(self)} faults; nothing was scored."]
        for kind, (what, remedy) in KINDS.items():
            if kind in self.counts:
                rest = self.counts[kind] - len(self.found[kind])
                more = f"; and {rest} more" if rest else ""
                lines.append(f"  {what} ({self.counts[kind]}): {'; '.join(self.found[kind])}{more}. {remedy}.")
        return "\n".join(lines)


def raise_all(found: list[Problems]) -> None:
    """Raise what several sets have.

    Raises:
        DataError: one of them holds a fault.
    """
    bad = [p.message() for p in found if p]
    if bad:
        raise DataError("\n".join(bad))
