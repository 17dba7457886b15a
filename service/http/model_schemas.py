"""Answers about the server's health and its models, and what changes the models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from pipeline.model_config import Calibration, ModelCard, Task
from service.engines.base import Precision
from service.http.oip.schemas import TensorMetadata


class HealthResponse(BaseModel):
    """Answer of GET /healthz."""

    status: Literal["ok", "draining", "engine_restarting", "no_model", "failed"]


class LiveResponse(BaseModel):
    """Answer of GET /v2/health/live."""

    live: bool


class EngineBuildModel(BaseModel):
    """A faster engine that is built, or was, while another one serves."""

    status: Annotated[str, Field(description="what is done just now, or how it ended")]
    progress: Annotated[float, Field(ge=0, le=1)]


class EngineModel(BaseModel):
    """What a model is served by."""

    model: str
    version: int
    engine: Annotated[str, Field(examples=["onnxruntime"])]
    device: Annotated[str, Field(examples=["cpu"])]
    precision: Precision
    reason: Annotated[str, Field(description="why this engine, and why no faster one")]
    build: Annotated[
        EngineBuildModel | None, Field(description="null if no other engine is to be built")
    ] = None
    canvas_ms: Annotated[
        dict[str, float],
        Field(description="time of a canvas by engine and precision, if timed to choose one"),
    ] = {}


class ReadyResponse(BaseModel):
    """Answer of GET /v2/health/ready."""

    ready: bool
    models: Annotated[list[str], Field(description="name:version on device")]
    engines: Annotated[list[EngineModel], Field(description="one for each of the models")]
    refused: Annotated[list[str], Field(description="models of the repository that are refused")]


class ModelSummary(BaseModel):
    """A model of the repository."""

    name: str
    state: Literal["READY", "UNAVAILABLE"]
    version: int | None = None
    description: str | None = None
    domain: Annotated[
        str | None, Field(description="the images and objects that it was trained on")
    ] = None
    reason: Annotated[str | None, Field(description="why it is not served")] = None


class RepositoryEntry(BaseModel):
    """A version of a model in the repository index, as Triton's clients expect it."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: Annotated[str, Field(description="why it is not served; empty if it is")] = ""


class IndexQuery(BaseModel):
    """Body of POST /v2/repository/index."""

    ready: Annotated[bool, Field(description="only what is served")] = False


class LoadQuery(BaseModel):
    """Body of POST /v2/repository/models/{name}/load and unload; none is needed."""

    parameters: dict[str, Any] = {}


class ModelList(BaseModel):
    """Answer of GET /v2/models."""

    models: list[ModelSummary]
    default_model: Annotated[
        str | None,
        Field(description="model of requests that name none; null: they are refused"),
    ] = None


class LoadResponse(BaseModel):
    """Answer of POST /v2/repository/models/{name}/load: what is served now."""

    name: str
    versions: list[str]
    default_model: Annotated[
        str | None,
        Field(description="model of requests that name none; null: they are refused"),
    ] = None


class ShadowModel(BaseModel):
    """A version that is, or was, compared with the served one."""

    version: int
    status: Literal["running", "promoted", "rejected", "failed"]
    reason: Annotated[str, Field(description="of the status")]
    share: Annotated[float, Field(description="of the images that it segments too")]
    images: Annotated[int, Field(description="that were compared")]
    failures: Annotated[int, Field(description="images that it failed on")]
    dropped: Annotated[int, Field(description="images that it had no time for")]
    agreement: Annotated[float | None, Field(description="mean panoptic quality, 0..1")]
    mean_iou: Annotated[float | None, Field(description="of the masks of matched instances")]
    unmatched_share: Annotated[float | None, Field(description="instances without a partner")]
    score_difference: Annotated[float | None, Field(description="mean, of matched instances")]
    slowdown: Annotated[float | None, Field(description="engine time over the served version's")]


class ModelDetail(BaseModel):
    """Answer of GET /v2/models/{name}: the Open Inference Protocol's metadata, and ours."""

    name: str
    version: int
    versions: list[str]
    platform: Annotated[str, Field(description="the engine")]
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    state: Literal["READY"]
    task: Task
    description: str
    backend: str
    device: str
    precision: Precision
    asked_precision: Annotated[
        Precision, Field(description="of config.json or else the server; the model may lack it")
    ]
    max_batch: int
    shadow: Annotated[
        ShadowModel | None, Field(description="the version that is compared with this one")
    ] = None
    input: dict[str, Any]
    card: Annotated[ModelCard, Field(description="what the model is for")]
    classes: list[dict[str, Any]]
    candidates: int
    mask_stride: int
    postprocess: dict[str, Any]
    calibration: Annotated[
        Calibration | None, Field(description="map from the network's scores to those of answers")
    ] = None
    provenance: dict[str, Any]
