"""The annotation JSON through its schema into flat arrays: all faults are found, what is sound is kept."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from panoptic_ibs.errors import DataError
from panoptic_ibs.schemas import Fault, decode, faults_in, shown, text_of, told

from .records import Defect, RecordTable

if TYPE_CHECKING:
    from panoptic_ibs.coco_format import Annotation, Image, Panoptic, Segment

WHAT = "the annotation JSON"
LISTS = ("images", "annotations", "categories")
_NAMED_BY = {"images": ("image", "id"), "annotations": ("image", "image_id"), "categories": ("category", "name")}


@dataclass
class Parsed:
    """What a JSON holds.

    Attributes:
        table: the sound entries.
        defects: what is wrong with the others.
        left_out: per image id, the ids of segments that were left out.
        categories_left_out: ids of categories that were left out.
    """

    table: RecordTable
    defects: list[Defect]
    left_out: dict[str, set[int]] = field(default_factory=dict)
    categories_left_out: set[int] = field(default_factory=set)


def read_annotations(path: Path) -> bytes:
    """The bytes of an annotation JSON, in UTF-8 without a byte order mark.

    Raises:
        DataError: missing, no regular file, or not readable.
    """
    return text_of(path, WHAT, "Check data.root and the split's name.")


def parse(path: Path, raw: bytes | None = None) -> Parsed:
    """Read an annotation JSON.

    Args:
        path: the panoptic JSON.
        raw: its bytes, as :func:`read_annotations` gives them; read when None.

    Raises:
        DataError: the file is missing, no JSON, or lacks one of its lists.
    """
    raw = read_annotations(path) if raw is None else raw
    with _no_collection():
        return _Parser(path).parse(raw)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: it would walk through the millions of dictionaries of a large JSON again and again."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class _Parser:
    """Turns a panoptic JSON into a table; entries with faults are left out and told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = Parsed(table=None, defects=[])  # type: ignore[arg-type]  # set at the end of parse
        self._faulty_images: set[str] = set()  # images that are left out; their annotations are, too
        self._annotated: set[str] = set()  # images that some annotation names

    def defect(self, kind: str, text: str) -> None:
        self.found.defects.append(Defect(kind, str(self.path), f"{self.path}: {text}"))

    def parse(self, raw: bytes) -> Parsed:
        content, places = self._checked(raw)
        images = self._images(content["images"], places["images"])
        kept: list[tuple[Image, Annotation]] = []
        taken: set[str] = set()
        for annotation, place in zip(content["annotations"], places["annotations"], strict=True):
            name = str(annotation["image_id"])
            if name not in images:
                if name not in self._faulty_images:
                    text = f"annotations[{place}].image_id {shown(annotation['image_id'])} is not in 'images'."
                    self.defect("unknown image", f"{text} Add the image or drop it.")
            elif name in taken:
                self.defect("duplicate id", f"annotations[{place}]: a second annotation of image {name}. Keep one.")
            else:
                taken.add(name)
                self._drop_twins(annotation, place)
                kept.append((images[name], annotation))
        self._annotated |= taken
        if not kept and not self.found.defects:
            self.defect("empty split", "the split is empty: 'annotations' holds no image. Check the split's name.")
        unannotated = [name for name in images if name not in self._annotated]
        self.found.table = _table(kept, unannotated, content["categories"])
        return self.found

    def _checked(self, raw: bytes) -> tuple[Panoptic, dict[str, list[int]]]:
        """The sound entries, and of each list their positions in the file."""
        from pydantic import ValidationError

        from panoptic_ibs.coco_format import PANOPTIC

        try:
            sound = PANOPTIC.validate_json(raw)  # checked while parsed: as fast as parsing alone
            return sound, {name: list(range(len(sound[name]))) for name in LISTS}  # type: ignore[literal-required]
        except ValidationError:
            content = decode(raw, self.path, WHAT)
        faults = faults_in(PANOPTIC, content)
        if any(len(f.steps) < 2 for f in faults):
            faults = [f for f in faults if len(f.steps) < 2]
            raise DataError(told(self.path, faults, "A panoptic JSON (COCO format) is expected."))
        for fault in faults:
            self.defect("malformed", f"{_named(fault, content)}.")
        places = self._without(content, faults)
        return PANOPTIC.validate_python(content), places

    def _without(self, content: dict[str, Any], faults: Iterable[Fault]) -> dict[str, list[int]]:
        """Take the faulty entries out of ``content``; returns the positions of those that stay."""
        entries: dict[str, set[int]] = {name: set() for name in LISTS}
        segments: dict[int, set[int]] = {}
        for fault in faults:
            name, place = str(fault.steps[0]), int(fault.steps[1])
            if name == "annotations" and len(fault.steps) > 3 and fault.steps[2] == "segments_info":
                segments.setdefault(place, set()).add(int(fault.steps[3]))
            else:
                entries[name].add(place)
        for place, rows in segments.items():
            annotation = content["annotations"][place]
            listed = annotation["segments_info"]
            image = _id_of(annotation, "image_id")
            ids = {_id_of(listed[row], "id") for row in rows}
            self.found.left_out.setdefault(image or "", set()).update(int(i) for i in ids if i and i.isdecimal())
            annotation["segments_info"] = [s for row, s in enumerate(listed) if row not in rows]
        self._faulty_images = {i for p in entries["images"] if (i := _id_of(content["images"][p], "id"))}
        self._annotated = {i for p in entries["annotations"] if (i := _id_of(content["annotations"][p], "image_id"))}
        gone = (_id_of(content["categories"][p], "id") for p in entries["categories"])
        self.found.categories_left_out = {int(i) for i in gone if i and i.removeprefix("-").isdecimal()}
        places = {name: [p for p in range(len(content[name])) if p not in entries[name]] for name in LISTS}
        for name in LISTS:
            content[name] = [content[name][p] for p in places[name]]
        return places

    def _images(self, entries: list[Image], places: list[int]) -> dict[str, Image]:
        images: dict[str, Image] = {}
        for entry, place in zip(entries, places, strict=True):
            name = str(entry["id"])
            if name in images:
                kinds = "" if type(entry["id"]) is type(images[name]["id"]) else ", as a number and as text"
                self.defect("duplicate id", f"images[{place}]: the id {name} occurs twice{kinds}. Ids must be unique.")
            else:
                images[name] = entry
        return images

    def _drop_twins(self, annotation: Annotation, place: int) -> None:
        """Of segments with the same id, the first stays."""
        segments = annotation["segments_info"]
        first = {s["id"]: s for s in reversed(segments)}
        if len(first) == len(segments):
            return
        where = f"annotations[{place}].segments_info (image {annotation['image_id']})"
        for name, count in Counter(s["id"] for s in segments).items():
            if count > 1:
                self.defect("duplicate id", f"{where} lists the id {name} twice. Ids must be unique.")
        annotation["segments_info"] = [s for s in segments if first[s["id"]] is s]


