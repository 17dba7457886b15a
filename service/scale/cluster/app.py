"""The Serve application: `serve run service.scale.cluster.app:build_app model_repo=/models`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from ray import exceptions as ray_errors
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from service.errors import StartupError
from service.grpc.front import build_front_ends
from service.http.app import create_app
from service.http.connections import raise_file_limit
from service.http.limits import RequestBodies
from service.http.servers import serve_beside
from service.jobs.service import JobService
from service.observe.logs import configure_logging
from service.observe.metrics import Metrics
from service.scale.cluster.front import ClusterSegmenter
from service.scale.cluster.messages import Answer, Call, Description, WorkerDied, WorkerLost
from service.scale.cluster.metrics import FrontMetrics, report_front
from service.scale.cluster.settings import ClusterSettings
from service.scale.cluster.worker import Worker, start_segmenter
from service.scale.merged_metrics import Report
from service.settings import Settings

FRONT = "Front"
WORKER = "Worker"
MAX_FRONT_REQUESTS = 4096
"""Requests in one front at once: more than its admission lets in."""
HEALTH_PERIOD_S = 5.0
"""Serve replaces a process whose health check fails three times running."""
REPORT_TIMEOUT_S = 5.0
LOOK_BACK_S = (12.0, 30.0)
"""Bounds of the time over which the load is averaged. Serve's processes report theirs every 10 s; a
shorter time would miss what is between two reports."""
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
"""Requests are logged once, by the front."""
SHARED: dict[str, Any] = {
    "health_check_period_s": HEALTH_PERIOD_S,
    "graceful_shutdown_wait_loop_s": 0.5,
    "logging_config": QUIET,
}
"""Options of both deployments."""
DIED = (
    ray_errors.ActorDiedError,
    ray_errors.WorkerCrashedError,
    ray_errors.NodeDiedError,
    ray_errors.OutOfMemoryError,
)
"""What says that a worker has ended."""
LOST = (
    *DIED,
    ray_errors.RayActorError,
    ray_errors.ObjectLostError,
    ray_errors.TaskCancelledError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
"""What says that a worker is gone, not that the call was wrong."""
HEAD = "node:__internal_head__"
"""Resource of the cluster's head node alone."""


def build_app(arguments: dict[str, Any]) -> serve.Application:
    """The application; what `serve run`, `serve deploy` and `solo-serve ray` start.

    Args:
        arguments: Settings by name, see `ClusterSettings`; text, as `serve run name=text` gives
            it, is read as a flag's. `SOLO_*` variables count where this is run.

    Raises:
        StartupError: Names each wrong setting.
    """
    try:
        settings = ClusterSettings(**arguments)
    except ValidationError as error:
        raise StartupError(str(error)) from error
    server = settings.server_settings()
    actor: dict[str, Any] = {"num_cpus": 0}
    build_front_ends(Settings(**server), shares_port=True)  # faults are said here, not in a replica
    if settings.jobs_dir is not None:
        JobService(Settings(**server), Metrics())
        actor["resources"] = {HEAD: 0.001}  # they share a folder that is not on a network
    fronts = serve.deployment(
        name=FRONT,
        num_replicas=settings.fronts,
        max_ongoing_requests=MAX_FRONT_REQUESTS,
        ray_actor_options=actor,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + 20,
        max_surge_percent=100,
        **SHARED,
    )(serve.ingress()(Front))
    workers = build_workers(settings).bind(server)
    application: serve.Application = fronts.bind(server, workers)
    return application


def build_workers(settings: ClusterSettings) -> serve.Deployment:
    """The deployment of the workers: how many, where, and with what reserved."""
    if settings.max_replicas in (None, settings.min_replicas):
        number: dict[str, Any] = {"num_replicas": settings.min_replicas}
    else:
        scaling = AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_requests,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            look_back_period_s=min(max(LOOK_BACK_S[0], settings.upscale_delay_s), LOOK_BACK_S[1]),
        )
        number = {"autoscaling_config": scaling}
    deployment: serve.Deployment = serve.deployment(
        name=WORKER,
        max_ongoing_requests=settings.max_requests,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        graceful_shutdown_timeout_s=settings.drain_timeout_s + 10,
        max_surge_percent=settings.surge_percent,
        **number,
        **SHARED,
    )(ServedWorker)
    return deployment


