"""What Triton's clients ask for beyond the Open Inference Protocol.

A model's configuration and statistics; what the server does not have is refused with a reason.
"""

from __future__ import annotations

from fastapi import APIRouter

from service.errors import NotOffered
from service.http.oip.config import TritonConfig, build_config
from service.http.routes.models import FAILURES, find_versions
from service.http.routes.state import SegmenterDep
from service.http.schemas import VersionNumber
from service.http.statistics import StatisticsResponse, read_statistics

router = APIRouter(tags=["open inference protocol"])
TRACES = "traces are set by SOLO_OTLP_ENDPOINT when the server starts"
LOGGING = "logging is set by SOLO_LOG_LEVEL and SOLO_LOG_FORMAT when the server starts"
SHARED_MEMORY = "shared memory is not supported; send tensors in the request"
NOT_OFFERED = {
    "/v2/trace/setting": TRACES,
    "/v2/models/{name}/trace/setting": TRACES,
    "/v2/logging": LOGGING,
    "/v2/systemsharedmemory/{rest:path}": SHARED_MEMORY,
    "/v2/cudasharedmemory/{rest:path}": SHARED_MEMORY,
}
"""Paths of Triton that are refused, and why."""


@router.get("/v2/models/stats")
async def show_statistics(segmenter: SegmenterDep) -> StatisticsResponse:
    """Images, engine calls and times of every version that is served, since the start.

    ```sh
    curl --fail-with-body localhost:8000/v2/models/stats
    ```
    """
    return StatisticsResponse(model_stats=await read_statistics(segmenter))


@router.get("/v2/models/{name}/stats", responses=FAILURES)
async def show_model_statistics(name: str, segmenter: SegmenterDep) -> StatisticsResponse:
    """As `/v2/models/stats`, of one model's versions."""
    return StatisticsResponse(model_stats=await read_statistics(segmenter, name))


@router.get("/v2/models/{name}/versions/{version}/stats", responses=FAILURES)
async def show_version_statistics(
    name: str, version: VersionNumber, segmenter: SegmenterDep
) -> StatisticsResponse:
    """As `/v2/models/{name}/stats`, of one version."""
    return StatisticsResponse(model_stats=await read_statistics(segmenter, name, version))


@router.get("/v2/models/{name}/config", responses=FAILURES)
async def show_config(name: str, segmenter: SegmenterDep) -> TritonConfig:
    """A model's configuration in Triton's words."""
    return build_config(segmenter.find(name, None), find_versions(segmenter, name))


@router.get("/v2/models/{name}/versions/{version}/config", responses=FAILURES)
async def show_version_config(
    name: str, version: VersionNumber, segmenter: SegmenterDep
) -> TritonConfig:
    """As `/v2/models/{name}/config`, of a certain version."""
    return build_config(segmenter.find(name, version), find_versions(segmenter, name))


def _refuse(path: str, reason: str) -> None:
    async def refuse() -> None:
        raise NotOffered(reason)

    router.add_api_route(path, refuse, methods=["GET", "POST"], include_in_schema=False)


for _path, _reason in NOT_OFFERED.items():
    _refuse(_path, _reason)
