"""Plots of measurements, drawn with matplotlib, which the project does not depend on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError

_DECADE = 10
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of a plot's panels.

    Attributes:
        title: Above it.
        x, y: Labels of the axes.
        lines: Points by label.
        rings: Points of a line, by its label, that are marked with a ring.
        crosses: Points by label, not joined by a line.
        levels: Horizontal dotted lines by label.
        bars: Horizontal bars by label: first quartile, median, third quartile.
        log: Axes that are logarithmic: "", "x" or "xy".
    """

    title: str
    x: str = ""
    y: str = ""
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    rings: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    crosses: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    bars: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    log: str = ""


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise BenchmarkError("--plot needs matplotlib: pip install matplotlib") from error
    pyplot.rcParams["svg.fonttype"] = "none"  # text stays text: smaller, and can be searched
    return pyplot


def draw(panels: Sequence[Panel], file: Path) -> None:
    """Draws the panels, at most four in a row."""
    pyplot = load_pyplot()
    width = min(4, len(panels))
    height = -(-len(panels) // width)
    figure, grid = pyplot.subplots(
        height, width, figsize=(4.5 * width, 3.2 * height), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _draw_panel(axes: Any, panel: Panel) -> None:
    colours = {}
    for label, points in panel.lines.items():
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        colours[label] = line.get_color()
    for label, points in panel.rings.items():
        how = {"color": colours[label], "fillstyle": "none", "linestyle": ""}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=10, **how)
    for label, points in panel.crosses.items():
        axes.plot(*zip(*points, strict=True), "x", label=label)
    for label, level in panel.levels.items():
        axes.axhline(level, color="grey", linestyle=":", label=label)
    for label, (low, middle, high) in panel.bars.items():
        axes.barh(label, middle, xerr=[[middle - low], [high - middle]], color="#4878a8")
    if panel.log == "xy":
        _use_logarithms(axes)
    elif panel.log == "x":
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
    elif not panel.bars:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize="small")
    axes.set(xlabel=panel.x, ylabel=panel.y)
    if not panel.bars:
        axes.legend(fontsize="x-small")


def _use_logarithms(axes: Any) -> None:
    """Both axes with plain numbers; the vertical one spans at least a decade, so that a small
    change looks small."""
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