def start(settings: ClusterSettings, proxy_location: str) -> None:
    """Deploys to the cluster that Ray is connected to, or upgrades what is deployed.

    Args:
        settings: All of them.
        proxy_location: Where Serve listens: HeadOnly or EveryNode.

    Raises:
        RuntimeError: The application does not start.
    """
    serve.start(
        proxy_location=proxy_location,
        http_options={"host": settings.host, "port": settings.port},
        logging_config=QUIET,
    )
    serve.run(build_app(settings.model_dump()), name=settings.app_name)


def end(settings: ClusterSettings) -> None:
    """Finishes what was accepted, as the single server does, then ends the application."""
    fronts = serve.get_deployment_handle(FRONT, settings.app_name)
    fronts.broadcast("finish_accepted").results(
        timeout_s=settings.drain_timeout_s + REPORT_TIMEOUT_S, return_exceptions=True
    )
    serve.delete(settings.app_name)
    serve.shutdown()  # type: ignore[no-untyped-call]


class ServedWorker(Worker):
    """A worker as Serve starts and ends it.

    Args:
        settings: Of the server, by name.
    """

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        super().__init__(await start_segmenter(settings))

    async def __del__(self) -> None:
        """Called when all calls are answered and no more come."""
        if hasattr(self, "_segmenter"):
            await self._segmenter.drain()


class Front:
    """A process that clients talk to, see `service.scale.cluster.front`.

    Args:
        settings: Of the server, by name.
        workers: The deployment of `ServedWorker`.
    """

    async def __init__(  # type: ignore[misc]
        self, settings: Mapping[str, Any], workers: DeploymentHandle[Any]
    ) -> None:
        self._settings = Settings(**settings)
        configure_logging(self._settings.log_level, self._settings.log_format)
        asked = ServeWorkers(workers)
        self._metrics = FrontMetrics(asked.collect)
        description = await asked.describe()  # comes when a worker is ready
        self._segmenter = ClusterSegmenter(self._settings, asked, description, self._metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve gives the requests to; gRPC, if it has a port, is served beside it.

        Serve's own gRPC would give a message to any front of the cluster, but without its deadline;
        it takes messages of up to 2 GiB, and has no TLS.
        """
        app = create_app(self._settings, segmenter=self._segmenter)
        bodies = app.state.bodies = RequestBodies(self._settings.max_bodies_bytes)
        self._metrics.follow(self._metrics.request_body_bytes, lambda: bodies.held)
        fronts = build_front_ends(self._settings, shares_port=True)
        if fronts:
            raise_file_limit(self._settings.max_connections)
        serve_beside(app, fronts, self._settings.drain_timeout_s)
        return app

    async def finish_accepted(self) -> None:
        """Refuses new work and waits for what was accepted; workers must be there until then."""
        await self._segmenter.finish_accepted()

    async def report(self) -> Report:
        """Its metrics."""
        return await report_front(self._metrics)


class ServeWorkers:
    """The workers of this application, see `messages.Workers`; for a front.

    Args:
        workers: The deployment of `ServedWorker`.
    """

    def __init__(self, workers: DeploymentHandle[Any]) -> None:
        self._workers = workers
        self._fronts = serve.get_deployment_handle(FRONT, serve.get_replica_context().app_name)

    async def segment(self, call: Call) -> Answer:
        """Cancels the call in the worker if the caller is cancelled.

        Raises:
            WorkerDied, WorkerLost: See `messages.Workers`.
        """
        response = self._workers.segment.remote(call)
        try:
            answer: Answer = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        except DIED as error:
            raise WorkerDied(type(error).__name__) from error
        except LOST as error:
            raise WorkerLost(type(error).__name__) from error
        return answer

    async def describe(self) -> Description:
        """Models of one worker.

        Raises:
            WorkerLost: The worker died, or cannot be reached.
        """
        try:
            description: Description = await self._workers.describe.remote()
        except LOST as error:
            raise WorkerLost(type(error).__name__) from error
        return description

    async def collect(self) -> list[Report]:
        """Metrics of all processes; one that does not answer in time is left out."""
        answers = await asyncio.gather(
            *(
                handle.broadcast("report").results_async(
                    timeout_s=REPORT_TIMEOUT_S, return_exceptions=True
                )
                for handle in (self._fronts, self._workers)
            )
        )
        return [report for of_one in answers for report in of_one if isinstance(report, tuple)]
