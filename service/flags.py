"""Command-line flags of the settings; a flag takes precedence over its SOLO_* variable."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError

from service.errors import StartupError
from service.settings import Settings
from service.version import read_version

S = TypeVar("S", bound=Settings)

PREFIX = "SOLO_"
SERVES = "Serves the models of a repository over HTTP."


def build_parser(
    kind: type[Settings] = Settings, prog: str = "solo-serve", description: str = SERVES
) -> argparse.ArgumentParser:
    """Builds a parser with one flag per setting.

    Args:
        kind: Settings class.
        prog: Command name in the help.
        description: Description in the help.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="A flag takes precedence over its SOLO_* variable, and that over the default.",
    )
    parser.add_argument("--version", action="version", version=f"solo-serve {read_version()}")
    for name, setting in kind.model_fields.items():
        computed = setting.default_factory is not None or setting.default is None
        default = "" if computed or setting.default == "" else f", default {setting.default}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar=name.rpartition("_")[2].upper(),
            help=f"{setting.description} ({PREFIX}{name.upper()}{default})".replace("%", "%%"),
        )
    return parser


def read_settings(kind: type[S], parser: argparse.ArgumentParser, arguments: Sequence[str]) -> S:
    """Reads the settings from flags, environment variables and defaults.

    Args:
        kind: Settings class.
        parser: From `build_parser`.
        arguments: Command-line arguments, without the command.

    Raises:
        StartupError: Names the flag or variable of each invalid setting, and its value.
    """
    flags = vars(parser.parse_args(arguments))
    try:
        return kind(**flags)
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


def find_unknown_variables(
    environment: Mapping[str, str], kind: type[Settings] = Settings
) -> list[str]:
    """One warning per SOLO_* variable that is no setting, with the closest setting's name."""
    known = [PREFIX + name.upper() for name in kind.model_fields]
    warnings = []
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            warnings.append(f"{name} is not a setting and is ignored{hint}")
    return warnings