def _id_of(entry: Any, key: str) -> str | None:
    """An id of an unchecked entry, as ids are compared; None where there is none to compare."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _named(fault: Fault, content: dict[str, Any]) -> Fault:
    """The fault, with the name of the image, segment or category that it is in."""
    kind, place = str(fault.steps[0]), fault.steps[1]
    entry = content[kind][place]
    title, key = _NAMED_BY[kind]
    name = None if fault.steps[2:] == (key,) else _id_of(entry, key)
    names = [f"{title} {name}"] if name else []
    if kind == "annotations" and len(fault.steps) > 4:
        name = _id_of(entry["segments_info"][fault.steps[3]], "id")
        names += [f"segment {name}"] if name and fault.steps[4] != "id" else []
    return Fault(fault.steps, f"({', '.join(names)}) {fault.text}" if names else fault.text)


def _table(kept: list[tuple[Image, Annotation]], unannotated: list[str], categories: Iterable[Any]) -> RecordTable:
    segments: list[Segment] = [s for _, annotation in kept for s in annotation["segments_info"]]
    category_ids = np.array([s["category_id"] for s in segments], dtype=np.int64)
    crowd = np.array([s.get("iscrowd", 0) for s in segments], dtype=bool)
    boxes = np.array([s["bbox"] for s in segments], dtype=np.float32).reshape(-1, 4)
    areas = np.array([s["area"] for s in segments], dtype=np.float64).astype(np.int64)
    usable = ~crowd & (boxes[:, 2] > 0) & (boxes[:, 3] > 0) & (areas > 0)
    candidates = np.flatnonzero(usable).astype(np.int32)
    sizes = np.array([(image["height"], image["width"]) for image, _ in kept], dtype=np.int32).reshape(-1, 2)
    return RecordTable(
        image_ids=np.array([str(image["id"]) for image, _ in kept], dtype=np.str_),
        image_files=np.array([image["file_name"] for image, _ in kept], dtype=np.str_),
        png_files=np.array([annotation["file_name"] for _, annotation in kept], dtype=np.str_),
        sizes=sizes,
        offsets=np.cumsum([0, *(len(annotation["segments_info"]) for _, annotation in kept)], dtype=np.int64),
        segment_ids=np.array([s["id"] for s in segments], dtype=np.int32),
        category_ids=category_ids,
        iscrowd=crowd,
        boxes=boxes,
        areas=areas,
        index_rows=candidates[np.argsort(category_ids[candidates], kind="stable")],
        integer_ids=np.array(all(isinstance(image["id"], int) for image, _ in kept)),
        unannotated=np.array(unannotated, dtype=np.str_),
        categories=np.array(json.dumps(categories)),
    )
