"""The application: `create_app(settings)` puts it together; there is nothing global."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from pipeline.errors import DecodeError
from service.errors import (
    InvalidParameter,
    ServiceError,
    Unauthorized,
    UnsupportedEncoding,
    build_error_body,
    describe_error,
    drop_frames,
)
from service.http.cors import build_cors_options
from service.http.exchange import CLIENT_LEFT
from service.http.explain import explain_errors
from service.http.keys import KeyRing
from service.http.middleware import BodyLimitMiddleware, RequestContextMiddleware
from service.http.refusals import count_refusal
from service.http.routes import health, inference, jobs, models, segment, triton, web
from service.http.routes import metrics as metrics_routes
from service.http.routes import repository as repository_routes
from service.jobs.runner import JobRunner
from service.jobs.service import JobService
from service.models.repository import Repository, load_repository
from service.observe.gpus import find_gpus
from service.observe.metrics import Metrics
from service.observe.tracing import Tracer, build_tracer
from service.protocol import Segmenter
from service.segmenter import LocalSegmenter
from service.settings import Settings
from service.version import read_version

logger = logging.getLogger(__name__)

DESCRIPTION = "Instance segmentation with SOLO: image bytes in, COCO masks out."
_FIXED_PATHS = (
    *("/segment", "/v2", "/v2/models", "/healthz", "/v2/health/live", "/v2/health/ready"),
    *("/v2/models/stats", "/v2/repository/index", "/v2/jobs", "/metrics"),
    *("/docs", "/openapi.json"),
)
_HANDLED = (ServiceError, DecodeError, RequestValidationError, HTTPException, ClientDisconnect)
ErrorAnswer = Callable[[Request, Exception], Awaitable[Response]]
_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    settings: Settings,
    repository: Repository | None = None,
    tracer: Tracer | None = None,
    segmenter: Segmenter | None = None,
) -> FastAPI:
    """Builds the application.

    Args:
        settings: Everything that can be set.
        repository: Loaded models; default: loaded from `settings.model_repo` at the start.
        tracer: Default: what the settings and OpenTelemetry's variables say; often none.
        segmenter: Does the work, and counts it; default: one for the repository.

    Raises:
        StartupError: `settings.default_model` is not in the repository, or the keys file cannot
            be read, or a setting of jobs is wrong, or tracing is asked for and not installed.
    """
    tracer = tracer or build_tracer(settings.otlp_endpoint, read_version())
    built = segmenter
    metrics = Metrics() if built is None else built.metrics
    if built is None and settings.device != "cpu":
        metrics.watch_gpus(find_gpus())
    if built is None and repository is not None:
        built = LocalSegmenter(settings, repository, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        segmenter = built
        if segmenter is None:
            loaded = await asyncio.to_thread(
                load_repository,
                settings.model_repo,
                settings.backend_options(),
                may_be_empty=settings.models_may_change,
            )
            segmenter = LocalSegmenter(settings, loaded, metrics)
        app.state.segmenter = segmenter
        segmenter.start()
        async with run_jobs(app.state.jobs, segmenter, settings):
            try:
                yield
            finally:
                await segmenter.drain()
            if tracer is not None:
                await tracer.close()

    app = FastAPI(
        title="solo-serve",
        description=DESCRIPTION,
        version=read_version(),
        lifespan=lifespan,
        docs_url=None,  # service.http.routes.web has both; the page works without a CDN
        openapi_url=None,
        redoc_url=None,
    )
    app.state.keys = KeyRing(settings.keys_file) if settings.keys_file else None
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.jobs = JobService(settings, metrics) if settings.jobs_dir is not None else None
    app.state.tracer = tracer
    app.state.version = app.version
    app.router.routes.append(segment.ROUTE)
    for module in (segment, inference, triton, jobs, models, health, web):
        app.include_router(module.router)
    if settings.admin_port is None:
        _include_admin_routes(app)
    answer = _build_answer(settings, metrics)
    _add_error_handlers(app, answer)
    _add_middleware(app, settings, metrics, tracer)
    # The last one added is the outermost: every answer has its headers.
    cors = build_cors_options(settings.cors_origins)
    if cors is not None:
        app.add_middleware(CORSMiddleware, **cors)
    return app


@asynccontextmanager
async def run_jobs(
    service: JobService | None, segmenter: Segmenter, settings: Settings
) -> AsyncIterator[None]:
    """Processes jobs until the segmenter admits no more work, if there are any."""
    if service is None:
        yield
        return
    runner = JobRunner(service, segmenter, settings.jobs_in_flight or settings.pool_threads + 1)
    runner.start()
    try:
        yield
    finally:
        await runner.stop()
        await service.close()


def create_admin_app(app: FastAPI) -> FastAPI:
    """What the admin port serves of an application: health, metrics, the model repository.

    Args:
        app: What `create_app` made; its state is shared, and its lifespan must run.
    """
    admin = FastAPI(title="solo-serve admin", version=app.version, docs_url=None, redoc_url=None)
    admin.state = app.state
    admin.include_router(health.router)
    _include_admin_routes(admin)
    _add_error_handlers(admin, _build_answer(app.state.settings, app.state.metrics))
    _add_middleware(admin, app.state.settings, app.state.metrics)
    return admin


def _include_admin_routes(app: FastAPI) -> None:
    for module in (repository_routes, metrics_routes):
        app.include_router(module.router)


def _add_middleware(
    app: FastAPI, settings: Settings, metrics: Metrics, tracer: Tracer | None = None
) -> None:
    app.add_middleware(
        BodyLimitMiddleware,
        max_bytes=settings.max_body_bytes,
        retry_after_s=settings.retry_after_s,
        metrics=metrics,
    )
    app.add_middleware(
        RequestContextMiddleware, metrics=metrics, routes=_FIXED_PATHS, tracer=tracer
    )


def _add_error_handlers(app: FastAPI, answer: ErrorAnswer) -> None:
    for kind in _HANDLED:
        app.add_exception_handler(kind, answer)


def _build_answer(settings: Settings, metrics: Metrics) -> ErrorAnswer:
    """The handler of all errors that have an answer of their own."""

    async def answer(request: Request, error: Exception) -> Response:
        drop_frames(error)
        if isinstance(error, ClientDisconnect):
            return Response(status_code=CLIENT_LEFT)  # for log and metrics
        if isinstance(error, RequestValidationError):
            error = InvalidParameter(_explain(error))
        elif isinstance(error, HTTPException):
            return _answer_http(request, error)
        headers = {}
        retry_after_s = count_refusal(error, metrics, settings.retry_after_s)
        if retry_after_s is not None:
            headers["retry-after"] = str(retry_after_s)
        elif isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        elif isinstance(error, UnsupportedEncoding):
            headers["accept-encoding"] = "identity"
        status, detail = describe_error(error)
        return _error_response(request, status, detail, headers)

    return answer


def _answer_http(request: Request, error: HTTPException) -> Response:
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    message = f"{error.detail}: {request.method} {request.url.path}"
    detail = {"code": code, "message": message}
    headers = dict(error.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(_list_methods(request))
    return _error_response(request, error.status_code, detail, headers)


def _list_methods(request: Request) -> list[str]:
    """The methods that any route takes at the request's path."""
    place = {"type": "http", **{name: request.scope[name] for name in ("path", "root_path")}}
    taken = {
        method
        for method in _METHODS
        for route in request.app.router.routes
        if route.matches({**place, "method": method})[0] is Match.FULL
    }
    # See RequestContextMiddleware.
    return sorted(taken | {"HEAD"} if "GET" in taken else taken)


def _explain(error: RequestValidationError) -> str:
    """Names each wrong parameter and its value, but not the place of the request it is in."""
    errors = [{**item, "loc": item["loc"][1:] or item["loc"]} for item in error.errors()]
    return explain_errors(errors, "parameter")


def _error_response(
    request: Request, status: int, detail: dict[str, str], headers: dict[str, str]
) -> Response:
    body = build_error_body(detail, request.url.path)
    return Response(body, status, headers, media_type="application/json")
