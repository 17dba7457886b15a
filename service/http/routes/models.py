"""GET /v2/models, /v2/models/{name} and /v2/models/{name}/versions/{version}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.http.model_schemas import ModelDetail, ModelList, ModelSummary, ShadowModel
from service.http.oip.schemas import INPUT, OUTPUTS, ProtocolError
from service.http.routes.state import SegmenterDep
from service.http.schemas import VersionNumber
from service.protocol import ModelState, Segmenter

router = APIRouter(tags=["models"])
FAILURES: dict[int | str, dict[str, Any]] = {
    404: {"model": ProtocolError, "description": "No such model or version"},
    422: {"model": ProtocolError, "description": "The version is no number"},
    503: {"model": ProtocolError, "description": "The model was refused"},
}


@router.get("/v2/models")
async def list_models(segmenter: SegmenterDep) -> ModelList:
    """Every model of the repository; of a refused one, why.

    ```sh
    curl --fail-with-body localhost:8000/v2/models
    ```
    """
    latest = {model.name: model for model in segmenter.models}
    served = [
        ModelSummary(
            name=name,
            state="READY",
            version=model.version,
            description=model.config.description,
            domain=model.config.card.domain,
        )
        for name, model in latest.items()
    ]
    others = [
        ModelSummary(name=name, state="UNAVAILABLE", reason=reason)
        for name, reason in segmenter.unavailable.items()
        if name not in latest
    ]
    return ModelList(
        models=sorted(served + others, key=lambda model: model.name),
        default_model=segmenter.default_model,
    )


@router.get("/v2/models/{name}", responses=FAILURES)
async def show_model(name: str, segmenter: SegmenterDep) -> ModelDetail:
    """What config.json says of a model, what it runs on, and its tensors.

    ```sh
    curl --fail-with-body localhost:8000/v2/models/nuclei
    ```
    """
    return describe_model(segmenter.find(name, None), segmenter)


@router.get("/v2/models/{name}/versions/{version}", responses=FAILURES)
async def show_version(name: str, version: VersionNumber, segmenter: SegmenterDep) -> ModelDetail:
    """As `/v2/models/{name}`, of a certain version."""
    return describe_model(segmenter.find(name, version), segmenter)


def find_versions(segmenter: Segmenter, name: str) -> list[int]:
    """The versions of a model that are served, ascending."""
    return sorted(model.version for model in segmenter.models if model.name == name)


def describe_model(model: ModelState, segmenter: Segmenter) -> ModelDetail:
    """The Open Inference Protocol's metadata and ours."""
    engine = model.engine
    config = model.config.model_dump(
        mode="json",
        include={
            "name",
            "version",
            "task",
            "description",
            "input",
            "card",
            "classes",
            "candidates",
            "mask_stride",
            "postprocess",
            "calibration",
            "provenance",
        },
    )
    return ModelDetail(
        versions=[str(version) for version in find_versions(segmenter, model.name)],
        platform=engine.name,
        inputs=[INPUT],
        outputs=list(OUTPUTS.values()),
        state="READY",
        backend=engine.name,
        device=engine.device,
        precision=engine.precision,
        asked_precision=model.asked_precision,
        max_batch=model.max_batch,
        shadow=None if model.shadow is None else ShadowModel(**vars(model.shadow)),
        **config,
    )
