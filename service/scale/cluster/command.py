"""`solo-serve ray`: starts Ray on this machine, or deploys to a cluster that runs."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from service.errors import StartupError
from service.flags import build_parser, find_unknown_variables, read_settings
from service.http.signals import EXIT_SIGNALS, handle_signals
from service.models.repository import find_models
from service.observe.logs import configure_logging
from service.scale.cluster.settings import ClusterSettings

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Serves the models of a repository on a Ray cluster: alone on this machine until a signal; "
    "with --ray-address it deploys, or upgrades what is deployed, and returns."
)
OBJECT_STORE_BYTES = 512 * 1024 * 1024
"""Of a cluster on this machine: images and answers pass through it, but do not stay."""


def run(settings: ClusterSettings) -> None:
    """Deploys; on this machine alone it then serves until a signal.

    Raises:
        StartupError: Ray is not installed or not there, or the application does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its makers of a cluster
    try:
        import ray

        from service.scale.cluster import app as application
    except ImportError as error:
        raise StartupError(f"requires the extra 'ray' of solo-serve: {error}") from error
    is_local = settings.ray_address is None
    ray_options: dict[str, Any] = {"logging_level": logging.WARNING}
    if is_local:
        # A wrong path is said before Ray starts.
        find_models(settings.model_repo, may_be_empty=settings.models_may_change)
        ray_options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=settings.ray_address or "local", **ray_options)
    except Exception as error:  # Ray's own are of no common kind
        raise StartupError(f"Ray: {error}") from error
    try:
        application.start(settings, proxy_location="HeadOnly" if is_local else "EveryNode")
        logger.info("solo-serve running on http://%s:%d (Ray)", settings.host, settings.port)
        if settings.grpc_port is not None:
            logger.info("gRPC on port %d of every node with a front", settings.grpc_port)
        if is_local:
            _wait_for_signal()
            logger.info("draining")
            application.end(settings)
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise StartupError(str(error)) from error
    finally:
        ray.shutdown()


def _wait_for_signal() -> None:
    stop = threading.Event()

    def handle(number: int) -> None:
        if number in EXIT_SIGNALS:
            stop.set()
        else:
            logger.info("workers check the model repository by themselves, with --model-poll-s")

    with handle_signals(handle):
        stop.wait()


def main(arguments: Sequence[str]) -> None:
    """Runs the subcommand; exits 0 after a drain, 1 with the reason if it cannot start."""
    try:
        parser = build_parser(ClusterSettings, "solo-serve ray", DESCRIPTION)
        settings = read_settings(ClusterSettings, parser, arguments)
        configure_logging(settings.log_level, settings.log_format)
        for warning in find_unknown_variables(os.environ, ClusterSettings):
            logger.warning(warning)
        run(settings)
    except StartupError as error:
        sys.exit(f"solo-serve ray: error: {error}")
