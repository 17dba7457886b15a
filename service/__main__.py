"""solo-serve, also `python -m service`: reads settings, loads the models, serves until SIGTERM.

`solo-serve ray` does so on a Ray cluster, see `service.scale.cluster`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from service.engines.choose import check_device
from service.errors import StartupError
from service.flags import SERVES, build_parser, find_unknown_variables, read_settings
from service.http.servers import build_server
from service.models.repository import load_repository
from service.observe.logs import configure_logging
from service.scale.cluster import command as cluster
from service.scale.workers.parent import run_workers
from service.settings import Settings

logger = logging.getLogger("service")


def serve(settings: Settings) -> None:
    """Loads the models and serves them until a signal.

    Raises:
        StartupError: The device or a port is not there, or no model can be served.
    """
    options = settings.backend_options()
    check_device(options)
    if settings.workers > 1:
        run_workers(settings)
        return
    may_be_empty = settings.models_may_change
    repository = load_repository(settings.model_repo, options, may_be_empty=may_be_empty)
    server = build_server(settings, repository)
    server.run()
    if not server.started:
        raise StartupError(f"cannot serve on {settings.host}:{settings.port}; see above")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the server; exits 0 after a drain, 1 with the reason if it cannot start."""
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
        serve(settings)
    except StartupError as error:
        sys.exit(f"solo-serve: error: {error}")


if __name__ == "__main__":
    main()
