"""Schemas of predictions: COCO panoptic JSONs and COCO's results format. Keys beyond these are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from panoptic_ibs.coco_format import CategoryId, ImageId, SegmentId
from panoptic_ibs.schemas import Fault, decode, faults_of

STRICT = ConfigDict(strict=True)
PANOPTIC = "Each annotation needs image_id and segments_info (of each segment id, category_id and, if any, score)"
RESULTS = (
    "Each entry needs image_id, category_id, score and segmentation: run lengths or polygons of three points or more"
)
_MOST = 3.4e38  # scores are ranked in single precision
_TOLD = 200  # entries whose faults are put in words


Score = Annotated[float, Field(allow_inf_nan=False, ge=-_MOST, le=_MOST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Length = Annotated[int, Field(ge=0, lt=1 << 32)]


@with_config(STRICT)
class PanopticSegment(TypedDict):
    """A predicted segment: ``id`` in the PNG, the data set's ``category_id``, and what it is ranked by."""

    id: SegmentId
    category_id: CategoryId
    score: NotRequired[Score]


@with_config(STRICT)
class PanopticEntry(TypedDict):
    """The prediction of an image; ``file_name`` is the PNG's, that of the image id where there is none."""

    image_id: ImageId
    file_name: NotRequired[str | None]
    segments_info: list[PanopticSegment]


@with_config(STRICT)
class RunLengths(TypedDict):
    """A mask as run lengths, compressed (text) or not."""

    size: Annotated[list[Length], Field(min_length=2, max_length=2)]
    counts: str | list[Length]


@with_config(STRICT)
class InstanceEntry(TypedDict):
    """A predicted instance; polygons are lists of x and y in turn."""

    image_id: ImageId
    category_id: CategoryId
    score: Score
    segmentation: RunLengths | Annotated[list[Annotated[list[Finite], Field(min_length=6)]], Field(min_length=1)]


@with_config(STRICT)
class PanopticFile(TypedDict):
    """A COCO panoptic JSON."""

    annotations: list[PanopticEntry]
    categories: NotRequired[Any]


_PANOPTIC, _ENTRY = TypeAdapter(PanopticFile), TypeAdapter(PanopticEntry)
_RESULTS, _INSTANCE = TypeAdapter(list[InstanceEntry]), TypeAdapter(InstanceEntry)


class Read(NamedTuple):
    """What a JSON holds: sound ``entries`` by their number, ``faults`` of the others, ``categories`` unchecked."""

    entries: list[tuple[int, Any]]
    faults: list[str]
    categories: Any = None


def is_results(text: bytes) -> bool:
    """Whether a JSON is a list, as COCO's results are."""
    return text[:4096].lstrip()[:1] == b"["


def read_panoptic(text: bytes, file: Path) -> Read | None:
    """A COCO panoptic JSON; None where it is another kind of JSON.

    Raises:
        DataError: no JSON.
    """
    try:
        content: Any = _PANOPTIC.validate_json(text)
        return Read(list(enumerate(content["annotations"])), [], content.get("categories"))
    except ValidationError:
        content = decode(text, file, "the JSON of the predictions")
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        return None
    return _sorted_out(content["annotations"], _ENTRY, ("annotations",))._replace(categories=content.get("categories"))


def read_results(text: bytes, file: Path) -> Read:
    """A list in COCO's results format.

    Raises:
        DataError: no JSON.
    """
    try:
        return Read(list(enumerate(_RESULTS.validate_json(text))), [])
    except ValidationError:
        return _sorted_out(decode(text, file, "the JSON of the predictions"), _INSTANCE, ())


def _sorted_out(entries: Sequence[Any], schema: TypeAdapter[Any], steps: tuple[str, ...]) -> Read:
    found = Read([], [])
    for number, entry in enumerate(entries):
        try:
            found.entries.append((number, schema.validate_python(entry)))
        except ValidationError as error:
            many = len(found.faults) > _TOLD
            found.faults.extend(
                ["another entry"]
                if many
                else [str(Fault((*steps, number, *fault.steps), fault.text)) for fault in faults_of(error, entry)]
            )
    return found
