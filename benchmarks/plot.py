"""Pictures of measurements. matplotlib is no dependency of the project."""

from __future__ import annotations

import importlib
from typing import Any

NO_PLOT = "no plot: matplotlib is not installed (pip install matplotlib)"
_DECADE = 10


def load_pyplot() -> Any | None:
    """matplotlib's pyplot that draws to files, or None if it is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return None
    # Text stays text: a fraction of the size, and it can be searched.
    pyplot.rcParams["svg.fonttype"] = "none"
    return pyplot


def use_logarithms(axes: Any) -> None:
    """Both axes, with plain numbers; the vertical one shows a decade at least.

    What hardly changes then looks as if it hardly changed.
    """
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_ylim()
    if high / low < _DECADE:
        middle, half = (low * high) ** 0.5, _DECADE**0.5
        axes.set_ylim(middle / half, middle * half)
    ticker: Any = importlib.import_module("matplotlib.ticker")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=9))
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(ticker.NullLocator())
