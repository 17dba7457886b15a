"""Pictures of measurements. matplotlib is no dependency of the project."""

from __future__ import annotations

import importlib
from typing import Any

NO_PLOT = "no plot: matplotlib is not installed (pip install matplotlib)"


def load_pyplot() -> Any | None:
    """matplotlib's pyplot that draws to files, or None if it is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return None
    pyplot.rcParams["svg.hashsalt"] = "the same picture of the same numbers"
    return pyplot
