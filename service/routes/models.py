"""GET /v2/models and /v2/models/{name}."""

from __future__ import annotations

from fastapi import APIRouter

from service.routes.state import SegmenterDep
from service.schemas import ErrorResponse, ModelDetail, ModelList, ModelSummary

router = APIRouter(tags=["models"])


@router.get("/v2/models")
async def list_models(segmenter: SegmenterDep) -> ModelList:
    """Every model of the repository; of a refused one, why."""
    repository = segmenter.repository
    served = [
        ModelSummary(name=name, state="READY", version=model.version)
        for name, model in repository.models.items()
    ]
    refused = [
        ModelSummary(
            name=name,
            state="UNAVAILABLE",
            reason=f"{error.file.relative_to(repository.root)}: {error.reason}",
        )
        for name, error in repository.refused.items()
    ]
    return ModelList(models=sorted(served + refused, key=lambda model: model.name))


@router.get(
    "/v2/models/{name}",
    responses={404: {"model": ErrorResponse}, 503: {"model": ErrorResponse}},
)
async def show_model(name: str, segmenter: SegmenterDep) -> ModelDetail:
    """What config.json says of a model, and what it runs on."""
    served = segmenter.find_model(name, None)
    loaded = served.loaded
    config = loaded.config.model_dump(
        mode="json",
        include={
            "name",
            "version",
            "task",
            "description",
            "input",
            "classes",
            "candidates",
            "mask_stride",
            "postprocess",
            "provenance",
        },
    )
    return ModelDetail(
        versions=[loaded.version],
        state="READY",
        backend=loaded.backend.name,
        device=loaded.backend.device,
        max_batch=served.batcher.max_batch,
        **config,
    )
