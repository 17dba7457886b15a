"""solo-serve, also `python -m service`: reads settings, loads the models, serves until SIGTERM."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from service.backends.build import check_device
from service.errors import StartupError
from service.logs import configure_logging
from service.registry import load_repository
from service.servers import build_server
from service.settings import Settings

logger = logging.getLogger("service")

PREFIX = "SOLO_"


def build_parser() -> argparse.ArgumentParser:
    """One flag for each setting."""
    parser = argparse.ArgumentParser(
        prog="solo-serve",
        description="Serves the models of a repository over HTTP.",
        epilog="A flag goes before its SOLO_* variable, and that before the default.",
    )
    for name, setting in Settings.model_fields.items():
        unnamed = setting.default_factory is not None or setting.default is None
        shown = "" if unnamed else f", default {setting.default}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar=name.rpartition("_")[2].upper(),
            help=f"{setting.description} ({PREFIX}{name.upper()}{shown})".replace("%", "%%"),
        )
    return parser


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from flags, variables and defaults.

    Raises:
        StartupError: Names each wrong setting and its value.
    """
    flags = vars(build_parser().parse_args(arguments))
    try:
        return Settings(**flags)
    except ValidationError as error:
        parts = []
        for item in error.errors():
            if not item["loc"]:
                parts.append(item["msg"].removeprefix("Value error, "))
                continue
            name = str(item["loc"][0])
            source = f"--{name.replace('_', '-')}" if name in flags else PREFIX + name.upper()
            parts.append(f"{source}: {item['msg']}, not {item['input']!r}")
        raise StartupError("; ".join(parts)) from error


def find_unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A warning for each SOLO_* variable that is no setting: most are typing errors."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    warnings = []
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            warnings.append(f"{name} is no setting and is ignored{hint}")
    return warnings


def serve(settings: Settings) -> None:
    """Loads the models and serves them until a signal.

    Raises:
        StartupError: The device or a port is not there, or no model can be served.
    """
    options = settings.backend_options()
    check_device(options)
    server = build_server(settings, load_repository(settings.model_repo, options))
    server.run()
    if not server.started:
        raise StartupError(f"cannot serve on {settings.host}:{settings.port}; see above")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the server; exits 0 after a drain, 1 with the reason if it cannot start."""
    try:
        settings = read_settings(arguments)
        configure_logging(settings.log_level, settings.log_format)
        for warning in find_unknown_variables(os.environ):
            logger.warning(warning)
        serve(settings)
    except StartupError as error:
        sys.exit(f"solo-serve: error: {error}")


if __name__ == "__main__":
    main()
