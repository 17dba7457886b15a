"""Cost curves as benchmarks/scaling.py measured them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.plot import NO_PLOT, load_pyplot, use_logarithms
from benchmarks.scaling_curve import Curve

COLUMNS = 4


def plot_curves(curves: Sequence[Curve], file: Path) -> str | None:
    """Draws a panel for each curve; a ring marks where a cost bends.

    Returns:
        Why there is no picture, None if there is one.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return NO_PLOT
    height = -(-len(curves) // COLUMNS)
    figure, grid = pyplot.subplots(
        height, COLUMNS, figsize=(13, 3 * height), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for axes, curve in zip(grid.flat, curves, strict=False):
        bends = curve.find_bends()
        for cost in curve.rounds:
            medians = curve.medians(cost)
            (line,) = axes.plot(curve.places, medians, marker="o", markersize=3, label=cost)
            if cost in bends:
                index = curve.places.index(bends[cost].at)
                axes.plot(
                    *(curve.places[index], medians[index]),
                    marker="o",
                    markersize=10,
                    fillstyle="none",
                    color=line.get_color(),
                )
        use_logarithms(axes)
        axes.set_xlabel(curve.unit, fontsize="small")
        axes.set_title(curve.name, fontsize="small")
        axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
    return None
