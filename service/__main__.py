"""solo-serve, also `python -m service`: reads settings, loads the models, serves until SIGTERM.

`solo-serve ray` does so on a Ray cluster, see `service.scale.cluster`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from service.engines.choose import check_device
from service.engines.visible import resolve_devices, show_devices
from service.errors import StartupError
from service.flags import SERVES, build_parser, find_unknown_variables, read_settings
from service.grpc.front import build_front_ends
from service.http.servers import build_server, freeze_imports
from service.http.signals import EXIT_FAILED, end_process, hold_reloads
from service.memory import find_memory_limit, fit_memory
from service.models.repository import load_repository
from service.observe.logs import configure_logging
from service.observe.standard_error import open_standard_files
from service.scale.cluster import command as cluster
from service.scale.workers.parent import run_workers
from service.settings import Settings

logger = logging.getLogger("service")


def serve(settings: Settings) -> int:
    """Loads the models and serves them until a signal.

    Returns:
        The exit status.

    Raises:
        StartupError: The device or a port is not there, no model can be served, or the memory limit
            is too low.
    """
    settings = fit_memory(settings, find_memory_limit())
    if settings.device_names and settings.device != "cpu":
        settings = settings.with_devices(resolve_devices(settings.device_names))
        if settings.workers == 1:
            show_devices(settings.device_names)
    options = settings.backend_options()
    check_device(options if settings.workers == 1 else replace(options, gpus=(0,)))
    if settings.workers > 1:
        return run_workers(settings)
    freeze_imports()
    may_be_empty = settings.models_may_change
    repository = load_repository(settings.model_repo, options, may_be_empty=may_be_empty)
    server = build_server(settings, repository, fronts=build_front_ends(settings))
    server.run()
    if server.failure is None:
        return 0
    print(f"solo-serve: error: {server.failure}", file=sys.stderr)
    return EXIT_FAILED


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the server; exits 0 after a drain, 1 with the reason if it cannot start."""
    open_standard_files()
    hold_reloads()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["ray"]:
        cluster.main(arguments[1:])
        return
    try:
        parser = build_parser(description=f"{SERVES} On a Ray cluster: solo-serve ray --help.")
        settings = read_settings(Settings, parser, arguments)
        configure_logging(settings.log_level, settings.log_format)
        for warning in find_unknown_variables(os.environ):
            logger.warning(warning)
        status = serve(settings)
    except StartupError as error:
        sys.exit(f"solo-serve: error: {error}")
    end_process(status)


if __name__ == "__main__":
    main()
