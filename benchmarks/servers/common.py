"""What every server of the comparison is told by variables: model, address, cores."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.ours import MAX_BATCH, SharedEngine

__all__ = ["HOST", "JSON", "MAX_BATCH", "SharedEngine", "load_engine", "read_cores", "read_port"]

MODEL, PORT, CORES = "SERVING_MODEL", "SERVING_PORT", "SERVING_CORES"
HOST = "127.0.0.1"
JSON = "application/json"


def read_port() -> int:
    """Where to listen."""
    return int(os.environ[PORT])


def read_cores() -> int:
    """Cores that the server may use, all its processes and threads together."""
    return int(os.environ[CORES])


def load_engine() -> SharedEngine:
    """The model with an engine of one thread."""
    return SharedEngine(Path(os.environ[MODEL]))
