"""Version of the installed distribution."""

from __future__ import annotations

from importlib import metadata


def read_version() -> str:
    """The version; "0" in a source tree that is not installed."""
    try:
        return metadata.version("solo-serve")
    except metadata.PackageNotFoundError:
        return "0"
