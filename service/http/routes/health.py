"""GET /healthz, /v2/health/live, /v2/health/ready."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.http.model_schemas import (
    EngineBuildModel,
    EngineModel,
    HealthResponse,
    LiveResponse,
    ReadyResponse,
)
from service.http.routes.state import SegmenterDep
from service.protocol import ModelState

router = APIRouter(tags=["health"])


@router.get("/healthz", responses={503: {"model": HealthResponse}})
async def healthz(segmenter: SegmenterDep, response: Response) -> HealthResponse:
    """200 as long as the process answers and need not be replaced; says if new work is taken."""
    if segmenter.failure is not None:
        response.status_code = 503
        return HealthResponse(status="failed")
    if not segmenter.admission.is_open:
        return HealthResponse(status="draining")
    if not segmenter.models:
        return HealthResponse(status="no_model")
    return HealthResponse(status="ok" if segmenter.is_ready else "engine_restarting")


@router.get("/v2/health/live", responses={503: {"model": LiveResponse}})
async def live(segmenter: SegmenterDep, response: Response) -> LiveResponse:
    """200 as long as the process answers, 503 if it must be replaced: no engine can be built."""
    is_live = segmenter.failure is None
    if not is_live:
        response.status_code = 503
    return LiveResponse(live=is_live)


@router.get("/v2/health/ready", responses={503: {"model": ReadyResponse}})
async def ready(segmenter: SegmenterDep, response: Response) -> ReadyResponse:
    """200 if new work is taken and a model is served, else 503; says what runs where.

    ```sh
    curl --fail-with-body localhost:8000/v2/health/ready
    ```
    """
    if not segmenter.is_ready:
        response.status_code = 503
    models = segmenter.models
    return ReadyResponse(
        ready=segmenter.is_ready,
        models=[f"{m.name}:{m.version} on {m.engine.device}" for m in models],
        engines=[_describe(model) for model in models],
        refused=sorted(set(segmenter.unavailable) - {model.name for model in models}),
    )


def _describe(model: ModelState) -> EngineModel:
    engine = model.engine
    build = None
    if engine.build is not None:
        build = EngineBuildModel(status=engine.build.status, progress=engine.build.progress)
    return EngineModel(
        model=model.name,
        version=model.version,
        engine=engine.name,
        device=engine.device,
        precision=engine.precision,
        reason=engine.reason,
        build=build,
        canvas_ms={name: round(1e3 * s, 3) for name, s in engine.canvas_s.items()},
    )
