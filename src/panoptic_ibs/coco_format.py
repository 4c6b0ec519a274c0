"""The COCO panoptic format as types that pydantic checks, for annotations and predictions alike.

Import it inside functions: pydantic is not needed to build and run a model. Whole numbers may be written as 12 or 12.0
(as pandas does), never as text or true; they arrive as int.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypedDict

MAX_ID = (1 << 24) - 1  # of a segment: three bytes of an RGB PNG; 0 is void
MAX_SIDE = (1 << 31) - 1
MAX_CHARACTERS = 1000  # of a name; arrays of names are as wide as the longest one


class Expected:
    """Annotation: what is expected in our words, told once for all members of a union and all parts of a list."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's way to ask for the schema."""
        return core_schema.custom_error_schema(handler(source), "expected", custom_error_message=self.words)


class Whole:
    """Annotation of ``int``: whole numbers from ``low`` to ``high``; 12.0 becomes 12."""

    def __init__(self, low: int, high: int, words: str = "") -> None:
        self.low, self.high = low, high
        self.words = words or f"a whole number from {low} to {high}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's way to ask for the schema."""
        as_int = core_schema.int_schema(strict=True, ge=self.low, le=self.high)
        is_whole = core_schema.float_schema(strict=True, ge=self.low, le=self.high, multiple_of=1, allow_inf_nan=False)
        # The limits again: as a float, 2^63 - 1 is 2^63.
        as_float = core_schema.chain_schema([core_schema.no_info_after_validator_function(int, is_whole), as_int])
        union = core_schema.union_schema([as_int, as_float])
        return core_schema.custom_error_schema(union, "expected", custom_error_message=self.words)


_Bool = Annotated[bool, Field(strict=True)]
_Name = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_CHARACTERS, pattern=r"^[^\x00]*$")]
_Place = Annotated[float, Field(strict=True, ge=-(2.0**31), le=2.0**31, allow_inf_nan=False)]
_Extent = Annotated[float, Field(strict=True, ge=0, le=2.0**31, allow_inf_nan=False)]
_Bytes = Annotated[list[Annotated[int, Whole(0, 255)]], Field(min_length=3, max_length=4)]
_Hex = Annotated[str, Field(strict=True, pattern=r"^#([0-9a-fA-F]{3}|[0-9a-fA-F]{6}|[0-9a-fA-F]{8})$")]

Name = Annotated[_Name, Expected(f"text of 1 to {MAX_CHARACTERS} characters, none of them NUL")]
SegmentId = Annotated[int, Whole(1, MAX_ID, f"a whole number from 1 to {MAX_ID} (0 is void)")]
CategoryId = Annotated[int, Whole(-(1 << 63), (1 << 63) - 1, "a whole number of at most 64 bits")]
ImageId = Annotated[CategoryId | _Name, Expected(f"a whole number, or text of 1 to {MAX_CHARACTERS} characters")]
IsThing = Annotated[Annotated[int, Whole(0, 1)] | _Bool, Expected("0 (stuff) or 1 (thing)")]
IsCrowd = Annotated[Annotated[int, Whole(0, 1)] | _Bool, Expected("0 or 1, or leave it out")]
Side = Annotated[int, Whole(1, MAX_SIDE)]
Box = Annotated[
    tuple[_Place, _Place, _Extent, _Extent],
    Expected("four finite numbers [x, y, width, height], width and height not negative"),
]
Area = Annotated[
    float, Field(strict=True, ge=0, le=2.0**53, allow_inf_nan=False), Expected("a number of pixels, 0 or more")
]
Color = Annotated[
    _Bytes | _Hex | None,
    Expected('[r, g, b] of whole numbers from 0 to 255, text such as "#80407f", or leave it out'),
]


class Image(TypedDict):
    """An entry of ``images``; the sides are in pixels."""

    id: ImageId
    file_name: Name
    height: Side
    width: Side


class Segment(TypedDict):
    """An entry of ``segments_info``; box and area are in pixels."""

    id: SegmentId
    category_id: CategoryId
    iscrowd: NotRequired[IsCrowd]
    bbox: Box
    area: Area


class Annotation(TypedDict):
    """An entry of ``annotations``."""

    image_id: ImageId
    file_name: Name
    segments_info: list[Segment]


class Category(TypedDict):
    """An entry of ``categories``."""

    id: CategoryId
    name: Name
    isthing: IsThing
    color: NotRequired[Color]


class Panoptic(TypedDict):
    """A panoptic JSON; what else stands in it is not looked at."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


class ClassRow(TypedDict):
    """A class as checkpoints keep it."""

    name: Name
    dataset_id: CategoryId
    is_thing: IsThing
    color: Color


PANOPTIC: TypeAdapter[Panoptic] = TypeAdapter(Panoptic)
CATEGORIES: TypeAdapter[list[Category]] = TypeAdapter(list[Category])
CLASS_ROWS: TypeAdapter[list[ClassRow]] = TypeAdapter(list[ClassRow])


def rgb_of(color: list[int] | str | None) -> tuple[int, int, int] | None:
    """Red, green and blue of a sound :data:`Color`; alpha is dropped."""
    if isinstance(color, str):
        digits = color[1:] if len(color) > 4 else "".join(2 * digit for digit in color[1:])
        color = list(bytes.fromhex(digits))
    return (color[0], color[1], color[2]) if color else None
