"""The model repository extension: POST /v2/repository/index and models/{name}/load, unload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ValidationError

from service.errors import Forbidden, InvalidParameter
from service.http.body import read_body
from service.http.explain import explain_errors
from service.http.model_schemas import IndexQuery, LoadQuery, LoadResponse, RepositoryEntry
from service.http.oip.schemas import ProtocolError, inline_schema
from service.http.routes.state import SegmenterDep, require_admin
from service.protocol import Segmenter
from service.settings import Settings

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


_INDEX_BODY = {
    "requestBody": {"content": {"application/json": {"schema": inline_schema(IndexQuery)}}}
}
_MAX_INDEX_BYTES = 4096


async def _read_query(request: Request) -> IndexQuery:
    body = await read_body(request, _MAX_INDEX_BYTES)
    if not body.strip():
        return IndexQuery()
    try:
        return IndexQuery.model_validate_json(body)
    except ValidationError as error:
        raise InvalidParameter(explain_errors(error.errors(), "field")) from error


def check_control(settings: Settings) -> None:
    """Raises Forbidden if models may not be loaded and unloaded by request."""
    if not settings.model_control:
        raise Forbidden("model control is off; the server must be started with --model-control")


async def _require_control(request: Request) -> None:
    check_control(request.app.state.settings)


async def _refuse_parameters(request: Request) -> None:
    """Refuses what would be ignored: another configuration, or files, for a model."""
    body = await read_body(request, _MAX_INDEX_BYTES)
    if not body.strip():
        return
    try:
        query = LoadQuery.model_validate_json(body)
    except ValidationError as error:
        raise InvalidParameter(explain_errors(error.errors(), "field")) from error
    check_parameters(query.parameters)


def check_parameters(parameters: Mapping[str, object]) -> None:
    """Raises InvalidParameter if a request to load or unload has one that is not supported."""
    for name, value in parameters.items():
        if name != "unload_dependents" or value not in (False, None):
            raise InvalidParameter(
                f"the parameter {name!r} is not supported; a model is as its folder says"
            )


_CONTROLLED = [
    *(Depends(_require_control), Depends(require_admin)),
    Depends(_refuse_parameters),
]


@router.post("/v2/repository/index", openapi_extra=_INDEX_BODY)
async def list_repository(request: Request, segmenter: SegmenterDep) -> list[RepositoryEntry]:
    """Every version that is served, and why other models, or newer versions, are not.

    ```sh
    curl --fail-with-body -X POST localhost:8000/v2/repository/index
    ```
    """
    query = await _read_query(request)
    return list_entries(segmenter, only_ready=query.ready)


def list_entries(segmenter: Segmenter, *, only_ready: bool) -> list[RepositoryEntry]:
    """The repository index, by name."""
    entries = [
        RepositoryEntry(name=model.name, version=str(model.version), state="READY")
        for model in segmenter.models
    ]
    if not only_ready:
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
