"""Parameters and answer of POST /segment, and what other routes share with it.

Parameters are validated with these classes, answers are only documented by them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.model_config import MAX_INT, MAX_SIDE_PX, Task
from pipeline.postprocess import Overlaps
from pipeline.scale import Scale
from pipeline.writers import FormatName
from service.work.request import Masks, Priority

_VERSION = re.compile("[1-9][0-9]{0,18}")
TimeoutMs = Annotated[
    int | None,
    Field(
        ge=1,
        le=86_400_000,
        description="deadline; then the request is answered 504 and its work stops; also as header "
        "X-Timeout-Ms; default: the server's",
    ),
]

ObjectSizePx = Annotated[
    float | None,
    Field(
        gt=0,
        le=MAX_SIDE_PX,
        description="typical diameter of the objects in the image; the image is shown to the model "
        "at the scale where they are as large as it expects; default: no rescaling",
    ),
]
UmPerPx = Annotated[
    float | None,
    Field(
        gt=0,
        le=MAX_INT,
        description="size of the image's pixels in micrometres, instead of object_size_px; "
        "default: as a TIFF states it",
    ),
]
Channel = Annotated[
    str | None,
    Field(
        max_length=200,
        description="of a TIFF with several channels: the name or number, from 0, of one",
    ),
]
PlaneZ = Annotated[
    Annotated[int, Field(ge=0, le=MAX_INT)] | Literal["max"] | None,
    Field(
        description="of a stack: the number of a plane or page, from 0, or max for the maximum "
        "projection"
    ),
]
PlaneT = Annotated[
    int | None,
    Field(ge=0, le=MAX_INT, description="of a time series: the number of a point, from 0"),
]


def _check_version(value: object) -> object:
    if isinstance(value, str) and not _VERSION.fullmatch(value):
        raise ValueError("a version is a whole number from 1, without sign, spaces or leading 0")
    return value


VersionNumber = Annotated[int, BeforeValidator(_check_version), Field(ge=1)]
"""A version of a model in a request, as config.json writes it: each has one URL."""


class SegmentQuery(BaseModel):
    """Query of POST /segment; an unknown parameter is refused, so that a typing error shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str | None, Field(description="default: the server's default model")] = None
    version: Annotated[VersionNumber | None, Field(description="default: the latest")] = None
    score_threshold: Annotated[
        float | None,
        Field(ge=0, le=1, description="least score; default: from the model's configuration"),
    ] = None
    max_instances: Annotated[
        int | None,
        Field(ge=1, le=100_000, description="default: from the model's configuration"),
    ] = None
    overlaps: Annotated[
        Overlaps,
        Field(
            description="resolve: each pixel belongs to the best instance that claims it; small "
            "remainders are dropped"
        ),
    ] = "keep"
    object_size_px: ObjectSizePx = None
    um_per_px: UmPerPx = None
    channel: Channel = None
    z: PlaneZ = None
    t: PlaneT = None
    scale: Annotated[
        Scale,
        Field(
            description="auto: the scale is found from the objects in some parts of the image, at "
            "the cost of at most 6 more canvases; instead of object_size_px"
        ),
    ] = "own"
    masks: Annotated[
        Masks,
        Field(
            description="COCO run-length encoding; COCO polygons, which fill holes; one index "
            "image for all instances; or boxes and scores alone"
        ),
    ] = "rle"
    format: Annotated[
        FormatName | None,
        Field(description="the answer is a file of this format; default: JSON with `results`"),
    ] = None
    simplify_px: Annotated[
        float,
        Field(ge=0, le=100, description="outlines of the format may be off so far; 0 is exact"),
    ] = 0
    priority: Annotated[
        Priority,
        Field(description="a client's interactive requests go before its batch requests"),
    ] = "interactive"
    picture: Annotated[
        bool, Field(description="adds picture_png, the image as the server has decoded it")
    ] = False
    timeout_ms: TimeoutMs = None


class ErrorDetail(BaseModel):
    """Why something was not done."""

    code: Annotated[str, Field(examples=["unsupported_format"])]
    message: str


class ErrorResponse(BaseModel):
    """Body of every answer that is not 2xx, but those under /v2."""

    error: ErrorDetail


class Rle(BaseModel):
    """COCO compressed run-length encoding."""

    size: Annotated[list[int], Field(description="height, width", examples=[[256, 256]])]
    counts: str


class InstanceModel(BaseModel):
    """One object; together with an `image_id` it is a COCO result."""

    category_id: int
    category: str
    score: float
    bbox: Annotated[list[float], Field(description="x, y, width, height, px")]
    area: Annotated[int, Field(description="mask pixels")]
    segmentation: Annotated[
        Rle | list[list[float]] | None,
        Field(description="RLE, or polygons [x1, y1, x2, y2, ...]; absent with png and none"),
    ] = None
    holes: Annotated[
        int | None,
        Field(description="with masks=polygon: holes of the mask, which its polygons fill"),
    ] = None


class WarningModel(BaseModel):
    """Why a result may be worthless although nothing failed."""

    code: Annotated[str, Field(examples=["unusual_image"])]
    message: str


class ImageResult(BaseModel):
    """One image: width, height and instances, or an error."""

    file_name: str | None
    width: Annotated[int | None, Field(description="of the upright image, px")] = None
    height: Annotated[int | None, Field(description="of the upright image, px")] = None
    orientation: Annotated[
        int | None,
        Field(description="EXIF orientation, 1 to 8, by which the stored pixels were turned"),
    ] = None
    instances: list[InstanceModel] | None = None
    um_per_px: Annotated[
        float | None, Field(description="size of a pixel in micrometres, as a TIFF states it")
    ] = None
    scale: Annotated[
        float | None,
        Field(
            description="scale at which the model saw the image, relative to its usual one; 1 "
            "unless object_size_px, um_per_px, scale or the file asks for another"
        ),
    ] = None
    canvases: Annotated[
        int | None, Field(description="canvases (tiles) that the engine processed")
    ] = None
    instances_found: Annotated[
        int | None, Field(description="instances before max_instances was applied")
    ] = None
    truncated: Annotated[
        bool | None, Field(description="whether max_instances left instances out")
    ] = None
    warnings: list[WarningModel] | None = None
    index_png: Annotated[
        str | None,
        Field(
            description="with masks=png: base64 of a grey PNG of the image's size whose pixel n "
            "is the n-th instance, 0 none; 16-bit beyond 255 instances"
        ),
    ] = None
    picture_png: Annotated[
        str | None, Field(description="with picture=true: base64 of the decoded image as PNG")
    ] = None
    error: ErrorDetail | None = None


class TimingMs(BaseModel):
    """Milliseconds of the image that was finished last; the stages add up to `total`."""

    decode: Annotated[float, Field(description="decoding, resizing, padding")]
    queue: Annotated[float, Field(description="waiting for a thread, a batch or the engine")]
    infer: float
    postprocess: float
    encode: float
    total: Annotated[float, Field(description="since the request's body was there")]


class Cost(BaseModel):
    """What a request cost."""

    canvases: Annotated[int, Field(description="canvases (tiles) of all images")]
    engine_ms: Annotated[float, Field(description="engine time; shared calls count by their share")]


class SegmentResponse(BaseModel):
    """Answer of POST /segment: one result for each image, in their order."""

    model: str
    version: int
    task: Annotated[
        Task, Field(description="the masks are the objects' pixels, or their contours alone")
    ]
    canvases: Annotated[int, Field(description="canvases (tiles) of all images")]
    cost: Cost
    results: list[ImageResult]
    timing_ms: TimingMs
