"""The model repository extension: POST /v2/repository/index and models/{name}/load, unload."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request, Response

from service.errors import Forbidden
from service.http.oip.schemas import ProtocolError
from service.http.routes.state import SegmenterDep, require_admin
from service.http.schemas import IndexQuery, LoadResponse, RepositoryEntry

router = APIRouter(tags=["model repository"])
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ProtocolError, "description": text}
    for status, text in {
        401: "An API key is asked for",
        403: "Model control is off, or the key is not an administrator's",
        404: "No such model",
        503: "The model cannot be served; what was served before still is",
    }.items()
}


async def _require_control(request: Request) -> None:
    if not request.app.state.settings.model_control:
        raise Forbidden("model control is off; the server must be started with --model-control")


_CONTROLLED = [Depends(_require_control), Depends(require_admin)]


@router.post("/v2/repository/index")
async def list_repository(
    segmenter: SegmenterDep, query: Annotated[IndexQuery | None, Body()] = None
) -> list[RepositoryEntry]:
    """Every version that is served, and why other models, or newer versions, are not.

    ```sh
    curl --fail-with-body -X POST localhost:8000/v2/repository/index
    ```
    """
    entries = [
        RepositoryEntry(name=model.name, version=str(model.version), state="READY")
        for model in segmenter.models
    ]
    if query is None or not query.ready:
        entries += [
            RepositoryEntry(name=name, version="", state="UNAVAILABLE", reason=reason)
            for name, reason in segmenter.unavailable.items()
        ]
    return sorted(entries, key=lambda entry: entry.name)


@router.post("/v2/repository/models/{name}/load", responses=_FAILURES, dependencies=_CONTROLLED)
async def load(name: str, segmenter: SegmenterDep) -> LoadResponse:
    """Serves what the model's config.json says now; until that is ready, what was served stays."""
    await segmenter.load(name)
    return LoadResponse(
        name=name,
        versions=[str(model.version) for model in segmenter.models if model.name == name],
        default_model=segmenter.default_model,
    )


@router.post("/v2/repository/models/{name}/unload", responses=_FAILURES, dependencies=_CONTROLLED)
async def unload(name: str, segmenter: SegmenterDep) -> Response:
    """Stops serving a model; requests that have it in use are finished."""
    await segmenter.unload(name)
    return Response()
