"""The protocol's objects, and what our tensors are called.

Symbols: N images of the request, n instances of all of them together, H W image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Datatype = Literal["BYTES", "UINT8", "FP32", "INT64"]
OutputName = Literal["scores", "category_ids", "bbox", "rle", "image_index", "image_hw", "error"]


class ProtocolError(BaseModel):
    """Body of every answer under /v2 that is not 2xx: the protocol's text, and our code."""

    error: Annotated[str, Field(examples=["there is no model 'cats', only ['nuclei']"])]
    code: Annotated[str, Field(examples=["unknown_model"])]


class ServerMetadata(BaseModel):
    """Answer of GET /v2."""

    name: str
    version: str
    extensions: list[str]


class ModelReady(BaseModel):
    """Answer of GET /v2/models/{name}/ready."""

    name: str
    ready: bool


class TensorMetadata(BaseModel):
    """A tensor that a model takes or gives; -1 is any size."""

    name: str
    datatype: Datatype
    shape: list[int]


INPUT = TensorMetadata(name="image", datatype="BYTES", shape=[-1])
"""Encoded files; UINT8 [H, W, 3], raw RGB, is taken too, but a tensor announces one type."""
_SHAPES: Mapping[OutputName, tuple[Datatype, list[int]]] = {
    "scores": ("FP32", [-1]),
    "category_ids": ("INT64", [-1]),
    "bbox": ("FP32", [-1, 4]),
    "rle": ("BYTES", [-1]),
    "image_index": ("INT64", [-1]),
    "image_hw": ("INT64", [-1, 2]),
    "error": ("BYTES", [-1]),
}
OUTPUTS: Mapping[OutputName, TensorMetadata] = {
    name: TensorMetadata(name=name, datatype=datatype, shape=shape)
    for name, (datatype, shape) in _SHAPES.items()
}
"""`scores` to `image_index` have an entry for each instance, the last two for each image."""


class _Asked(BaseModel):
    """A part of a request; what it does not know is refused, so that a typing error shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InferParameters(_Asked):
    """What may be set for a request."""

    score_threshold: Annotated[
        float | None, Field(ge=0, le=1, description="default: from the model's configuration")
    ] = None
    max_instances: Annotated[
        int | None, Field(ge=1, le=100_000, description="default: from the model's configuration")
    ] = None
    priority: Annotated[
        int,
        Field(ge=0, description="0, 1: interactive work, which goes first; 2 and more: batch work"),
    ] = 0
    timeout: Annotated[
        int | None,
        Field(
            ge=1,
            le=86_400_000_000,
            description="microseconds, after which the request is answered 504 and what still "
            "waits is dropped; header X-Timeout-Ms has milliseconds; default: the server's",
        ),
    ] = None
    binary_data_output: Annotated[
        bool, Field(description="outputs are binary unless they say otherwise")
    ] = False

    @property
    def timeout_ms(self) -> int | None:
        """`timeout`, rounded up."""
        return None if self.timeout is None else -(-self.timeout // 1000)


class InputParameters(BaseModel):
    """Of an input; what others put here to describe their data is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    binary_data_size: Annotated[
        int | None, Field(ge=0, description="bytes of this input after the JSON")
    ] = None


class InferInput(_Asked):
    """The image, or images."""

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


class OutputParameters(_Asked):
    """Of an output."""

    binary_data: bool | None = None


class RequestedOutput(_Asked):
    """An output that the client wants."""

    name: OutputName
    parameters: OutputParameters | None = None


class InferRequest(_Asked):
    """Body of POST /v2/models/{name}/infer, or the JSON before its binary data."""

    id: str | None = None
    parameters: InferParameters | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput] | None, Field(description="default: all of them")] = (
        None
    )


class OutputTensor(BaseModel):
    """An output with its data, or with `binary_data_size` in its parameters."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: Annotated[list[Any] | None, Field(description="flat, row by row")] = None


class InferResponse(BaseModel):
    """Answer of POST /v2/models/{name}/infer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


def inline_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema without references, for a place that has no definitions."""
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
