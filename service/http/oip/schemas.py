"""The protocol's objects, and the tensors of our models.

Symbols: N images of the request, n instances of all of them together, H W image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.model_config import MAX_INT, MAX_SIDE_PX
from pipeline.postprocess import Overlaps
from pipeline.scale import Scale

Datatype = Literal["BYTES", "UINT8", "FP32", "INT64"]
OutputName = Literal[
    "scores", "category_ids", "bbox", "rle", "image_index", "image_hw", "error", "warnings"
]


class ProtocolError(BaseModel):
    """Body of every error response under /v2: the protocol's `error` and our `code`."""

    error: Annotated[str, Field(examples=["there is no model 'cats', only ['nuclei']"])]
    code: Annotated[str, Field(examples=["unknown_model"])]


class ServerMetadata(BaseModel):
    """Response of GET /v2."""

    name: str
    version: str
    extensions: list[str]


class ModelReady(BaseModel):
    """Response of GET /v2/models/{name}/ready."""

    name: str
    ready: bool


class TensorMetadata(BaseModel):
    """An input or output tensor of a model; -1 is a dimension of any size."""

    name: str
    datatype: Datatype
    shape: list[int]


INPUT = TensorMetadata(name="image", datatype="BYTES", shape=[-1])
"""Encoded files. UINT8 [H, W, 3], raw RGB, is accepted too, but metadata has only one type."""
_SHAPES: Mapping[OutputName, tuple[Datatype, list[int]]] = {
    "scores": ("FP32", [-1]),
    "category_ids": ("INT64", [-1]),
    "bbox": ("FP32", [-1, 4]),
    "rle": ("BYTES", [-1]),
    "image_index": ("INT64", [-1]),
    "image_hw": ("INT64", [-1, 2]),
    "error": ("BYTES", [-1]),
    "warnings": ("BYTES", [-1]),
}
OUTPUTS: Mapping[OutputName, TensorMetadata] = {
    name: TensorMetadata(name=name, datatype=datatype, shape=shape)
    for name, (datatype, shape) in _SHAPES.items()
}
"""`scores` to `image_index` have one entry per instance, the last three one per image."""


class _StrictModel(BaseModel):
    """Part of a request; unknown fields are rejected, so that misspelt ones are noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InferParameters(_StrictModel):
    """Parameters of a request."""

    score_threshold: Annotated[
        float | None, Field(ge=0, le=1, description="default: from the model's configuration")
    ] = None
    max_instances: Annotated[
        int | None, Field(ge=1, le=100_000, description="default: from the model's configuration")
    ] = None
    overlaps: Annotated[Overlaps, Field(description="as in POST /segment")] = "keep"
    object_size_px: Annotated[
        float | None, Field(gt=0, le=MAX_SIDE_PX, description="as in POST /segment")
    ] = None
    um_per_px: Annotated[
        float | None, Field(gt=0, le=MAX_INT, description="as in POST /segment")
    ] = None
    channel: Annotated[
        str | None, Field(max_length=200, description="as in POST /segment, like z and t")
    ] = None
    z: Annotated[int, Field(ge=0, le=MAX_INT)] | Literal["max"] | None = None
    t: Annotated[int | None, Field(ge=0, le=MAX_INT)] = None
    scale: Annotated[Scale, Field(description="as in POST /segment")] = "own"
    priority: Annotated[
        int,
        Field(ge=0, description="0 and 1: interactive, served first; 2 and above: batch work"),
    ] = 0
    timeout: Annotated[
        int | None,
        Field(
            ge=1,
            le=86_400_000_000,
            description="microseconds; then the response is 504 and queued work of the request is "
            "dropped; also the header X-Timeout-Ms, in milliseconds; default: the server's",
        ),
    ] = None
    binary_data_output: Annotated[
        bool, Field(description="default of the outputs' `binary_data`")
    ] = False

    @property
    def timeout_ms(self) -> int | None:
        """`timeout` in milliseconds, rounded up."""
        return None if self.timeout is None else -(-self.timeout // 1000)


class InputParameters(BaseModel):
    """Parameters of an input; unknown ones are ignored, as clients add their own."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    binary_data_size: Annotated[
        int | None, Field(ge=0, description="bytes of this input after the JSON")
    ] = None


class InferInput(_StrictModel):
    """The input tensor: one or more images."""

    name: Literal["image"]
    datatype: Annotated[
        Literal["BYTES", "UINT8"], Field(description="encoded files, or raw RGB pixels")
    ]
    shape: Annotated[
        list[Annotated[int, Field(ge=1)]],
        Field(description="BYTES: [N]; UINT8: [H, W, 3]", examples=[[1]]),
    ]
    parameters: InputParameters | None = None
    data: Annotated[
        list[Any] | None,
        Field(description="BYTES: files in base64; UINT8: numbers, flat or nested"),
    ] = None


class OutputParameters(_StrictModel):
    """Parameters of an output."""

    binary_data: bool | None = None


class RequestedOutput(_StrictModel):
    """An output requested by the client."""

    name: OutputName
    parameters: OutputParameters | None = None


class InferRequest(_StrictModel):
    """Body of POST /v2/models/{name}/infer, or its JSON part before the binary data."""

    id: str | None = None
    parameters: InferParameters | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput] | None, Field(description="default: all of them")] = (
        None
    )


class OutputTensor(BaseModel):
    """An output with `data`, or with `binary_data_size` in its parameters."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: Annotated[list[Any] | None, Field(description="flat, in row-major order")] = None


class InferResponse(BaseModel):
    """Response of POST /v2/models/{name}/infer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


def inline_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema with all references resolved, for use without `$defs`."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rpartition("/")[2]])
        return {key: resolve(value) for key, value in node.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved
